"""The files that the pages of the documentation name: images in every form, checkpoints, and a finished run.

A name that looks like a Hub id is a folder here, which `--checkpoint` accepts as well.
"""

import csv
import io
import shutil
import tarfile
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import timm
from PIL import Image
from sklearn.datasets import load_digits
from timm.models import save_for_hf

from tests.pages import ROOT
from tests.shapes import write_shapes

EMBEDDED = str(resources.files("hf_transfer") / "assets" / "embedded")
ROWS = [
    {
        "label": ("cat", "dog")[i % 2],
        "split": "train" if i < 16 else "test",
        "patient": f"p{i // 2}",
        "year": 2015 + i % 7,
    }
    for i in range(24)
]


def write_files(root: Path) -> None:
    """Writes everything that a page may name, apart from finished runs."""
    write_pets(root)
    (root / "shapes").mkdir()
    write_shapes(root / "shapes")
    write_digits(root)
    write_checkpoints(root)
    for name in ("recipes", "benchmarks"):
        (root / name).symlink_to(ROOT / name)


def write_digits(root: Path) -> None:
    """Writes folders of labeled digits, and photos without labels."""
    data = load_digits()
    labeled = {
        "path/to/images": "012",
        "path/to/more": "34",
        "path/to/other_images": "012",
        "my_photos": "01",
        "other_photos": "01",
    }
    names = {"0": "ants", "1": "bees"}
    for k, (folder, classes) in enumerate(labeled.items()):
        for label in classes:
            pictures = data.images[data.target == int(label)][24 * k : 24 * k + 24]
            for i, picture in enumerate(pictures):
                name = names[label] if folder in ("my_photos", "other_photos") else label
                part = "test" if i >= 16 else "train"
                save(picture, root / folder / part / name / f"{i}.jpg")
    for i, picture in enumerate(data.images[-6:]):
        for folder in ("photos", "new_photos", "path/to/photos"):
            save(picture, root / folder / f"{i}.jpg")
    for name in ("image", "cat", "dog"):
        save(data.images[0], root / f"{name}.jpg")


def save(picture: np.ndarray, file: Path) -> None:
    """Saves a digit (8 x 8, from 0 to 16) at four times its size."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((15 * picture).astype("uint8").repeat(4, 0).repeat(4, 1)).convert("RGB").save(file)


def write_checkpoints(root: Path) -> None:
    """Writes the embedded checkpoint under the names of convolutional networks, and a small ViT under those of ViTs."""
    for name in ("mobilenetv2_100.ra_in1k", "resnet18.a1_in1k"):
        shutil.copytree(EMBEDDED, root / "timm" / name)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=3, num_classes=10)
    data = {"input_size": (3, 32, 32)}
    arguments = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3}
    for name in ("vit_small_patch14_dinov2.lvd142m", "deit_tiny_patch16_224.fb_in1k"):
        save_for_hf(vit, root / "timm" / name, model_args=arguments, data_config=data, safe_serialization=True)


def picture(i: int) -> Image.Image:
    return Image.new("RGB", (8, 6), (9 * i, 200 * (i % 2), 40))


def encoded(i: int) -> bytes:
    stream = io.BytesIO()
    picture(i).save(stream, "PNG")
    return stream.getvalue()


def write_table(file: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    file.parent.mkdir(exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_shard(file: Path, numbers: list[int]) -> None:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for i in numbers:
            for suffix, content in {"png": encoded(i), "cls": str(i % 2).encode()}.items():
                member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_pets(root: Path) -> None:
    """Writes the same 24 images in every form of docs/data.md."""
    paths = [f"{row['split']}/{row['label']}/{i}.png" for i, row in enumerate(ROWS)]
    for i, path in enumerate(paths):
        for file in (root / "pets" / path, root / "pets_with_metadata" / f"{i}.png"):
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(i).save(file)
    shutil.make_archive(str(root / "pets"), "zip", root, "pets")
    shutil.make_archive(str(root / "pets"), "gztar", root / "pets")
    named = list(zip(paths, ROWS, strict=True))
    write_table(root / "pets" / "labels.csv", [{"image": path, **row} for path, row in named])
    renamed = [{"photo": path, "kind": row["label"]} for path, row in named]
    write_table(root / "tables" / "pets.tsv", renamed, "\t")
    beside = [{"file_name": f"{i}.png", "label": row["label"], "split": row["split"]} for i, row in enumerate(ROWS)]
    write_table(root / "pets_with_metadata" / "metadata.csv", beside)
    labels = [row["label"] for row in ROWS]
    images = [{"bytes": encoded(i), "path": None} for i in range(24)]
    table = datasets.Dataset.from_dict({"image": images, "kind": labels}).cast_column("image", datasets.Image())
    table.to_parquet(root / "pets.parquet")
    features = datasets.Features({"image": datasets.Array3D((6, 8, 3), "uint8"), "label": datasets.Value("string")})
    arrays = {"image": [np.asarray(picture(i)).tolist() for i in range(24)], "label": labels}
    datasets.Dataset.from_dict(arrays, features).to_parquet(root / "arrays.parquet")
    write_shard(root / "shards" / "train-000.tar", list(range(16)))
    write_shard(root / "shards" / "test-000.tar", list(range(16, 24)))
    for name in ("coarse", "fine"):
        (root / "tables" / name).mkdir()
        table.rename_column("kind", "label").to_parquet(root / "tables" / name / "train.parquet")
    lines = "".join(f"- config_name: {name}\n  data_files: {name}/train.parquet\n" for name in ("coarse", "fine"))
    (root / "tables" / "README.md").write_text(f"---\nconfigs:\n{lines}---\n")
