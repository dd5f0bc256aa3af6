"""Saves and loads the state from which a run resumes.

A state is one file with everything that the rest of the run depends on. An interrupted write does not damage the old file. The
format is safetensors, with JSON in the header for all values that are not tensors, so loading a state executes no code.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

STATE = "state.safetensors"
_TENSOR, _TUPLE, _INT_KEYS = "__tensor__", "__tuple__", "__int_keys__"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Replaces the state file in `folder` by `state`, which contains nested dicts and lists of tensors and JSON values."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_pack(state, tensors))
    partial = folder / f"{STATE}.partial"
    save_file(tensors, partial, metadata={"state": text})
    partial.replace(folder / STATE)


def load_state(folder: Path) -> dict[str, Any] | None:
    """Returns the state in `folder` with its tensors on the CPU, or None if the folder contains no saved state."""
    if not has_state(folder):
        return None
    with safe_open(folder / STATE, framework="pt") as file:
        packed = json.loads(file.metadata()["state"])
        state: dict[str, Any] = _unpack(packed, file)
    return state


def has_state(folder: Path) -> bool:
    """Returns whether `folder` contains a saved state."""
    return (folder / STATE).is_file()


def remove_state(folder: Path) -> None:
    """Deletes the state in `folder`, so that a later `--resume` cannot continue an older run."""
    (folder / STATE).unlink(missing_ok=True)


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        # safetensors can store neither tensors that share memory nor memory formats such as channels_last: store a copy.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: name}
    if isinstance(value, dict):
        packed = {str(k): _pack(v, tensors) for k, v in value.items()}
        return {_INT_KEYS: packed} if value and all(isinstance(k, int) for k in value) else packed
    if isinstance(value, tuple):
        return {_TUPLE: [_pack(v, tensors) for v in value]}
    return [_pack(v, tensors) for v in value] if isinstance(value, list) else value


def _unpack(value: Any, file: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(v, file) for v in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return file.get_tensor(value[_TENSOR])
    if _TUPLE in value:
        return tuple(_unpack(v, file) for v in value[_TUPLE])
    if _INT_KEYS in value:
        return {int(k): _unpack(v, file) for k, v in value[_INT_KEYS].items()}
    return {k: _unpack(v, file) for k, v in value.items()}
