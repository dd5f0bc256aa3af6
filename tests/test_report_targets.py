"""Reports of runs whose images have any number of labels, or numbers: what they show, and that it is what was predicted."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import drive, needs_chromium
from test_report import check_that_nothing_is_loaded
from test_report_images import read_galleries, read_images, read_page
from test_targets_of_runs import write_shapes

import hf_transfer as ht
from hf_transfer.reporting.formats import format_number
from hf_transfer.reporting.remake import compare_folders
from hf_transfer.reporting.saved_runs import read_activated, read_saved_run
from hf_transfer.reporting.selection import Predicted, choose_images
from hf_transfer.run import Run
from hf_transfer.targets.multi_label import MultiLabel

COLUMNS: dict[str, dict[str, Any]] = {
    "labels": {"problem_type": "multi_label_classification", "label_column": "shapes"},
    "numbers": {"problem_type": "regression", "label_columns": ["brightness", "angle"]},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("shapes")
    table = write_shapes(folder)
    return {
        kind: ht.Task(str(table), image_column="image", split_column="split", **columns).fit(
            ht.linear_probe(), output_dir=folder / kind
        )
        for kind, columns in COLUMNS.items()
    }


def page_of(run: Run) -> str:
    assert run.folder is not None
    return read_page(run.folder)


def read_test(run: Run) -> tuple[list[str], Any, Any]:
    """The names, the labels and what was predicted (probabilities or numbers) of the test images."""
    assert run.folder is not None
    saved = read_saved_run(run.folder)
    assert saved.data is not None
    assert saved.data.test is not None
    test = saved.data.test
    return (
        [test.image_name(i) for i in range(len(test))],
        test.labels,
        read_activated(saved, run.backbone.target)["test"],
    )


@pytest.mark.parametrize("kind", ["labels", "numbers"])
def test_a_target_shows_what_fits(runs: dict[str, Run], kind: str) -> None:
    html = page_of(runs[kind])
    check_that_nothing_is_loaded(html)
    galleries, images = read_galleries(html), read_images(html)
    title = "Most confident mistakes" if kind == "labels" else "Largest errors"
    assert title in galleries
    assert "Suspicious labels" not in galleries
    assert "Map of the images" in html
    assert ("Can the probabilities be trusted?" in html) is (kind == "labels")
    assert ("Predicted numbers" in html) is (kind == "numbers")
    names, labels, _ = read_test(runs[kind])
    first = images[galleries[title][0]]
    assert first["split"] == "test"
    described = runs[kind].backbone.target.describe_label(labels[names.index(first["name"])]) or "none"
    assert first["truth"] == described


def test_mistakes_are_judged_by_the_thresholds() -> None:
    """A probability of 0.3 is a decision for the first label, and 0.7 is none for the second."""
    target = MultiLabel(names=("first", "second"), thresholds=(0.1, 0.9))
    probabilities = np.array([[0.3, 0.7], [0.3, 0.7], [0.05, 0.95], [0.05, 0.95]])
    places: Any = [(None, i) for i in range(4)]
    predicted = Predicted(
        places=places,
        logits=np.log(probabilities / (1 - probabilities)).astype(np.float32),
        labels=np.array([[1, 0], [0, 1], [0, 1], [np.nan, 1]], np.float32),
        is_scored=np.ones(4, bool),
    )
    choice = choose_images(predicted, target)
    assert choice.is_right is not None
    assert choice.is_right.tolist() == [True, False, True, True]
    assert choice.groups[0].title == "Most confident mistakes"
    assert choice.groups[0].rows.tolist() == [1]


def test_mistakes_on_the_page_differ_from_the_truth(runs: dict[str, Run]) -> None:
    images = read_images(page_of(runs["labels"]))
    assert len(images) == 16
    for image in images:
        assert image["right"] is (image["truth"] == image["predicted"]), image


def test_the_table_of_labels_counts_missed_and_extra_images(runs: dict[str, Run]) -> None:
    html = page_of(runs["labels"])
    _, labels, probabilities = read_test(runs["labels"])
    decided = probabilities > np.array(runs["labels"].results["target"]["thresholds"])
    expected = {}
    for k in range(labels.shape[1]):
        expected[f"missed {k}"] = int(((labels[:, k] == 1) & ~decided[:, k]).sum())
        expected[f"extra {k}"] = int(((labels[:, k] == 0) & decided[:, k]).sum())
    buttons = dict(re.findall(r'data-cell="((?:missed|extra) \d)" data-count="(\d+)"', html))
    assert {key: int(count) for key, count in buttons.items()} == {k: n for k, n in expected.items() if n}
    assert buttons, "a probe on 38 images makes mistakes"
    shown = Counter(key for image in read_images(html) for key in image["keys"] if image["split"] == "test")
    assert shown == {key: count for key, count in expected.items() if count}


def test_points_are_the_predictions(runs: dict[str, Run]) -> None:
    html = page_of(runs["numbers"])
    names, labels, predicted = read_test(runs["numbers"])
    section = html[html.index('id="numbers"') :]
    section = section[: section.index("</section>")]
    charts = re.findall(r"<svg.*?</svg>", section, re.DOTALL)
    assert len(charts) == 4  # two of each number
    images = read_images(html)
    for number in range(2):
        for chart, x, y in (
            (charts[2 * number], labels[:, number], predicted[:, number]),
            (charts[2 * number + 1], predicted[:, number], predicted[:, number] - labels[:, number]),
        ):
            dots = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"[^>]*data-image="(\d+)"', chart)
            assert len(dots) == len(names)
            rows = [names.index(images[int(image)]["name"]) for *_, image in dots]
            for values, positions, sign in ((x, [float(d[0]) for d in dots], 1), (y, [float(d[1]) for d in dots], -1)):
                assert np.corrcoef(values[rows], positions)[0, 1] * sign > 0.9999
    half = format_number(float(np.quantile(abs(predicted[:, 0] - labels[:, 0]), 0.5)))
    assert f"Half of the errors are below {half}," in section


def test_a_number_is_said_once_and_rounded(runs: dict[str, Run]) -> None:
    """Two numbers are named; the caption of one number would only repeat the prediction (see `Illustrations`)."""
    names, _, predicted = read_test(runs["numbers"])
    images = [image for image in read_images(page_of(runs["numbers"])) if image["split"] == "test"]
    for image in images:
        row = predicted[names.index(image["name"])]
        assert image["predicted"] == ", ".join(f"{value:.4g}" for value in row)
        assert image["top"] == [["brightness", f"{row[0]:.4g}"], ["angle", f"{row[1]:.4g}"]]


def test_runs_with_numbers_are_compared(runs: dict[str, Run], tmp_path: Path) -> None:
    folder = runs["numbers"].folder
    assert folder is not None
    comparison, path = compare_folders([folder, folder], tmp_path / "both.html")
    assert comparison.runs[1].difference == 0
    assert not comparison.runs[1].is_different
    html = path.read_text(encoding="utf-8")
    check_that_nothing_is_loaded(html)
    assert html.count('class="point') == 2
    assert "The runs decide alike on all images." in html
    assert "within chance" in html


# --- in a browser -----------------------------------------------------------------------------------------------------

CHOOSE_POINTS = """
const charts = [...document.querySelectorAll("#numbers svg[tabindex]")];
charts[0].focus();
const shown = () => document.querySelector("#numbers .shown .file").textContent;
out.first = shown();
press(charts[0], "ArrowRight");
out.second = shown();
out.chosen = charts.slice(0, 2).map((chart) => chart.querySelectorAll(".point.chosen").length);
const worst = charts[1].querySelector(".point[data-image]");
worst.dispatchEvent(new PointerEvent("pointerenter"));
out.pointed = worst.classList.contains("chosen");
out.picture = document.querySelector("#numbers .shown img").src.slice(0, 22);
"""
OPEN_LABEL = """
const button = document.querySelector(".per-class button[data-cell]");
const panel = document.getElementById("cell");
button.click();
out.title = panel.querySelector("h3").textContent;
out.count = Number(button.dataset.count);
out.shown = panel.querySelectorAll("img").length;
press(document, "Escape");
out.closed = panel.hidden && document.activeElement === button;
"""


@needs_chromium
def test_numbers_in_a_browser(runs: dict[str, Run], tmp_path: Path) -> None:
    out = drive(page_of(runs["numbers"]), CHOOSE_POINTS, tmp_path)
    assert out["errors"] == []
    assert out["first"] != out["second"]
    assert out["chosen"] == [1, 1]
    assert out["pointed"]
    assert out["picture"] == "data:image/jpeg;base64"
    assert (out["unnamed"], out["wider"]) == (0, 0)


@needs_chromium
def test_labels_in_a_browser(runs: dict[str, Run], tmp_path: Path) -> None:
    out = drive(page_of(runs["labels"]), OPEN_LABEL, tmp_path)
    assert out["errors"] == []
    assert out["shown"] == out["count"] > 0
    assert re.match(r"\d+ images? (of \w+ missed|wrongly labeled \w+)", out["title"])
    assert out["closed"]
    assert (out["unnamed"], out["wider"]) == (0, 0)
