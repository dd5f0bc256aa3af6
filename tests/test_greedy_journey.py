"""The journey, offline: greedy pretraining on five digits, a Hub folder, fine-tuning on five others; compared with scratch."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from PIL import Image

from tests.test_recipes import ROOT, TIMEOUT_S

UPSTREAM = range(5)  # the digits; downstream has the other five


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The upstream run's folder, and the benchmark's line for it and for each seed downstream."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("journey")
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        side, split = "upstream" if label in UPSTREAM else "downstream", "test" if i % 3 == 0 else "train"
        part = root / side / split / str(label)
        part.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).save(part / f"{i}.png")
    shown = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "journey.py"), "--upstream", str(root / "upstream"),
            "--upstream_images", "0", "--downstream", str(root / "downstream"), "--images_per_class", "5", "--side_px", "16",
            "--layers", "3", "--width", "16", "--stage_epochs", "3", "--upstream_epochs", "4", "--epochs", "8",
            "--lr", "1e-3", "--hflip", "0", "--seeds", "3", "--output_dir", str(root / "run"),
        ],
        capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr[-3000:]
    return root / "run", [json.loads(line) for line in shown.stdout.splitlines() if line.startswith("{")]


def test_growing_upstream_saves_labels_downstream(journey: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (_, *rows) = journey
    assert [row["seed"] for row in rows] == [0, 1, 2]
    transferred, from_scratch = (mean(row[key] for row in rows) for key in ("transferred", "from_scratch"))
    # 25 images of five digits that are new to it, equal epochs: fewer than half the errors.
    assert transferred > 0.8
    assert 1 - transferred < 0.5 * (1 - from_scratch)


def test_the_network_from_scratch_needs_longer(journey: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (_, *rows) = journey
    for row in rows:
        assert row["epochs_to_scratch_best"] is not None
        assert row["epochs_to_scratch_best"] < row["scratch_epochs"]


def test_upstream_grew_layer_by_layer_and_was_fine_tuned(journey: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (upstream, *_) = journey
    assert [stage["depth"] for stage in upstream["stages"]] == [1, 2, 3]
    assert upstream["upstream"] > 0.9
    results = json.loads((folder / "results.json").read_text())
    assert results["details"]["fine_tuned"]
    assert (folder / "model" / "modeling_greedy.py").is_file()
