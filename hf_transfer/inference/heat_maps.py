"""Explains predictions image by image, and draws each explanation: the image as the network sees it, and its heat map."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hf_transfer.config import ExplainBy
from hf_transfer.inference.explain import MapCut, choose_map_cut, explain, occlude
from hf_transfer.inference.predict import ImageLike, Prediction, name_image, open_image
from hf_transfer.locations import chain_dir, mark_output
from hf_transfer.logs import open_bar
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain
from hf_transfer.network.preprocessing import Pixels
from hf_transfer.processes import run_on_main

log = logging.getLogger(__name__)

BATCH = 16
SOFTWARE = "hf_transfer explanation"  # in each PNG, which tells it from other pictures
LEAST_PX = 224  # smaller images are enlarged
STRENGTH = 0.65  # largest share of the heat map's color in a pixel
# From cold to hot; as dark to bright, so that it also reads in gray.
COLORS = np.array([[20, 11, 70], [120, 28, 109], [203, 71, 72], [246, 140, 31], [252, 255, 164]], np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """The regions of one image that speak for a label."""

    image: str  # the path that the user gave, or "image 3" for a PIL image or array at index 3
    label: str
    pixels: Pixels  # (H, W, C) what the network sees: uint8, or normalized float32
    heat: NDArray[np.float32]  # (H, W) from 0 to 1

    def draw(self) -> Image.Image:
        """Returns a picture of the image, with the heat map on top of it at its right."""
        return draw_explanation(self.pixels, self.heat)


@dataclass(frozen=True, kw_only=True)
class Explainer:
    """A network with the method that explains its predictions: Grad-CAM at a cut, or occlusion."""

    backbone: Backbone
    chain: Chain
    map_cut: MapCut | None  # None: occlusion

    def write(self, predictions: Sequence[Prediction], folder: Path) -> list[Path]:
        """Writes a PNG to `folder` for each prediction, which explains its first label. Returns the paths of the PNGs.

        The predictions are of image files. Each PNG has the name of its image, in the same subfolders. With several processes,
        the main process computes and writes all of them.
        """
        return run_on_main(lambda: self._write(predictions, folder))

    def explain(self, images: Sequence[ImageLike], labels: Sequence[str]) -> Iterator[Explanation]:
        """Yields the explanation of one label for each image, in batches. Raises BadImageError for an unreadable image."""
        with open_bar(total=len(images), title="explanations", unit="img") as bar:
            for start in range(0, len(images), BATCH):
                rows = range(start, min(start + BATCH, len(images)))
                shown = [name_image(images[i], i) for i in rows]
                opened = [open_image(images[i], name) for i, name in zip(rows, shown, strict=True)]
                pixels = np.stack([self.backbone.preprocessing.pixels(image) for image in opened])
                heat = self._compute_heat(pixels, [labels[i] for i in rows])
                for i, name, own_pixels, own_heat in zip(rows, shown, pixels, heat, strict=True):
                    yield Explanation(image=name, label=labels[i], pixels=own_pixels, heat=own_heat)
                bar.update(len(rows))

    def _write(self, predictions: Sequence[Prediction], folder: Path) -> list[Path]:
        paths = find_pictures([prediction.image for prediction in predictions], folder)
        folder.mkdir(parents=True, exist_ok=True)
        mark_output(folder)
        explanations = self.explain([Path(p.image) for p in predictions], [p.labels[0] for p in predictions])
        for path, explanation in zip(paths, explanations, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            mark = PngInfo()
            mark.add_text("Software", SOFTWARE)
            explanation.draw().save(path, pnginfo=mark)
        return paths

    def _compute_heat(self, pixels: NDArray[Any], labels: Sequence[str]) -> NDArray[np.float32]:
        """Returns the heat maps (B, H, W) of images with `pixels` (B, H, W, C), for one label each."""
        device = next(self.backbone.model.parameters()).device
        images = self.backbone.preprocessing.normalize(torch.from_numpy(pixels).to(device))
        outputs = torch.tensor([self.backbone.label_names.index(label) for label in labels], device=device)
        if self.map_cut is None:
            heat = occlude(self.chain, images, outputs=outputs)
        else:
            heat = explain(self.chain, images, outputs=outputs, at=self.map_cut)
        values: NDArray[np.float32] = heat.cpu().numpy()
        return values


def make_explainer(backbone: Backbone, *, method: ExplainBy = "grad_cam", at: str | None = None) -> Explainer:
    """Returns the explainer of a network. `at`: the cut for Grad-CAM.

    Raises ValueError for an unknown method, and as `choose_map_cut` does.
    """
    if method not in get_args(ExplainBy):
        raise ValueError(f"method={method!r}: choose {' or '.join(map(repr, get_args(ExplainBy)))}")
    chain = backbone.chain(cache_dir=chain_dir())
    map_cut = choose_map_cut(chain, at) if method == "grad_cam" else None
    if map_cut is not None:
        layout = map_cut.layout
        log.info("Grad-CAM at the cut %s: %d x %d positions", map_cut.cut.name, layout.height, layout.width)
    return Explainer(backbone=backbone, chain=chain, map_cut=map_cut)


def find_pictures(images: Sequence[str], folder: Path) -> list[Path]:
    """Returns the path of the picture in `folder` that explains each image file.

    Raises ValueError if a picture would replace a file that is no explanation, or if `folder` contains one of the images: other
    commands read no images in a folder of explanations.
    """
    pictures = [folder / name for name in name_pictures(images)]
    for path in pictures:
        if path.exists() and not _is_explanation(path):
            raise ValueError(f"explain: {path} exists, and is no explanation that may be replaced: give another folder")
    for parent in {Path(image).parent for image in images}:
        if parent.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"explain: {folder} contains images to explain, from {parent}: give another folder")
    return pictures


def _is_explanation(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError):
        return False


def name_pictures(images: Sequence[str]) -> list[Path]:
    """Returns a PNG's path for each image file, relative to the deepest folder that contains all images.

    The PNG has the name of the image. If two images differ only in the suffix, the names of all PNGs contain it.

    >>> [path.as_posix() for path in name_pictures(["photos/a/1.jpg", "photos/b/1.jpg"])]
    ['a/1.png', 'b/1.png']
    >>> [path.as_posix() for path in name_pictures(["photos/1.jpg", "photos/1.tif"])]
    ['1.jpg.png', '1.tif.png']
    """
    paths = [Path(image).absolute() for image in images]
    root = commonpath([path.parent for path in paths]) if paths else ""
    relative = [path.relative_to(root) for path in paths]
    if len({path.with_suffix("") for path in relative}) == len(set(relative)):
        return [path.with_suffix(".png") for path in relative]
    return [path.with_name(f"{path.name}.png") for path in relative]


def draw_explanation(pixels: Pixels, heat: NDArray[np.float32]) -> Image.Image:
    """Returns a picture of twice the image's width: the image, and the image in gray under its heat map.

    `pixels` (H, W, C): uint8, or normalized float32, whose contrast is stretched. `heat` (H, W): from 0 to 1.
    """
    shown = _as_rgb(pixels)
    gray = np.repeat(shown.mean(2, keepdims=True), 3, axis=2)
    share = STRENGTH * heat[..., None]
    over = (1 - share) * gray + share * _color(heat)
    side_by_side = np.concatenate([shown, over], axis=1).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(side_by_side)
    factor = -(-LEAST_PX // min(heat.shape))
    return picture if factor == 1 else picture.resize((factor * picture.width, factor * picture.height))


def _color(heat: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns colors (H, W, 3) from 0 to 255 for values (H, W) from 0 to 1."""
    stops = np.linspace(0, 1, len(COLORS))
    return np.stack([np.interp(heat, stops, channel) for channel in COLORS.T], axis=-1).astype(np.float32)


def _as_rgb(pixels: Pixels) -> NDArray[np.float32]:
    values = pixels.astype(np.float32)
    if pixels.dtype != np.uint8:
        low, high = values.min(), values.max()
        values = 255 * (values - low) / max(float(high - low), 1e-6)
    return np.repeat(values, 3, axis=2) if values.shape[2] == 1 else values
