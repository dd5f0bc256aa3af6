"""The image processor of a timm checkpoint, as transformers' TimmWrapperImageProcessor computes it, without transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform

from hf_transfer.network.damage import read_json

WRAPPER = "TimmWrapperImageProcessor"  # transformers' class, which reads config.json like this file
# Files and keys of config.json with which transformers may choose another processor.
_OTHER_FILES = ("preprocessor_config.json", "processor_config.json")
_OTHER_KEYS = frozenset({"image_processor_type", "feature_extractor_type", "auto_map"})


class TimmProcessor:
    """Turns an image into the input of a timm network with timm's own transform for evaluation."""

    def __init__(self, *, pretrained_cfg: Mapping[str, Any], architecture: str) -> None:
        """`pretrained_cfg`: the preprocessing in timm's format, as in config.json. Other keys are ignored."""
        self.architecture = architecture
        self.data_config: dict[str, Any] = resolve_data_config(dict(pretrained_cfg), model=None, verbose=False)
        self.val_transforms: Any = create_transform(**self.data_config, is_training=False)

    def __call__(self, images: Image.Image, *, return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        """Returns one image as `pixel_values` (1, C, H, W) float32. Only `return_tensors="pt"` is supported."""
        return {"pixel_values": self.val_transforms(images)[None]}

    def save_pretrained(self, folder: Path) -> None:
        """Writes nothing to `folder`, since timm's preprocessing is part of the network's config.json."""


def find_timm_processor(folder: Path) -> TimmProcessor | None:
    """Returns the processor of the timm checkpoint in `folder`, or None if transformers must choose the processor."""
    file = folder / "config.json"
    others = [folder / name for name in _OTHER_FILES if (folder / name).is_file()]
    if not file.is_file() or any(read_json(other).get("image_processor_type") != WRAPPER for other in others):
        return None
    config = read_json(file)
    is_timm = config.get("model_type") in (None, "timm_wrapper") and {"pretrained_cfg", "architecture"} <= config.keys()
    if not is_timm or config.keys() & _OTHER_KEYS:
        return None
    return TimmProcessor(pretrained_cfg=config["pretrained_cfg"], architecture=config["architecture"])
