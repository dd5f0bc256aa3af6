"""Predicts the labels of image files, PIL images and arrays with a saved classifier and its own preprocessing."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image

from hf_transfer.confidence.record import read_confidence
from hf_transfer.config import ComputeConfig, EngineChoice
from hf_transfer.data.folders import list_folder, note_on_outputs
from hf_transfer.data.images import BadImageError, read_image
from hf_transfer.inference.confidence import ConfidenceRequest, Judgment, make_judge
from hf_transfer.network.adapters import find_adapter, load_adapted, read_task
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.network.preprocessing import Preprocessing
from hf_transfer.prefix.engine_choice import decide_engine
from hf_transfer.prefix.resources import Resources
from hf_transfer.processes import gather
from hf_transfer.targets.target import read_target
from hf_transfer.training.evaluate import compute_logits_and_features

log = logging.getLogger(__name__)

ImageLike = str | Path | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a network predicts for one image: the most likely labels first, or all numbers of a regression in their order."""

    image: str  # the path that the user gave, or "image 3" for a PIL image or array at index 3
    labels: tuple[str, ...]
    values: tuple[float, ...]  # for each label: its probability, or the predicted number
    present: tuple[str, ...] | None = None  # of a model with several labels per image: those above their thresholds
    label_set: tuple[str, ...] | None = None  # with `coverage`: labels that contain the truth, the most likely first
    intervals: tuple[tuple[float, float], ...] | None = None  # with `coverage`: of each number in `labels`
    answers: bool | None = None  # with `max_error`: whether the network answers or abstains
    unlike_training: bool | None = None  # whether the image is unlike all training images; None: not known
    distance: float | None = None  # to the training images, of which 1 is the limit

    @property
    def probabilities(self) -> tuple[float, ...]:
        """The probabilities of the labels, for a classifier."""
        return self.values


