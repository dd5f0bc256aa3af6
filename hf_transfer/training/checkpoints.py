"""Saves and loads the state from which a run resumes.

A state is one file with everything that the rest of the run depends on. The format is safetensors, with JSON in the header for
all values that are not tensors, so loading a state executes no code. A checksum in the header covers all values. An
interrupted write does not damage the old file, and the state saved before the newest one stays as a reserve.
"""

import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_transfer.errors import ContinuableError
from hf_transfer.network.fingerprint import update_hash
from hf_transfer.processes import run_on_main

log = logging.getLogger(__name__)

STATE, PREVIOUS = "state.safetensors", "state.previous.safetensors"
_TENSOR, _TUPLE, _INT_KEYS = "__tensor__", "__tuple__", "__int_keys__"
# All that a file with wrong bytes can raise while it is read.
_DAMAGE = (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)

Tensors = dict[str, torch.Tensor]


class StateError(RuntimeError):
    """No saved state can be read."""


class StateWriter:
    """Saves states of one run in `folder`, in a background thread, so that training does not wait for the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for left in (*folder.glob(".tmp*"), *folder.glob("*.partial")):  # of a run that was killed while it wrote
            left.unlink(missing_ok=True)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf_transfer-state")
        self._pending: Future[None] | None = None

    def write(self, state: Mapping[str, Any]) -> None:
        """Copies `state` and starts to save the copy. First waits for the previous save, and raises its ContinuableError."""
        self.wait()
        tensors: Tensors = {}
        text = json.dumps(_pack(state, tensors))
        self._pending = self._thread.submit(_write, self.folder, text, tensors)

    def wait(self) -> None:
        """Waits until the last state is on the disk. Raises ContinuableError, with path and remedy, if it cannot be saved."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits as `wait` does, and ends the thread."""
        self._thread.shutdown()
        self.wait()


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Replaces the state in `folder` by `state`, which contains nested dicts and lists of tensors and JSON values.

    Raises ContinuableError if the disk refuses. The former state is then unchanged.
    """
    tensors: Tensors = {}
    text = json.dumps(_pack(state, tensors))
    _write(folder, text, tensors)


def load_state(folder: Path) -> dict[str, Any] | None:
    """Returns the newest undamaged state in `folder`, with its tensors on the CPU, or None if `folder` contains no state.

    Raises StateError if every state in the folder is damaged.
    """
    problems: list[str] = []
    for path in (folder / STATE, folder / PREVIOUS):
        if not path.is_file():
            continue
        try:
            state = _read(path)
        except _DAMAGE as error:
            problems.append(f"the saved state {path} is damaged ({error})")
        else:
            if problems:
                log.warning("%s: resuming from the state that was saved before, %s", problems[0], path.name)
            return state
    if problems:
        raise StateError(f"{problems[0]}: restore the file from a copy, or start fresh without --resume")
    return None


def share_state(folder: Path, accelerator: Accelerator) -> dict[str, Any] | None:
    """Returns, in every process, the state that the main process loads from its `folder`. Other processes read no file."""
    if accelerator.num_processes == 1:
        return load_state(folder)
    tensors: Tensors = {}

    def read() -> tuple[Any, dict[str, tuple[torch.dtype, torch.Size]]] | None:
        state = load_state(folder)
        packed = None if state is None else _pack(state, tensors)
        return None if state is None else (packed, {name: (t.dtype, t.shape) for name, t in tensors.items()})

    shared = run_on_main(read)
    if shared is None:
        return None
    packed, kinds = shared
    for name, (dtype, shape) in kinds.items():
        tensor = tensors.get(name, torch.empty(shape, dtype=dtype)).to(accelerator.device)
        if tensor.numel():
            broadcast(tensor.flatten().view(torch.uint8), from_process=0)  # as bytes: backends lack some dtypes
        tensors[name] = tensor.cpu()
    state: dict[str, Any] = _unpack(packed, tensors)
    return state


def has_state(folder: Path) -> bool:
    """Returns whether `folder` contains a saved state."""
    return (folder / STATE).is_file() or (folder / PREVIOUS).is_file()


def remove_state(folder: Path) -> None:
    """Deletes the states in `folder`, so that a later `--resume` cannot continue an older run."""
    for name in (STATE, PREVIOUS):
        (folder / name).unlink(missing_ok=True)


def remove_reserves(folder: Path) -> None:
    """Deletes the reserve of every state below `folder`, which a finished run does not need: its last state is complete."""
    for state in sorted(folder.rglob(STATE)):
        state.with_name(PREVIOUS).unlink(missing_ok=True)


def _write(folder: Path, text: str, tensors: Tensors) -> None:
    """Writes a state to a temporary file, and renames the file when all of it is on the disk."""
    path = folder / STATE
    partial = folder / f"{STATE}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={"state": text, "checksum": _compute_checksum(text, tensors)})
        _sync(partial)
        if path.exists():
            path.replace(folder / PREVIOUS)
        partial.replace(path)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise ContinuableError(
            f"the state of the run cannot be saved to {path} ({error}): free disk space, or make the folder writable"
        ) from error


def _sync(path: Path) -> None:
    """Waits until `path` is on the disk, so that a power failure cannot lose a file that has been renamed."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    if metadata["checksum"] != _compute_checksum(metadata["state"], tensors):
        raise ValueError("its checksum differs")
    state: dict[str, Any] = _unpack(json.loads(metadata["state"]), tensors)
    return state


def _compute_checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = xxhash.xxh3_128(text.encode())
    for name in sorted(tensors):
        update_hash(digest, name, tensors[name])
    return digest.hexdigest()


def _pack(value: Any, tensors: Tensors) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        # A copy: training goes on while the state is written, and safetensors can store neither tensors that share memory
        # nor memory formats such as channels_last.
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        packed = {str(k): _pack(v, tensors) for k, v in value.items()}
        return {_INT_KEYS: packed} if value and all(isinstance(k, int) for k in value) else packed
    if isinstance(value, tuple):
        return {_TUPLE: [_pack(v, tensors) for v in value]}
    return [_pack(v, tensors) for v in value] if isinstance(value, list) else value


def _unpack(value: Any, tensors: Tensors) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_unpack(v, tensors) for v in value[_TUPLE])
    if _INT_KEYS in value:
        return {int(k): _unpack(v, tensors) for k, v in value[_INT_KEYS].items()}
    return {k: _unpack(v, tensors) for k, v in value.items()}
