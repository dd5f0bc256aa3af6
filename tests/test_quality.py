"""benchmarks/quality.py: hindsight without luck, means over cells, lines that survive a kill, and the same images for all."""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

import hf_transfer as ht
from hf_transfer.choosing import candidates
from hf_transfer.choosing.gain import PROBABILITY_ERROR

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("lines", "hindsight", "fit_rule", "fit_contenders", "quality_sets", "quality_systems", "quality_report")
STORED = ROOT / "benchmarks" / "results" / "advise.jsonl"
LEADS = ROOT / "benchmarks" / "results" / "leads.jsonl"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


def test_the_luck_of_equal_candidates_is_no_regret(bench: Any) -> None:
    generator = np.random.default_rng(0)
    naive, halves = [], []
    for seed in range(60):
        hits = generator.random((6, 150)) < 0.8
        naive.append(100 * (hits[1:].mean(1).max() - hits[0].mean()))
        halves.append(bench.hindsight.compute_regret(hits[0], list(hits[1:]), seed=seed))
    error = np.std(halves) / np.sqrt(len(halves))
    assert np.mean(naive) > 2.5  # the best of five on 150 images is lucky
    assert abs(np.mean(halves)) < 3 * error


def test_a_better_candidate_is_a_regret_of_its_lead(bench: Any) -> None:
    generator = np.random.default_rng(0)
    system, best = generator.random(2000) < 0.6, generator.random(2000) < 0.8
    gap = 100 * (best.mean() - system.mean())
    assert bench.hindsight.compute_regret(system, [system, best]) == pytest.approx(gap, abs=0.3)
    assert bench.hindsight.compute_gain(best, system) == pytest.approx(gap)
    assert bench.hindsight.compute_regret(system, [system, system]) == 0.0


def test_the_seeds_of_a_cell_are_drawn_together(bench: Any) -> None:
    def cell(name: str, seed: int) -> Any:
        return bench.lines.Cell(name, "net", 10, seed)

    one = bench.hindsight.average({cell("a", 0): 1.0, cell("b", 0): 3.0, cell("c", 0): 5.0})
    copies = bench.hindsight.average(
        {cell(name, seed): v for name, v in {"a": 1.0, "b": 3.0, "c": 5.0}.items() for seed in range(9)}
    )
    assert one == copies
    assert (one.value, one.num_groups) == (3.0, 3)
    assert one.low < 2 < 4 < one.high