class UnreadableImagesError(BadImageError):
    """Some images cannot be read. `problems` has one error per unreadable image, and `predictions` covers all others."""

    def __init__(self, problems: Sequence[BadImageError], predictions: Sequence[Prediction]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems, self.predictions = tuple(problems), tuple(predictions)


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The images to classify, with the interface of `prefix.pixels.Images`."""

    images: Sequence[ImageLike]
    preprocessing: Preprocessing
    name: str = "images"
    problems: dict[int, BadImageError] = field(default_factory=dict)  # by the index of an unreadable image

    def __len__(self) -> int:
        return len(self.images)

    def name_of(self, index: int) -> str:
        return name_image(self.images[index], index)

    @property
    def identity(self) -> dict[str, Any]:
        return {"images": [self.name_of(i) for i in range(len(self))]}

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Returns resized pixels (b, H, W, C) of images `rows`. Unreadable ones are black; `problems` gets the errors."""
        return np.stack([self.preprocessing.pixels(self._decode(int(i))) for i in rows])

    def prepare(self, pixels: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        """Normalizes `pixels` (b, H, W, C). Returns images (b, C, H, W) float32."""
        return self.preprocessing.normalize(pixels)

    def _decode(self, index: int) -> Image.Image:
        try:
            return open_image(self.images[index], self.name_of(index))
        except BadImageError as error:
            self.problems[index] = error
            return Image.new("RGB", (1, 1))


def name_image(image: ImageLike, index: int) -> str:
    """Returns the path that the user gave, or "image 3" for a PIL image or array at index 3."""
    return str(image) if isinstance(image, (str, Path)) else f"image {index}"


def open_image(image: ImageLike, name: str) -> Image.Image:
    """Returns an image in mode RGB. Raises BadImageError, which calls the image `name`, if it cannot be read."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise BadImageError(
                f"{name}: an array {image.shape} of {image.dtype}; give RGB pixels as a uint8 array (H, W, 3)"
            )
        image = Image.fromarray(image)
    elif not isinstance(image, (str, Path, Image.Image)):
        raise BadImageError(
            f"{name}: cannot read {type(image).__name__}; give a path, a PIL image or a uint8 array (H, W, 3)"
        )
    return read_image(image, name)


def load_saved(model: str, *, trust_remote_code: bool = False) -> Backbone:
    """Loads a saved classifier from a folder or a Hub id. If `model` is an adapter, merges the adapter into its base model."""
    adapter = find_adapter(model)
    if adapter is not None:
        return load_adapted(adapter)
    backbone = load(model, trust_remote_code=trust_remote_code)
    return replace(backbone, confidence=read_confidence(backbone.source.folder))


def switch_adapters(checkpoint: str, adapters: Sequence[str], *, trust_remote_code: bool = False) -> Iterator[Backbone]:
    """Loads `checkpoint` once, and yields the network with each adapter (folder or Hub id) and the adapter's labels in turn.

    Raises ValueError for a folder without an adapter, and for an adapter that was trained on another checkpoint.
    """
    base: Backbone | None = None
    for name in adapters:
        folder = find_adapter(name)
        if folder is None:
            raise ValueError(
                f"adapter={name!r} is no adapter: give a model folder saved with --no-merge, or the Hub id of an adapter"
            )
        if base is None:
            task = read_task(folder)
            pooling = task.get("pooling", "auto")
            target = read_target(task, task["label_names"])
            base = load(checkpoint, target, trust_remote_code=trust_remote_code, pooling=pooling)
        yield load_adapted(folder, base=base)


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Returns the given files, and all image files below the given folders, sorted within each folder.

    Raises ValueError for a path that does not exist, and for a folder that cannot be read or has no images.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            top = list_folder(path)
            for note in note_on_outputs(top):
                log.warning("%s: %s", path, note)
            inside = sorted(path / image for image in top.all_images())
            if not inside:
                raise ValueError(f"{path}: no image in this folder or below; give a folder with image files")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder; give a local path (images from URLs are not read)")
    return files


def predict(
    backbone: Backbone,
    images: Sequence[ImageLike],
    *,
    top_k: int = 5,
    batch_size: int = 32,
    num_workers: int = 0,
    engine: EngineChoice = "auto",
    coverage: float | None = None,
    max_error: float | None = None,
) -> list[Prediction]:
    """Returns the `top_k` most likely labels of each image, or the first `top_k` numbers, in the order of `images`.

    An image is a path, a PIL image or an RGB uint8 array (H, W, 3) of any size. `num_workers` threads decode the images and, on
    a CPU, run the network (0: one thread per core). `engine` is the setting of training runs. Moves the model to the
    accelerator's device and into eval mode.

    `coverage` asks for sets of labels, or intervals of numbers, that contain the truth with this probability. `max_error` asks
    to abstain so often that at most this share of the answers is wrong. Models that this package has trained can do both, and
    say whether an image is unlike all training images (see docs/confidence.md).

    Raises ValueError for top_k or batch_size below 1, and for a coverage or error that the model cannot promise. Raises
    UnreadableImagesError, which contains all other predictions, if some images cannot be read.

        predict(load_saved("runs/x/model"), find_images(["photos/"]), top_k=3)
    """
    if top_k < 1 or batch_size < 1:
        raise ValueError(f"top_k={top_k}, batch_size={batch_size}: choose 1 or more for both")
    judge = make_judge(backbone, ConfidenceRequest(coverage=coverage, max_error=max_error))
    compute = ComputeConfig(batch_size=batch_size, num_workers=num_workers, engine=engine)
    resources = Resources(accelerator=Accelerator(), compute=compute)
    inputs = _Inputs(images=images, preprocessing=backbone.preprocessing)
    if not len(inputs):
        return []
    shape = backbone.preprocessing.image_shape
    chosen = decide_engine(backbone.model, inputs, resources, image_shape=shape, num_images=len(inputs))
    model = backbone.model.eval()
    logits, features = compute_logits_and_features(model, judge.inputs, inputs, resources, engine=chosen)
    problems = {i: error for own in gather(inputs.problems) for i, error in own.items()}  # of all processes
    judgment = judge.judge(logits, features)
    activated = backbone.target.activate(torch.from_numpy(logits))
    order = backbone.target.order_outputs(activated)
    predictions = [
        _describe(inputs.name_of(i), backbone.label_names, activated[i].tolist(), order[i].tolist(), top_k, judgment, i)
        for i in range(len(inputs))
        if i not in problems
    ]
    if problems:
        raise UnreadableImagesError([problems[i] for i in sorted(problems)], predictions)
    return predictions


def _describe(
    image: str,
    names: Sequence[str],
    values: Sequence[float],
    order: Sequence[int],
    top_k: int,
    judgment: Judgment,
    row: int,
) -> Prediction:
    """Returns the prediction for image number `row`, with `values` (K,) whose columns users read in `order`."""
    columns = order[:top_k]
    present, sets, intervals = judgment.present, judgment.sets, judgment.intervals
    answers, distances = judgment.answers, judgment.distances
    return Prediction(
        image=image,
        labels=tuple(names[k] for k in columns),
        values=tuple(values[k] for k in columns),
        present=None if present is None else tuple(names[k] for k in order if present[row, k]),
        label_set=None if sets is None else tuple(names[k] for k in order if sets[row, k]),
        intervals=None if intervals is None else tuple((float(a), float(b)) for a, b in intervals[row, columns]),
        answers=None if answers is None else bool(answers[row]),
        unlike_training=None if distances is None else bool(distances[row] > 1),
        distance=None if distances is None else float(distances[row]),
    )
