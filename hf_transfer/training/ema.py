"""An exponential moving average (EMA) of the weights, which a run evaluates and saves instead of the last weights.

arXiv 1803.05407 shows why averaging weights along the training path helps. The formula is the same as in timm
`utils/model_ema.py` (ModelEmaV3), with the warm-up of TensorFlow's ExponentialMovingAverage (first weights fade fast).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor


class Averaged:
    """Moving averages of named tensors, in float32 on the device of each tensor. Integer tensors are copied, not averaged.

    `named` contains the trainable parameters and the running statistics that change. Frozen tensors need no average.
    """

    def __init__(self, named: Mapping[str, torch.Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: choose 0 <= decay < 1, such as 0.999")
        self.decay = decay
        self._updates = 0
        self._averages = {name: _as_average(tensor.detach()).clone() for name, tensor in named.items()}

    @torch.no_grad()
    def restart(self, named: Mapping[str, torch.Tensor]) -> None:
        """Replaces each average by its tensor, as at the start."""
        self._check(named, "restart")
        self._updates = 0
        _copy(named, self._averages)

    @torch.no_grad()
    def update(self, named: Mapping[str, torch.Tensor]) -> None:
        """Moves each average towards its tensor by the share 1 - min(decay, (1 + t) / (10 + t)), after t updates."""
        self._check(named, "update")
        decay = min(self.decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        floats = [name for name, tensor in named.items() if tensor.is_floating_point()]
        if floats:
            live = [own_shard(_as_average(named[name])) for name in floats]
            torch._foreach_lerp_([own_shard(self._averages[name]) for name in floats], live, 1 - decay)
        for name, tensor in named.items():
            if not tensor.is_floating_point():
                self._averages[name].copy_(tensor)

    @contextmanager
    def swapped(self, named: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Replaces the values of the tensors by the averages inside the context. Afterwards the old values are restored."""
        self._check(named, "swapped")
        with torch.no_grad():
            former = {name: tensor.detach().clone() for name, tensor in named.items()}
        try:
            _copy(self._averages, named)
            yield
        finally:
            _copy(former, named)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for `load_state_dict`. The tensors in the state are the averages themselves, not copies."""
        return {"updates": self._updates, "averages": dict(self._averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies saved averages into this object. Raises ValueError if the saved tensors have other names or shapes."""
        self._check(state["averages"], "load_state_dict")
        _copy(state["averages"], self._averages)
        self._updates = state["updates"]

    def _check(self, named: Mapping[str, torch.Tensor], where: str) -> None:
        other = set(named) ^ set(self._averages)
        other |= {n for n in named if n not in other and named[n].shape != self._averages[n].shape}
        if other:
            raise ValueError(
                f"{where}: {len(other)} tensors differ from the averaged tensors in name or shape: "
                f"{', '.join(sorted(other)[:5])}"
            )


def own_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this process's shard of a sharded tensor, and any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as_average(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


@torch.no_grad()
def _copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
