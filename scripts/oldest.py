"""Prints pip constraints that pin each dependency of pyproject.toml to its lower bound (`make test-oldest`).

python scripts/oldest.py > constraints.txt
pip install --constraint constraints.txt --editable '.[dev]'
"""

import re
import tomllib
from pathlib import Path


def pin_lower_bounds(requirements: list[str]) -> list[str]:
    """Returns `name==version` for each `name>=version`. Raises ValueError for a requirement without a lower bound."""
    pinned = []
    for requirement in requirements:
        match = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,.*)?", requirement)
        if match is None:
            raise ValueError(f"pyproject.toml: {requirement!r} has no lower bound; write `name>=version`")
        pinned.append(f"{match[1]}=={match[2]}")
    return pinned


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    print("\n".join(pin_lower_bounds(project["dependencies"])))
