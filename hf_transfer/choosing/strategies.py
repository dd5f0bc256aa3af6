"""The strategies that are chosen among: each is a recipe, its plan, its cost, and the command that runs it.

Time is reckoned in forwards of the network, whose speed was measured: a backward costs twice the forward of what it goes
through, with adapters about once (no gradients of frozen weights). Memory: weights, gradients, Adam's two moments, the moving
average and the kept best, and the activations that one image's backward needs, which are counted.
"""

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_transfer.choosing.rule import STRATEGIES
from hf_transfer.config import RecipeConfig, TrainConfig
from hf_transfer.data.dataset import Data
from hf_transfer.network.adapters import add_adapters, merge_adapters
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.describe import count_flops
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.methods import AdapterConfig
from hf_transfer.network.policies import full, last
from hf_transfer.training.costs import Costs, anonymous_memory_bytes
from hf_transfer.training.outcome import Outcome
from hf_transfer.training.phase import Phase, Plan, ProbePhase, optimization_of
from hf_transfer.training.plan import run_plan
from hf_transfer.training.solve import solve_head
from hf_transfer.training.steps import CPU_BATCH

NUM_LAST = 2  # the default of recipes/last_layers.py
LORA_DEFAULTS = {
    "lr": 1e-3,
    "layer_decay": 1.0,
    "cache_views": 0,
}  # of recipes/lora.py, where they are not all recipes'
ADAPTER_SHARE = 0.02  # of the parameters, about, that adapters train
COPIES_OF_TRAINED = 5  # gradient, two moments, moving average, kept best
FORWARDS = {
    "last_layers": 3.0,
    "lora": 2.2,
    "probe_then_full": 3.0,
    "full": 3.0,
}  # of the trained part, an image and epoch


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a strategy will take, reckoned and not measured."""

    seconds: float
    memory_bytes: int


def settle(name: str, config: TrainConfig) -> TrainConfig:
    """The settings that the strategy's recipe would have: its own defaults where `config` holds the common ones."""
    if name != "lora":
        return config
    common = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    changed = {k: v for k, v in LORA_DEFAULTS.items() if getattr(config, k) == common[k]}
    return dataclasses.replace(config, **changed)  # type: ignore[arg-type]


def make_plan(name: str, config: TrainConfig, backbone: Backbone, chain: Chain) -> tuple[Plan, Backbone, Chain]:
    """The plan of a strategy that takes gradient steps, and what it runs on: adapters are put in, in place."""
    how = optimization_of(config)
    probe = ProbePhase(sweep="none" if name == "lora" else "all")
    if name == "last_layers":
        return (
            [probe, Phase(policy=last(min(NUM_LAST, len(chain))), epochs=config.epochs, optimization=how)],
            backbone,
            chain,
        )
    if name == "lora":
        adapted, chain = add_adapters(backbone, chain, AdapterConfig(method="lora", seed=config.seed))
        return [probe, Phase(policy=adapted.policy(), epochs=config.epochs, optimization=how)], adapted, chain
    steps = Phase(policy=full(), epochs=config.epochs, optimization=how)
    if name in ("probe_then_full", "full"):
        return [probe, steps] if name == "probe_then_full" else [steps], backbone, chain
    raise ValueError(f"strategy {name!r}: choose one of {', '.join(STRATEGIES[1:])}")


def carry_out(
    name: str,
    chain: Chain,
    backbone: Backbone,
    data: Data,
    *,
    config: TrainConfig,
    accelerator: Accelerator,
    costs: Costs,
    checkpoints: Path | None = None,
) -> Outcome:
    """What the strategy's recipe does between loading and saving, adapters merged."""
    if name == "linear_probe":
        return solve_head(chain, backbone, data, config=config, accelerator=accelerator, costs=costs)
    config = settle(name, config)
    plan, prepared, chain = make_plan(name, config, backbone, chain)
    outcome = run_plan(
        plan, chain, prepared, data, config=config, accelerator=accelerator, costs=costs, checkpoints=checkpoints
    )
    return replace(outcome, backbone=merge_adapters(prepared)) if name == "lora" else outcome  # type: ignore[arg-type]


