"""One optimizer per phase: each trainable parameter in exactly one group, by its layer and by whether it decays.

Learning rates fall with the distance from the head along the chain, the same list that freezing and caching use
(layer-wise decay: arXiv 2106.08254, 2111.06377 section A.1; open_clip `timm_model.py`, `group_matcher`). The schedule is a
pure function of the step, so a resumed run has nothing to restore.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from hf_transfer.network.chain import Chain
from hf_transfer.network.policies import is_norm

OptimizerName = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "linear", "one_cycle", "constant"]

ONE_CYCLE_START = 1 / 25  # fastai's `div` and `div_final`
ONE_CYCLE_END = 1e-5


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How one phase moves its parameters."""

    optimizer: OptimizerName = "adamw"
    lr: float = 1e-4  # of the last layer below the head
    head_lr: float | None = None  # of the head; None: lr
    layer_decay: float = 1.0  # the lr of a layer is this times the lr of the layer after it, head left out
    weight_decay: float = 0.05  # of kernels and matrices only
    momentum: float = 0.9  # of SGD, Nesterov's
    schedule: Schedule = "cosine"
    warmup: float = 0.1  # share of the phase's optimizer steps

    def __post_init__(self) -> None:
        for name, allowed in (("optimizer", get_args(OptimizerName)), ("schedule", get_args(Schedule))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {' or '.join(map(repr, allowed))}")
        for name in ("lr", "head_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: choose more than 0")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay}: choose 0 < layer_decay <= 1; 1 is no decay")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay}: choose 0 or more")
        for name in ("momentum", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: choose 0 <= {name} < 1")


def group_parameters(chain: Chain, trainable: Collection[str], how: Optimization) -> list[dict[str, Any]]:
    """Parameter groups for torch's optimizers in chain order: `params`, their `names`, `lr`, `initial_lr`, `weight_decay`.

    One for each layer and each of decayed and not; empty ones are left out. Raises ValueError where nothing trains or a
    name is no parameter of any layer.
    """
    unknown = set(trainable) - {name for layer in chain.layers for name in layer.parameters}
    if unknown:
        raise ValueError(f"not parameters of this chain: {', '.join(sorted(unknown)[:5])}")
    if not trainable:
        raise ValueError("no parameter trains: choose a policy that names some")
    parameters = dict(chain.model.named_parameters())
    quick = _head_parameters(chain)
    groups: dict[tuple[int, float, float], dict[str, Any]] = {}
    for i, layer in enumerate(chain.layers):
        below_head = max(0, len(chain.layers) - 2 - i)
        layer_lr = how.lr * how.layer_decay**below_head
        for name in layer.parameters:
            if name not in trainable:
                continue
            lr = how.head_lr if name in quick and how.head_lr is not None else layer_lr
            decay = how.weight_decay if is_decayed(chain.model, name) else 0.0
            new = {"params": [], "names": [], "lr": lr, "initial_lr": lr, "weight_decay": decay}
            group = groups.setdefault((i, lr, decay), new)
            group["params"].append(parameters[name])
            group["names"].append(name)
    return list(groups.values())


def is_decayed(model: nn.Module, name: str) -> bool:
    """Whether weight decay applies: kernels and matrices that are called weights, of no normalisation or embedding.

    So biases, norms, layer scales, class tokens, position embeddings and tables of relative positions get none.
    """
    owner, _, own_name = name.rpartition(".")
    module = model.get_submodule(owner)
    if not own_name.endswith("weight") or isinstance(module, nn.Embedding) or is_norm(module):
        return False
    return sum(size > 1 for size in module.get_parameter(own_name).shape) >= 2  # GRN's scale is (1, 1, 1, C)


def make_optimizer(groups: list[dict[str, Any]], how: Optimization) -> torch.optim.Optimizer:
    """Torch's AdamW or SGD over the groups, whose own lr and weight decay hold."""
    if how.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=how.lr, momentum=how.momentum, nesterov=how.momentum > 0)
    return torch.optim.AdamW(groups, lr=how.lr)


def lr_factor(step: int, total_steps: int, how: Optimization) -> float:
    """What every group's lr is multiplied by at optimizer step `step` (from 0) of a phase: above 0, 1 at most.

    Warm-up takes round(warmup * total_steps) steps, the last step never among them, and the step after it has factor 1.
    Cosine and linear would reach 0 at the step after the last; one_cycle (arXiv 1708.07120, in fastai's form; momentum is
    not cycled) goes by cosines from 1/25 to 1 and to 1e-5 at the last step. Raises ValueError outside the phase.
    """
    if not 0 <= step < total_steps:
        raise ValueError(
            f"lr_factor(step={step}): this phase has {total_steps} steps; choose 0 <= step < {total_steps}"
        )
    warmup_steps = min(round(how.warmup * total_steps), total_steps - 1)
    if how.schedule == "one_cycle":
        if step < warmup_steps:
            return _cosine(ONE_CYCLE_START, 1.0, step / warmup_steps)
        return _cosine(1.0, ONE_CYCLE_END, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)  # not 0 at first: that step would be lost
    passed = (step - warmup_steps) / (total_steps - warmup_steps)
    if how.schedule == "cosine":
        return _cosine(1.0, 0.0, passed)
    return 1.0 - passed if how.schedule == "linear" else 1.0


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's lr to `factor` times its initial one, in place. Accelerate's wrapped optimizers are fine."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _head_parameters(chain: Chain) -> frozenset[str]:
    """Those with the head's lr: the last layer's; of a chain that is all head, the classifier's, which alone is new."""
    if any(layer.parameters for layer in chain.layers[:-1]):
        return frozenset(chain.layers[-1].parameters)
    return frozenset(chain.classifier_parameters if chain.classifier is not None else ())


def _cosine(start: float, end: float, passed: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * passed)) / 2
