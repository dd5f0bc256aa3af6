"""Predictions of a saved model are those of plain transformers on the same files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_transfer.config import DataConfig
from hf_transfer.data.images import BadImageError
from hf_transfer.hub.predict import evaluate, find_images, predict
from hf_transfer.network.backbone import load
from tests.test_save import write_upstream


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
def test_predictions_are_those_of_the_pipeline(checkpoint: str, images: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    from hf_transfer.network.source import find_source

    if checkpoint != "embedded":
        write_upstream(checkpoint, tmp_path)
        checkpoint = str(tmp_path)
    backbone = load(checkpoint)
    files = find_images([images / "test"])
    found = predict(backbone, files, top_k=3, batch_size=2)
    theirs = pipeline("image-classification", model=str(find_source(checkpoint).folder))(
        [str(f) for f in files], top_k=3
    )
    assert [p.image for p in found] == [str(f) for f in files]
    for ours, rows in zip(found, theirs, strict=True):
        assert list(ours.labels) == [row["label"] for row in rows]
        np.testing.assert_allclose(ours.probabilities, [row["score"] for row in rows], atol=1e-5)


def test_files_and_folders_are_found_and_mistakes_are_named(images: Path, tmp_path: Path) -> None:
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


def test_a_data_sets_classes_are_the_models_by_name(images: Path) -> None:
    scores = evaluate("embedded", DataConfig(dataset=str(images)))  # two of its ten classes
    assert scores["num_samples"] == 5
    counts = {row["label"]: row["support"] for row in scores["per_class"]}
    assert (counts["0"], counts["1"], counts["2"]) == (3, 2, 0)
    files = find_images([images / "test"])
    right = [p.labels[0] == Path(p.image).parent.name for p in predict(load("embedded"), files, top_k=1)]
    assert scores["accuracy"] == np.mean(right)


def test_a_class_that_the_model_does_not_know_is_named(images: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("cat", "1"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (20, 20), (i * 50, 0, 0)).save(tmp_path / split / label / f"{i}.png")
    with pytest.raises(ValueError, match="does not know cat"):
        evaluate("embedded", DataConfig(dataset=str(tmp_path)))
