"""Runs save calibrated networks with a record of their confidence, and predictions use the record wherever the model is."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

import hf_transfer as ht
from hf_transfer.cli import main
from hf_transfer.confidence.record import CONFIDENCE, KEY
from hf_transfer.confidence.selective import choose_threshold
from hf_transfer.data.images import BadImageError
from hf_transfer.inference.predict import load_saved, predict
from hf_transfer.network.backbone import load
from hf_transfer.network.head import HeadInput
from hf_transfer.prefix.engines import prepare
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.store import Store
from hf_transfer.prefix.taps import LogitsAndFeatures
from hf_transfer.repeats import run_config
from hf_transfer.reporting.confidence import describe_confidence
from hf_transfer.run import Run
from hf_transfer.runs import train_session
from hf_transfer.session import Session
from hf_transfer.training import familiarity
from hf_transfer.training.calibrate import HeldOutLogits
from hf_transfer.training.records import RunResult
from tests.sessions import make_config, make_session
from tests.test_confidence import make_record
from tests.test_publish import TOKENS, HubServer, make_run, signed_in

SMALL: dict[str, Any] = {"images_per_class": 50, "num_workers": 1, "num_threads": 1}


def train(folder: Path | None, *, calibrate: bool = True, **settings: Any) -> Run:
    """Trains the last layer with strongly smoothed labels, which makes a network too modest."""
    task = ht.Task("sklearn/digits", **{**SMALL, **settings})
    phases = [ht.train(ht.policies.last(1), epochs=2)]
    return task.fit(phases, output_dir=folder, label_smoothing=0.5, calibrate=calibrate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("confidence")


@pytest.fixture(scope="module")
def calibrated(folder: Path) -> Run:
    return train(folder / "calibrated")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Run:
    return train(folder / "plain", calibrate=False)


@pytest.fixture(scope="module")
def photos(folder: Path, calibrated: Run) -> Path:
    """Ten test images."""
    (folder / "photos").mkdir()
    assert calibrated._session is not None
    test = calibrated._session.data.test
    assert test is not None
    for i in range(10):
        test.image(i).save(folder / "photos" / f"{i}.png")
    return folder / "photos"


def test_plain_timm_gives_calibrated_probabilities_and_the_same_decisions(
    calibrated: Run, plain: Run, folder: Path
) -> None:
    section = calibrated.results["details"]["confidence"]
    (temperature,) = section["temperatures"]
    assert temperature < 0.9  # smoothed labels make a network too modest
    models = [
        timm.create_model(f"local-dir:{folder / name}/model", pretrained=True) for name in ("calibrated", "plain")
    ]
    images = torch.randn(8, *calibrated.backbone.preprocessing.image_shape)
    with torch.no_grad():
        after, before = (model.eval()(images) for model in models)
    torch.testing.assert_close(after, before / temperature, rtol=1e-4, atol=1e-4)
    assert bool((after.argmax(1) == before.argmax(1)).all())
    assert calibrated.test.accuracy == plain.test.accuracy
    assert calibrated.test.nll < plain.test.nll
    assert calibrated.test.ece < plain.test.ece
    change = section["calibration"]["test"]
    assert change["log_loss_before"] == pytest.approx(plain.test.nll, abs=1e-5)
    assert change["log_loss_after"] == pytest.approx(calibrated.test.nll, abs=1e-5)
    assert change["log_loss_change"][1] < 0


def test_the_metrics_are_those_of_the_saved_network(calibrated: Run, folder: Path) -> None:
    again = ht.evaluate(folder / "calibrated" / "model", "sklearn/digits", split="test")
    assert again.nll == pytest.approx(calibrated.test.nll, abs=1e-4)
    assert again.ece == pytest.approx(calibrated.test.ece, abs=1e-3)


def test_a_run_without_calibration_promises_nothing(plain: Run, folder: Path, photos: Path) -> None:
    model = folder / "plain" / "model"
    assert not (model / CONFIDENCE).exists()
    assert KEY not in json.loads((model / "config.json").read_text())
    assert "confidence" not in plain.results["details"]
    assert plain.predict(str(photos))[0].unlike_training is None
    with pytest.raises(ValueError, match=r"coverage=0\.9: this model has no record of its confidence"):
        plain.predict(str(photos), coverage=0.9)


def test_a_saved_model_predicts_as_the_run_in_memory(calibrated: Run, folder: Path, photos: Path) -> None:
    asked: dict[str, Any] = {"coverage": 0.9, "max_error": 0.3}
    predictions = calibrated.predict(str(photos), **asked)
    again = ht.load_run(folder / "calibrated").predict(str(photos), **asked)
    assert [replace(p, values=(), distance=None) for p in again] == [
        replace(p, values=(), distance=None) for p in predictions
    ]
    np.testing.assert_allclose([p.distance for p in again], [p.distance for p in predictions], rtol=1e-4)
    assert not any(p.unlike_training for p in predictions)
    for narrow, wide in zip(calibrated.predict(str(photos), coverage=0.5), predictions, strict=True):
        assert set(narrow.label_set or ()) <= set(wide.label_set or ())
    assert all(p.answers is None and p.label_set is None for p in calibrated.predict(str(photos)))
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    (strange,) = calibrated.predict(noise)
    assert strange.distance is not None
    assert strange.distance > max(p.distance or 0.0 for p in predictions)


def test_unreadable_images_do_not_shift_judgments(calibrated: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    files = sorted(photos.iterdir())
    with pytest.raises(BadImageError) as caught:
        predict(calibrated.backbone, [files[0], tmp_path / "bad.png", files[1]], coverage=0.9)
    expected = predict(calibrated.backbone, [files[0], files[1]], coverage=0.9)
    got = caught.value.predictions  # type: ignore[attr-defined]
    assert [(p.image, p.label_set) for p in got] == [(p.image, p.label_set) for p in expected]


def test_the_command_prints_sets_abstention_and_warnings(
    calibrated: Run, folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", str(folder / "calibrated" / "model"), str(photos), "--coverage", "0.9", "--max_error", "0.3"]
    expected = calibrated.predict(str(photos), coverage=0.9, max_error=0.3)
    main([*words, "--json"])
    shown = capsys.readouterr()
    assert "held-out images" in shown.err
    rows = json.loads(shown.out)
    assert [(row["set"], row["answers"], row["unlike_training"]) for row in rows] == [
        (list(p.label_set or ()), p.answers, p.unlike_training) for p in expected
    ]
    main([*words, "--format", "csv"])
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["set"] for row in table] == ["|".join(p.label_set or ()) for p in expected]
    assert [row["label"] for row in table] == [p.labels[0] for p in expected]
    assert [row["answers"] for row in table] == [str(p.answers).lower() for p in expected]
    main(words)
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("abstains") for line in lines] == [not p.answers for p in expected]
    assert all("; set: " in line for line in lines)


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_an_exported_file_keeps_the_record_but_knows_no_features(
    engine: str,
    calibrated: Run,
    plain: Run,
    folder: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["export", str(folder / "calibrated"), "--format", engine, "--output_dir"]
    main([*words, str(tmp_path / "alone")])
    expected = calibrated.predict(str(photos), coverage=0.9, max_error=0.3)
    asked = ["--coverage", "0.9", "--max_error", "0.3", "--json", "--engine", engine]
    capsys.readouterr()
    main(["predict", str(tmp_path / "alone"), str(photos), *asked])
    shown = capsys.readouterr()
    assert "held-out images" in shown.err
    reason = "because an exported file gives no features: omit --engine, or give the folder of the weights"
    assert f"does not say which images are unlike training, {reason}" in shown.err
    rows = json.loads(shown.out)
    assert [(row["set"], row["answers"]) for row in rows] == [(list(p.label_set or ()), p.answers) for p in expected]
    assert all("unlike_training" not in row and "distance" not in row for row in rows)
    main(["export", str(folder / "plain"), "--format", engine, "--output_dir", str(tmp_path / "alone")])
    assert not (tmp_path / "alone" / CONFIDENCE).exists()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["predict", str(tmp_path / "alone"), str(photos), *asked])
    assert "this model has no record of its confidence" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--coverage", "95"), "coverage=95.0: choose a share between 0 and 1, such as 0.95"),
        (("--max_error", "0"), "max_error=0.0: choose a share between 0 and 1, such as 0.02"),
        (("--max_error", "0.0001"), "cannot show an error this low; choose --max_error 0."),
    ],
)
def test_an_impossible_promise_is_refused(
    flags: tuple[str, str],
    message: str,
    calibrated: Run,
    folder: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["predict", str(folder / "calibrated" / "model"), str(photos), *flags])
    assert message in capsys.readouterr().err


def test_the_card_and_the_report_say_what_confidence_is_worth(calibrated: Run, folder: Path) -> None:
    for file in ("model/README.md", "report.html"):
        text = (folder / "calibrated" / file).read_text()
        assert "Calibration error on 539 test images" in text
        assert "Sets for a coverage of 95 % contain the label in" in text
        assert "the model answers" in text


def test_folds_are_left_as_they_are_and_calibrate_the_model_together(tmp_path: Path) -> None:
    run = train(tmp_path / "run", images_per_class=12, folds=2)
    assert not (tmp_path / "run" / "fold_1" / "model" / CONFIDENCE).exists()
    section = run.results["details"]["confidence"]
    assert (section["held_out_by"], section["num_held_out"]) == ("folds", 120)
    assert run.validation.estimated_by == "folds"
    assert run.validation.nll == pytest.approx(section["calibration"]["held_out"]["log_loss_after"], rel=0.2)


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
def test_a_model_keeps_its_record_through_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_transfer.hub.publish.verify", lambda *_, **__: ())
    record = make_record()
    inputs = (replace(record.inputs[0], module="fc"),)
    run = make_run(replace(load("embedded"), confidence=replace(record, inputs=inputs)), tmp_path / "run")
    with HubServer(TOKENS) as hub, signed_in(hub, tmp_path, "hf_alice"):
        ht.publish(run, "alice/digits")
        loaded = load_saved("alice/digits")
        assert load("alice/digits").confidence is None  # training starts without a record
    assert loaded.confidence is not None
    np.testing.assert_array_equal(loaded.confidence.scores, record.scores)


def test_engines_compute_the_same_logits_and_features(calibrated: Run) -> None:
    from accelerate import Accelerator

    from hf_transfer.config import ComputeConfig
    from hf_transfer.inference.confidence import ConfidenceRequest, make_judge

    judge = make_judge(calibrated.backbone, ConfidenceRequest())
    module = LogitsAndFeatures(calibrated.backbone.model.cpu().eval(), judge.inputs)
    resources = Resources(accelerator=Accelerator(), compute=ComputeConfig(num_workers=1))
    images = torch.randn(4, *calibrated.backbone.preprocessing.image_shape)
    (expected,), (folded,) = (prepare(engine, module, images, resources).functions(1) for engine in ("eager", "folded"))
    for eager, other in zip(expected(images), folded(images), strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("all_images", [False, True])
def test_a_trained_part_computes_the_features_of_the_network_from_stored_activations(
    all_images: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"epochs": 1, "images_per_class": 8, "probe_first": False, "cache": "memory"}
    config = make_config("last_layers", **settings, train_on_all=all_images)
    seen: list[RunResult] = []

    def watch(own: Session, result: RunResult, inputs: Sequence[HeadInput]) -> None:
        seen.append(result)
        computed.clear()
        features = familiarity._read_features(own, result, inputs)
        assert computed == [2]  # two images pass through the whole network, to check the activations
        computed.clear()
        expected = familiarity._read_features(own, replace(result, activations=None), inputs)
        assert computed == [len(own.data.train), len(own.data.validation)]
        for one, other in zip(features, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)

    computed: list[int] = []
    run = familiarity.compute_logits_and_features

    def count(model: Any, inputs: Any, images: Any, *rest: Any, **settings: Any) -> Any:
        computed.append(len(images))
        return run(model, inputs, images, *rest, **settings)

    monkeypatch.setattr(familiarity, "compute_logits_and_features", count)
    monkeypatch.setattr("hf_transfer.training.confidence.find_distance", watch)
    _, finished = run_config(config)
    assert all(result.activations is not None for result in seen)
    assert len(seen) == 1, "the sibling of a model of all images is not calibrated"
    assert finished.activations is None


def test_outdated_activations_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session("last_layers", epochs=1, images_per_class=8, probe_first=False, cache="memory")
    seen: list[tuple[RunResult, Sequence[HeadInput]]] = []
    monkeypatch.setattr(
        "hf_transfer.training.confidence.find_distance", lambda _, result, inputs: seen.append((result, inputs))
    )
    train_session(session)
    ((result, inputs),) = seen
    expected = familiarity._read_features(session, replace(result, activations=None), inputs)
    assert result.activations is not None
    outdated = {name: Store([store[:] * 2]) for name, store in result.activations.stores.items()}
    changed = replace(result, activations=replace(result.activations, stores=outdated))
    for one, other in zip(familiarity._read_features(session, changed, inputs), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_bound_of_abstention_holds_for_alike_images_of_a_group() -> None:
    """True error 5 % at each probability, and asked for 4 %: with 95 % confidence nothing is promised."""
    rng, promised = np.random.default_rng(0), {True: 0, False: 0}
    for seed in range(60):
        is_wrong = np.repeat(rng.random(400) < 0.05, 10)
        logits = np.zeros((4000, 2), np.float32)
        logits[:, 0] = np.repeat(rng.uniform(1, 3, 400), 10)
        held_out = HeldOutLogits(
            logits=logits, labels=is_wrong.astype(np.int64), by="folds", groups=np.arange(4000) // 10
        )
        for is_drawn in promised:
            each = held_out.draw_one_per_group(seed) if is_drawn else held_out
            assert len(each) == (400 if is_drawn else 4000)
            found = choose_threshold(each.logits[:, 0], each.labels == 0, 0.04)
            promised[is_drawn] += found is not None
    assert promised[True] <= 6, "5 % of 60 draws are 3"
    assert promised[False] > 6, "else this test shows nothing"


def fit_objects(folder: Path, num_objects: int) -> Run:
    """Trains a probe on three alike images of each of `num_objects` objects, which are the groups."""
    images, labels = load_digits(n_class=2, return_X_y=True)
    rows = ["path,label,object"]
    for i in range(num_objects):
        for copy in range(3):
            Image.fromarray(np.uint8(images[i].reshape(8, 8) * 15)).save(folder / f"{i}_{copy}.png")
            rows.append(f"{i}_{copy}.png,digit {labels[i]},{i}")
    (folder / "labels.csv").write_text("\n".join(rows))
    task = ht.Task(str(folder / "labels.csv"), group_column="object")
    return task.fit(ht.linear_probe(readouts="none"), output_dir=folder / "run")


def test_a_run_with_groups_holds_out_one_image_of_each(tmp_path: Path) -> None:
    results = fit_objects(tmp_path, 60).results
    confidence = results["details"]["confidence"]
    assert confidence["held_out_by"] == "cross_validation"
    assert confidence["num_held_out"] == 60
    assert "180 images that the probe" in describe_confidence(results)[0], "all images fit the temperature"
    assert results["metrics"]["validation"]["num_samples"] == 180


def test_fewer_than_ten_groups_give_neither_sets_nor_abstention(tmp_path: Path) -> None:
    run = fit_objects(tmp_path, 7)
    confidence = run.results["details"]["confidence"]
    assert (confidence["num_held_out"], confidence["coverage"], confidence["abstention"]) == (7, {}, None)
    for asked in ({"coverage": 0.9}, {"max_error": 0.5}):
        with pytest.raises(ValueError, match=r"10 or more held-out images \(with --group_column, of"):
            run.predict(str(tmp_path / "0_0.png"), **asked)


def test_sets_of_all_labels_have_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit_objects(tmp_path, 12)
    for coverage, is_noted in (("0.9", False), ("0.95", True)):  # 12 of 13 are 92 %
        main(["predict", str(tmp_path / "run" / "model"), str(tmp_path / "0_0.png"), "--coverage", coverage])
        shown = capsys.readouterr()
        assert ("has too few held-out images for this coverage" in shown.err) == is_noted
        assert ("set: digit 0, digit 1" in shown.out) == is_noted


@pytest.mark.parametrize("unknown_in", ["all splits", "test"])
def test_sets_need_images_whose_labels_are_all_known(
    unknown_in: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One label of each image is unknown, in all splits or in test images alone."""
    images, digits = load_digits(return_X_y=True)
    rows, names = ["path,even,large,third,split"], ("even", "large", "third")
    for i in range(80):
        split = ("train", "validation", "test", "train")[i % 4]
        Image.fromarray(np.uint8(images[i].reshape(8, 8) * 15)).save(tmp_path / f"{i}.png")
        flags = [str(int(flag)) for flag in (digits[i] % 2 == 0, digits[i] > 4, digits[i] % 3 == 0)]
        if unknown_in in ("all splits", split):
            flags[i // 4 % 3] = ""
        rows.append(",".join([f"{i}.png", *flags, split]))
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    columns: dict[str, Any] = {"label_columns": names, "split_column": "split"}
    task = ht.Task(str(tmp_path / "labels.csv"), problem_type="multi_label_classification", **columns)
    run = task.fit(ht.linear_probe(readouts="none"), output_dir=tmp_path / "run")
    known = {"all splits": [], "test": ["held_out"]}[unknown_in]
    coverage = run.results["details"]["confidence"]["coverage"]
    assert list(coverage) == known
    assert [coverage[name]["num_images"] for name in known] == [60] * len(known)
    words = ["predict", str(tmp_path / "run" / "model"), str(tmp_path / "0.png"), "--coverage", "0.9"]
    if known:
        main(words)
        assert "; set: " in capsys.readouterr().out
        return
    with pytest.raises(SystemExit):
        main(words)
    assert "coverage=0.9: this model has no sets or intervals, which need 10 or" in capsys.readouterr().err
