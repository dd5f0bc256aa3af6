"""Finds the Python code that comes with a checkpoint, and runs the code only if the user trusts the checkpoint.

config.json names the code in `auto_map`: for each auto class of transformers, `file.Class` or `owner/name--file.Class`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_transfer.network.source import Source, list_code


@dataclass(frozen=True, kw_only=True)
class RemoteCode:
    """The place of a class that is not in transformers."""

    reference: str  # file.Class
    origin: str  # the folder or Hub repository of the file


def check_trust(source: Source, *, trust_remote_code: bool) -> None:
    """Raises ValueError if the checkpoint loads only with its own Python code, and `trust_remote_code` is False."""
    config = source.read_config()
    if trust_remote_code or not config.get("auto_map") or config.get("model_type") in CONFIG_MAPPING:
        return
    files = ", ".join(list_code(source.folder))
    raise ValueError(
        f"{source.name} loads only with its own Python code ({files}), which can do anything that you can do on this machine; "
        "read the code, then give --trust_remote_code to run it"
    )


def find_remote_class(source: Source, config: PreTrainedConfig) -> tuple[type[PreTrainedModel], RemoteCode]:
    """Returns the checkpoint's own class that AutoModel would load, and the place of the class's code.

    Raises ValueError if the checkpoint's code has no such class, or if the code fails.
    """
    auto_map: dict[str, str] = config.auto_map
    if "AutoModel" not in auto_map:
        raise ValueError(
            f"{source.name}: its Python code has classes for {', '.join(sorted(auto_map))} only; choose a checkpoint whose "
            "code has a class for AutoModel or AutoModelForImageClassification"
        )
    repo, _, reference = auto_map["AutoModel"].rpartition("--")
    code = RemoteCode(reference=reference, origin=repo or str(source.folder))
    with explained_code(source):
        kind: Any = get_class_from_dynamic_module(reference, code.origin)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.config_class is not None):
        raise ValueError(
            f"{source.name}: its class {reference} is no PreTrainedModel with a config_class; choose another checkpoint"
        )
    return kind, code


@contextmanager
def explained_code(source: Source) -> Iterator[None]:
    """Replaces errors of the checkpoint's own code in the `with` block by a ValueError of one line."""
    try:
        yield
    except ImportError as error:  # transformers names the packages that the code needs
        raise ValueError(
            f"{source.name}: its Python code cannot be imported: {' '.join(str(error).split())}"
        ) from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, SyntaxError, TypeError) as error:
        raise ValueError(
            f"{source.name}: its Python code fails ({type(error).__name__}: {' '.join(str(error).split())}); the code may need "
            "another version of transformers"
        ) from error
