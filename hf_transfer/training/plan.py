"""Runs a plan: its phases in order, each with its own cut, optimizer and preparation; resumable at any step of any of them.

outcome = run_plan(plan, chain, backbone, data, run)
"""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_transfer.config import TrainConfig, to_settings
from hf_transfer.data.dataset import Data
from hf_transfer.data.extract import use_fast_layout
from hf_transfer.data.options import ExtractOptions
from hf_transfer.data.pixels import EvaluationImages
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Suffix
from hf_transfer.network.freezing import Audit, set_trainable
from hf_transfer.training import readouts, wise
from hf_transfer.training.allocator import keep_freed_memory
from hf_transfer.training.checkpoints import load_state, remove_state, save_state
from hf_transfer.training.costs import Costs
from hf_transfer.training.evaluate import compute_image_logits
from hf_transfer.training.feeds import augmentation_of, make_phase_data
from hf_transfer.training.loop import WholeNetwork, train_phase, validate
from hf_transfer.training.metrics import score
from hf_transfer.training.phase import Phase, Plan, ProbePhase
from hf_transfer.training.steps import Workplace

log = logging.getLogger(__name__)

# Between the last validation of the trained network and that of the whole one from files, in float32.
VERIFIED_LOG_LOSS = 1e-3
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
class Outcome:
    """What `Run.finish` writes of a plan."""

    plan: list[Mapping[str, Any]]
    metrics: Mapping[str, Any]
    curves: list[Mapping[str, Any]]
    details: Mapping[str, Any]


def run_plan(
    plan: Plan,
    chain: Chain,
    backbone: Backbone,
    data: Data,
    *,
    config: TrainConfig,
    accelerator: Accelerator | None = None,
    costs: Costs | None = None,
    checkpoints: Path | None = None,
) -> Outcome:
    """Trains the chain's model in place, phase by phase, and scores it on validation and, once, on test.

    Of `config`, phases say their own policy, epochs and optimization; the rest holds for all. Without `checkpoints` no state is
    saved. `costs` gets the seconds of each part.

    With `config.resume`, goes on from the state in `checkpoints`, to the same bits as without the interruption on a CPU.
    Raises ValueError where that state is of another plan, data set or setting, naming them.
    """
    accelerator = accelerator or Accelerator()
    costs = costs or Costs()
    selected = [phase.policy.select(chain) for phase in plan]  # a policy that does not fit fails before anything runs
    _check_mixing(plan, chain, config, selected)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    chain.model.to(accelerator.device)
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
    start: dict[str, torch.Tensor] | None = state.get("start") if state else None  # of gradient steps, for WiSE-FT
    upstream = Audit(chain, None, frozenset().union(*selected))  # what no phase trains

    def save(part: dict[str, Any] | None) -> None:
        if accelerator.is_main_process and checkpoints is not None:
            held = {"identity": identity, "done": done, "part": part, "model": chain.model.state_dict(), "start": start}
            save_state(checkpoints, held)

    def place(number: int) -> Workplace:
        return Workplace(
            chain=chain,
            data=data,
            config=config,
            accelerator=accelerator,
            save=save,
            epochs_before=sum(int(d["epochs"]) for d in done),
            steps_before=number << 32,  # seeds of two phases never meet
        )

    for number in range(len(done), len(plan)):
        phase, at = plan[number], place(number)
        if accelerator.is_main_process and len(plan) > 1:
            log.info("phase %d of %d: %s", number + 1, len(plan), phase.policy.name)
        if isinstance(phase, ProbePhase):
            done.append(_run_probe(phase, backbone, at, costs))
        else:
            if config.wise_ft and start is None:
                start = _take_start(plan, number, selected, backbone, at, costs)
            done.append(_run_steps(phase, backbone, at, costs, part, starts_trained=bool(done)))
        part = None
        save(None)  # a run that is resumed from here begins the next phase
        accelerator.wait_for_everyone()
    details: dict[str, Any] = {}
    curves = _curves(done)
    if start is not None:
        with costs.part("wise_ft"):
            found = _interpolate(start, backbone, place(len(plan)))
        done[-1] = _describe_interpolated(done[-1], found)
        details, curves = {"wise_ft": found}, [*curves, *wise.draw_curves(found)]
    set_trainable(chain.model, selected[-1])
    upstream.check()
    with costs.part("evaluate"):
        metrics = _score_splits(chain, backbone, data, config, accelerator)
    difference = abs(metrics["validation"]["nll"] - done[-1]["score"]["log_loss"])
    if accelerator.mixed_precision == "no" and config.dtype == "float32" and difference > VERIFIED_LOG_LOSS:
        raise RuntimeError(
            f"the saved network's validation log-loss differs by {difference:.2g} from the one that it was chosen by"
        )
    return Outcome(
        plan=[{k: v for k, v in d.items() if k != "history"} for d in done],
        metrics=metrics,
        curves=curves,
        details={
            **details,
            "phases": [{"policy": d["policy"], "history": d["history"]} for d in done],
            "augmentation": vars(augmentation_of(config)),
            "audited_tensors": len(upstream),
            # The cost of a resumed run is that of its last process alone.
            "resumed": state is not None,
        },
    )


def _take_start(
    plan: Plan, number: int, selected: list[frozenset[str]], backbone: Backbone, at: Workplace, costs: Costs
) -> dict[str, torch.Tensor]:
    """The weights that gradient steps start from; where the head is untrained then, with a probe in its place."""
    model = at.chain.model
    names = frozenset().union(*(s for p, s in zip(plan, selected, strict=True) if not isinstance(p, ProbePhase)))
    if any(isinstance(phase, ProbePhase) for phase in plan[:number]):
        return wise.copy_weights(model, names)
    head = wise.copy_weights(model, at.chain.classifier_parameters)
    _run_probe(ProbePhase(select_by=at.config.select_by), backbone, at, costs)
    start = wise.copy_weights(model, names)
    wise.set_weights(model, head)
    return start