def test_a_line_that_was_cut_off_spoils_no_other(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "runs.jsonl"
    bench.lines.append_line(file, {"a": 1})
    with file.open("a") as stream:
        stream.write('{"cut": [1, 2')
    bench.lines.append_line(file, {"b": 2})
    assert bench.lines.read_lines([file, tmp_path / "missing"]) == [{"a": 1}, {"b": 2}]
    assert "cut off" in capsys.readouterr().err


def test_auto_expects_what_the_leads_show_and_without_a_set_something_else(bench: Any) -> None:
    leads, advice = bench.lines.read_lines([LEADS]), bench.lines.read_lines([STORED])
    own = list(candidates.AUTO)
    with bench.fit_contenders.contenders_without("none of them", leads, advice):
        for contender, fitted in zip(own, candidates.AUTO, strict=True):
            assert contender.log_ratios == pytest.approx(fitted.log_ratios, abs=0.0051)
            assert contender.spread == pytest.approx(fitted.spread, abs=0.0051)
    with bench.fit_contenders.contenders_without("sign_digits", leads, advice):
        for contender, fitted in zip(own[1:3], candidates.AUTO[1:3], strict=True):  # those that differ most among sets
            assert contender.log_ratios != pytest.approx(fitted.log_ratios, abs=0.1)
    assert own == candidates.AUTO


def test_the_noise_of_choices_is_reported_with_expectations_that_have_not_seen_the_set(
    monkeypatch: pytest.MonkeyPatch, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    noise = importlib.import_module("choice_noise")
    monkeypatch.setattr(noise, "RESAMPLES", 3)
    leads, judged = bench.lines.read_lines([LEADS]), ROOT / "benchmarks" / "results" / "choice_noise.jsonl"

    def expect(accuracy_of: str) -> list[Any]:
        """Expected gains on sign digits, if other runs on `accuracy_of` had reached another accuracy than they did."""
        changed = [{**line, "accuracy": 0.5 if line["set"] == accuracy_of else line["accuracy"]} for line in leads]
        line = next(line for line in bench.lines.read_lines([judged]) if line["set"] == "sign_digits")
        return [each.prior for each in noise.read_left_out(line, changed, bench.lines.read_lines([STORED]))]

    assert expect("sign_digits") == expect("none of them") != expect("trashnet")

    noise.report(SimpleNamespace(leads=LEADS, advice=STORED, out=judged))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| hits")]
    gains = {(way.removeprefix("| "), source): gain for way, source, gain, *_ in rows}
    both = f"hits and probabilities, PROBABILITY_ERROR {PROBABILITY_ERROR}"
    defaults = (ROOT / "docs" / "defaults.md").read_text()
    item = " ".join(defaults[defaults.index("- **Hits alone") :].split("\n- ")[0].split())
    for source, words in (("the other sets", "choose {1};"), ("all sets", "({0} and {1};")):
        shown = [gains[way, source].removeprefix("+") for way in ("hits alone", both)]
        assert words.format(*shown) in item
    assert f"gains {gains['hits alone', 'the other sets'].removeprefix('+')} points" in item


def test_runs_on_all_images_do_not_change_what_auto_expects(bench: Any) -> None:
    leads, advice = bench.lines.read_lines([LEADS]), bench.lines.read_lines([STORED])
    on_all = [{**line, "images_per_class": 0} for line in leads]
    list_runs = bench.fit_contenders.list_lead_runs
    assert list_runs([*leads, *on_all], advice) == list_runs(leads, advice)


def make_lines(bench: Any) -> list[dict[str, Any]]:
    """Two sets with two seeds of 40 test images: `full` is right on all, `auto` on all but 4, the rest on all but 8."""
    lines: list[dict[str, Any]] = []
    for name in ("a", "b"):
        lines.append({"labels_of": name, "label_names": ["x", "y"], "labels": [0, 1] * 20})
        for size, seed in ((10, 0), (10, 1), (0, 0)):
            wrong = dict.fromkeys(bench.quality_report.CANDIDATES, 8) | {
                "full": 0,
                "auto": 4,
                "auto_left_out": 6,
                "fastai": 12,
            }
            for system, count in wrong.items():
                predicted = [0, 1] * 20
                predicted[:count] = [1 - label for label in predicted[:count]]
                cell = {"set": name, "checkpoint": "net.x", "images_per_class": size, "seed": seed}
                lines.append({"system": system, **cell, "predicted": predicted, "cpu_seconds": 1.0 + count})
    return lines


def test_leads_on_all_images_train_on_none_that_judge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    leads = importlib.import_module("leads")
    shared = {"dataset": "sklearn/digits", "images_per_class": None, "output_dir": str(tmp_path)}
    data = leads.open_cell(shared, most=100).data
    trained = np.concatenate([data.train.rows, data.validation.rows])
    assert len(data.test) == 100
    assert np.intersect1d(data.test.rows, trained).size == 0
    everything = np.sort(np.concatenate([data.test.rows, trained]))
    whole = ht.Task("sklearn/digits").data
    assert np.array_equal(everything, np.sort(np.concatenate([whole.train.rows, whole.validation.rows])))
    assert len(leads.open_cell(shared, most=10**6).data.test) == len(everything) // 5


def test_the_report_has_regret_gains_and_seconds(bench: Any, tmp_path: Path) -> None:
    lines, figure = make_lines(bench), tmp_path / "figure.svg"
    text = bench.quality_report.report(lines, figure=figure)
    rows = {
        line.split("|")[1].strip(): [part.strip() for part in line.split("|")[2:]]
        for line in text.splitlines()
        if "|" in line
    }
    assert rows["`auto`"][0] == "90.0"
    regret = float(rows["`auto`"][1].split()[0])
    assert regret == pytest.approx(10.0, abs=1e-6)
    assert rows["always `full`"][:3] == ["100.0", "+0.00 (+0.00 to +0.00)", "-10.00 (-10.00 to -10.00)"]
    assert rows["always `lora`"][2] == "+10.00 (+10.00 to +10.00)"
    assert rows["a, net, all images, seed 0"] == ["90.0 % in 5 s", "70.0 % in 13 s", ""]
    assert "| b, net, all images, seed 0 | 90.0 | 100.0 (full) | -10.0 (-20.0 to -2.5) | +10.0 |" in text
    assert "| test accuracy, % | `auto` | `linear_probe` | `last_layers` |" in text
    assert rows["b, net, all images, seed 0"] == ["90.0 % in 5 s", "70.0 % in 13 s", ""]
    assert rows["fastai `fine_tune`"][:2] == ["+20.00 (+20.00 to +20.00)", "2.60"]
    names = [element.text for element in ET.parse(figure).iter() if element.tag.endswith("text")]
    assert {"auto", "full", "fastai fine_tune"} <= set(names)
    assert sum("per class" in (name or "") for name in names) == 1
    only_a = bench.quality_report.report(
        [line for line in lines if (line.get("system"), line.get("set")) != ("fastai", "b")]
    )
    assert "| +20.00 (+20.00 to +20.00) | 2.60 | 2 cells, 3 with their seeds (a) |" in only_a
    left_out = bench.quality_report.report(lines, leave_one_out=True)
    assert "| `auto`, its table fitted without the set | 85.0 | +15.00" in left_out
    assert "| `auto` |" not in left_out


def test_each_cell_has_the_gain_over_each_system_that_ran_in_it(bench: Any) -> None:
    lines = [line for line in make_lines(bench) if (line.get("system"), line.get("images_per_class")) != ("fastai", 0)]
    text = bench.quality_report.report(lines, sets=["b"], each_cell=True)
    heads, _, *rows = text.partition("## Each cell\n\n")[2].splitlines()
    assert heads.endswith("| `full` | fastai `fine_tune` |")
    assert len(rows) == 3
    few = [part.strip() for part in rows[0].split("|")[1:-1]]
    assert few[:2] == ["b, net, 10 per class, seed 0", "90.0 in 5 s"]
    assert few[-2] == "100.0 in 1 s; -10.0 (-20.0 to -2.5)"
    assert few[-1].startswith("70.0 in 13 s; +20.0 (+")
    assert rows[-1].startswith("| b, net, all images, seed 0 | 90.0 in 5 s |")
    assert rows[-1].endswith("|  |")


def test_lines_that_cannot_be_compared_are_refused(bench: Any) -> None:
    lines = make_lines(bench)
    with pytest.raises(SystemExit, match="two lines"):
        bench.quality_report.report([*lines, dict(lines[-1])])
    with pytest.raises(SystemExit, match="different test images"):
        bench.quality_report.report([*lines, {**lines[0], "labels": [1, 0] * 20}])
    with pytest.raises(SystemExit, match="differ in precision"):
        bench.quality_report.report([*lines[:-1], {**lines[-1], "precision": "bf16"}])
    with pytest.raises(SystemExit, match="no line of auto"):
        bench.quality_report.report([line for line in lines if line.get("system") != "auto"])


def test_a_cell_in_mixed_precision_says_so(bench: Any) -> None:
    lines = [
        {**line, "precision": "bf16" if (line.get("set"), line.get("images_per_class")) == ("b", 0) else "fp32"}
        for line in make_lines(bench)
    ]
    text = bench.quality_report.report(lines)
    assert "| b, net, all images, seed 0, bf16 | 90.0 | 100.0 (full) |" in text
    assert "| b, net, all images, seed 0, bf16 | 90.0 | 80.0 | 80.0 | 80.0 | 80.0 | 100.0 | 70.0 |" in text
    assert text.count("bf16") == 3  # also beside peers


def test_of_a_large_set_the_first_images_of_each_class_are_used(bench: Any, tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "cifar10"
    folder.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])})
    labels = [1] * 300 + [0] * 700 + [1] * 400
    rows = {"image": [str(i) for i in range(len(labels))], "label": labels}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")
    subset = bench.quality_sets.find_dataset(tmp_path, "cifar10", tmp_path / "scratch")
    train, test = (datasets.Dataset.from_parquet(str(subset / f"{split}.parquet")) for split in ("train", "test"))
    assert train["image"][:] == [str(i) for i in [*range(300), *range(300, 800), *range(1000, 1200)]]
    assert test["image"][:] == [str(i) for i in [*range(200), *range(300, 500)]]
    assert train.features["label"].names == ["x", "y"]
    assert bench.quality_sets.find_dataset(tmp_path, "other", tmp_path / "scratch") == tmp_path / "datasets" / "other"


