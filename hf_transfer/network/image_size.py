"""Gives a pretrained network another input size (`--image_size_px`), so that plain timm or transformers loads the result.

- A network that takes any size (convolutional networks, rotary or interpolated position embeddings) stays unchanged.
- timm creates a network again with its argument `img_size`, and resizes tables of positions while it loads the weights.
- transformers resizes tables of positions with the network's own `interpolate_pos_encoding`. Their new values replace the
  weights, since the saved network must not depend on an argument of `forward`.
"""

import copy
import inspect
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_transfer.network.forward import compute_logits, eval_mode
from hf_transfer.network.preprocessing import quiet_transformers
from hf_transfer.network.vision_config import find_vision_configs
from hf_transfer.network.weights import shorten_names

SAME_RELATIVE = 1e-4  # largest allowed difference from the network's own interpolation, relative to the largest value
SIZE_STEP_PX = 32  # most networks halve the grid five times
NUM_STEPS = 8  # smaller and larger sizes that are tried for an error message
MAX_LETTERS = 300  # of a library's reason in an error message

INTERPOLATE = "interpolate_pos_encoding"  # a method of transformers' embeddings, and an argument of `forward`

_FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, AssertionError, LookupError, ArithmeticError)


def resize_network(model: nn.Module, before: tuple[int, int, int], image_size_px: int) -> nn.Module:
    """Returns `model` for square images, with resized tables of positions. The result may be `model` itself.

    `before`: the shape (C, H, W) of the images that `model` takes. Raises ValueError, with sizes that are possible, if the
    network does not take images of this size.
    """
    patch_px = _find_patch_size(model)
    if image_size_px % patch_px:
        below = image_size_px - image_size_px % patch_px
        sizes = " or ".join(str(size) for size in (below, below + patch_px) if size)
        raise ValueError(f"image_size_px={image_size_px}: the network's patches have {patch_px} pixels; choose {sizes}")
    resize: Any = _resize_transformers if isinstance(model, PreTrainedModel) else _resize_timm
    try:
        resized: nn.Module = resize(model, before, image_size_px)
    except _FAILURES as error:
        reason, nearest = " ".join(str(error).split()), list[int]()
        if names := re.findall(r"size mismatch for (\S+):", reason):
            reason = f"timm does not resize {shorten_names(names)}"
        else:
            nearest = _find_sizes(lambda size: resize(copy.deepcopy(model), before, size), image_size_px, patch_px)
        others = " or ".join(str(size_px) for size_px in nearest if size_px != before[1])
        raise ValueError(
            f"image_size_px={image_size_px}: {type(model).__name__} does not take images of this size "
            f"({reason[:MAX_LETTERS]}); {f'choose {others}, or ' if others else ''}omit image_size_px"
        ) from error
    return resized


