"""The phases of a plan in order, each with its own cut, optimizer and preparation; resumable at any step of any of them."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_transfer.config import TrainConfig, to_settings
from hf_transfer.data.dataset import Data
from hf_transfer.data.extract import move_model, use_fast_layout
from hf_transfer.data.options import ExtractOptions
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.freezing import Audit
from hf_transfer.training import readouts, wise
from hf_transfer.training.allocator import keep_freed_memory
from hf_transfer.training.checkpoints import load_state, remove_state, save_state
from hf_transfer.training.costs import Costs
from hf_transfer.training.feeds import PhaseData, augmentation_of, make_phase_data
from hf_transfer.training.loop import train_phase
from hf_transfer.training.phase import Phase, Plan, ProbePhase
from hf_transfer.training.steps import Workplace

log = logging.getLogger(__name__)

KEPT_START = "the start: no epoch was better beyond chance"

STATE_FORMAT = 2  # raise when a state of before would be gone on from otherwise

# They may change between the runs: they say where things are, not what is computed.
NOT_COMPARED = (
    "output_dir",
    "resume",
    "cache",
    "cache_gb",
    "num_threads",
    "tracker",
    "save_every",
    "checkpoint",
    "dataset",
    "base_model",
    "merge",
    "push_to_hub",
    "private",
)


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What became of the phases."""

    done: list[dict[str, Any]]  # one of each phase that ran: its description, score and history
    resumed: bool
    num_audited: int  # tensors that no phase may change
    start: dict[str, torch.Tensor] | None  # weights that gradient steps on the whole network started from, for WiSE-FT


def run_phases(
    plan: Plan,
    chain: Chain,
    backbone: Backbone,
    data: Data,
    *,
    config: TrainConfig,
    accelerator: Accelerator,
    costs: Costs,
    checkpoints: Path | None = None,
    goes_on: Callable[[list[dict[str, Any]]], bool] = lambda done: True,
) -> Ran:
    """Trains the chain's model in place, phase by phase, without scoring what comes out.

    `chain` is that of the whole network, whose state is saved; a phase may name the part of it that it trains. `goes_on` is
    asked before each phase but the first. Otherwise as `training.plan.run_plan`.
    """
    chains = [phase.chain or chain if isinstance(phase, Phase) else chain for phase in plan]
    # A policy that does not fit fails before anything runs.
    selected = [phase.policy.select(on) for phase, on in zip(plan, chains, strict=True)]
    _check_mixing(plan, chains, config, selected)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    move_model(chain.model, accelerator)
    use_fast_layout(chain.model)
    identity = _identity(plan, data, config)
    state = load_state(checkpoints) if config.resume and checkpoints is not None else None
    if state is not None:
        _check_same(state["identity"], identity)
        _load_model(chain, state["model"])
        log.info("resuming in phase %d of %d", min(len(state["done"]) + 1, len(plan)), len(plan))
    elif accelerator.is_main_process and checkpoints is not None:
        if config.resume:
            log.info("no saved state in %s: starting anew", checkpoints.name)
        remove_state(checkpoints)
    accelerator.wait_for_everyone()
    done: list[dict[str, Any]] = state["done"] if state else []
    part: dict[str, Any] | None = state["part"] if state else None  # of the phase that was interrupted
    start: dict[str, torch.Tensor] | None = state["start"] if state else None
    upstream = Audit(chain, None, frozenset().union(*selected))  # what no phase trains

    def save(part: dict[str, Any] | None) -> None:
        if accelerator.is_main_process and checkpoints is not None:
            held = {"identity": identity, "done": done, "part": part, "model": chain.model.state_dict(), "start": start}
            save_state(checkpoints, held)

    reads: PhaseData | None = None
    for number in range(len(done), len(plan)):
        phase = plan[number]
        if done and not goes_on(done):
            break
        at = Workplace(
            chain=chains[number],
            data=data,
            config=config,
            accelerator=accelerator,
            save=save,
            epochs_before=sum(int(d["epochs"]) for d in done),
            steps_before=number << 32,  # seeds of two phases never meet
        )
        if accelerator.is_main_process and len(plan) > 1:
            log.info("phase %d of %d: %s", number + 1, len(plan), phase.policy.name)
        if isinstance(phase, ProbePhase):
            done.append(_run_probe(phase, backbone, at, costs, _cuts_to_come(plan, number, selected, at)))
        else:
            if config.wise_ft and phase.chain is None and start is None:
                start = _take_start(plan, number, selected, backbone, at, costs)
            before = reads if phase.through else None
            found, reads = _run_steps(phase, backbone, at, costs, part, before, is_first=not done)
            done.append(found)
        part = None
        save(None)  # a run that is resumed from here begins the next phase
        accelerator.wait_for_everyone()
    upstream.check()
    return Ran(done=done, resumed=state is not None, num_audited=len(upstream), start=start)


