"""The strategies to choose from: each has a recipe, a plan, a cost, and a command that runs it.

Time is estimated in forwards of the network, whose speed is measured: a backward costs two forwards of the part that it runs
through, or about one with adapters (frozen weights need no gradients). Memory: weights, gradients, Adam's two moments, moving
average and the kept best, plus the activations that the backward of one image needs, which are counted.
"""

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_transfer.choosing.forward_stats import ForwardStats
from hf_transfer.choosing.rule import STRATEGIES
from hf_transfer.config import RecipeConfig, TrainConfig
from hf_transfer.data.dataset import Data
from hf_transfer.network.adapters import add_adapters, merge_adapters
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.describe import count_flops
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.methods import Adapter
from hf_transfer.network.policies import full, last
from hf_transfer.training.costs import Costs, anonymous_memory_bytes
from hf_transfer.training.outcome import Outcome
from hf_transfer.training.phase import Phase, Plan, ProbePhase, optimization_of
from hf_transfer.training.plan import run_plan
from hf_transfer.training.solve import solve_head
from hf_transfer.training.steps import CPU_BATCH

NUM_LAST = 2  # the default of recipes/last_layers.py
# The defaults of recipes/lora.py that differ from the common ones.
LORA_DEFAULTS = {"lr": 1e-3, "layer_decay": 1.0, "cache_views": 0}
ADAPTER_SHARE = 0.02  # approximate share of the parameters that adapters train
COPIES_OF_TRAINED = 5  # gradient, two moments, moving average, kept best
# Cost of a training step on one image, in forwards of the trained part.
FORWARDS = {"last_layers": 3.0, "lora": 2.2, "probe_then_full": 3.0, "full": 3.0}


@dataclass(frozen=True, kw_only=True)
class Price:
    """Estimated cost of a strategy."""

    seconds: float
    memory_bytes: int


def settle(name: str, config: TrainConfig) -> TrainConfig:
    """Returns `config` with the recipe's own default wherever the value is the common default."""
    if name != "lora":
        return config
    common = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    changed = {k: v for k, v in LORA_DEFAULTS.items() if getattr(config, k) == common[k]}
    return dataclasses.replace(config, **changed)  # type: ignore[arg-type]


def make_plan(name: str, config: TrainConfig, backbone: Backbone, chain: Chain) -> tuple[Plan, Backbone, Chain]:
    """Returns the plan of a strategy with gradient steps, and the backbone and chain it runs on; adds adapters in place."""
    optimization = optimization_of(config)
    probe = ProbePhase(sweep="none" if name == "lora" else "all")
    if name == "last_layers":
        return (
            [probe, Phase(policy=last(min(NUM_LAST, len(chain))), epochs=config.epochs, optimization=optimization)],
            backbone,
            chain,
        )
    if name == "lora":
        adapted, chain = add_adapters(backbone, chain, Adapter(method="lora", seed=config.seed))
        return [probe, Phase(policy=adapted.policy(), epochs=config.epochs, optimization=optimization)], adapted, chain
    steps = Phase(policy=full(), epochs=config.epochs, optimization=optimization)
    if name in ("probe_then_full", "full"):
        return [probe, steps] if name == "probe_then_full" else [steps], backbone, chain
    raise ValueError(f"strategy={name!r}: choose one of {', '.join(STRATEGIES[1:])}")


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
    """Runs what the strategy's recipe runs between loading and saving, and returns the outcome with adapters merged."""
    if name == "linear_probe":
        return solve_head(chain, backbone, data, config=config, accelerator=accelerator, costs=costs)
    config = settle(name, config)
    plan, prepared, chain = make_plan(name, config, backbone, chain)
    outcome = run_plan(
        plan, chain, prepared, data, config=config, accelerator=accelerator, costs=costs, checkpoints=checkpoints
    )
    return replace(outcome, backbone=merge_adapters(prepared)) if name == "lora" else outcome  # type: ignore[arg-type]


def price(
    chain: Chain, data: Data, config: TrainConfig, stats: ForwardStats, *, probe_seconds: float, on_cpu: bool
) -> Mapping[str, Price]:
    """Returns seconds and memory of each strategy with an empty cache."""
    total, before = count_flops(chain)
    sizes = {name: p.numel() for name, p in chain.model.named_parameters()}
    trained_last = last(min(NUM_LAST, len(chain))).select(chain)
    last_cut = chain.lowest_cut(trained_last)
    share_above = 1.0 if last_cut is None or not total else 1 - before[last_cut.name] / total
    num_train, num_validation = len(data.train), len(data.validation)
    num_weights = sum(sizes.values())
    num_trained = {
        "last_layers": sum(sizes[n] for n in trained_last),
        "lora": int(ADAPTER_SHARE * num_weights),
        "probe_then_full": num_weights,
        "full": num_weights,
    }
    activations = {"last_layers": count_activation_bytes(chain, last_cut)}
    activations |= dict.fromkeys(("lora", "probe_then_full", "full"), count_activation_bytes(chain, None))
    batch_size = CPU_BATCH if on_cpu else config.batch_size
    base_bytes = anonymous_memory_bytes() if on_cpu else 4 * num_weights
    one_pass = (num_train + num_validation) / stats.images_per_second
    prices = {"linear_probe": Price(seconds=one_pass + probe_seconds, memory_bytes=base_bytes)}
    for name, forwards in FORWARDS.items():
        share = share_above if name == "last_layers" else 1.0
        epoch = share * (forwards * num_train + num_validation) / stats.training_images_per_second
        first = one_pass if name == "full" else 2 * one_pass if name == "last_layers" else one_pass + probe_seconds
        # The saved network is evaluated once more from the image files.
        seconds = first + config.epochs * epoch + num_validation / stats.images_per_second
        memory = base_bytes + 4 * COPIES_OF_TRAINED * num_trained[name] + batch_size * activations[name]
        prices[name] = Price(seconds=seconds, memory_bytes=int(memory))
    return prices


def count_activation_bytes(chain: Chain, cut: Cut | None) -> int:
    """Returns the bytes that autograd keeps of one image for the backward of the network after `cut`, or of all of it."""
    parameter = next(chain.model.parameters())
    weights = {t.untyped_storage().data_ptr() for t in (*chain.model.parameters(), *chain.model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    flags = {n: p.requires_grad for n, p in chain.model.named_parameters()}
    try:
        chain.model.requires_grad_(True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if cut is None:
                output = compute_logits(chain.model, torch.zeros(1, *chain.image_shape, device=parameter.device))
            else:
                with chain.suffix(cut) as suffix:
                    output = suffix(torch.zeros(1, *cut.shape, device=parameter.device))
        del output
    finally:
        for name, p in chain.model.named_parameters():
            p.requires_grad_(flags[name])
    return sum(kept.values())


def make_command(name: str, config: RecipeConfig, *extra: str) -> str:
    """Returns the `accelerate launch` command that runs the strategy on the same data, checkpoint and settings."""
    changed = {}
    for f in dataclasses.fields(RecipeConfig):
        value = getattr(config, f.name)
        if f.name not in ("output_dir", "checkpoint", "dataset") and value != f.default:
            changed[f.name] = value
    settings = {"checkpoint": config.checkpoint, "dataset": config.dataset, **changed, "output_dir": f"runs/{name}"}
    flags = [w for k, v in settings.items() for w in _as_flag(k, v)]
    return shlex.join(["accelerate", "launch", f"recipes/{name}.py", *flags, *extra])


def _as_flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def without_test(data: Data) -> Data:
    """Returns the data without its test split, so that no choice can depend on it."""
    return replace(data, test=None)
