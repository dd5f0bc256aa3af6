"""The adapter methods of `peft` that this package offers, and what each accepts.

Each is the identity before its first step, trains in an ordinary loop, keeps its parameters beside the module that it adapts,
and can be merged into it. The tests check all of this.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

DEFAULT_RANK = 16


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of peft: its config class, fixed arguments of that config, and what the config calls rank and alpha."""

    config: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    alpha_argument: str = "lora_alpha"
    has_rank: bool = True
    splits_groups: bool = False  # on a grouped convolution, each group gets its share of the rank


METHODS: Mapping[str, Method] = {
    "lora": Method(config="LoraConfig", splits_groups=True),
    "dora": Method(config="LoraConfig", arguments={"use_dora": True}, splits_groups=True),
    "loha": Method(config="LoHaConfig", alpha_argument="alpha"),
    "ia3": Method(config="IA3Config", arguments={"feedforward_modules": []}, has_rank=False),
}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which adapters, of which size, on which modules of which layers."""

    method: str = "lora"
    rank: int | None = None  # None: 16
    alpha: float | None = None  # the adapter's output is scaled by alpha / rank; None: rank
    targets: str = "auto"  # auto, attention, mlp, all, or a regular expression that is searched in module names
    layers: str = "all"  # or last:K
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"adapter={self.method!r}: choose one of {', '.join(METHODS)}")
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if value is not None and not self.has_rank:
                raise ValueError(f"{name}={value}: {self.method} has no {name}; leave it out")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank}: choose 1 or more")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha}: choose more than 0")
        if self.layers != "all" and not re.fullmatch(r"last:[1-9]\d*", self.layers):
            raise ValueError(f"adapter_layers={self.layers!r}: choose all or last:K with K >= 1, such as last:4")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"targets={self.targets!r}: not attention, mlp, all, nor a regular expression: {error}"
            ) from error

    @property
    def has_rank(self) -> bool:
        """Whether the method has a rank and an alpha."""
        return METHODS[self.method].has_rank

    @property
    def size(self) -> int:
        """The rank, or its default."""
        return self.rank or DEFAULT_RANK

    @property
    def scale(self) -> float:
        """The alpha, or its default."""
        return self.alpha or float(self.size)

    @property
    def name(self) -> str:
        """Method and size, for logs and plans."""
        return f"{self.method} rank {self.size} alpha {self.scale:g}" if self.has_rank else self.method

    def peft_arguments(self) -> dict[str, Any]:
        """Arguments of the method's peft config."""
        method = METHODS[self.method]
        size = {"r": self.size, method.alpha_argument: self.scale} if method.has_rank else {}
        return {**size, **method.arguments}


def is_adaptable(module: nn.Module) -> bool:
    """Whether it is a Linear or Conv2d that does only what its type says, so that an adapter can be merged into it."""
    if parametrize.is_parametrized(module):
        return False
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    if isinstance(module, nn.Conv2d):
        own = type(module)
        # Subclasses pad by themselves (Conv2dSame) or normalize their weight (StdConv2d): an added weight is not the same.
        plain = own.forward is nn.Conv2d.forward and own._conv_forward is nn.Conv2d._conv_forward
        return plain and module.padding_mode == "zeros"
    return False


def find_misfit(adapter: AdapterConfig, module: Any) -> str | None:
    """Why the adapter does not fit this Linear or Conv2d; None if it fits."""
    if not adapter.has_rank:
        return None
    groups = getattr(module, "groups", 1)
    if METHODS[adapter.method].splits_groups and adapter.size % groups:
        return f"rank {adapter.size} is not divisible by its {groups} groups"
    smallest = min(module.weight.shape[0], module.weight[0].numel())
    return f"rank {adapter.size} is larger than the layer ({smallest})" if adapter.size > smallest else None