def test_peers_get_the_images_that_were_drawn(bench: Any, tmp_path: Path) -> None:
    task = ht.Task("sklearn/digits", images_per_class=2, seed=1)
    job = SimpleNamespace(dataset="sklearn/digits")
    files, labels = bench.quality_systems.list_training_files(job, task.data, tmp_path)
    drawn = [split.image(i) for split in (task.data.train, task.data.validation) for i in range(len(split))]
    assert labels == [*task.data.train.labels.tolist(), *task.data.validation.labels.tolist()]
    assert sorted(labels) == sorted([*range(10)] * 2)
    for file, image in zip(files, drawn, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(image))
    folder = tmp_path / "images"
    for name in ("x", "y"):
        (folder / "train" / name).mkdir(parents=True)
        for i in range(4):
            drawn[0].save(folder / "train" / name / f"{i}.png")
    job, data = SimpleNamespace(dataset=str(folder)), ht.Task(folder, images_per_class=3).data
    files, labels = bench.quality_systems.list_training_files(job, data, tmp_path)
    assert {file.parent.parent for file in files} == {folder / "train"}  # the files themselves
    assert [file.parent.name for file in files] == ["xy"[label] for label in labels]
    assert len(set(files)) == 6


def test_runs_of_all_families_are_scored_on_the_same_images_and_not_repeated(tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(ROOT / "hf_transfer" / "assets" / "embedded", data / "checkpoints" / "net")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 4)):
        for label, name in enumerate(("dark", "light")):
            folder = data / "datasets" / "tones" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 80, (16, 16, 3)) + 170 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    systems = ["linear_probe", "trainer_defaults", *(["fastai"] if importlib.util.find_spec("fastai") else [])]
    out = tmp_path / "runs.jsonl"
    command = [
        sys.executable, str(ROOT / "benchmarks" / "quality.py"), "run", "--data", str(data), "--out", str(out),
        "--sets", "tones", "--checkpoints", "net", "--sizes", "5", "--seeds", "0", "--epochs", "1", "--threads", "1",
        "--num_workers", "0", "--fresh_cache", "--shard", "1/1", "--systems", *systems,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_TRANSFER_CACHE": str(tmp_path / "unused")}
    shown = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert shown.returncode == 0, shown.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs.1of1.jsonl").read_text().splitlines()]
    assert lines[0] == {"labels_of": "tones", "label_names": ["dark", "light"], "labels": [0] * 4 + [1] * 4}
    assert [line["system"] for line in lines[1:]] == systems
    assert lines[1]["predicted"] == lines[0]["labels"]
    for line in lines[1:]:
        assert line["test_accuracy"] == np.mean(np.array(line["predicted"]) == np.array(lines[0]["labels"]))
        assert line["machine"]["threads"] == 1
        assert line["seconds"] > 0
        assert line["cpu_seconds"] > 0
    assert not (tmp_path / "unused" / "activations").exists()  # --fresh_cache
    again = subprocess.run([*command, "--shard", "1/1"], capture_output=True, text=True, check=False, env=environment)
    assert (again.returncode, again.stdout) == (0, "")
