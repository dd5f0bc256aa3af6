"""Imports heavy libraries in less time. A linear probe on stored features takes less time than its imports.

- Each collection of garbage visits all objects, and imports create a million objects that stay. Without collections, the
  imports of a run take a quarter less time.
- torch's compiler, `torch._dynamo`, takes a second. torchvision and timm import it at once, for a question and for a decorator
  that they use later or never.
"""

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

DYNAMO = "torch._dynamo.utils"


@contextmanager
def fast_imports() -> Iterator[None]:
    """Pauses garbage collection in the `with` block, and keeps torchvision and timm from importing torch's compiler there."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with _delayed_dynamo():
            yield
    finally:
        if was_enabled:
            gc.enable()


def exempt_from_collection() -> None:
    """Exempts all present objects from garbage collection, once. For commands, whose modules stay until the process ends."""
    if not gc.get_freeze_count():
        gc.freeze()


@contextmanager
def _delayed_dynamo() -> Iterator[None]:
    """Keeps torchvision (`is_compile_supported`) and timm (`torch.compiler.disable`) from importing `torch._dynamo`."""
    import torch

    if {"torch._dynamo", "torchvision", "timm"} & sys.modules.keys():
        yield
        return
    disable, sys.modules[DYNAMO] = torch.compiler.disable, _DelayedDynamo(DYNAMO)
    torch.compiler.disable = torch._disable_dynamo  # the same decorator, which imports the compiler at the first call
    try:
        yield
    finally:
        torch.compiler.disable = disable
        _remove_stand_in()


class _DelayedDynamo(ModuleType):
    """Stands for `torch._dynamo.utils`. A name that torchvision does not import comes from the real module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _is_compile_supported if name == "is_compile_supported" else getattr(_import_dynamo(), name)


def _is_compile_supported(device_type: str) -> bool:
    return bool(_import_dynamo().is_compile_supported(device_type))


def _import_dynamo() -> Any:
    _remove_stand_in()
    return importlib.import_module(DYNAMO)


def _remove_stand_in() -> None:
    if isinstance(sys.modules.get(DYNAMO), _DelayedDynamo):
        del sys.modules[DYNAMO]