def _interpolate(start: dict[str, torch.Tensor], backbone: Backbone, at: Workplace) -> dict[str, Any]:
    chain = at.chain
    reads = make_phase_data(chain.lowest_cut(set(start)), chain, backbone, at.data, at.config, at.accelerator)
    network = WholeNetwork(chain.model) if reads.cut is None else chain.suffix(reads.cut)
    with network if isinstance(network, Suffix) else nullcontext(), at.accelerator.autocast():
        return wise.interpolate(
            chain.model, start, lambda: validate(network, reads, at)[0], select_by=at.config.select_by
        )


def _describe_interpolated(phase: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    row = next(row for row in found["curve"] if row["alpha"] == found["alpha"])
    return {
        **phase,
        "score": {"accuracy": row["accuracy"], "log_loss": row["log_loss"]},
        "description": (
            f"{phase['description']}; of the weights between its start (with the probe) and these, {found['alpha']:.0%} of the "
            "way validated best (WiSE-FT)"
        ),
    }


def _run_steps(
    phase: Phase, backbone: Backbone, at: Workplace, costs: Costs, part: Any, *, starts_trained: bool
) -> dict[str, Any]:
    names = phase.policy.select(at.chain)
    cut = at.chain.lowest_cut(names)
    with costs.part("store"):
        reads = make_phase_data(cut, at.chain, backbone, at.data, at.config, at.accelerator)
    costs.count_images("store", reads.num_computed)
    with costs.part("train"):
        found = train_phase(phase, reads, at, starts_trained=starts_trained, resumed=part)
    costs.count_images("train", found["images"])
    how = phase.optimization
    best = found["best"]
    kept = f"epoch {best['epoch']}" if "epoch" in best else "the start: no epoch was better beyond chance"
    where = "the pixels" if cut is None else cut.name
    return {
        "policy": phase.policy.name,
        "cut": where,
        "optimizer": how.optimizer,
        "epochs": phase.epochs,
        "lr": how.lr,
        "num_trainable": found["num_trainable"],
        "images_per_second": found["images_per_second"],
        "kept": kept,
        "score": {"accuracy": best["accuracy"], "log_loss": best["log_loss"]},
        "history": found["history"],
        "description": (
            f"{phase.policy.name} ({found['num_trainable']:,} parameters, cut at {where}) by {how.optimizer}, learning rate "
            f"{how.lr:g}, {how.schedule}, up to {phase.epochs} epochs; {kept} was kept by validation"
        ),
    }


def _run_probe(phase: ProbePhase, backbone: Backbone, at: Workplace, costs: Costs) -> dict[str, Any]:
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
        )
    costs.count_images("features", sum(computed.values()))
    with costs.part("probe"):
        best, _ = readouts.choose_readout(
            candidates,
            at.data,
            select_by="accuracy" if phase.select_by == "accuracy" else "log_loss",
            class_balance=at.config.class_balance,
            folds=phase.folds,
            refit=False,
            spread_floor=phase.spread_floor,
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


def _score_splits(
    chain: Chain, backbone: Backbone, data: Data, config: TrainConfig, accelerator: Accelerator
) -> dict[str, Any]:
    """The whole network, as it will be saved, on images from their files."""
    metrics: dict[str, Any] = {}
    for split in (data.validation, data.test):
        if split is not None:
            logits, labels = compute_image_logits(
                chain,
                EvaluationImages(split=split, preprocessing=backbone.preprocessing),
                split.labels,
                accelerator=accelerator,
                options=ExtractOptions.from_config(config),
            )
            metrics[split.name] = score(logits, labels, data.label_names, seed=config.seed)
    return metrics


def _check_mixing(plan: Plan, chain: Chain, config: TrainConfig, selected: list[frozenset[str]]) -> None:
    if not augmentation_of(config).is_mixing or config.cache_views == 0:
        return
    if all(isinstance(p, ProbePhase) or chain.lowest_cut(s) is not None for p, s in zip(plan, selected, strict=True)):
        raise ValueError(
            f"mixup={config.mixup}, cutmix={config.cutmix}: below the cut only activations are kept, and images cannot be "
            "mixed; choose --cache_views 0, or leave mixing out"
        )


def _identity(plan: Plan, data: Data, config: TrainConfig) -> dict[str, Any]:
    """What must be the same for a state to be gone on from."""
    settings = {k: v for k, v in to_settings(config).items() if k not in NOT_COMPARED}
    splits = {"train": data.train.fingerprint, "validation": data.validation.fingerprint}
    return {**settings, **splits, "plan": [phase.policy.name for phase in plan]}


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


def _curves(done: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    """Loss and accuracy against epochs, over all phases."""
    rows = [row for phase in done for row in phase["history"]]
    if len(rows) < 2:
        return []
    epochs = list(range(1, len(rows) + 1))

    def series(name: str, key: str) -> dict[str, Any]:
        return {"name": name, "x": epochs, "y": [row[key] for row in rows]}

    return [
        {"title": "Loss", "x_label": "epoch", "y_label": "Loss", "x_log": False,
         "series": [series("training", "train_loss"), series("validation log-loss", "validation_log_loss")]},
        {"title": "Accuracy", "x_label": "epoch", "y_label": "Accuracy", "x_log": False,
         "series": [series("training", "train_accuracy"), series("validation", "validation_accuracy")]},
    ]  # fmt: skip
