"""Makes the optimizer of a phase, its parameter groups and its learning-rate schedule.

Each trainable parameter is in exactly one group; groups differ in the layer and in the decay of the weights. Learning rates
fall with the distance from the head along the chain (the network as a sequence of layers), by layer-wise decay (arXiv
2106.08254; 2111.06377 section A.1). The schedule is a pure function of the step, so a resumed run does not restore it.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from hf_transfer.config import OptimizerConfig
from hf_transfer.network.chain import Chain
from hf_transfer.network.policies import is_norm
from hf_transfer.training.ema import own_shard

ONE_CYCLE_START = 1 / 25  # fastai's `div` and `div_final`
ONE_CYCLE_END = 1e-5


def group_parameters(chain: Chain, trainable: Collection[str], optimization: OptimizerConfig) -> list[dict[str, Any]]:
    """Returns parameter groups for torch's optimizers. Groups of the same layer differ in weight decay or learning rate.

    The keys of a group are `params`, `names`, `lr`, `initial_lr`, `weight_decay` and `l2_sp` (see `decay_to_start`). Groups are
    in the order of the layers.
    Raises ValueError if `trainable` is empty, or if a name is not a parameter of any layer.
    """
    unknown = set(trainable) - {name for layer in chain.layers for name in layer.parameters}
    if unknown:
        raise ValueError(f"not parameters of this chain: {', '.join(sorted(unknown)[:5])}")
    if not trainable:
        raise ValueError("no parameter trains: choose a policy that selects at least one parameter")
    parameters = dict(chain.model.named_parameters())
    head = _head_parameters(chain)
    groups: dict[tuple[int, float, float, float], dict[str, Any]] = {}
    for i, layer in enumerate(chain.layers):
        below_head = max(0, len(chain.layers) - 2 - i)
        layer_lr = optimization.lr * optimization.layer_decay**below_head
        for name in layer.parameters:
            if name not in trainable:
                continue
            lr = optimization.head_lr if name in head and optimization.head_lr is not None else layer_lr
            l2_sp = 0.0 if name in chain.classifier_parameters else optimization.l2_sp
            decay = optimization.weight_decay if not l2_sp and is_decayed(chain.model, name) else 0.0
            new = {"params": [], "names": [], "lr": lr, "initial_lr": lr, "weight_decay": decay, "l2_sp": l2_sp}
            group = groups.setdefault((i, lr, decay, l2_sp), new)
            group["params"].append(parameters[name])
            group["names"].append(name)
    return list(groups.values())


def is_decayed(model: nn.Module, name: str) -> bool:
    """Returns whether the parameter `name` gets weight decay: kernels and matrices whose name ends in "weight" do.

    Biases, norms, layer scales, class tokens, embeddings and relative position tables get no weight decay.
    """
    owner, _, own_name = name.rpartition(".")
    module = model.get_submodule(owner)
    if not own_name.endswith("weight") or isinstance(module, nn.Embedding) or is_norm(module):
        return False
    return sum(size > 1 for size in module.get_parameter(own_name).shape) >= 2  # GRN's scale is (1, 1, 1, C)


def make_optimizer(
    groups: list[dict[str, Any]], optimization: OptimizerConfig, *, fused: bool = False
) -> torch.optim.Optimizer:
    """Returns timm's optimizer for the parameter groups, each of which has its own learning rate and weight decay.

    `fused`: whether one kernel updates all parameters; otherwise torch decides.
    """
    # timm's "sgd" is SGD with Nesterov momentum, which must be above 0. timm's "momentum" is SGD without Nesterov momentum.
    is_plain = optimization.optimizer == "sgd" and optimization.momentum == 0
    name = "momentum" if is_plain else optimization.optimizer
    options: dict[str, Any] = {"fused": True} if fused else {}
    return create_optimizer_v2(groups, opt=name, lr=optimization.lr, momentum=optimization.momentum, **options)


def decay_to_start(optimizer: torch.optim.Optimizer, start: Mapping[str, torch.Tensor]) -> None:
    """Adds L2-SP to each step of the optimizer: before the step, w -= lr * l2_sp * (w - start) (arXiv 1802.01483, section 3.1).

    The decay is decoupled from the gradients, as AdamW's decay towards zero is. `start`: tensors by parameter name, sharded
    like the parameters; not changed.
    """

    @torch.no_grad()
    def decay(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if group["l2_sp"]:
                weights = [own_shard(parameter) for parameter in group["params"]]
                targets = [own_shard(start[name]) for name in group["names"]]
                torch._foreach_lerp_(weights, targets, min(1.0, group["lr"] * group["l2_sp"]))

    optimizer.register_step_pre_hook(decay)


def lr_factor(step: int, total_steps: int, optimization: OptimizerConfig) -> float:
    """Returns the factor (above 0, at most 1) that scales all learning rates at optimizer step `step` (from 0) of a phase.

    Warm-up takes round(warmup_ratio * total_steps) steps and ends before the last step. The first step after it has factor 1.
    The schedules "cosine" and "linear" would reach 0 one step after the last step. "one_cycle" (arXiv 1708.07120, as in fastai
    but with constant momentum) follows cosines from 1/25 to 1 and down to 1e-5. Raises ValueError for a step outside the phase.
    """
    if not 0 <= step < total_steps:
        raise ValueError(
            f"lr_factor(step={step}): this phase has {total_steps} steps; choose 0 <= step < {total_steps}"
        )
    warmup_steps = min(round(optimization.warmup_ratio * total_steps), total_steps - 1)
    if optimization.lr_scheduler_type == "one_cycle":
        if step < warmup_steps:
            return _cosine(ONE_CYCLE_START, 1.0, step / warmup_steps)
        return _cosine(1.0, ONE_CYCLE_END, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)  # above 0 at the first step, which would have no effect otherwise
    passed = (step - warmup_steps) / (total_steps - warmup_steps)
    if optimization.lr_scheduler_type == "cosine":
        return _cosine(1.0, 0.0, passed)
    return 1.0 - passed if optimization.lr_scheduler_type == "linear" else 1.0


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's learning rate, in place, to `factor` times the group's initial learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _head_parameters(chain: Chain) -> frozenset[str]:
    """Returns the parameter names of the last layer, or only of the classifier if no earlier layer has parameters."""
    if any(layer.parameters for layer in chain.layers[:-1]):
        return frozenset(chain.layers[-1].parameters)
    return frozenset(chain.classifier_parameters if chain.head is not None else ())


def _cosine(start: float, end: float, passed: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * passed)) / 2