def _take_start(
    plan: Plan, number: int, selected: list[frozenset[str]], backbone: Backbone, at: Workplace, costs: Costs
) -> dict[str, torch.Tensor]:
    """The weights that gradient steps start from; where the head is untrained then, with a probe in its place."""
    model = at.chain.model
    names = frozenset().union(*(s for p, s in zip(plan, selected, strict=True) if not isinstance(p, ProbePhase)))
    phase = plan[number]
    if any(isinstance(p, ProbePhase) for p in plan[:number]) or (isinstance(phase, Phase) and phase.is_trained):
        return wise.copy_weights(model, names)
    head = wise.copy_weights(model, at.chain.classifier_parameters)
    _run_probe(ProbePhase(), backbone, at, costs)
    start = wise.copy_weights(model, names)
    wise.set_weights(model, head)
    return start


def _run_steps(
    phase: Phase,
    backbone: Backbone,
    at: Workplace,
    costs: Costs,
    part: Any,
    before: PhaseData | None,
    *,
    is_first: bool,
) -> tuple[dict[str, Any], PhaseData]:
    names = phase.policy.select(at.chain)
    cut = at.chain.lowest_cut(names)
    times = [time.perf_counter()]
    with costs.part("store"):
        reads = make_phase_data(
            cut, at.chain, backbone, at.data, at.config, at.accelerator, through=phase.through, before=before
        )
    costs.count_images("store", reads.num_computed)
    times.append(time.perf_counter())
    with costs.part("train"):
        # A network of its own has a head of its own, which no phase before this one has trained.
        starts_trained = phase.is_trained or (not is_first and phase.chain is None)
        found = train_phase(phase, reads, at, starts_trained=starts_trained, resumed=part)
    costs.count_images("train", found["images"])
    times.append(time.perf_counter())
    how = phase.optimization
    score = found["kept"]
    kept = f"epoch {score['epoch']}" if "epoch" in score else KEPT_START
    where = "the pixels" if cut is None else cut.name
    described = {
        "policy": phase.policy.name,
        "cut": where,
        "optimizer": how.optimizer,
        "epochs": phase.epochs,
        "lr": how.lr,
        "num_trainable": found["num_trainable"],
        "images_per_second": found["images_per_second"],
        "kept": kept,
        "score": {"accuracy": score["accuracy"], "log_loss": score["log_loss"]},
        "cost": {
            "store_seconds": times[1] - times[0],
            "store_images": reads.num_computed,
            "train_seconds": times[2] - times[1],
            "train_images": found["images"],
        },
        "history": found["history"],
        "description": (
            f"{phase.policy.name} ({found['num_trainable']:,} parameters, cut at {where}) by {how.optimizer}, learning rate "
            f"{how.lr:g}, {how.schedule}, up to {phase.epochs} epochs; {kept} was kept by validation"
        ),
    }
    return described, reads


