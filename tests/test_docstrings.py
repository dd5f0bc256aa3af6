"""Every `>>>` example in the package runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import hf_transfer


def modules_with_examples() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(hf_transfer.__path__, "hf_transfer.")]
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    return [m.__name__ for m in modules if any(test.examples for test in finder.find(m))]


EXAMPLES = modules_with_examples()


def test_the_public_api_has_examples() -> None:
    assert {"hf_transfer.run", "hf_transfer.task", "hf_transfer.training.phase"} <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