def price(
    chain: Chain,
    data: Data,
    config: TrainConfig,
    *,
    images_per_second: float,
    training_images_per_second: float,
    probe_seconds: float,
    on_cpu: bool,
) -> Mapping[str, Price]:
    """Seconds and memory of each strategy, from images without their features: what the cache holds comes off."""
    total, before = count_flops(chain)
    sizes = {name: p.numel() for name, p in chain.model.named_parameters()}
    last_cut = chain.lowest_cut(last(min(NUM_LAST, len(chain))).select(chain))
    above = 1.0 if last_cut is None or not total else 1 - before[last_cut.name] / total
    train, held_out = len(data.train), len(data.validation)
    weights = sum(sizes.values())
    trained = {
        "last_layers": sum(sizes[n] for n in last(min(NUM_LAST, len(chain))).select(chain)),
        "lora": int(ADAPTER_SHARE * weights),
        "probe_then_full": weights,
        "full": weights,
    }
    activations = {"last_layers": count_activation_bytes(chain, last_cut)}
    activations |= dict.fromkeys(("lora", "probe_then_full", "full"), count_activation_bytes(chain, None))
    at_once = CPU_BATCH if on_cpu else config.batch_size
    held = anonymous_memory_bytes() if on_cpu else 4 * weights
    one_pass = (train + held_out) / images_per_second
    found = {"linear_probe": Price(seconds=one_pass + probe_seconds, memory_bytes=held)}
    for name, forwards in FORWARDS.items():
        share = above if name == "last_layers" else 1.0
        epoch = share * (forwards * train + held_out) / training_images_per_second
        first = one_pass if name == "full" else 2 * one_pass if name == "last_layers" else one_pass + probe_seconds
        # The saved network is scored once from files.
        seconds = first + config.epochs * epoch + held_out / images_per_second
        memory = held + 4 * COPIES_OF_TRAINED * trained[name] + at_once * activations[name]
        found[name] = Price(seconds=seconds, memory_bytes=int(memory))
    return found


def count_activation_bytes(chain: Chain, cut: Cut | None) -> int:
    """What autograd keeps of one image for the backward of the network after `cut`, or of all of it."""
    parameter = next(chain.model.parameters())
    own = {t.untyped_storage().data_ptr() for t in (*chain.model.parameters(), *chain.model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    flags = {n: p.requires_grad for n, p in chain.model.named_parameters()}
    try:
        chain.model.requires_grad_(True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if cut is None:
                made = compute_logits(chain.model, torch.zeros(1, *chain.image_shape, device=parameter.device))
            else:
                with chain.part(cut) as suffix:
                    made = suffix(torch.zeros(1, *cut.shape, device=parameter.device))
        del made
    finally:
        for name, p in chain.model.named_parameters():
            p.requires_grad_(flags[name])
    return sum(kept.values())


def make_command(name: str, config: RecipeConfig, *extra: str) -> str:
    """The `accelerate launch` line that runs the strategy on the same data, checkpoint and settings."""
    given = {}
    for f in dataclasses.fields(RecipeConfig):
        value = getattr(config, f.name)
        if f.name not in ("output_dir", "checkpoint", "dataset") and value != f.default:
            given[f.name] = value
    named = {"checkpoint": config.checkpoint, "dataset": config.dataset, **given, "output_dir": f"runs/{name}"}
    flags = [w for k, v in named.items() for w in _as_flag(k, v)]
    return shlex.join(["accelerate", "launch", f"recipes/{name}.py", *flags, *extra])


def _as_flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def without_test(data: Data) -> Data:
    """The same data for what only chooses: nothing can look at the test split."""
    return replace(data, test=None)
