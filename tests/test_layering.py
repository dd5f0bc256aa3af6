"""Imports point one way along the data flow, never in a circle, and the light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hf_transfer"
# A room may import from itself and from the rooms before it.
ROOMS = (
    "config", "locations", "network", "data", "training", "choosing", "inference", "reporting", "hub", "reporting.run", "cli",
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
    """None for the package itself, whose public names may come from anywhere (lazily).

    `reporting.run` pushes with `hub`, so it comes after it; the rest of `reporting` renders results, for `hub` too.
    """
    inner = name.partition(".")[2]
    return inner if inner in ROOMS else inner.split(".")[0] or None


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


LIGHT = [n for n in ("hf_transfer", "hf_transfer.config", "hf_transfer.locations", "hf_transfer.cli") if n in MODULES]


def test_light_modules_import_nothing_heavy() -> None:
    loads = "; ".join(f"import {name}" for name in LIGHT)
    loaded = run(f"{loads}; import sys; print(*{{m.split('.')[0] for m in sys.modules}})").split()
    assert set(loaded).isdisjoint(HEAVY)
