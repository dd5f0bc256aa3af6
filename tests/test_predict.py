"""Predictions of a saved model equal those of the transformers pipeline on the same files."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

import hf_transfer as ht
from hf_transfer.cli import main
from hf_transfer.config import AdapterConfig
from hf_transfer.data.images import BadImageError
from hf_transfer.hub.save import save_model
from hf_transfer.inference.predict import Prediction, UnreadableImagesError, find_images, predict
from hf_transfer.inference.rows import NamedPrediction, OutputFormat, format_rows
from hf_transfer.network.adapters import add_adapters, load_adapted
from hf_transfer.network.backbone import load
from hf_transfer.targets.multi_label import MultiLabel
from hf_transfer.targets.regression import Regression
from tests.shapes import write_shapes
from tests.test_save import results_for, write_upstream


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(0)
    for i in range(5):
        (root / "test" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        (root / "train" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)
        for split in ("train", "test"):
            Image.fromarray(pixels).save(root / split / str(i % 2) / f"{i}.png")
    return root


@pytest.mark.parametrize("checkpoint", ["embedded", "ViT"])
def test_predictions_equal_those_of_the_pipeline(checkpoint: str, images: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    from hf_transfer.network.source import find_source

    if checkpoint != "embedded":
        write_upstream(checkpoint, tmp_path)
        checkpoint = str(tmp_path)
    backbone = load(checkpoint)
    files = find_images([images / "test"])
    predictions = predict(backbone, files, top_k=3, batch_size=2)
    theirs = pipeline("image-classification", model=str(find_source(checkpoint).folder))(
        [str(f) for f in files], top_k=3
    )
    assert [p.image for p in predictions] == [str(f) for f in files]
    for ours, rows in zip(predictions, theirs, strict=True):
        assert list(ours.labels) == [row["label"] for row in rows]
        np.testing.assert_allclose(ours.probabilities, [row["score"] for row in rows], atol=1e-5)


def test_files_and_folders_are_listed_and_mistakes_are_named(images: Path, tmp_path: Path) -> None:
    one = images / "test" / "0" / "0.png"
    assert find_images([one, images / "test" / "1"]) == [one, *sorted((images / "test" / "1").iterdir())]
    with pytest.raises(ValueError, match="no such file"):
        find_images(["https://example.org/a.jpg"])
    with pytest.raises(ValueError, match="no image in this folder"):
        find_images([tmp_path])
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(BadImageError, match=r"bad\.jpg"):
        predict(load("embedded"), [one, bad])
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="loop cannot be read"):
        find_images([tmp_path])


def test_unreadable_images_do_not_stop_the_others(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(images / "test", tmp_path / "photos")
    (tmp_path / "photos/0/2.png").write_bytes((tmp_path / "photos/0/2.png").read_bytes()[:60])
    (tmp_path / "photos/9.jpg").symlink_to("gone.jpg")
    files = find_images([tmp_path / "photos"])
    assert len(files) == 6
    backbone = load("embedded")
    with pytest.raises(
        UnreadableImagesError, match=r"0/2\.png: the image is damaged.*9\.jpg: the file cannot"
    ) as caught:
        predict(backbone, files, batch_size=2)
    readable = [file for file in files if file.name not in ("2.png", "9.jpg")]
    assert list(caught.value.predictions) == predict(backbone, readable, batch_size=2)
    with pytest.raises(SystemExit) as stop:
        main(["predict", "embedded", str(tmp_path / "photos"), "--json"])
    assert stop.value.code == 1
    shown = capsys.readouterr()
    assert [row["image"] for row in json.loads(shown.out)] == [str(file) for file in readable]
    assert [line.count(".png: ") + line.count(".jpg: ") for line in shown.err.splitlines()] == [1, 1]


def test_images_that_another_process_could_not_read_have_no_prediction(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each process decodes its own share, and knows only its own problems."""
    files = find_images([images / "test"])
    problem = BadImageError(f"{files[3]}: the image is damaged")
    monkeypatch.setattr("hf_transfer.inference.predict.gather", lambda own: [own, {3: problem}])
    with pytest.raises(UnreadableImagesError, match="damaged") as caught:
        predict(load("embedded"), files)
    assert [each.image for each in caught.value.predictions] == [str(file) for file in files if file != files[3]]
    for rank, shown in (("0", 4), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            main(["predict", "embedded", str(images / "test"), "--format", "jsonl"])
        assert stop.value.code == 1
        output = capsys.readouterr()
        assert len(output.out.splitlines()) == shown
        assert output.err.count("damaged") == bool(shown)


def test_a_number_may_be_called_like_a_column_of_the_table() -> None:
    target = Regression(names=("distance", "image", "angle"))
    prediction = Prediction(
        image="a.png", labels=target.names, values=(12.5, 3.0, 1.0), unlike_training=False, distance=0.4
    )
    rows = list(
        csv.DictReader(format_rows([NamedPrediction(prediction=prediction, target=target)], "csv").splitlines())
    )
    assert rows == [
        {
            "image": "a.png", "predicted distance": "12.5", "predicted image": "3.0", "angle": "1.0",
            "unlike_training": "false", "distance": "0.4",
        }
    ]  # fmt: skip


def test_the_present_labels_are_those_above_their_thresholds_and_decide_what_the_metrics_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`top_k` limits the printed scores, not the present labels. A model without thresholds decides at 0.5."""
    target = MultiLabel(names=("a", "b", "c"), thresholds=(0.2, 0.9, 0.5))
    logits = torch.tensor([[-1.0, 2.0, 0.1], [-2.0, 3.0, -0.1], [-3.0, -3.0, -3.0]])
    expected = [[True, False, True], [False, True, False], [False, False, False]]
    assert target.find_present(logits).tolist() == expected
    assert target.decide(logits).tolist() == np.array(expected, float).tolist()
    assert replace(target, thresholds=()).find_present(logits)[0].tolist() == [False, True, True]
    scored = target.measure(logits.numpy(), np.array(expected, np.float32), groups=None)
    assert scored.values["exact_match"] == 1
    folder = write_shapes(tmp_path).parent
    run = ht.Task(str(folder / "labels.csv"), label_column="shapes", problem_type=target.problem_type).fit(
        ht.linear_probe(), output_dir=tmp_path / "run"
    )
    files = [str(folder / f"{i}.png") for i in range(8)]
    predictions = run.predict(files, top_k=1)
    cutoffs = dict(zip(run.backbone.label_names, run.backbone.target.cutoffs, strict=True))
    for few, all_of_them in zip(predictions, run.predict(files, top_k=len(cutoffs)), strict=True):
        above = [name for name, p in zip(all_of_them.labels, all_of_them.values, strict=True) if p > cutoffs[name]]
        assert list(few.present or ()) == above
    assert len({each.present for each in predictions}) > 1
    rows = {}
    for kind in ("json", "csv", "text"):
        main(["predict", str(tmp_path / "run"), *files, "--top_k", "1", "--format", kind])
        rows[kind] = capsys.readouterr().out
    assert [row["present"] for row in json.loads(rows["json"])] == [list(each.present or ()) for each in predictions]
    cells = [row["present"] for row in csv.DictReader(rows["csv"].splitlines())]
    assert cells == ["|".join(each.present or ()) for each in predictions]
    for line, each in zip(rows["text"].splitlines(), predictions, strict=True):
        assert f"; present: {', '.join(each.present or ()) or 'none'}" in line


def test_a_model_of_one_class_names_no_present_labels(images: Path) -> None:
    [prediction] = predict(load("embedded"), find_images([images / "test" / "0" / "0.png"]))
    assert prediction.present is None
    row = NamedPrediction(prediction=prediction, target=load("embedded").target)
    assert all("present" not in format_rows([row], kind) for kind in get_args(OutputFormat))


def test_images_in_memory_are_predicted_as_their_files_are(images: Path) -> None:
    backbone = load("embedded")
    files = find_images([images / "test"])
    pictures = [Image.open(file) for file in files]
    arrays = [np.asarray(picture) for picture in pictures]
    from_files = predict(backbone, [str(files[0]), *files[1:]], batch_size=2)
    assert [p.image for p in from_files] == [str(file) for file in files]
    for in_memory in (pictures, arrays, [*pictures[:2], *arrays[2:]]):
        predictions = predict(backbone, in_memory, batch_size=2)
        assert [p.image for p in predictions] == [f"image {i}" for i in range(5)]
        assert [(p.labels, p.probabilities) for p in predictions] == [(p.labels, p.probabilities) for p in from_files]
    assert [p.image for p in predict(backbone, [files[0], arrays[1]])] == [str(files[0]), "image 1"]
    assert predict(backbone, []) == []


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 8), np.uint8), r"image 1: an array \(8, 8\) of uint8; give RGB"),
        (np.zeros((8, 8, 4), np.uint8), r"an array \(8, 8, 4\)"),
        (np.zeros((8, 8, 3), np.float32), "of float32; give RGB"),
        (np.zeros((0, 8, 3), np.uint8), "image 1: "),
        (b"bytes", "image 1: cannot read bytes; give a path, a PIL image or a uint8 array"),
    ],
)
def test_an_input_that_is_not_an_image_is_named(images: Path, image: object, words: str) -> None:
    with pytest.raises(BadImageError, match=words):
        predict(load("embedded"), [images / "test" / "0" / "0.png", image])  # type: ignore[list-item]


def test_dataset_classes_are_matched_to_the_models_by_name(images: Path) -> None:
    metrics = ht.evaluate("embedded", images, split="test")  # two of its ten classes
    assert metrics.num_samples == 5
    counts = {row["label"]: row["support"] for row in metrics.per_class}
    assert (counts["0"], counts["1"], counts["2"]) == (3, 2, 0)
    files = find_images([images / "test"])
    right = [p.labels[0] == Path(p.image).parent.name for p in predict(load("embedded"), files, top_k=1)]
    assert metrics.accuracy == np.mean(right)
    assert ht.evaluate("embedded", images).num_samples == 10  # of all splits


def test_evaluate_warns_of_images_that_the_run_has_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for label in ("ant", "bee"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (16, 16, 3), dtype=np.uint8) + 120 * (label == "ant")
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    data, run = str(tmp_path / "data"), tmp_path / "run"
    ht.Task(data, "embedded").fit(ht.linear_probe(readouts="none"), output_dir=run)
    assert not (run / "model" / "seen_images.npy").exists()  # nothing of it is published
    for model in (run, run / "model"):
        caplog.clear()
        capsys.readouterr()
        main(["evaluate", str(model), "--dataset", data, "--json"])
        warning = (
            "12 of these 18 images trained or selected the model of this run, so the metrics are optimistic: evaluate"
            " images that the run has not seen, with --split test"
        )
        assert warning in caplog.text
        assert any(warning in note for note in json.loads(capsys.readouterr().out)["notes"])
    caplog.clear()
    shutil.move(tmp_path / "data" / "test", tmp_path / "moved")  # the bytes of images matter, and not their names
    main(["evaluate", str(run), "--dataset", str(tmp_path / "moved")])
    assert "trained or selected" not in caplog.text
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--dataset", data, "--split", "test"])
    error = capsys.readouterr().err
    assert (
        "only train (report.html of the run has the metrics of the images that it held out itself); omit --split"
        in error
    )
    assert "or name a stored split with --test_split" in error
    caplog.clear()
    main(["evaluate", str(run), "--dataset", data])
    assert caplog.text.rstrip().endswith("evaluate images that the run has not seen, with another --dataset")
    (run / "seen_images.npy").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"seen_images\.npy is damaged .*: delete the file"):
        ht.evaluate(run, data)


def test_a_class_that_the_model_does_not_know_is_named(images: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("cat", "1"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (20, 20), (i * 50, 0, 0)).save(tmp_path / split / label / f"{i}.png")
    with pytest.raises(ValueError, match="does not know cat"):
        ht.evaluate("embedded", tmp_path)


@pytest.mark.parametrize("name", ["timm ViT", "ViT"])
def test_adapters_are_switched_on_one_base(
    name: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base is loaded once and stays unchanged, whatever the adapter's method and classes."""
    write_upstream(name, tmp_path / "base")
    kinds = {
        "lora": ("lora", ("ant", "bee")),
        "scales": ("ia3", ("a", "b", "c")),
        "again": ("lora", ("ant", "bee")),
    }
    for adapter, (method, labels) in kinds.items():
        backbone = load(str(tmp_path / "base"), labels, base_model="someone/upstream")
        adapted, _ = add_adapters(backbone, backbone.chain(), AdapterConfig(method=method))
        with torch.no_grad():
            for parameter_name, parameter in adapted.model.named_parameters():
                if parameter_name in adapted.trained or adapted.head.owns(parameter_name):
                    parameter += 0.1 * torch.randn(parameter.shape)
        save_model(adapted, results_for(adapted), tmp_path / adapter)
    paths = [str(tmp_path / adapter) for adapter in kinds]
    flags = [word for path in paths for word in ("--adapter", path)]
    main(["predict", str(tmp_path / "base"), str(images / "test"), *flags, "--json"])
    rows = json.loads(capsys.readouterr().out)
    files = find_images([images / "test"])
    for path in paths:
        alone = predict(load_adapted(path, checkpoint=str(tmp_path / "base")), files, top_k=3)
        switched = [row for row in rows if row["adapter"] == path]
        assert [row["image"] for row in switched] == [p.image for p in alone]
        for row, expected in zip(switched, alone, strict=True):
            assert [entry["label"] for entry in row["labels"]] == list(expected.labels)
            np.testing.assert_allclose([entry["score"] for entry in row["labels"]], expected.probabilities, atol=1e-6)
    main(["predict", str(tmp_path / "base"), str(files[0]), *flags])
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith(":")] == [f"{p}:" for p in paths]
    with pytest.raises(SystemExit):
        main(["predict", str(tmp_path / "base"), str(files[0]), "--adapter", str(tmp_path / "base")])
    assert "is no adapter" in capsys.readouterr().err
    write_upstream("timm ResNet", tmp_path / "other")
    with pytest.raises(SystemExit):
        main(["predict", str(tmp_path / "other"), str(files[0]), "--adapter", paths[0]])
    assert "trained on other weights" in capsys.readouterr().err
