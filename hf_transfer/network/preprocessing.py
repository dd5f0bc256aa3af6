"""The image preprocessing of a checkpoint. Training, the cache, the saved model and inference share it.

The checkpoint's own timm transform or transformers image processor resizes and crops, so the pixels equal the output of plain
`AutoImageProcessor`. This module only rescales and normalizes, on the device, as that processor does.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedConfig

PARITY = 1e-5  # largest allowed difference from the checkpoint's processor, in normalized pixels (within +-3)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The two steps of preprocessing: image -> uint8 pixels (H, W, 3), and pixels -> normalized floats (B, 3, H, W)."""

    height_px: int
    width_px: int
    interpolation: str
    crop_pct: float | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float  # factor by which pixel values are multiplied before mean and std
    spec: Mapping[str, Any]  # everything that determines the pixels, as JSON values for cache keys
    processor: Any = field(repr=False)  # the checkpoint's image processor, which is saved beside the weights
    resize: Callable[[Image.Image], NDArray[np.uint8]] = field(repr=False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (3, H, W) of one image as the network's input."""
        return 3, self.height_px, self.width_px

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Returns an RGB image as uint8 pixels (H, W, 3), resized and cropped as for the checkpoint's evaluation."""
        return self.resize(image)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns uint8 pixels (B, H, W, 3) as normalized float32 (B, 3, H, W), in channels-last memory on the same device."""
        return self.normalize_floats(pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last))

    def normalize_floats(self, images: torch.Tensor) -> torch.Tensor:
        """Normalizes float32 images (B, 3, H, W) with values from 0 to 255, in place."""
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, 3, 1, 1)
        # Divides as torchvision's ToTensor does, since x / 255 differs from x * (1 / 255) in the last bit.
        images = images.div_(255.0) if self.rescale == 1 / 255 else images.mul_(self.rescale)
        return images.sub_(mean).div_(std)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides warnings of transformers while the `with` block runs, since this package checks the loaded weights itself."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def load_preprocessing(folder: Path, *, trust_remote_code: bool = False) -> Preprocessing:
    """Loads the preprocessing of the checkpoint in `folder` (Hub layout).

    Raises ValueError if the checkpoint names no preprocessing, or one that does more than resize, crop, rescale and normalize.
    """
    try:
        with quiet_transformers():
            processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the checkpoint {folder.name} names no image preprocessing that transformers can read ({error}). "
            "Remedy: add preprocessor_config.json (or timm's `pretrained_cfg` in config.json) to the checkpoint"
        ) from error
    is_timm = hasattr(processor, "val_transforms")
    preprocessing = _from_timm(processor) if is_timm else _from_transformers(processor)
    _check_parity(preprocessing)
    return preprocessing


def preprocessing_of_config(config: PreTrainedConfig, name: str) -> Preprocessing:
    """Returns the preprocessing that `load_preprocessing` would load from a folder that contains only the config `config`."""
    with tempfile.TemporaryDirectory(prefix="hf_transfer-") as parent:
        config.save_pretrained(Path(parent, name))
        return load_preprocessing(Path(parent, name))


def _from_timm(processor: Any) -> Preprocessing:
    config = processor.data_config
    *geometry, to_tensor, normalize = processor.val_transforms.transforms
    if not (hasattr(normalize, "mean") and "ToTensor" in type(to_tensor).__name__):
        raise ValueError(f"the checkpoint's transform must end with ToTensor and Normalize: {processor.val_transforms}")

    def resize(image: Image.Image) -> NDArray[np.uint8]:
        for transform in geometry:
            image = transform(image)
        return np.asarray(image)

    _, height, width = config["input_size"]
    return Preprocessing(
        height_px=height,
        width_px=width,
        interpolation=str(config["interpolation"]),
        crop_pct=config["crop_pct"],
        mean=_three(config["mean"]),
        std=_three(config["std"]),
        rescale=1 / 255,
        spec={"library": "timm", "version": timm.__version__, **{k: str(v) for k, v in config.items()}},
        processor=processor,
        resize=resize,
    )


def _from_transformers(processor: Any) -> Preprocessing:
    def resize(image: Image.Image) -> NDArray[np.uint8]:
        output = processor(images=image, do_rescale=False, do_normalize=False, return_tensors="pt")
        pixels: torch.Tensor = output["pixel_values"][0]
        return pixels.to(torch.uint8).permute(1, 2, 0).contiguous().numpy()

    spec = {k: v for k, v in processor.to_dict().items() if not k.startswith("_")}
    height, width, _ = resize(Image.new("RGB", (96, 64))).shape
    normalizes = getattr(processor, "do_normalize", True)
    resample = Image.Resampling(getattr(processor, "resample", None) or Image.Resampling.BILINEAR)
    return Preprocessing(
        height_px=height,
        width_px=width,
        interpolation=resample.name.lower(),
        crop_pct=getattr(processor, "crop_pct", None),
        mean=_three(processor.image_mean) if normalizes else (0.0, 0.0, 0.0),
        std=_three(processor.image_std) if normalizes else (1.0, 1.0, 1.0),
        rescale=float(processor.rescale_factor) if getattr(processor, "do_rescale", True) else 1.0,
        spec={"library": "transformers", "class": type(processor).__name__, **_jsonable(spec)},
        processor=processor,
        resize=resize,
    )


def _three(values: Any) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ValueError(f"the checkpoint expects images of {len(values)} channels, but RGB images have 3")
    return float(values[0]), float(values[1]), float(values[2])


def _jsonable(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, bool | int | float | str | None) else str(v) for k, v in spec.items()}


def _check_parity(preprocessing: Preprocessing) -> None:
    """Raises ValueError if the normalized pixels of a noise image differ from the output of the checkpoint's own processor."""
    noise = np.random.default_rng(0).integers(0, 256, (113, 149, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    theirs = preprocessing.processor(images=image, return_tensors="pt")["pixel_values"]
    ours = preprocessing.normalize(torch.from_numpy(preprocessing.pixels(image).copy())[None])
    difference = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
    if not difference <= PARITY:
        raise ValueError(
            f"{type(preprocessing.processor).__name__} does more than resize, crop, rescale and normalize (its output "
            f"differs from these four steps by {difference:.2g}): choose a checkpoint without other steps"
        )
