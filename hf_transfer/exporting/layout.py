"""config.json and preprocessor_config.json beside exported files, in the layout that transformers.js and optimum load.

A timm checkpoint states its preprocessing in config.json only. The preprocessor_config.json that is written for it repeats the
steps for programs without timm. It names transformers' wrapper of timm as its class, so transformers still reads config.json.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from torchvision.transforms import CenterCrop, Resize

from hf_transfer.network.backbone import Backbone
from hf_transfer.network.damage import find_weights, read_json
from hf_transfer.network.preprocessing import SETTINGS_FILE, Preprocessing
from hf_transfer.network.timm_processor import WRAPPER
from hf_transfer.network.transformers_types import is_transformers_model

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers


def write_layout(backbone: Backbone, folder: Path) -> None:
    """Completes both files in a folder that has the model's weights, or writes them to a folder of exported files alone.

    Files of a saved model that are complete stay as they are. In a folder without weights, files may be of another model.
    """
    source = backbone.source.folder
    own = folder / "config.json"
    is_saved = own.is_file() and bool(find_weights(folder))
    config = read_json(own) if is_saved else _read_config(backbone)
    completed = {**config, **_list_entries(backbone, config)}
    if not is_saved or completed != config:
        _write_json(own, completed)
    if is_saved and (folder / SETTINGS_FILE).is_file():
        return
    (folder / SETTINGS_FILE).unlink(missing_ok=True)
    if hasattr(backbone.preprocessing.processor, "val_transforms"):
        settings = make_settings(backbone.preprocessing)
        if settings is not None:
            _write_json(folder / SETTINGS_FILE, settings)
    else:
        backbone.preprocessing.processor.save_pretrained(folder)
    for code in source.glob("*.py"):  # the class of a processor or network may come with the checkpoint
        if not is_saved or not (folder / code.name).exists():
            shutil.copy(code, folder / code.name)


def make_settings(preprocessing: Preprocessing) -> dict[str, Any] | None:
    """Returns the steps of a timm transform as settings of an image processor; None for steps that such settings lack."""
    steps = list(preprocessing.processor.val_transforms.transforms)
    if [type(step) for step in steps[:2]] != [Resize, CenterCrop] or preprocessing.interpolation not in RESAMPLE:
        return None
    size, colors = steps[0].size, preprocessing.colors
    assert colors is not None
    is_edge = isinstance(size, int) or len(size) == 1
    edge = size if isinstance(size, int) else size[0]
    return {
        "image_processor_type": WRAPPER,
        "do_resize": True,
        "size": {"shortest_edge": edge} if is_edge else {"height": size[0], "width": size[1]},
        "resample": RESAMPLE[preprocessing.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": preprocessing.height_px, "width": preprocessing.width_px},
        "do_rescale": True,
        "rescale_factor": colors.rescale,
        "do_normalize": True,
        "image_mean": list(colors.mean),
        "image_std": list(colors.std),
    }


def _read_config(backbone: Backbone) -> dict[str, Any]:
    """Returns the network's own config or, for timm, that of its checkpoint. A stack that is not saved has no checkpoint."""
    if is_transformers_model(backbone.model):
        config: dict[str, Any] = json.loads(backbone.model.config.to_json_string())
        return config
    return backbone.source.read_config()


def _list_entries(backbone: Backbone, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of config.json that say what the outputs are, for this target."""
    names = backbone.label_names
    entries = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        **backbone.target.to_config(),
    }
    if backbone.library != "timm":
        return entries
    data_config = dict(backbone.preprocessing.processor.data_config)
    cfg = {**config.get("pretrained_cfg", {})}
    changed = {key: _to_lists(value) for key, value in data_config.items() if _to_lists(value) != cfg.get(key)}
    entries |= {"model_type": "timm_wrapper", "label_names": list(names), "num_classes": len(names)}
    return {**entries, "pretrained_cfg": {**cfg, **changed}}


def _to_lists(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
