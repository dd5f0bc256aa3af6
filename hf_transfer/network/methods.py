"""The adapter methods of `peft` that this package offers, and the modules that each method can adapt.

New adapters of every method leave the network's output unchanged, train in an ordinary loop, store their parameters beside the
adapted module, and can be merged into that module's weight. The tests check this.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from hf_transfer.config import AdapterConfig, AdapterName


@dataclass(frozen=True, kw_only=True)
class Method:
    """The settings with which peft creates the adapters of one method."""

    config: str  # name of the config class in peft
    arguments: Mapping[str, Any] = field(default_factory=dict)  # fixed arguments of the config
    alpha_argument: str = "lora_alpha"  # the argument of the config that sets alpha
    splits_groups: bool = False  # whether the rank is divided among the groups of a grouped convolution


METHODS: Mapping[AdapterName, Method] = {
    "lora": Method(config="LoraConfig", splits_groups=True),
    "dora": Method(config="LoraConfig", arguments={"use_dora": True}, splits_groups=True),
    "loha": Method(config="LoHaConfig", alpha_argument="alpha"),
    "ia3": Method(config="IA3Config", arguments={"feedforward_modules": []}),
}


def make_peft_config(adapter: AdapterConfig, target_modules: list[str] | str) -> Any:
    """Returns the peft config for `adapter`, which adapts the modules named by `target_modules`."""
    import peft  # imported here because the import takes seconds, and runs without adapters do not need peft

    method = METHODS[adapter.method]
    size = {"r": adapter.size, method.alpha_argument: adapter.scale} if adapter.has_rank else {}
    return getattr(peft, method.config)(target_modules=target_modules, **size, **method.arguments)


def is_adaptable(module: nn.Module) -> bool:
    """Whether `module` is a Linear or Conv2d with the forward of torch, so that an adapter can be merged into its weight."""
    if parametrize.is_parametrized(module):
        return False
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    if isinstance(module, nn.Conv2d):
        own = type(module)
        # Some subclasses pad by themselves (Conv2dSame) or normalize the weight (StdConv2d): merging would change the output.
        plain = own.forward is nn.Conv2d.forward and own._conv_forward is nn.Conv2d._conv_forward
        return plain and module.padding_mode == "zeros"
    return False


def find_misfit(adapter: AdapterConfig, module: Any) -> str | None:
    """Returns the reason why the adapter does not fit a Linear or Conv2d, or None if the adapter fits."""
    if not adapter.has_rank:
        return None
    groups = getattr(module, "groups", 1)
    if METHODS[adapter.method].splits_groups and adapter.size % groups:
        return f"rank {adapter.size} is not divisible by the convolution's {groups} groups"
    smallest = min(module.weight.shape[0], module.weight[0].numel())
    return f"rank {adapter.size} is larger than the module's width {smallest}" if adapter.size > smallest else None
