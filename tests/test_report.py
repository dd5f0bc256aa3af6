"""The report is one well-formed, self-contained page with every number of the results, which match their schema."""

import copy
import json
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from hf_transfer.config import RunConfig
from hf_transfer.metrics.bootstrap import Bootstrap
from hf_transfer.metrics.classification import read_outcomes, score
from hf_transfer.reporting.formats import format_bytes, format_number, format_percent, format_seconds
from hf_transfer.reporting.glossary import COSTS, WORDS
from hf_transfer.reporting.report import render_report, write_report
from hf_transfer.reporting.report_results import NO_TEST_SPLIT, NOTHING_SELECTED, explain_validation, find_interval
from hf_transfer.reporting.results import public_settings
from hf_transfer.runs import train_session
from hf_transfer.settings import replace_settings
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.training.records import to_json
from tests.sessions import make_session

_VOID = {"meta", "link", "br", "hr", "img", "input"}


class _Page(HTMLParser):
    """The elements of a page; raises if they are not nested properly."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[tuple[str, list[str]]] = []  # class of the table, cells
        self._table = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = dict(attrs).get("class") or ""
        if tag == "tr":
            self.rows.append((self._table, []))
        if tag in {"td", "th"}:
            self.rows[-1][1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "title", "script"}:
            self.text.append(data)
            if "tr" in self.open:
                self.rows[-1][1][-1] += data

    def table(self, name: str) -> list[list[str]]:
        return [cells for table, cells in self.rows if name in table.split()]


def _scores(names: list[str], num_samples: int, seed: int, absent: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(len(names) - absent, size=num_samples)
    logits = generator.normal(size=(num_samples, len(names)))
    logits[np.arange(num_samples), labels] += 2
    return score(read_outcomes(logits, labels), names, Bootstrap(resamples=50)).to_dict()


def _results(names: list[str], *, test: bool = True, curves: bool = True) -> dict[str, Any]:
    metrics = {"validation": _scores(names, 8 * len(names), seed=1)}
    if test:
        metrics["test"] = _scores(names, 10 * len(names), seed=0)
    results: dict[str, Any] = {
        "strategy": "linear_probe",
        "plan": ["probe"],
        "metrics": metrics,
        "label_names": names,
        "target": {**to_json(SingleLabel(names=tuple(names)).to_dict()), "metrics": to_json(SingleLabel.metrics)},
        "cost": {
            "seconds": {"features": 74.2, "solve": 3.5},
            "images_per_second": 241.3,
            "peak_memory_bytes": 912_000_000,
        },
        "versions": {"torch": "2.13.0"},
        "data": {
            "name": "someone/beans",
            "fingerprint": "9f3c1ab2",
            "num_images": {"train": 100, "validation": 20},
            "notes": ["Validation was split off <train>."],
        },
        "checkpoint": {"id": "timm/vit_tiny", "revision": "a5b9be0"},
        "config": {"seed": 0, "dataset": "someone/beans"},
    }
    if curves:
        grid = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
        results["curves"] = [
            {
                "title": "Regularization",
                "x_label": "C",
                "y_label": "log loss & more",
                "x_log": True,
                "series": [
                    {"name": "mean", "x": grid, "y": [2.0, 1.5, 1.0, 0.9, 1.1]},
                    {"name": "class <token>", "x": grid, "y": [2.0, None, 1.0, float("nan"), 1.2]},
                ],
            },
            {
                "title": "Loss",
                "x_label": "step",
                "y_label": "loss",
                "x_log": False,
                "series": [{"name": "train", "x": [0, 1000, 2000], "y": [1.0, 1.0, 1.0]}],
            },
        ]
    return results


def _names(num_classes: int) -> list[str]:
    return [f"class {index}" for index in range(num_classes)]


@pytest.mark.parametrize("curves", [True, False], ids=["curves", "no curves"])
@pytest.mark.parametrize("test", [True, False], ids=["test", "no test"])
@pytest.mark.parametrize("num_classes", [2, 30, 120])
def test_page_is_balanced_and_complete(num_classes: int, test: bool, curves: bool) -> None:
    names = _names(num_classes)
    results = _results(names, test=test, curves=curves)
    page = _Page(render_report(results))
    shown = results["metrics"]["test" if test else "validation"]

    per_class = page.table("per-class")[1:]
    assert sorted(row[0] for row in per_class) == sorted(names)
    recalls = [float(row[1]) for row in per_class]
    assert recalls == sorted(recalls)
    assert {row[0]: int(row[-1]) for row in per_class} == {row["label"]: row["support"] for row in shown["per_class"]}

    matrix = page.table("matrix")
    if num_classes <= 30:
        assert [[int(cell) for cell in row[1:]] for row in matrix[1:]] == shown["confusion_matrix"]
    else:
        assert matrix == []
        counts = [int(row[2]) for row in page.table("list") if row[1].startswith("class ")]
        assert len(counts) == 30
        assert counts == sorted(counts, reverse=True)
        off_diagonal = np.array(shown["confusion_matrix"]) * (1 - np.eye(num_classes, dtype=int))
        assert counts == sorted(off_diagonal.ravel().tolist(), reverse=True)[:30]
    assert ("svg" in dict(page.tags)) is curves

    text = " ".join(page.text)
    low, high = find_interval(shown, "accuracy") or (0.0, 0.0)
    assert f"{100 * low:.1f} to {100 * high:.1f}" in text
    assert "Validation was split off <train>." in text
    assert "timm/vit_tiny, revision a5b9be0" in text
    assert "1 min 14 s" in text
    assert ("Top-5" in text) is (num_classes > 5)


def test_a_page_without_a_test_split_warns() -> None:
    with_test, without = (render_report(_results(_names(3), test=test, curves=False)) for test in (True, False))
    assert NO_TEST_SPLIT in without
    assert "Result on validation" in without
    assert NO_TEST_SPLIT not in with_test
    assert "Result on test" in with_test


@pytest.mark.parametrize(
    ("strategy", "keeps_last", "is_fair"),
    [
        ("full", False, False),
        ("full", True, True),
        ("probe_then_full", True, False),
    ],  # folds chose C of the solved head
)
def test_a_card_without_a_test_split_says_whether_images_selected_the_model(
    strategy: str, keeps_last: bool, is_fair: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"epochs": 1, "images_per_class": 6, "test_split": "none", "keep_last_epoch": keeps_last}
    with caplog.at_level("INFO"):
        train_session(make_session(strategy, tmp_path, **settings))
    results = json.loads((tmp_path / "results.json").read_text())
    sentence = explain_validation(results, results["metrics"]["validation"])
    assert sentence == (NOTHING_SELECTED if is_fair else NO_TEST_SPLIT)
    assert ("optimistic, because these images also selected the model" in caplog.text) is not is_fair
    assert sentence in (tmp_path / "model" / "README.md").read_text()
    chosen = {**results, "details": {"auto": {"candidates": [{"runs": 1}]}}}
    assert explain_validation(chosen, chosen["metrics"]["validation"]) == NO_TEST_SPLIT, "the images chose the strategy"


def test_nothing_is_loaded_from_elsewhere() -> None:
    check_that_nothing_is_loaded(render_report(_results(_names(3))))


def check_that_nothing_is_loaded(html: str) -> None:
    page = _Page(html)
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not {"src", "href", "srcset", "action"} & {name for _, a in page.tags for name in a}
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    plain = re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]*", "", html)
    for reference in ("http:", "https:", "src=", "url(", "@import", "fetch(", "XMLHttpRequest"):
        assert reference not in plain


def test_names_and_notes_are_escaped() -> None:
    names = ["<script>alert(1)</script>", "\"quoted\" & 'more'", "a</td>"]
    results = _results(names)
    results["data"]["name"] = "<b>bold</b>"
    results["config"]["dataset"] = "</pre><script>"
    html = render_report(results)
    page = _Page(html)  # raises if a name closed an element
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2  # the page's own
    assert "b" not in tags
    assert {row[0] for row in page.table("per-class")[1:]} == set(names)
    assert "&lt;script&gt;alert(1)" in html


def test_absent_classes_come_last_with_dashes() -> None:
    names = _names(4)
    results = _results(names)
    results["metrics"]["test"] = _scores(names, 30, seed=0, absent=1)
    html = render_report(results)
    last = _Page(html).table("per-class")[-1]
    assert last == ["class 3", "–", "", "–", "–", "0"]
    assert "1 of 4 classes have no image in this split (class 3)" in html


def test_a_minimal_result_is_enough() -> None:
    scores = _scores(["a", "b"], 20, seed=0) | {"notes": []}
    page = _Page(render_report({"metrics": {"test": scores}}))
    assert {"Result on test", "Confusion matrix", "Classes"} <= set(page.text)
    assert not {"Cost", "Data", "Curves", "How it was run"} & set(page.text)


def test_the_glossary_says_what_an_interval_contains() -> None:
    """The value for all images, in 95 % of samples; the value of another sample of the same size only in about 83 %."""
    rng = np.random.default_rng(0)
    means, others = rng.normal(size=(2, 20_000))  # of samples of one size, in standard errors from the true mean
    assert np.mean(np.abs(means) < 1.96) == pytest.approx(0.95, abs=0.01)
    assert np.mean(np.abs(means - others) < 1.96) == pytest.approx(0.83, abs=0.01)
    assert "contains the value for all images" in WORDS["95 % interval"]


def test_cost_and_fingerprints_may_come_by_name() -> None:
    results = _results(_names(2))
    results["cost"]["seconds"]["total"] = 100.0
    results["cost"] |= {"images_per_second": {"train_features": 241.3, "test": 99.0}, "device": "CPU, 2 threads"}
    results["data"]["fingerprint"] = {"train": "aa11", "test": "bb22"}
    page = _Page(render_report(results))
    text = " ".join(" ".join(page.text).split())
    assert "241 images per second in train features, 99.0 images per second in test." in text
    assert "Fingerprint train aa11, test bb22" in text
    assert "On CPU, 2 threads." in text
    assert [row[0] for row in page.table("cost")] == ["Part", "features", "solve", "Whole run"]
    assert page.table("cost")[-1][1] == "1 min 40 s"


def test_the_cost_of_a_resumed_run_is_no_total() -> None:
    results = _results(_names(2))
    results["cost"]["is_resumed"] = True
    assert _Page(render_report(results)).table("cost")[-1][0] == "Since the last resume"


def test_a_perfect_classifier_of_many_classes_has_no_confused_pairs() -> None:
    names = _names(40)
    perfect = score(read_outcomes(10 * np.eye(40), np.arange(40)), names, Bootstrap(resamples=10)).to_dict()
    assert "No image was misclassified." in render_report({"metrics": {"test": perfect}})


def test_missing_points_are_gaps_and_logarithmic_ticks_are_powers() -> None:
    html = render_report(_results(_names(3)))
    paths = re.findall(r'<path class="stroke s\d d\d" d="(M[^"]*)"', html)
    curves = [path for path in paths if "H" not in path]
    assert [len(re.findall("M", path)) for path in curves] == [1, 3, 1]
    assert [len(re.findall("[ML]", path)) for path in curves] == [5, 3, 3]
    # equal steps on the logarithmic axis
    xs = [float(x) for x in re.findall(r"[ML]([\d.]+) ", curves[0])]
    assert np.diff(xs) == pytest.approx(np.diff(xs)[0], abs=0.11)  # rounded to tenths
    for tick in ("10⁻⁴", "10⁻³", "10⁰"):
        assert f">{tick}</text>" in html
    assert ">2\u202f000</text>" in html
    assert "class &lt;token&gt;" in html
    assert "nan" not in html


@pytest.mark.parametrize("values", [[0.0], [5e-7, 6e-7], [-3e5, 8e5], [1.0, 1.0 + 1e-12]])
@pytest.mark.parametrize("x_log", [True, False])
def test_points_lie_inside_the_picture(values: list[float], x_log: bool) -> None:
    results = _results(_names(2))
    xs = [3e-5 * 7.0**index for index in range(len(values))]
    results["curves"] = [
        {
            "title": "t",
            "x_label": "x",
            "y_label": "y",
            "x_log": x_log,
            "series": [{"name": "s", "x": xs, "y": values}],
        }
    ]
    html = render_report(results)
    marks = re.findall(r'<circle class="s0" cx="([\d.-]+)" cy="([\d.-]+)"', html)
    assert len(marks) == len(values)
    assert all(0 <= float(x) <= 440 and 0 <= float(y) <= 260 for x, y in marks)
    ticks = re.findall(r'text-anchor="end">([^<]+)<', html)
    assert 2 <= len(set(ticks)) == len(ticks) <= 8


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="no split"):
        render_report({"metrics": {}})
    with pytest.raises(ValueError, match=r"\['train'\]"):
        render_report({"metrics": {"train": _scores(["a", "b"], 20, seed=0), "test": None}})
    results = _results(_names(2))
    broken = copy.deepcopy(results)
    broken["curves"][0]["series"][0]["x"][0] = 0.0
    with pytest.raises(ValueError, match="'Regularization' has x <= 0"):
        render_report(broken)
    results["curves"][1]["series"][0]["y"] = [None, None, None]
    with pytest.raises(ValueError, match="'Loss' has no finite point"):
        render_report(results)


def test_report_is_written_as_utf8(tmp_path: Path) -> None:
    results = _results(["naïve", "日本"])
    write_report(results, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_report(results)


def test_numbers_read_well() -> None:
    assert [format_percent(x) for x in (0.93149, 1.0, None)] == ["93.1", "100.0", "–"]
    assert [format_number(x) for x in (0.0, 0.01234, 0.291, 1.234, 241.3, 12_345.0, -0.5)] == [
        "0",
        "0.0123",
        "0.291",
        "1.23",
        "241",
        "12\u202f345",
        "−0.500",
    ]
    assert [format_seconds(s) for s in (0.364, 12.34, 59.97, 74.2, 3599.7, 7620)] == [
        "0.36 s",
        "12.3 s",
        "1 min 00 s",
        "1 min 14 s",
        "1 h 00 min",
        "2 h 07 min",
    ]
    assert [format_bytes(n) for n in (912_000_000, 1_524_000_000)] == ["912 MB", "1.52 GB"]


def test_trackers_get_no_path(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    paths = {"checkpoint": tmp_path, "dataset": tmp_path / "images", "output_dir": tmp_path / "run"}
    config = replace_settings(RunConfig(), {"seed": 3, **{name: str(path) for name, path in paths.items()}})
    settings = public_settings(config)
    assert (settings["checkpoint"], settings["dataset"], settings["seed"]) == (tmp_path.name, "images", 3)
    assert str(tmp_path) not in str(settings)
    assert public_settings(config, {"checkpoint": "someone/vit", "dataset": "beans"})["checkpoint"] == "someone/vit"


def read_schema() -> Any:
    return json.loads((resources.files("hf_transfer") / "reporting" / "results.schema.json").read_text())


def _complete_results() -> dict[str, Any]:
    """The content of results.json after a solved head and three epochs, with every optional part."""
    results = _results(_names(6))
    score = {"accuracy": 0.9, "log_loss": 0.3}
    cost = {"store_seconds": 0.1, "store_images": 8, "train_seconds": 2.0, "train_images": 48}
    phase = {"score": score, "cost": cost, "num_trainable": 9, "refitted": False, "description": "a sentence"}
    solved = phase | {"policy": "head", "cut": "features", "optimizer": "L-BFGS", "epochs": 0, "kept": "solution"}
    solved |= {"regularization_c": 0.1, "linear_model": "ridge regression", "num_features": 8, "readout": "depth 3"}
    trained = phase | {
        "policy": "full",
        "cut": "pixels",
        "optimizer": "adamw",
        "epochs": 3,
        "kept": "epoch",
        "kept_epoch": 2,
    }
    trained |= {"lr": 0.1, "lr_scheduler_type": "cosine", "images_per_second": 9.5, "wise_ft_alpha": 0.5}
    epoch = {
        "epoch": 1,
        "train_loss": 0.9,
        "train_accuracy": 0.5,
        "validation": score,
        "images": 16,
        "images_per_second": 9.5,
    }
    gain = {"mean": 0.01, "error": 0.02}
    candidate = {
        "name": "full lr=0.1", "strategy": "full", "verdict": "unlikely", "prior": gain, "posterior": gain, "estimated_s": 9.0,
        "judged_by": "folds", "runs": 2, "num_images": 24, "quality": 0.9, "probe_quality": 0.8, "gain": gain, "seconds": 9.5,
        "left_s": None,
    }  # fmt: skip
    skipped = {
        **candidate, "verdict": "over_budget", "estimated_s": None, "judged_by": None, "runs": 0, "num_images": 0,
        "quality": None, "probe_quality": None, "gain": None, "seconds": 0.0, "left_s": -1.0,
    }  # fmt: skip
    choice = {
        "kept": "linear_probe", "strategy": "linear_probe", "probe": score, "candidates": [candidate, skipped],
        "trained_on_all": True, "command": "hf-transfer train linear_probe", "reason": "a sentence",
    }  # fmt: skip
    details = {
        "phases": [{"policy": "head", "history": []}, {"policy": "full", "history": [epoch]}],
        "augmentation": {"hflip": 0.5}, "audited_tensors": 3, "kept_probe": False, "resumed": False, "auto": choice,
        "fine_tuned": True, "anything": [1],
    }  # fmt: skip
    results["curves"][0]["series"][1]["y"][3] = None  # JSON has no nan
    results["data"] |= {
        "revision": None,
        "license": "mit",
        "fingerprint": {"train": "aa11", "validation": "bb22"},
        "train_images_per_class": dict.fromkeys(_names(6), 4),
    }
    results["cost"]["seconds"]["total"] = 80.0
    return results | {
        "schema_version": 1,
        "plan": [solved, trained],
        "cost": results["cost"] | {"images_per_second": {"features": 99.0}, "memory_is": "resident", "device": "CPU"},
        "details": details,
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "checkpoint": results["checkpoint"] | {"preprocessing": {"library": "timm"}},
        "config": {"seed": 0, "dataset": "someone/beans", "checkpoint": "embedded"},
    }


def test_the_schema_accepts_complete_results_and_no_others() -> None:
    validator = jsonschema.Draft202012Validator(read_schema())
    validator.check_schema(read_schema())
    results = json.loads(json.dumps(_complete_results(), allow_nan=False))
    assert [error.message for error in validator.iter_errors(results)] == []
    assert {key for key in results if not validator.is_valid({k: v for k, v in results.items() if k != key})} == {
        *results
    }

    def broken(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
        changed: Any = copy.deepcopy(results)
        target = changed
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
        return dict(changed)

    for path, value in [
        (("schema_version",), 2),
        (("output_dir",), "runs/x"),
        (("metrics", "train"), results["metrics"]["test"]),
        (("metrics", "test", "accuracy"), 1.5),
        (("metrics", "test", "per_class", 0, "recall"), "high"),
        (("plan", 1, "score"), {"accuracy": 0.9}),
        (("plan", 0, "policy"), None),
        (("plan", 0, "kept"), "kept the start"),
        (("plan", 0, "note"), "a sentence"),
        (("plan", 0), {k: v for k, v in results["plan"][0].items() if k != "regularization_c"}),
        (("plan", 1), {k: v for k, v in results["plan"][1].items() if k != "lr"}),
        (("plan", 1), {k: v for k, v in results["plan"][1].items() if k != "kept_epoch"}),
        (("details", "audited_tensors"), -1),
        (("details", "auto", "candidates", 0, "verdict"), "kept linear_probe"),
        (("details", "phases", 1, "history", 0, "validation"), 0.9),
        (("cost", "seconds"), {"train": 1.0}),
        (("curves", 0, "series", 0, "x", 0), None),
        (("data", "fingerprint"), {"train": "aa11"}),
    ]:
        assert not validator.is_valid(broken(path, value)), path


def test_the_page_has_words_for_each_part_of_the_cost() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (Path(__file__).parents[1] / "hf_transfer").rglob("*.py")]
    parts = {name for text in sources for name in re.findall(r'costs\.part\("(\w+)"\)', text)}
    assert "train" in parts
    assert {name.replace("_", " ") for name in parts} - COSTS.keys() == set()
