"""Runs a plan: its phases in order, then the scores of what came out.

outcome = run_plan(plan, chain, backbone, data, config=config)
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_transfer.config import TrainConfig
from hf_transfer.data.dataset import Data
from hf_transfer.data.options import ExtractOptions
from hf_transfer.data.pixels import EvaluationImages
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain
from hf_transfer.network.freezing import set_trainable
from hf_transfer.training import wise
from hf_transfer.training.costs import Costs
from hf_transfer.training.evaluate import compute_image_logits
from hf_transfer.training.feeds import augmentation_of, make_phase_data
from hf_transfer.training.loop import validate
from hf_transfer.training.metrics import score
from hf_transfer.training.outcome import Outcome
from hf_transfer.training.phase import Plan, ProbePhase
from hf_transfer.training.phases import KEPT_START, run_phases
from hf_transfer.training.solve import solve_head
from hf_transfer.training.steps import Workplace

log = logging.getLogger(__name__)

# Between the last validation of the trained network and that of the whole one from files, in float32.
VERIFIED_LOG_LOSS = 1e-3


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

    Where a plan began with a probe and no step was better than that, what comes out is the probe as its own recipe makes it
    (`training.solve.solve_head`): fitted on validation images, too, which are scored by fits that have not seen them, and of
    the readout that these choose, for which `outcome.backbone` may hold another model than the chain's.

    Of `config`, phases say their own policy, epochs and optimization; the rest holds for all. Without `checkpoints` no state is
    saved. `costs` gets the seconds of each part.

    With `config.resume`, goes on from the state in `checkpoints`, to the same bits as without the interruption on a CPU.
    Raises ValueError where that state is of another plan, data set or setting, naming them.
    """
    accelerator = accelerator or Accelerator()
    costs = costs or Costs()
    ran = run_phases(
        plan, chain, backbone, data, config=config, accelerator=accelerator, costs=costs, checkpoints=checkpoints
    )
    done, details, curves = ran.done, dict[str, Any](), draw_curves(ran.done)
    at = Workplace(chain=chain, data=data, config=config, accelerator=accelerator, save=lambda part: None)
    first = plan[0] if plan else None
    is_probe = isinstance(first, ProbePhase) and len(done) > 1 and all(d["kept"] == KEPT_START for d in done[1:])
    if ran.start is not None and not is_probe:
        with costs.part("wise_ft"):
            found = _interpolate(ran.start, backbone, at)
        done = [*done[:-1], _describe_interpolated(done[-1], found)]
        details, curves = {"wise_ft": found}, [*curves, *wise.draw_curves(found)]
        is_probe = isinstance(first, ProbePhase) and found["alpha"] == 0.0
    set_trainable(chain.model, plan[-1].policy.select(chain) if plan else ())
    if is_probe:
        assert isinstance(first, ProbePhase)
        log.info("no step was better than the probe: it is kept, and fitted on training and validation images")
        probe = solve_head(
            chain, backbone, data, config=config, accelerator=accelerator, costs=costs, sweep=first.sweep
        )  # fmt: skip
        backbone, metrics, details = probe.backbone, probe.metrics, {**details, **probe.details}
        told = f"{probe.plan[0]['description']}; fitted on validation images, too, since no step was better"
        done = [{**done[0], **probe.plan[0], "description": told}, *done[1:]]
    else:
        with costs.part("evaluate"):
            metrics = score_splits(chain, backbone, data, config, accelerator)
        difference = abs(metrics["validation"]["nll"] - done[-1]["score"]["log_loss"]) if done else 0.0
        if accelerator.mixed_precision == "no" and config.dtype == "float32" and difference > VERIFIED_LOG_LOSS:
            raise RuntimeError(
                f"the saved network's validation log-loss differs by {difference:.2g} from the one that it was chosen by"
            )
    return Outcome(
        backbone=backbone,
        plan=describe_phases(done),
        metrics=metrics,
        curves=curves,
        details={
            **details,
            "phases": [{"policy": d["policy"], "history": d["history"]} for d in done],
            "augmentation": vars(augmentation_of(config)),
            "audited_tensors": ran.num_audited,
            "is_probe": is_probe,
            # The cost of a resumed run is that of its last process alone.
            "resumed": ran.resumed,
        },
    )


def describe_phases(done: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    """What results.json says of each phase under "plan"; the histories have a place of their own."""
    return [{k: v for k, v in d.items() if k != "history"} for d in done]


def _interpolate(start: dict[str, torch.Tensor], backbone: Backbone, at: Workplace) -> dict[str, Any]:
    chain = at.chain
    reads = make_phase_data(chain.lowest_cut(set(start)), chain, backbone, at.data, at.config, at.accelerator)
    with chain.part(start=reads.cut) as network, at.accelerator.autocast():
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


def score_splits(
    chain: Chain,
    backbone: Backbone,
    data: Data,
    config: TrainConfig,
    accelerator: Accelerator,
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


def draw_curves(done: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
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
