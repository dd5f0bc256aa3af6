"""The adapter methods of `peft` that this package offers, and what each accepts.

Each is the identity before its first step, trains in an ordinary loop, keeps its parameters beside the module that it adapts,
and can be merged into it. The tests check all of this.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from hf_transfer.config import AdapterConfig, AdapterName


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of peft: its config class, fixed arguments of that config, and what the config calls rank and alpha."""

    config: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    alpha_argument: str = "lora_alpha"
    splits_groups: bool = False  # on a grouped convolution, each group gets its share of the rank


METHODS: Mapping[AdapterName, Method] = {
    "lora": Method(config="LoraConfig", splits_groups=True),
    "dora": Method(config="LoraConfig", arguments={"use_dora": True}, splits_groups=True),
    "loha": Method(config="LoHaConfig", alpha_argument="alpha"),
    "ia3": Method(config="IA3Config", arguments={"feedforward_modules": []}),
}


def make_peft_config(adapter: AdapterConfig, target_modules: list[str] | str) -> Any:
    """peft's own configuration of the adapters."""
    import peft  # its import takes seconds, which a run without adapters does not pay

    method = METHODS[adapter.method]
    size = {"r": adapter.size, method.alpha_argument: adapter.scale} if adapter.has_rank else {}
    return getattr(peft, method.config)(target_modules=target_modules, **size, **method.arguments)


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
