"""Imports point one way along the data flow, never in a circle, and the light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

from hf_transfer.cli import COMMANDS
from hf_transfer.strategy import strategy_names

PACKAGE = Path(__file__).resolve().parents[1] / "hf_transfer"
# A room may import from itself and from the rooms before it.
ROOMS = (
    "settings", "config", "public_names", "locations", "interrupts", "errors", "displays", "logs", "sealed", "processes",
    "startup", "capability", "threads", "choices", "costs", "metrics", "confidence", "targets", "solvers", "network", "data",
    "prefix", "session", "training", "strategy", "flags", "choosing", "strategies", "exporting", "inference", "reporting",
    "hub", "out_of_memory", "output", "auditing", "embeddings", "accelerator", "runs", "adding", "repeats", "launch", "run",
    "task", "doctor", "commands", "cli", "__main__",
)  # fmt: skip
HEAVY = (
    "accelerate",
    "datasets",
    "evaluate",
    "numpy",
    "peft",
    "sklearn",
    "timm",
    "torch",
    "torchvision",
    "transformers",
    "yaml",
)


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str) -> set[str]:
    """Modules of the package that `name` imports, wherever in its code; TYPE_CHECKING blocks included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports within the package are absolute"
            assert node.module is not None
            # `from package.room import noun` may name a module or something in one.
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= modules or {node.module}
    return {n for n in found if n == "hf_transfer" or n.startswith("hf_transfer.")}


def room(name: str) -> str | None:
    """None for the package itself, which imports its public names from anywhere, lazily."""
    return name.partition(".")[2].split(".")[0] or None


def test_every_module_has_a_room() -> None:
    assert {room(name) for name in MODULES} - {None} <= set(ROOMS)


@pytest.mark.parametrize("name", [n for n in MODULES if room(n) is not None])
def test_imports_point_one_way(name: str) -> None:
    own = room(name)
    assert own is not None
    for other in imported(name):
        assert other in MODULES, f"{name} imports {other}, which is no module"
        target = room(other)
        assert target is not None, f"{name} imports the package's public face"
        assert ROOMS.index(target) <= ROOMS.index(own), f"{name} imports {other}, against the data flow"


def test_no_import_goes_in_a_circle() -> None:
    graph = nx.DiGraph([(name, other) for name in MODULES for other in imported(name)])
    circles = list(nx.simple_cycles(graph))
    assert not circles, circles


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def show_help(*words: str) -> str:
    """Code that prints a help text: of the command followed by `words`, or of the recipe that the one word is the path of."""
    is_recipe = words[0].endswith(".py")
    call = f"runpy.run_path({words[0]!r}, run_name='__main__')" if is_recipe else "cli.main()"
    arguments = ["x", *([] if is_recipe else words), "--help"]
    start = f"import runpy, sys; sys.argv = {arguments}{'' if is_recipe else '; from hf_transfer import cli'}"
    return f"{start}\ntry: {call}\nexcept SystemExit: pass"


LIGHT = {
    "import hf_transfer": "import hf_transfer",
    **{f"hf-transfer {name}": show_help(name) for name in COMMANDS},
    **{f"hf-transfer train {name}": show_help("train", name) for name in strategy_names()},
    **{f"recipes/{name}.py": show_help(str(PACKAGE.parent / "recipes" / f"{name}.py")) for name in strategy_names()},
    "hf-transfer": show_help("--help"),
}


@pytest.mark.parametrize("name", LIGHT)
def test_import_and_help_are_light(name: str) -> None:
    """Nothing heavy is imported, and the processor's time, which other programs do not lengthen, is under half a second."""
    after = "\nimport sys, time; print('LOADED', time.process_time(), *{m.split('.')[0] for m in sys.modules})"
    output = run(LIGHT[name] + after)
    assert ("usage: " in output) == ("import" not in name)
    _, seconds, *loaded = output.splitlines()[-1].split()
    assert set(loaded).isdisjoint(HEAVY)
    assert float(seconds) < 0.5
