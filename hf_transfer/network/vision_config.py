"""Finds the config of the network that takes the images, which may be nested in a checkpoint's config.json.

It is `vision_config` in multimodal checkpoints, and in this package's own models the config of `backbone` or of `body`.
"""

from collections.abc import Iterator, Mapping
from typing import Any


def find_vision_configs(fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the nested configs of image networks in `fields`, the outermost first.

    `fields`: the contents of a config.json, or the attributes of a config of transformers. What is yielded may be changed in
    place.
    """
    wrapped = (fields.get(name) for name in ("backbone", "body"))
    nested = [fields.get("vision_config"), *(each.get("config") for each in wrapped if isinstance(each, dict))]
    for config in nested:
        inner = config if isinstance(config, dict) else getattr(config, "__dict__", None)
        if inner:
            yield inner
            yield from find_vision_configs(inner)
