"""The report's images are those of the predictions, its page stays small, and `hf-transfer report` makes it again."""

import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import drive, needs_chromium
from PIL import Image
from test_report import check_that_nothing_is_loaded

import hf_transfer as ht
from hf_transfer.cli import main
from hf_transfer.metrics.bootstrap import mean_interval
from hf_transfer.metrics.classification import describe_precision
from hf_transfer.metrics.records import Score
from hf_transfer.reporting.chain_picture import lay_out_chain
from hf_transfer.reporting.feature_map import check_map_method, place_on_plane
from hf_transfer.reporting.illustrations import EXPLAINED
from hf_transfer.reporting.pictures import draw_pictures
from hf_transfer.reporting.predictions import read_named_predictions
from hf_transfer.reporting.remake import compare_folders
from hf_transfer.reporting.report import render_report
from hf_transfer.reporting.saved_runs import illustrate_saved, read_saved_run
from hf_transfer.reporting.sentences import describe_choice
from hf_transfer.reporting.settings_table import flatten
from hf_transfer.reporting.verdict import _suggest_class, describe_kept_model, give_verdict
from hf_transfer.run import Run
from hf_transfer.training.records import AutoChoice, CandidateRecord, Gain, Judging, to_json
from hf_transfer.training.records import Verdict as CandidateVerdict


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "probe"
    found: Run = ht.Task("sklearn/digits", images_per_class=10).fit(ht.linear_probe(), output_dir=folder)
    return found


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    found: Run = ht.Task("sklearn/digits", images_per_class=10).fit(ht.full(epochs=2), output_dir=folder)
    return found


