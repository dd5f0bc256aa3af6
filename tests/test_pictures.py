"""docs/pictures are what scripts/draw_cuts.py draws from the strategies' plans, and small enough to load at once."""

import importlib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from hf_transfer.strategy import strategy_names

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
MOST_BYTES = 20_000
COMMAND = "run scripts/draw_cuts.py to update docs/pictures"


@pytest.fixture(scope="module")
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("draw_cuts")


def test_pictures_are_what_the_script_draws(script: Any) -> None:
    drawn = script.draw_all()
    assert {f"{name}.svg" for name in strategy_names()} <= set(drawn)
    assert {file.name: file.read_text() for file in PICTURES.glob("*.svg")} == drawn, COMMAND
    for name, svg in drawn.items():
        assert len(svg.encode()) < MOST_BYTES, name
        assert ET.fromstring(svg).get("aria-label"), name


def test_a_row_shows_the_cut_and_the_share_that_trains(script: Any) -> None:
    probe, partial = script.list_phases("last_layers")
    assert partial.num_stored == len(partial.names) - 3
    assert partial.trained_shares[partial.num_stored :] == [1.0, 1.0, 1.0]
    assert probe.num_stored == len(probe.names) - 1
    (norms,) = script.list_phases("full", trains="norms")
    assert norms.num_stored == 0
    assert all(0 < share < 0.2 for share in norms.trained_shares[:-1])
