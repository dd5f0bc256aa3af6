"""What a saved model says of images, through its own preprocessing: of files, or of a labelled data set."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.data.extract import read_pixels, use_fast_layout
from hf_transfer.data.images import IMAGE_SUFFIXES, read_bytes, read_image
from hf_transfer.data.options import ExtractOptions
from hf_transfer.data.pixels import EvaluationImages
from hf_transfer.network.adapters import find_adapter, load_adapted, read_task
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.preprocessing import Preprocessing
from hf_transfer.training.evaluate import compute_image_logits
from hf_transfer.training.metrics import score


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The likeliest labels of one image, most likely first."""

    image: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class _Files:
    """Image files as `data.pixels.Images`."""

    paths: Sequence[Path]
    preprocessing: Preprocessing
    name: str = "images"

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def identity(self) -> dict[str, Any]:
        return {"files": [str(path) for path in self.paths]}

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Pixels (b, H, W, 3)."""
        pictures = (read_image(read_bytes(self.paths[i], str(self.paths[i])), str(self.paths[i])) for i in rows)
        return np.stack([self.preprocessing.pixels(picture) for picture in pictures])

    def prepare(self, pixels: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        """Normalised (b, 3, H, W)."""
        return self.preprocessing.normalize(pixels)


def load_saved(model: str, *, trust_remote_code: bool = False) -> Backbone:
    """A saved classifier with its own head, by folder or Hub id: a checkpoint, or an adapter merged into its base."""
    adapter = find_adapter(model)
    if adapter is not None:
        return load_adapted(adapter)
    return load(model, trust_remote_code=trust_remote_code)


def switch_adapters(checkpoint: str, adapters: Sequence[str], *, trust_remote_code: bool = False) -> Iterator[Backbone]:
    """The classifier of each adapter (folder or Hub id) beside one base, which is read once; labels may differ.

    Raises ValueError for what is no adapter, and for one that was trained on another base.
    """
    base: Backbone | None = None
    for name in adapters:
        folder = find_adapter(name)
        if folder is None:
            raise ValueError(f"adapter={name!r} is no adapter: a folder saved with --no-merge, or a Hub id of one")
        if base is None:
            labels = read_task(folder)["label_names"]
            base = load(checkpoint, labels, trust_remote_code=trust_remote_code)
        yield load_adapted(folder, base=base)


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The files named, and the image files in the folders named, those of each in order.

    Raises ValueError for a path that is not there, and a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.casefold() in IMAGE_SUFFIXES and p.is_file())
            if not inside:
                raise ValueError(f"{path}: no image in this folder")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder (images are read from this machine, not from URLs)")
    return found


def predict(
    backbone: Backbone,
    images: Sequence[Path],
    *,
    top_k: int = 5,
    batch_size: int = 32,
    num_threads: int = 0,
) -> list[Prediction]:
    """The `top_k` likeliest labels of each image, in order.

    Raises BadImageError, naming the file, for one that cannot be read; ValueError for top_k or batch_size below 1.
    """
    if top_k < 1 or batch_size < 1:
        raise ValueError(f"top_k={top_k}, batch_size={batch_size}: choose 1 or more")
    device = Accelerator().device
    model = backbone.model.to(device).eval()
    use_fast_layout(model)
    files = _Files(paths=images, preprocessing=backbone.preprocessing)
    rows = np.arange(len(images))
    predictions: list[Prediction] = []
    for pixels in read_pixels(files, rows, batch_size=batch_size, num_threads=num_threads):
        with torch.inference_mode():
            batch = files.prepare(torch.from_numpy(pixels).to(device), rows)
            probabilities, classes = compute_logits(model, batch).float().softmax(1).sort(1, descending=True)
        for values, order in zip(probabilities[:, :top_k].tolist(), classes[:, :top_k].tolist(), strict=True):
            labels = tuple(backbone.label_names[i] for i in order)
            predictions.append(
                Prediction(image=str(images[len(predictions)]), labels=labels, probabilities=tuple(values))
            )
    return predictions


def evaluate(
    checkpoint: str, data: DataConfig, *, split: str = "test", trust_remote_code: bool = False
) -> dict[str, Any]:
    """Scores of a saved model, with its own head, on one split of a labelled data set (see `training.metrics.score`).

    The data set's classes are the model's by name; it may have fewer, in any order. Raises ValueError for a split that is
    not there, and for a class that the model does not know.
    """
    backbone = load_saved(checkpoint, trust_remote_code=trust_remote_code)
    found = load_data(data)
    chosen = {"train": found.train, "validation": found.validation, "test": found.test}.get(split)
    if chosen is None:
        raise ValueError(f"split={split!r}: {found.name} has no such split; train, validation and test are known")
    unknown = [name for name in found.label_names if name not in backbone.label_names]
    if unknown:
        raise ValueError(
            f"{backbone.source.name} does not know {', '.join(unknown[:5])}; its classes are "
            f"{', '.join(backbone.label_names[:20])}"
        )
    class_of = np.array([backbone.label_names.index(name) for name in found.label_names], np.int64)
    logits, labels = compute_image_logits(
        backbone.chain(),
        EvaluationImages(split=chosen, preprocessing=backbone.preprocessing),
        class_of[chosen.labels],
        accelerator=Accelerator(),
        options=ExtractOptions(),
    )
    return score(logits, labels, backbone.label_names, seed=data.seed)
