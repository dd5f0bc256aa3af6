"""Arrays of pixels in tables, configurations of a local folder, and columns that are missing."""

import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Array2D, Array3D, ClassLabel, Features, List, Value

from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.data.images import BadImageError

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 5, 4, 3), dtype=np.uint8)
NESTED = {"gray": List(List(Value("uint8"))), "rgb": List(List(List(Value("uint8"))))}
FEATURES: dict[str, tuple[np.ndarray, Any]] = {
    "Array2D": (PIXELS[..., 0], Array2D((5, 4), "uint8")),
    "Array3D": (PIXELS, Array3D((5, 4, 3), "uint8")),
    "lists of gray": (PIXELS[..., 0], NESTED["gray"]),
    "lists of RGB": (PIXELS, NESTED["rgb"]),
    "int64 lists": (PIXELS[..., 0], List(List(Value("int64")))),
}


@pytest.fixture(autouse=True)
def _no_progress_bars() -> None:
    datasets.disable_progress_bars()


def load(dataset: Path | str, images: Any = None, **settings: Any) -> Data:
    return load_data(DataConfig(dataset=str(dataset), **settings), images)


@pytest.mark.parametrize(("pixels", "feature"), FEATURES.values(), ids=FEATURES)
def test_arrays_of_pixels_are_images(pixels: np.ndarray, feature: Any, tmp_path: Path) -> None:
    features = Features({"image": feature, "label": ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict({"image": pixels.tolist(), "label": [0, 1] * 4}, features)
    table.to_parquet(tmp_path / "pets.parquet")
    for data in (load(tmp_path / "pets.parquet"), load("memory", table)):
        for split in data.splits:
            for i, row in enumerate(split.rows.tolist()):
                expected = pixels[row] if pixels.ndim == 4 else np.repeat(pixels[row][..., None], 3, axis=-1)
                assert (np.asarray(split.image(i)) == expected).all()
    as_pixels = load("memory", [(each, int(i % 2)) for i, each in enumerate(pixels)])
    stored = load(tmp_path / "pets.parquet").train
    assert [stored.image(i).tobytes() for i in range(len(stored))] == [
        as_pixels.train.image(i).tobytes() for i in range(len(stored))
    ]


def test_images_of_several_sizes_have_several_digests(tmp_path: Path) -> None:
    images = [np.zeros((2, 6), np.uint8).tolist(), np.zeros((6, 2), np.uint8).tolist()] * 4
    pq.write_table(
        pa.table({"image": pa.array(images, pa.list_(pa.list_(pa.uint8()))), "label": [0, 1] * 4}),
        tmp_path / "x.parquet",
    )
    train = load(tmp_path / "x.parquet").train
    assert train.image(0).size == (6, 2)
    assert len({bytes(digest) for digest in train.digests(tmp_path / "manifests")}) == 2


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([[1, 2], [3]], "the rows of pixels have different lengths"),
        ([[1, 2], None], "the rows of pixels have different lengths"),
        ([[1, None], [3, 4]], "other values than pixels from 0 to 255"),
        ([[1, 256], [3, 4]], "other values than pixels from 0 to 255"),
        ([[1, -1], [3, 4]], "other values than pixels from 0 to 255"),
        ([], r"an array of shape \(0, 0\) is no image; give \(H, W\) or \(H, W, 3\)"),
        ([[]], r"an array of shape \(1, 0\) is no image"),
        (None, "None instead of an image"),
    ],
)
def test_arrays_that_are_no_images_are_named(image: Any, message: str, tmp_path: Path) -> None:
    images = pa.array([[[1, 2]]] * 7 + [image], pa.list_(pa.list_(pa.int64())))
    pq.write_table(pa.table({"image": images, "label": [0, 1] * 4}), tmp_path / "x.parquet")
    source = load(tmp_path / "x.parquet").train.source
    with pytest.raises(BadImageError, match=rf"row 7 of split 'train': .*{message}"):
        source.image(7)
    assert len(load(tmp_path / "x.parquet", on_bad_image="skip").train) == 5