def read_page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def read_images(html: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="images">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return list(json.loads(found[1]))


def read_galleries(html: str) -> dict[str, list[int]]:
    """The numbers of each gallery's images, by title."""
    parts = re.findall(
        r"<h3>([^<(]*?)(?: \(\d+\))?</h3>\s*<p[^>]*>.*?</p>\s*<ul class=\"shots\" data-images=\"([^\"]*)\"", html
    )
    return {title: json.loads(numbers) for title, numbers in parts}


def test_mistakes_are_those_of_the_predictions(run: Run) -> None:
    assert run.folder is not None
    names, values = read_named_predictions(run.folder / "predictions.parquet", run.backbone.target)["test"]
    probability_of = dict(zip(names, values, strict=True))
    html = read_page(run.folder)
    images, galleries = read_images(html), read_galleries(html)
    assert list(galleries)[:2] == ["Most confident mistakes", "Least certain"]
    labels = run.backbone.target.names
    of_truth = []
    for number, image in enumerate(images[i] for i in galleries["Most confident mistakes"]):
        row = probability_of[image["name"]]
        assert image["right"] is False
        assert image["truth"] != image["predicted"] == labels[int(row.argmax())] == image["top"][0][0]
        assert image["top"][0][1] == f"{100 * row.max():.1f} %"
        if number < EXPLAINED:
            assert image["heat"].startswith("data:image/jpeg;base64,")
        of_truth.append(row[labels.index(image["truth"])])
    assert of_truth == sorted(of_truth)
    assert of_truth, "a probe on ten images per class makes mistakes"
    doubts = [probability_of[images[i]["name"]].max() for i in galleries["Least certain"]]
    assert doubts == pytest.approx(sorted(values.max(1))[: len(doubts)])


def test_cells_have_the_images_that_the_matrix_counts(run: Run) -> None:
    assert run.folder is not None
    images = read_images(read_page(run.folder))
    matrix = np.array(run.test.confusion_matrix)
    shown = np.zeros_like(matrix)
    names = run.backbone.target.names
    for image in images:
        for key in image["keys"]:
            true, predicted = map(int, key.split(","))
            assert (names[true], names[predicted]) == (image["truth"], image["predicted"])
            assert image["split"] == "test"
            shown[true, predicted] += 1
    assert (shown <= matrix).all()
    is_mistake = ~np.eye(len(matrix), dtype=bool)
    assert (shown[is_mistake] == matrix[is_mistake]).all()  # fewer than MAX_MISTAKES
    assert (shown.diagonal() > 0).all()


def test_page_loads_nothing_and_says_what_it_cost(run: Run) -> None:
    assert run.folder is not None
    html = read_page(run.folder)
    check_that_nothing_is_loaded(html)
    assert str(run.folder) not in html
    assert json.loads((run.folder / "results.json").read_text())["cost"]["seconds"]["report"] > 0
    for heading in ("What to do next", "Map of the images", "Can the probabilities be trusted?", "What was trained"):
        assert heading in html
    assert 'class="trained first"' in html


def test_pictures_of_noise_stay_below_the_limit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of noise are the largest that a JPEG can have."""
    assert run.folder is not None
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8))
    saved = read_saved_run(run.folder)
    monkeypatch.setattr("hf_transfer.data.splits.Split.reduced_image", lambda *_: (noise, noise.size))
    for name, value in (("MAX_COMPUTED", 1000), ("SMALL_PX", 160)):
        monkeypatch.setattr(f"hf_transfer.reporting.illustrations.{name}", value)
    illustrations = illustrate_saved(saved)
    assert illustrations is not None
    page = render_report(saved.results, illustrations)
    assert 3_000_000 < len(page.encode()) < 5_000_000
    assert illustrations.galleries[0].images, "the budget cuts the map first"


def test_an_unreadable_image_is_left_out(tmp_path: Path) -> None:
    from hf_transfer.config import DataConfig
    from hf_transfer.data.dataset import load_data

    for k in range(2):
        (tmp_path / f"class{k}").mkdir()
        for i in range(6):
            Image.new("RGB", (40, 20), (100 * k, 10 * i, 0)).save(tmp_path / f"class{k}" / f"{i}.png")
    split = load_data(DataConfig(dataset=str(tmp_path)), divides_copies=True).train
    Path(tmp_path / split.image_name(0)).write_bytes(b"broken")
    pictures = draw_pictures([(split, 0), (split, 1)], [160, 160])
    assert pictures[0] == ""
    assert pictures[1].startswith("data:image/jpeg;base64,")


def test_report_makes_the_same_page_again(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.folder is not None
    main(["report", str(run.folder), "--output", str(tmp_path / "again.html")])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'again.html'}\n"
    first, again = (read_page(run.folder), (tmp_path / "again.html").read_text(encoding="utf-8"))
    assert read_galleries(again) == read_galleries(first)
    kept = {i for numbers in read_galleries(first).values() for i in numbers}
    for i in kept:
        assert {**read_images(again)[i], "heat": ""} == {**read_images(first)[i], "heat": ""}


def test_report_without_the_images_says_why(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run.folder is not None
    folder = tmp_path / "moved"
    shutil.copytree(run.folder, folder)
    config = (folder / "config.yaml").read_text().replace("sklearn/digits", str(tmp_path / "gone"))
    (folder / "config.yaml").write_text(config)
    main(["report", str(folder)])
    assert "Most confident mistakes" not in read_page(folder)
    assert "the page has no images" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "no finished run in this folder"),
        (["nowhere", "--output", "missing/page.html"], "give a file in a folder that exists"),
        (["nowhere", "--json"], "--json prints a comparison"),
        (["one", "two", "--map", "pca"], "a comparison has no map"),
    ],
)
def test_mistakes_of_the_command_are_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["report", *words])
    assert message in capsys.readouterr().err


def test_two_runs_are_compared_image_by_image(
    run: Run, tuned: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(each.folder) for each in (run, tuned)]
    page = tmp_path / "both.html"
    main(["report", *folders, "--output", str(page), "--json"])
    numbers = json.loads(capsys.readouterr().out)
    hits = []
    for each in (run, tuned):
        assert each.folder is not None
        names, values = read_named_predictions(each.folder / "predictions.parquet", each.backbone.target)["test"]
        labels = {image["name"]: image["truth"] for image in _list_test_labels(each)}
        decided = [each.backbone.target.names[k] for k in values.argmax(1)]
        hits.append(np.array([labels[n] == d for n, d in zip(names, decided, strict=True)], float))
    differences = hits[1] - hits[0]
    assert numbers["runs"][0]["difference"] == 0
    assert numbers["runs"][1]["difference"] == pytest.approx(tuned.test.accuracy - run.test.accuracy)
    assert numbers["runs"][1]["difference_interval"] == pytest.approx(mean_interval(differences))
    html = page.read_text(encoding="utf-8")
    check_that_nothing_is_loaded(html)
    shown = {k: len(v) for k, v in read_galleries(html).items()}
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    expected = {"tuned is better than probe": min(better, 12), "tuned is worse than probe": min(worse, 12)}
    assert shown == {title: count for title, count in expected.items() if count}
    main(["report", *folders, "--output", str(page)])
    assert re.search(r"tuned \(full\): accuracy .*points \(.*\), (more than|within) chance", capsys.readouterr().out)


def test_runs_without_a_test_split_are_compared_on_all_images_that_both_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ht.Task("sklearn/digits", images_per_class=5, test_split="none")
    one = task.fit(ht.linear_probe(), output_dir=tmp_path / "one")
    task.fit(ht.linear_probe(readouts="none"), output_dir=tmp_path / "other")
    task.fit(ht.last_layers(epochs=1, probe_first=False), output_dir=tmp_path / "validated")
    lines = {}
    for name in ("other", "validated"):
        names = [str(tmp_path / each) for each in ("one", name)]
        main(["report", *names, "--output", str(tmp_path / "both.html")])
        lines[name] = capsys.readouterr().out.splitlines()
    assert lines["other"][0].startswith("50 cross-validated images; ")
    assert f"accuracy {100 * one.validation.accuracy:.1f} %" in lines["other"][1]
    assert lines["validated"][0].startswith("10 validation images; "), "the second run held out no others"
    labels = task.data.validation.labels
    probabilities = read_named_predictions(tmp_path / "one" / "predictions.parquet", one.backbone.target)["validation"][
        1
    ]
    accuracy = (probabilities.argmax(1) == labels).mean()
    assert f"accuracy {100 * accuracy:.1f} %" in lines["validated"][1], (
        "on the compared images, not on those of the run"
    )


def _list_test_labels(each: Run) -> list[dict[str, str]]:
    assert each.folder is not None
    data = read_saved_run(each.folder).data
    assert data is not None
    assert data.test is not None
    test = data.test
    return [{"name": test.image_name(i), "truth": test.target.describe_label(test.labels[i])} for i in range(len(test))]


def test_runs_on_other_images_are_not_compared(run: Run, tmp_path: Path) -> None:
    assert run.folder is not None
    folder = tmp_path / "other"
    shutil.copytree(run.folder, folder)
    results = json.loads((folder / "results.json").read_text())
    results["data"]["fingerprint"]["test"] = "0" * 32
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="was scored on other test images"):
        compare_folders([run.folder, folder], tmp_path / "page.html")


def test_a_map_places_similar_images_together() -> None:
    generator = np.random.default_rng(0)
    centers = np.repeat(np.eye(3, 50) * 10, 20, 0)
    positions = place_on_plane(centers + generator.normal(size=(60, 50)))
    assert positions.min(0).tolist() == [0, 0]
    assert positions.max(0).tolist() == [1, 1]
    groups = positions.reshape(3, 20, 2)
    spread = groups.std(1).max()
    means = groups.mean(1)
    assert min(np.linalg.norm(means[i] - means[j]) for i in range(3) for j in range(i)) > 4 * spread


def test_umap_is_refused_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install umap-learn"):
        check_map_method("umap")


def test_the_verdict_follows_the_evidence(run: Run) -> None:
    results = dict(run.results)
    accuracy = 100 * run.test.accuracy
    verdict = give_verdict(results, 40)
    assert verdict.value == f"{accuracy:.1f}"
    assert verdict.next_steps[0].startswith("Look at the 12 most suspicious labels below, of 40")
    assert any("hf-transfer train auto" in step for step in verdict.next_steps)
    assert not any("suspicious" in step for step in give_verdict(results, 0).next_steps)
    test = results["metrics"]["test"]
    scores = {**test, "accuracy": 0.7, "accuracy_interval": [0.5, 0.9], "num_samples": 20}
    few = {**results, "metrics": {"test": scores}}
    assert any(step.startswith("Label more test images") for step in give_verdict(few).next_steps)
    rows = [{"label": "cat", "recall": 0.2, "support": 50}, {"label": "dog", "recall": 0.95, "support": 200}]
    scores = {**test, "per_class": rows, "confusion_matrix": [[10, 40], [10, 190]], "accuracy": 0.8}
    poor = {**results, "metrics": {"test": scores}}
    steps = give_verdict(poor).next_steps
    assert any(step.startswith("Add labeled images of cat: 20.0 %") and "taken for dog" in step for step in steps)


@pytest.mark.parametrize(("num_classes", "is_named"), [(2, True), (100, False)])
def test_the_worst_of_many_classes_is_named_only_if_that_is_no_chance(num_classes: int, is_named: bool) -> None:
    """Of 100 equal classes with 50 images each, one has 33 hits where 40 are expected in more than half of all draws."""
    rows = [{"label": str(i), "recall": 0.8, "support": 50} for i in range(num_classes - 1)]
    rows.append({"label": "worst", "recall": 0.64, "support": 50})
    scores = {"accuracy": 0.8, "per_class": rows, "confusion_matrix": np.eye(num_classes).tolist()}
    assert ("worst" in _suggest_class({}, scores)) is is_named


def test_log_results_report_and_card_say_the_same_of_the_number_of_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="hf_transfer"):
        task = ht.Task("sklearn/digits", images_per_class=5, test_split="none")
        run = task.fit(ht.linear_probe(), output_dir=tmp_path)
    scores = run.results["metrics"]["validation"]
    assert scores["num_samples"] == 50  # cross-validation held out each image, so more than the 10 validation images
    (sentence,) = [note for note in scores["notes"] if "apart" in note]
    assert "differ by 3 points" in sentence
    assert sentence == describe_precision(run.validation.accuracy, run.validation.accuracy_interval, 50)
    texts = [caplog.text, read_page(tmp_path), (tmp_path / "model/README.md").read_text(encoding="utf-8")]
    for text in texts:
        assert sentence in unescape(text)
        assert set(re.findall(r"apart that differ by ([^,]*), about", text)) == {"3 points"}
    clause = "each image was predicted by a probe that was fitted without it"
    assert scores["estimated_by"] == "cross_validation"
    (line,) = [line for line in caplog.messages if line.startswith("validation: ")]
    assert line.endswith(f"; {clause}")
    for text in texts:
        assert clause in unescape(text)
        assert "optimistic" not in text
    for text in texts[1:]:
        assert f"There is no test split: {clause}." in unescape(text)
    steps = [step for step in give_verdict(run.results).next_steps if "apart" in step]
    assert steps == [f"Label more images. {sentence}"]
    low, high = (f"{100 * bound:.1f}" for bound in run.validation.accuracy_interval)
    accuracy = f"accuracy is {100 * run.validation.accuracy:.1f} % (95 % interval {low} to {high})"
    assert f"{accuracy} on 50 cross-validated images" in texts[2]
    assert "50 cross-validated images" in texts[1]


def test_a_stage_has_no_layers_that_it_has_not_grown(run: Run) -> None:
    chain = run.backbone.chain()
    names = [layer.name for layer in chain.layers]
    phases = [
        {"policy": "of any name", "cut": "pixels", "num_trainable": 5},
        {"policy": "full", "cut": "pixels", "num_trainable": 50},
    ]
    picture = lay_out_chain(chain, phases, [{"layer": names[1]}])
    assert picture is not None
    assert [phase.last_grown for phase in picture.phases] == [1, len(names) - 1]
    assert [phase.first_trained for phase in picture.phases] == [0, 0]


PROBE_SCORE = {"accuracy": 0.8, "log_loss": 0.5}


def test_the_page_says_how_sure_auto_is() -> None:
    row = {
        "name": "full",
        "verdict": "kept",
        "gain": {"mean": 0.04, "error": 0.05},
        "num_images": 25,
        "posterior": {"mean": 0.03, "error": 0.04},
    }
    choice = {
        "kept": "full",
        "candidates": [row, {"name": "lora", "verdict": "over_budget", "gain": None}],
        "trained_on_all": True,
        "probe": PROBE_SCORE,
    }
    results: dict[str, Any] = {"plan": [{"kept": "last"}], "details": {"auto": choice}}
    assert describe_kept_model(results) == (
        "Kept: full, the best of 1 judged candidate. 1 of 2 candidates did not fit into the time budget. Its gain in accuracy "
        "over the linear probe is +4.0 points on 25 held-out images, and +3.0 points (95 % interval -4.8 to +10.8) together "
        "with the experience from other data sets, so it may also be chance."
    )
    row["posterior"] = {"mean": 0.03, "error": 0.01}
    choice["trained_on_all"] = False
    sentence = describe_kept_model(results)
    assert (
        "(95 % interval +1.0 to +5.0) together with the experience from other data sets. No time was left" in sentence
    )
    choice["kept"] = "linear_probe"
    row["verdict"] = "not_better"
    assert describe_kept_model(results) == (
        "Kept: the linear probe. None of 1 judged candidate is expected to be better. 1 of 2 candidates did not fit into the "
        "time budget."
    )
    choice["candidates"] = [row, row]
    assert describe_kept_model(results) == "Kept: the linear probe. None of 2 candidates is expected to be better."
    choice["candidates"] = [{"name": "lora", "verdict": "over_budget", "gain": None}]
    assert describe_kept_model(results) == "Kept: the linear probe. 1 of 1 candidate did not fit into the time budget."


def test_the_page_tells_the_measured_gain_of_auto_from_the_estimated_one() -> None:
    score, gain = Score(quality=0.8, loss=0.5), Gain(mean=0.012, error=0.02)
    record = CandidateRecord(
        name="full", strategy="full", verdict=CandidateVerdict.KEPT, prior=gain, posterior=gain, estimated_s=1.0,
        judged_by=Judging.FOLDS, runs=3, num_images=60, quality=0.75, probe_quality=0.8, gain=gain, seconds=9.0,
    )  # fmt: skip
    choice = AutoChoice(
        kept="full", strategy="full", probe=score, candidates=(record,), trained_on_all=True, command="hf-transfer"
    )
    results = {"plan": [{"kept": "last"}], "details": {"auto": to_json(choice)}}
    assert "measured -5.0 on 60 images of 3 folds, from hits and probabilities +1.2)" in describe_choice(choice)
    assert (
        "Its gain in accuracy over the linear probe is -5.0 points on 60 held-out images, estimated at +1.2 points from hits "
        "and probabilities, and +1.2 points"
    ) in describe_kept_model(results)
    plain = replace(record, quality=0.812)  # for labels and numbers, the estimate is what was measured
    choice = replace(choice, candidates=(plain,))
    assert "measured +1.2 on 60 images of 3 folds)" in describe_choice(choice)
    results = {"plan": [{"kept": "last"}], "details": {"auto": to_json(choice)}}
    assert "is +1.2 points on 60 held-out images, and +1.2 points" in describe_kept_model(results)


def test_the_page_says_why_the_probe_was_kept() -> None:
    probe = {"accuracy": 0.875, "log_loss": 0.4}
    results = {
        "data": {"num_images": {"validation": 160}},
        "plan": [
            {"kept": "solution", "score": probe, "policy": "head"},
            {"kept": "start", "score": probe, "policy": "full"},
        ],
        "details": {
            "kept_probe": True,
            "phases": [{"history": []}, {"history": [{"validation": {"accuracy": 0.881, "log_loss": 0.39}}]}],
        },
    }
    sentence = describe_kept_model(results)
    compared = "88.1 % after 1 epoch against 87.5 % of the probe is within chance on 160 images"
    assert compared in sentence
    assert "All figures are of the probe; curves over epochs show the discarded network." in sentence
    worse = {**results, "details": {**results["details"], "phases": [{"history": []}, {"history": [
        {"validation": {"accuracy": 0.875, "log_loss": 0.39}}
    ]}]}}  # fmt: skip
    assert "87.5 % of the probe is no gain on 160 images" in describe_kept_model(worse)
    by_loss = {**results, "config": {"select_by": "log_loss"}}
    by_loss["plan"] = [{**results["plan"][0], "refitted": True}, results["plan"][1]]
    sentence = describe_kept_model(by_loss)
    assert "Validation log loss: 0.390 after 1 epoch against 0.400 of the probe is within chance" in sentence
    assert "of the probe, fitted again on training and validation images" in sentence


def test_settings_are_a_table() -> None:
    assert list(flatten({"a": {"b": [1, {"c": None}]}, "d": True})) == [
        ("a.b 1", "1"),
        ("a.b 2.c", "none"),
        ("d", "yes"),
    ]


# --- in a browser -----------------------------------------------------------------------------------------------------

DRIVER = """
const rows = () => [...document.querySelectorAll("table.matrix tbody tr")].map((row) => row.cells[0].textContent);
const order = document.getElementById("order");
const sort = (name) => { order.value = name; order.dispatchEvent(new Event("change")); return rows(); };
out.listed = rows();
out.mistakes = sort("mistakes");
out.columns = [...document.querySelectorAll("table.matrix thead th")].map((cell) => cell.textContent);
out.counts = [...document.querySelectorAll("table.matrix tbody tr")].map((row) =>
  [...row.cells].slice(1).map((cell) => Number(cell.textContent)));
out.alike = sort("alike");
out.back = sort("listed");
const panel = document.getElementById("cell");
const button = document.querySelector("table.matrix td:not(.right) button");
button.focus();
button.click();
out.cell = button.dataset.cell;
out.count = Number(button.dataset.count);
out.title = panel.querySelector("h3").textContent;
out.names = [...panel.querySelectorAll(".file")].map((each) => each.textContent);
out.alts = [...panel.querySelectorAll("img")].map((each) => each.alt);
press(document, "Escape");
out.closed = panel.hidden && document.activeElement === button;
const before = document.activeElement;
press(before, "ArrowDown");
press(document.activeElement, "ArrowUp");
press(document.activeElement, "ArrowRight");
out.moved = document.activeElement !== before && document.activeElement.matches("table.matrix button");
const map = document.getElementById("map");
map.focus();
const first = document.querySelector("#map-image .file").textContent;
press(map, "ArrowRight");
out.map = [first, document.querySelector("#map-image .file").textContent];
const picture = document.querySelector("#galleries img");
const plain = picture.src;
document.getElementById("heat").click();
out.heat = picture.src !== plain && picture.src.startsWith("data:image/jpeg");
document.getElementById("heat").click();
out.heat = out.heat && picture.src === plain;
"""


@needs_chromium
def test_page_in_a_browser(run: Run, tmp_path: Path) -> None:
    assert run.folder is not None
    out = drive(read_page(run.folder), DRIVER, tmp_path)
    assert out["errors"] == []
    names, matrix = list(run.backbone.target.names), np.array(run.test.confusion_matrix)
    assert out["listed"] == out["back"] == names
    wrong = matrix.sum(1) - matrix.diagonal()
    assert [wrong[names.index(name)] for name in out["mistakes"]] == sorted(wrong, reverse=True)
    assert out["columns"] == out["mistakes"]
    by_mistakes = [names.index(name) for name in out["mistakes"]]
    assert out["counts"] == matrix[np.ix_(by_mistakes, by_mistakes)].tolist()
    assert sorted(out["alike"]) == sorted(names)
    true, predicted = map(int, out["cell"].split(","))
    assert out["count"] == matrix[true, predicted] == len(out["names"])
    assert f"of {names[true]} predicted as {names[predicted]}" in out["title"]
    assert all(f"labeled {names[true]}, predicted {names[predicted]}" in alt for alt in out["alts"])
    assert out["closed"]
    assert out["moved"]
    assert out["map"][0] != out["map"][1]
    assert out["heat"]
    assert out["unnamed"] == 0
