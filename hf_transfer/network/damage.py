"""Reads files of a checkpoint, adapter or run that may be damaged. The error for a damaged file names the file and the remedy.

Errors of libraries become a ValueError here, so that no caller has to know how safetensors, json, timm or transformers fail.
"""

import functools
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from traceback import walk_tb
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from hf_transfer.config import ModelConfig

P = ParamSpec("P")
R = TypeVar("R")

MAX_CLASSES = 10**6
# The files of weights in order of preference, as transformers chooses. An index names the files of weights in shards.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_JSON_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
_REMEDY = "download the file again (hf download --force-download), or copy it again from its source"
# Errors that libraries raise for a file with the right syntax and wrong contents.
_WRONG_CONTENTS = (
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    SafetensorError,
    StrictDataclassError,
)


def read_json(file: Path) -> dict[str, Any]:
    """Returns the JSON object in `file`. Raises ValueError if the file is damaged, and OSError if it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: this is not JSON ({error}); {_REMEDY}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it is a JSON {type(content).__name__}, not an object; {_REMEDY}")
    return content


def check_files(folder: Path) -> None:
    """Raises ValueError if a JSON file or the header of a weights file in a checkpoint folder is damaged.

    Also refuses a pickle that contains anything but tensors. Damaged values of the weights cannot be recognized.
    """
    for name in _JSON_FILES:
        if (folder / name).exists():
            _check_is_file(folder / name)
            read_json(folder / name)
    _check_num_classes(folder / "config.json")
    for file in find_weights(folder):
        if is_pickled(file):
            _read_pickled(file)
        else:
            check_weights(file)


def check_weights(file: Path) -> None:
    """Raises ValueError if a safetensors file is missing, no regular file, or has a damaged header."""
    _check_is_file(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); {_REMEDY}") from error


def find_weights(folder: Path) -> list[Path]:
    """Returns the files of weights that a checkpoint folder uses: safetensors or, if there are none, pickles.

    Returns [] if there are no weights. Raises ValueError if an index of weights in shards is damaged.
    """
    name = next((name for name in WEIGHTS if (folder / name).exists()), None)
    if name is None or not name.endswith(".json"):
        return [] if name is None else [folder / name]
    _check_is_file(folder / name)
    names = read_json(folder / name).get("weight_map")
    if not isinstance(names, dict) or not names or not all(map(_is_file_name, names.values())):
        raise ValueError(f"{folder / name} is damaged: weight_map must name files in the same folder; {_REMEDY}")
    return [folder / name for name in sorted(set(names.values()))]


def is_pickled(file: Path) -> bool:
    """Whether a file of weights is a pickle."""
    return file.suffix == ".bin"


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields name and value of the tensors in a checkpoint's files."""
    for path in find_weights(folder):
        if is_pickled(path):
            yield from _read_pickled(path).items()
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def _read_pickled(file: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors in a pickle, without running its code. Raises ValueError if it contains anything else."""
    _check_is_file(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged or hostile pickle makes torch raise errors of any class
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), "")
        raise ValueError(
            f"{file} is damaged, or contains more than tensors, which is refused because a pickle can run code "
            f"({reason.strip() or str(error).partition(chr(10))[0]}); {_REMEDY}, or choose a checkpoint with safetensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{file} contains more than a dictionary of tensors; choose a checkpoint with safetensors")
    return content


def explain_damage(
    load: Callable[Concatenate[str | ModelConfig, P], R],
) -> Callable[Concatenate[str | ModelConfig, P], R]:
    """Decorates a function that loads a checkpoint: an error about wrong contents of a file becomes a ValueError."""

    @functools.wraps(load)
    def load_or_explain(checkpoint: str | ModelConfig, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return load(checkpoint, *args, **kwargs)
        except (ValueError, *_WRONG_CONTENTS) as error:
            if isinstance(error, ValueError) and _is_own(error):
                raise
            name = checkpoint.checkpoint if isinstance(checkpoint, ModelConfig) else checkpoint
            raise ValueError(
                f"{name} cannot be loaded: its config.json, preprocessor_config.json or weights are damaged or not "
                f"supported ({type(error).__name__}: {error}); download the checkpoint again, or choose another"
            ) from error

    return load_or_explain


def _is_own(error: BaseException) -> bool:
    """Whether this package raised the error, and not one of the libraries that it calls."""
    module = "" if error.__traceback__ is None else list(walk_tb(error.__traceback__))[-1][0].f_globals["__name__"]
    return module.startswith("hf_transfer.")


def _check_num_classes(config_file: Path) -> None:
    """Raises ValueError for a number of classes with which transformers would fill the memory by names of classes."""
    config = read_json(config_file)
    for name in ("num_classes", "num_labels"):
        value = config.get(name)
        if value is not None and not (isinstance(value, int) and 0 <= value <= MAX_CLASSES):
            raise ValueError(f"{config_file} is damaged: {name} is {value!r}, not 0 to {MAX_CLASSES}; {_REMEDY}")


def _is_file_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.endswith((".safetensors", ".bin"))
        and PurePosixPath(name).name == name
        and "\\" not in name
    )


def _check_is_file(file: Path) -> None:
    if not file.is_file():  # opening a FIFO or a device may block forever
        kind = "is not a regular file" if file.exists() else "is missing"
        raise ValueError(f"{file} {kind}; {_REMEDY}")