def test_channels_first_is_refused_with_the_shape(tmp_path: Path) -> None:
    features = Features({"image": Array3D((3, 5, 4), "uint8"), "label": Value("int64")})
    table = datasets.Dataset.from_dict({"image": PIXELS.transpose(0, 3, 1, 2).tolist(), "label": [0, 1] * 4}, features)
    with pytest.raises(BadImageError, match=r"an array of shape \(3, 5, 4\) is no image; give \(H, W\) or \(H, W, 3\)"):
        load("memory", table).train.image(0)


def with_configs(root: Path) -> Path:
    for name, names in {"coarse": ["a", "b"], "fine": ["a1", "a2", "b1", "b2"]}.items():
        features = Features({"image": NESTED["rgb"], "label": ClassLabel(names=names)})
        labels = [i % len(names) for i in range(8)]
        table = datasets.Dataset.from_dict({"image": PIXELS.tolist(), "label": labels}, features)
        (root / name).mkdir(parents=True)
        table.to_parquet(root / name / "train-0.parquet")
    lines = [f"- config_name: {name}\n  data_files: {name}/train-*.parquet" for name in ("coarse", "fine")]
    (root / "README.md").write_text("---\nlicense: mit\nconfigs:\n" + "\n".join(lines) + "\n---\n")
    return root


def test_a_configuration_of_a_folder_follows_a_colon(tmp_path: Path) -> None:
    root = with_configs(tmp_path / "pets")
    data = load(f"{root}:fine")
    assert (data.name, data.license, data.label_names) == ("pets:fine", "mit", ("a1", "a2", "b1", "b2"))
    with pytest.raises(
        ValueError, match=r"pets has the configurations 'coarse', 'fine'; choose one .* path/to/pets:NAME"
    ):
        load(root)
    with pytest.raises(
        ValueError, match=r"pets has the configurations 'coarse', 'fine'; choose one .* path/to/pets:NAME"
    ):
        load(f"{root}:other")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_column": "kind"}, "no column label_column='kind', but has {}; choose one of these"),
        (
            {"label_columns": ("breed,sex",)},
            "'breed,sex', but has {}; separate names by spaces: --label_columns breed sex",
        ),
        (
            {"label_columns": ("breed", "x")},
            "no column label_columns='x', but has {}; choose one of these",
        ),
        ({"image_column": "photo"}, "no column image_column='photo', but has {}; choose one of these"),
        ({}, "no column looks like the label; name a column with --label_column. The table has {}"),
    ],
)
def test_a_column_that_is_missing_has_a_remedy_that_works(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "pets.csv").write_text("image,breed,sex\n1.png,a,0\n")
    described = "columns 'image' (string), 'breed' (string), 'sex' (int64)"
    with pytest.raises(ValueError, match=re.escape(message.format(described))) as error:
        load_data(DataConfig(dataset=str(tmp_path / "pets.csv"), **settings))
    assert "test_split" not in str(error.value)


@pytest.mark.parametrize("settings", [{}, {"label_column": "label"}])
@pytest.mark.parametrize(("name", "role"), [("test", "test"), ("valid", "validation")])
def test_a_held_out_split_without_the_label_may_be_omitted(name: str, role: str, settings: dict[str, Any]) -> None:
    images = [np.full((2, 2), i, np.uint8) for i in range(8)]
    train = pd.DataFrame({"image": images, "label": [0, 1] * 4})
    splits = {"train": train, name: pd.DataFrame({"image": images, "other": "x"})}
    with pytest.raises(ValueError, match=f", or omit this split with --{role}_split none"):
        load_data(DataConfig(**settings), splits)
    omitted = DataConfig(**settings, **{f"{role}_split": "none"})
    assert load_data(omitted, splits).test is None