def _cuts_to_come(plan: Plan, number: int, selected: list[frozenset[str]], at: Workplace) -> list[Cut]:
    """The cuts at which later phases read each image as evaluated, for the probe's own pass to store on disk.

    Only those below which nothing trains before: else the activations will be others by then.
    """
    if at.config.cache_views != 1:
        return []
    found: dict[str, Cut] = {}
    trained: set[str] = set()
    for phase, names in zip(plan[number + 1 :], selected[number + 1 :], strict=True):
        cut = at.chain.lowest_cut(names) if isinstance(phase, Phase) and phase.chain is None else None
        if cut is not None and cut != at.chain.features and trained.isdisjoint(at.chain.before(cut)[0]):
            found[cut.name] = cut
        trained |= names
    num_bytes = sum(cut.bytes_per_image for cut in found.values()) * (len(at.data.train) + len(at.data.validation))
    storage = ExtractOptions.from_config(at.config).choose_storage(num_bytes, at.accelerator)
    return list(found.values()) if storage.kind == "disk" else []


def _run_probe(
    phase: ProbePhase, backbone: Backbone, at: Workplace, costs: Costs, beside: Sequence[Cut] = ()
) -> dict[str, Any]:
    options = ExtractOptions.from_config(at.config)
    with costs.part("features"):
        # The test split is left alone: it is scored once, at the end.
        candidates, computed = readouts.extract_readouts(
            at.chain,
            backbone,
            replace(at.data, test=None),
            sweep="none",
            accelerator=at.accelerator,
            options=options,
            beside=beside,
        )
    costs.count_images("features", sum(computed.values()))
    with costs.part("probe"):
        best, _ = readouts.choose_readout(
            candidates,
            at.data,
            # By accuracy, a few held-out images may choose a head that is nearly 0, from which training has to begin anew.
            select_by="log_loss",
            class_balance=at.config.class_balance,
            folds=5,
            refit=False,
            seed=at.config.seed,
            accelerator=at.accelerator,
        )
        readouts.install_probe(backbone, at.chain, best)
    probe = best.probe
    found = readouts.score_probe(best, at.data.validation, at.accelerator)
    log.info("probe: validation accuracy %.1f %%, log-loss %.4f", 100 * found["accuracy"], found["log_loss"])
    return {
        "policy": phase.policy.name,
        "cut": best.readout.cut.name,
        "optimizer": "L-BFGS",
        "epochs": 0,
        "num_trainable": probe.weight.numel() + probe.bias.numel(),
        "kept": "the solution",
        "score": found,
        "history": [],
        "description": (
            f"the head alone, a logistic regression on frozen features, C = {probe.c:.3g} chosen on held-out images"
        ),
    }


def _check_mixing(plan: Plan, chains: list[Chain], config: TrainConfig, selected: list[frozenset[str]]) -> None:
    if not augmentation_of(config).is_mixing or config.cache_views == 0:
        return
    phases = zip(plan, chains, selected, strict=True)
    if plan and all(isinstance(p, ProbePhase) or on.lowest_cut(s) is not None for p, on, s in phases):
        raise ValueError(
            f"mixup={config.mixup}, cutmix={config.cutmix}: below the cut only activations are kept, and images cannot be "
            "mixed; choose --cache_views 0, or leave mixing out"
        )


def _identity(plan: Plan, data: Data, config: TrainConfig) -> dict[str, Any]:
    """What must be the same for a state to be gone on from."""
    settings = {k: v for k, v in to_settings(config).items() if k not in NOT_COMPARED}
    splits = {"train": data.train.fingerprint, "validation": data.validation.fingerprint}
    return {"format": STATE_FORMAT, **settings, **splits, "plan": [phase.policy.name for phase in plan]}


def _check_same(kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    other = [f"{k} was {kept.get(k)!r}, is {now.get(k)!r}" for k in {**kept, **now} if kept.get(k) != now.get(k)]
    if other:
        raise ValueError(
            f"--resume: the saved state is of another run: {'; '.join(other[:5])}. Give the same settings (config.yaml in the "
            "output folder holds them), or start anew without --resume"
        )


def _load_model(chain: Chain, kept: Mapping[str, torch.Tensor]) -> None:
    """In place and in each tensor's own layout: another layout takes other kernels, which round otherwise."""
    own = chain.model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(kept[name])
