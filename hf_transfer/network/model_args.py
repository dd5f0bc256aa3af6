"""Reads the setting `model_args`: arguments of an architecture's constructor as a JSON object."""

import json
from typing import Any

_DERIVED = frozenset({"num_classes", "img_size", "image_size", "num_labels", "id2label", "label2id"})


def read_model_args(text: str | None) -> dict[str, Any]:
    """Parses the setting model_args. Raises ValueError if it is no JSON object, or has a key that other settings determine."""
    try:
        given = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f'model_args={text}: this is not JSON ({error}); give an object such as {{"depth": 6}}'
        ) from error
    if not isinstance(given, dict):
        raise ValueError(f'model_args={text}: give a JSON object such as {{"depth": 6}}')
    derived = sorted(_DERIVED & set(given))
    if derived:
        raise ValueError(f"model_args={text}: omit {derived[0]}; labels and --image_size_px determine its value")
    refused = sorted(key for key in given if is_unsafe_argument(key))
    if refused:
        raise ValueError(f"model_args={text}: omit {refused[0]}; weights come from --checkpoint alone")
    return given


def is_unsafe_argument(name: str) -> bool:
    """Whether the constructor argument `name` makes timm load weights or other files, some of which may be pickles."""
    return name.startswith("pretrained") or name in ("checkpoint_path", "cache_dir")
