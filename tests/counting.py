"""Counts what a training step asks of a device, without a device: on tensors of torch's device `meta`, which have no values."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from hf_transfer import capability
from hf_transfer.data import sending

DEVICE = torch.device("meta")
PINNED: list[torch.Tensor] = []  # tensors that stand for ones in pinned memory, which needs a GPU
WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "_unique", "masked_select", "argwhere")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class OperatorCounter(TorchDispatchMode):
    """Counts the calls of torch's operators, and lists the calls for which a host would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.waits: list[str] = []
        self._literals = _LiteralCounter(self.waits)

    def __enter__(self) -> "OperatorCounter":
        self._literals.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._literals.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.calls += 1
        if self._waits(name, args, kwargs):
            self.waits.append(name)
        return func(*args, **kwargs)

    def _waits(self, name: str, args: Any, kwargs: Any) -> bool:
        on_device = [t.device == DEVICE for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        if not any(on_device):
            device = kwargs.get("device")
            return (
                name == "_to_copy" and device is not None and device.type == "meta" and self._is_slow(args[0], kwargs)
            )
        if name == "_to_copy":
            return kwargs.get("device") == torch.device("cpu")
        if name == "copy_" and args[0].device != args[1].device:
            return args[0].device != DEVICE or self._is_slow(args[1], {"non_blocking": len(args) > 2 and args[2]})
        if name in INDEXING:
            indices = [t for t in tree_flatten(args[1])[0] if isinstance(t, torch.Tensor)]
            return any(t.device != DEVICE or t.dtype is torch.bool for t in indices)
        return name in WAITING

    def _is_slow(self, source: torch.Tensor, kwargs: Any) -> bool:
        """Whether a copy to the device waits. Only copies from pinned memory can go on beside the host."""
        return not kwargs.get("non_blocking") or all(source is not pinned for pinned in PINNED)


class _LiteralCounter(TorchFunctionMode):
    """Lists the tensors that are made of Python numbers on the device: a copy that waits, which torch hides on `meta`."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and result.device == DEVICE:
            self._waits.append(func.__name__)
        return result


@contextmanager
def device_without_values(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate's device is `meta`, on which optimizers may use the kernels of GPUs."""
    fused, foreach = (
        getattr(_foreach_utils, f"_get_{kind}_kernels_supported_devices") for kind in ("fused", "foreach")
    )
    with monkeypatch.context() as patches:
        patches.setattr(Accelerator, "device", property(lambda self: DEVICE))
        for module in (_foreach_utils, importlib.import_module("torch.optim.optimizer")):
            patches.setattr(module, "_get_fused_kernels_supported_devices", lambda: [*fused(), "meta"])
            patches.setattr(module, "_get_foreach_kernels_supported_devices", lambda: [*foreach(), "meta"])
        patches.setattr(capability, "_get_fused_kernels_supported_devices", lambda: [*fused(), "meta"])
        patches.setattr(sending, "pin", _pin)
        patches.setattr(torch, "get_device_module", lambda device: torch.cpu)
        patches.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
        capability.capability_of.cache_clear()
        yield
    PINNED.clear()
    capability.capability_of.cache_clear()


def _pin(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    PINNED.append(torch.from_numpy(array).clone())
    return PINNED[-1]
