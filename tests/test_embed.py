"""Embeddings equal what the network computes, in the order of the images; a query finds its own image first."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from timm.models import save_for_hf

from hf_transfer import embeddings
from hf_transfer.cli import main
from hf_transfer.config import ComputeConfig, DataConfig
from hf_transfer.data.every_image import is_data_set, load_every_split, load_files
from hf_transfer.data.images import BadImageError
from hf_transfer.inference import heat_maps
from hf_transfer.inference.embed import embed
from hf_transfer.inference.neighbors import find_nearest
from hf_transfer.inference.predict import find_images
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.network.part import Part
from hf_transfer.network.positions import find_layouts
from tests.families import make_model
from tests.ranks import run_ranks
from tests.test_save import write_upstream

MEMORY = ComputeConfig(cache="memory", engine="eager")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(7):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(path)
    return folder


def normalize(backbone: Backbone, files: list[Path]) -> torch.Tensor:
    pixels = [backbone.preprocessing.pixels(Image.open(file).convert("RGB")) for file in files]
    return backbone.preprocessing.normalize(torch.from_numpy(np.stack(pixels)))


def test_features_are_the_input_of_the_head(photos: Path) -> None:
    backbone, files = load("embedded"), find_images([photos])
    seen = []
    backbone.model.fc.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        backbone.model(normalize(backbone, files))
    embedded = embed(load("embedded"), load_files(files), compute=MEMORY)
    np.testing.assert_allclose(embedded.store[:], seen[-1].numpy(), rtol=1e-5, atol=1e-6)
    assert embedded.computed == len(files)


@pytest.mark.parametrize("name", ["embedded", "timm ViT", "timm Swin"])
def test_other_cuts_give_the_activation_or_its_mean(name: str, photos: Path, tmp_path: Path) -> None:
    if name != "embedded":
        write_upstream(name, tmp_path)
    backbone = load("embedded" if name == "embedded" else str(tmp_path), ("a", "b"))
    chain, files = backbone.chain(), find_images([photos])
    at = next(cut.name for cut in reversed(chain.cuts) if cut.name in find_layouts(chain))
    cut = chain.cut(at)
    with torch.no_grad():
        activation = Part(backbone.model, chain.image_shape, ends=[cut])(normalize(backbone, files))
    whole = embed(backbone, load_files(files), at=at, pool="none", compute=MEMORY).store[:]
    np.testing.assert_allclose(whole, activation.numpy(), rtol=1e-4, atol=1e-5)
    of_family = {
        "embedded": lambda: activation.mean((2, 3)),
        "timm ViT": lambda: activation[:, 1:].mean(1),  # without the class token
        "timm Swin": lambda: activation.mean((1, 2)),
    }
    expected = of_family[name]()
    mean = embed(backbone, load_files(files), at=at, compute=MEMORY).store[:]
    np.testing.assert_allclose(mean, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_files_have_a_row_per_image(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = find_images([photos])
    expected = embed(load("embedded"), load_files(files), compute=MEMORY).store[:]
    for suffix in ("parquet", "npy"):
        main(["embed", "embedded", str(photos), "--output", str(tmp_path / f"e.{suffix}"), "--json"])
        printed = json.loads(capsys.readouterr().out)
        assert (printed["num_images"], printed["shape"], printed["at"]) == (7, [80], "features")
    table = pq.read_table(tmp_path / "e.parquet")
    assert table.column("path").to_pylist() == [file.relative_to(photos).as_posix() for file in files]
    assert table.column("label").null_count == len(files)
    np.testing.assert_allclose(np.array(table.column("embedding").to_pylist()), expected, rtol=1e-6)
    described = json.loads(table.schema.metadata[b"hf_transfer"])
    assert described == {"model": "embedded", "at": "features", "pool": None, "shape": [80]}
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), expected, rtol=1e-6)
    with (tmp_path / "e.csv").open() as lines:
        assert [row["path"] for row in csv.DictReader(lines)] == table.column("path").to_pylist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.csv", "e.npy", "e.parquet"]


def test_a_data_set_keeps_splits_and_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["embed", "embedded", "sklearn/digits", "--output", str(tmp_path / "e.parquet"), "--at", "layer2.1"])
    assert "1,797 images, 32 numbers each (layer2.1)" in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "e.parquet", columns=["split", "label"]).to_pylist()
    splits = load_every_split(DataConfig(dataset="sklearn/digits"))
    assert [row["split"] for row in rows] == ["train"] * 1258 + ["test"] * 539
    assert [row["label"] for row in rows[1258:]] == [str(label) for label in splits["test"].labels]
    main(["embed", "embedded", "sklearn/digits", "--output", str(tmp_path / "e.parquet"), "--at", "layer2.1"])
    assert "found in the cache" in capsys.readouterr().out


def test_without_a_cache_the_images_are_computed_once(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        main(["embed", "embedded", str(photos), "--output", str(tmp_path / "e.npy"), "--cache", "none", "--json"])
        assert json.loads(capsys.readouterr().out)["images_per_s"] > 0


def test_without_a_cache_no_cache_folder_is_touched(
    photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))
    main(["embed", "embedded", str(photos), "--query", str(find_images([photos])[4]), "--cache", "none"])
    assert not [*(tmp_path / "cache").rglob("*")]


def test_a_query_finds_its_own_image_first(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = find_images([photos])
    main(["embed", "embedded", str(photos), "--query", str(files[4]), str(files[1]), "--top", "3", "--json"])
    queries = json.loads(capsys.readouterr().out)["queries"]
    assert list(queries) == [str(files[4]), str(files[1])]
    features = embed(load("embedded"), load_files(files), compute=MEMORY).store[:]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for own, found in zip((4, 1), queries.values(), strict=True):
        order = np.argsort(-unit @ unit[own])[:3]
        assert [match["image"] for match in found] == [files[i].relative_to(photos).as_posix() for i in order]
        np.testing.assert_allclose([match["cosine"] for match in found], (unit @ unit[own])[order], rtol=1e-5)
        assert order[0] == own


def test_blocks_do_not_change_the_neighbors() -> None:
    rng = np.random.default_rng(0)
    rows, queries = (rng.standard_normal((n, 5), dtype=np.float32) for n in (50, 3))
    whole = find_nearest(queries, [rows], 7)
    divided = find_nearest(queries, [rows[:3], rows[3:30], rows[30:]], 7)
    np.testing.assert_array_equal(whole.indices, divided.indices)
    np.testing.assert_allclose(whole.cosines, divided.cosines, rtol=1e-6)
    assert find_nearest(queries, [rows[:2]], 7).indices.shape == (3, 2)


def test_a_checkpoint_without_classifier_is_embedded(photos: Path, tmp_path: Path) -> None:
    model = make_model("timm ViT")
    model.reset_classifier(0)
    save_for_hf(model, str(tmp_path / "vit"), data_config={"input_size": (3, 32, 32)}, safe_serialization=True)
    main(["embed", str(tmp_path / "vit"), str(photos), "--output", str(tmp_path / "e.npy")])
    backbone = load(str(tmp_path / "vit"), ("a", "b"))
    with torch.no_grad():
        expected = model(normalize(backbone, find_images([photos])))
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_unreadable_images_are_named_or_left_out(photos: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    files = [*find_images([photos]), bad]
    with pytest.raises(BadImageError, match=r"bad\.png"):
        embed(load("embedded"), load_files(files), compute=MEMORY)
    assert len(load_files(files, on_bad_image="skip")) == len(files) - 1


def test_what_is_a_data_set(photos: Path, tmp_path: Path) -> None:
    assert is_data_set(["sklearn/digits"])
    assert is_data_set([str(tmp_path / "labels.csv")])
    assert is_data_set([str(tmp_path)])  # no image inside: tables, or an error that says what is allowed
    assert not is_data_set([str(photos)])
    assert not is_data_set([str(photos / "a" / "missing.png")])
    assert not is_data_set(["a/b", "c/d"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "nothing to do with the embeddings"),
        (("--output", "e.txt"), "ends with .parquet or .npy"),
        (("--output", "nowhere/e.npy"), "a file in a folder that exists"),
        (("--query", "nothing.png"), "query='nothing.png': no such file"),
        (("--output", "e.npy", "--top", "0"), "top=0"),
        (("--output", "e.npy", "--pool", "none"), "pool='none'"),
        (("--output", "e.npy", "--at", "nothing"), "'nothing' is no cut of this chain"),
        (("--output", "e.npy", "--label_column", "x"), "label_column='x': a list of image files has no columns"),
    ],
)
def test_mistakes_are_one_line(
    flags: tuple[str, ...], message: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["embed", "embedded", str(photos), *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def embed_and_explain(photos: str, folder: str) -> tuple[int, int]:
    """How many files of embeddings, and how many pictures, this process writes."""
    written = {"embeddings": 0, "pictures": 0}
    write, draw = embeddings.write_embeddings, heat_maps.draw_explanation

    def count_embeddings(*arguments: Any) -> None:
        written["embeddings"] += 1
        write(*arguments)

    def count_pictures(*arguments: Any) -> Image.Image:
        written["pictures"] += 1
        return draw(*arguments)

    embeddings.write_embeddings, heat_maps.draw_explanation = count_embeddings, count_pictures
    main(["embed", "embedded", photos, "--output", f"{folder}/images.npy"])
    main(["predict", "embedded", photos, "--explain", f"{folder}/why", "--format", "csv"])
    return written["embeddings"], written["pictures"]


def test_with_several_processes_the_main_one_writes_and_prints(photos: Path, tmp_path: Path) -> None:
    env = {"ACCELERATE_USE_CPU": "true", "HF_TRANSFER_CACHE": str(tmp_path / "cache")}
    counts = run_ranks(embed_and_explain, 2, str(photos), str(tmp_path), folder=tmp_path / "log", env=env)
    assert counts == [(1, 7), (0, 0)]
    own = embed(load("embedded"), load_files(find_images([photos])), compute=MEMORY)
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), own.store[:], rtol=1e-5, atol=1e-5)
    printed = [(tmp_path / "log" / f"printed-{rank}").read_text() for rank in (0, 1)]
    assert ["image,label" in text for text in printed] == [True, False]