def _find_sizes(resize: Callable[[int], nn.Module], image_size_px: int, patch_px: int) -> list[int]:
    """Returns the nearest smaller and the nearest larger size for which `resize` succeeds."""
    step = math.lcm(SIZE_STEP_PX, patch_px)
    below, above = -(-image_size_px // step) - 1, image_size_px // step + 1
    smaller = (step * i for i in range(below, max(below - NUM_STEPS, 0), -1))
    larger = (step * i for i in range(above, above + NUM_STEPS))
    sizes = (next((s for s in candidates if _succeeds(resize, s)), None) for candidates in (smaller, larger))
    return [size_px for size_px in sizes if size_px is not None]


def _succeeds(resize: Callable[[int], nn.Module], size_px: int) -> bool:
    try:
        resize(size_px)
    except _FAILURES:
        return False
    return True


def _find_patch_size(model: nn.Module) -> int:
    """Returns the side of the patches that attention or mixing layers see as tokens, or 1 for other networks."""
    if isinstance(model, PreTrainedModel):
        configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
        owners = [c for c in configs if hasattr(c, "num_attention_heads") or hasattr(c, "num_heads")]
        sizes = [getattr(owner, "patch_stride", None) or getattr(owner, "patch_size", None) for owner in owners]
    else:
        sizes = [m.patch_size for m in model.modules() if hasattr(m, "patch_size") and hasattr(m, "proj")]
    return max((max(size) if isinstance(size, tuple | list) else int(size) for size in sizes if size), default=1)


def _check_forward(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Raises an error if `model` does not compute finite logits of images of `shape`."""
    with eval_mode(model), torch.no_grad():
        logits = compute_logits(model, _noise(shape))
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite")


def _noise(shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


# --- timm -------------------------------------------------------------------------------------------------------------


def _resize_timm(model: Any, before: tuple[int, int, int], image_size_px: int) -> nn.Module:
    """Returns the network that timm creates with `img_size`, or `model` if its constructor has no such argument."""
    arguments = {k: v for k, v in model._model_args.items() if k not in ("num_classes", "img_size")}
    cfg = {k: v for k, v in model.pretrained_cfg.items() if k not in ("source", "custom_load", "label_offset")}
    # timm reads from input_size which grid a table of positions has.
    cfg |= {"input_size": before, "num_classes": model.num_classes, "state_dict": model.state_dict()}
    resized: Any = model
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"timm\.")  # its interpolation uses deprecated indexing
            resized = timm.create_model(
                cfg["architecture"],
                pretrained=True,
                pretrained_cfg=cfg,
                num_classes=model.num_classes,
                img_size=image_size_px,
                **arguments,
            ).eval()
        resized.pretrained_cfg.pop("state_dict", None)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    _check_forward(resized, (before[0], image_size_px, image_size_px))
    return resized  # type: ignore[no-any-return]


# --- transformers -----------------------------------------------------------------------------------------------------


def _resize_transformers(model: PreTrainedModel, before: tuple[int, int, int], image_size_px: int) -> nn.Module:
    """Returns `model` if it takes images of this size, or else the same class with resized tables of positions."""
    shape = (before[0], image_size_px, image_size_px)
    resized = model
    try:
        _check_forward(model, shape)
        _compare_interpolated(model, model, _noise(shape))
    except _FAILURES as error:
        resized = _rebuild(model, image_size_px, error)
        _check_forward(resized, shape)
        _compare_interpolated(model, resized, _noise(shape))
    if isinstance(getattr(resized.config, "pretrained_cfg", None), dict):  # the preprocessing of a greedy stack
        resized.config.pretrained_cfg = {**resized.config.pretrained_cfg, "input_size": list(shape)}
    return resized


def _rebuild(model: PreTrainedModel, image_size_px: int, error: Exception) -> PreTrainedModel:
    """Returns a network of the same class and weights for images of this size, with interpolated tables of positions.

    Raises `error`, which `model` raises for such images, if no table depends on the size. Raises ValueError if transformers
    does not interpolate one of the tables.
    """
    config = copy.deepcopy(model.config)
    if not _set_image_size(config, image_size_px):
        raise error
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        resized: PreTrainedModel = type(model)(config).eval()
    state = model.state_dict()
    tables = {name: tensor.shape for name, tensor in resized.state_dict().items() if tensor.shape != state[name].shape}
    if not tables:
        raise error
    for name, shape in tables.items():
        state[name] = _interpolate(model, name, shape, image_size_px)
    resized.load_state_dict(state)
    return resized


def _set_image_size(config: PreTrainedConfig, image_size_px: int) -> bool:
    """Writes the image size into `config`, or into the config of its vision network, in place. Returns False without one."""
    for fields in (vars(config), *find_vision_configs(vars(config))):
        if fields.get("image_size"):
            fields["image_size"] = image_size_px if isinstance(fields["image_size"], int) else [image_size_px] * 2
            return True
    return False


def _interpolate(model: PreTrainedModel, name: str, shape: torch.Size, image_size_px: int) -> torch.Tensor:
    """Returns the table of positions `name`, interpolated to `shape` by the method of the module that uses the table."""
    parts = name.split(".")
    modules = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) - 1, 0, -1)]
    owner: Any = next((module for module in modules if hasattr(module, INTERPOLATE)), None)
    if owner is None:
        raise ValueError(f"transformers does not resize {name}")
    given = {
        "embeddings": torch.zeros(1, *shape[-2:]),
        "pos_embeds": model.state_dict()[name],
        "height": image_size_px,
        "width": image_size_px,
    }
    wanted = inspect.signature(owner.interpolate_pos_encoding).parameters
    with torch.no_grad():
        table: torch.Tensor = owner.interpolate_pos_encoding(**{argument: given[argument] for argument in wanted})
    return table.reshape(shape)


def _compare_interpolated(model: PreTrainedModel, resized: PreTrainedModel, pixels: torch.Tensor) -> None:
    """Raises ValueError if `resized` does not compute what `model` computes with `interpolate_pos_encoding=True`.

    Without this argument, a network has no other table of positions than those that its forward resizes itself.
    """
    name = next((name for name, module in model.named_modules() if _takes_flag(module)), None)
    if name is None:
        return
    with eval_mode(model), eval_mode(resized), torch.no_grad():
        expected = model.get_submodule(name)(pixels, **{INTERPOLATE: True})[0]
        difference = (resized.get_submodule(name)(pixels)[0] - expected).abs().max()
    if not difference <= SAME_RELATIVE * expected.abs().max():
        raise ValueError(f"it does not compute what it computes with {INTERPOLATE}=True")


def _takes_flag(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and INTERPOLATE in inspect.signature(module.forward).parameters
