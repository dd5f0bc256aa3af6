"""Runs the phases of a plan (a list of phases) in order. A run can be resumed at any step of any phase."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_transfer.errors import count_noun
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.dropping import check_head_dropout, check_stochastic_depth
from hf_transfer.network.fingerprint import hash_tensors
from hf_transfer.network.freezing import Audit
from hf_transfer.prefix.allocator import keep_freed_memory
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.prefix.store import SelectedStore
from hf_transfer.prefix.sweep import place_model
from hf_transfer.processes import wait_for_everyone
from hf_transfer.session import Session
from hf_transfer.settings import to_settings
from hf_transfer.training import readouts, wise
from hf_transfer.training.checkpoints import StateWriter, remove_state, share_state
from hf_transfer.training.feeds import PhaseData, check_augmentation, make_phase_data
from hf_transfer.training.final_fit import FinalFit, PhaseLength
from hf_transfer.training.fit_head import describe_solution
from hf_transfer.training.loop import compile_network, train_phase, validate
from hf_transfer.training.phase import Plan, SolveHeadPhase, TrainPhase
from hf_transfer.training.records import Activations, PhaseCost, PhaseResult, phase_from_json, to_json
from hf_transfer.training.steps import PhaseRun, count_accumulated, count_epochs, count_images_per_step

log = logging.getLogger(__name__)

STATE_FORMAT = 8  # increase this number when a run could not continue from older states in the same way

# Settings that only divide a step's images into batches. Their product with the number of processes is compared instead.
BATCHES = frozenset(("batch_size", "gradient_accumulation_steps"))
# Settings that may change when a run is resumed: they do not influence the result, or (checkpoint, dataset,
# preprocessing_from) are paths, whose content is compared.
NOT_COMPARED = frozenset((
    "output_dir", "overwrite_output_dir", "resume", "cache", "cache_gb", "num_workers", "num_threads", "tracker",
    "device_feed", "save_every_s", "folds", "train_on_all", "seeds",
    "checkpoint", "dataset", "image_root", "base_model", "preprocessing_from", "merge",
    "push_to_hub", "private", "exclude", "relabel",
))  # fmt: skip

# What follows from settings, checkpoint and images in the description of a run (see `describe_identity`).
CONSEQUENCES = frozenset(("network", "preprocessing", "batches", "train", "validation", "test", "plan", "final"))
TITLES: Mapping[str, str] = {  # names in a message of what is no flag in the description of a run
    **{name: name for name in CONSEQUENCES},
    **{split: f"fingerprint of the {split} images" for split in ("train", "validation", "test")},
    "format": "format of the state",
    "images_per_step": "--batch_size times --gradient_accumulation_steps times processes = images_per_step",
}

PhaseState = Mapping[str, Any] | None
"""The part of a saved state that describes an unfinished phase; None between phases."""


@dataclass(frozen=True, kw_only=True)
class PhasesResult:
    """The result of all phases of a plan."""

    done: tuple[PhaseResult, ...]
    resumed: bool
    num_audited: int  # number of tensors that no phase may change
    validation_images: EvaluationImages | None = None  # the pixels that the last phase read, if it read pixels
    activations: Activations | None = None  # what the last phase read, if it read activations without augmentation
    # Logits (N, K) that the last phase computed for the validation images with the kept weights, if these logits are those of
    # the saved network: in fp32, on the published pixels.
    validation_logits: NDArray[np.float32] | None = None
    start: wise.Weights | None  # for WiSE-FT: the weights before the first gradient step on the whole network


def run_phases(
    session: Session,
    plan: Plan,
    *,
    checkpoints: Path | None = None,
    continues: Callable[[Sequence[PhaseResult]], bool] = lambda done: True,
    final: FinalFit | None = None,
) -> PhasesResult:
    """Trains the chain's model in place, phase by phase, without scoring the result.

    The session's chain describes the whole network; a phase may train a part of the network through a chain of its own.
    Before every phase except the first, `continues` decides from the earlier results whether to run the phase.

    With `final`, every phase trains on train and validation images, as long as earlier runs did, and nothing is validated.
    With `resume`, the run continues from the state in `checkpoints`. On a CPU, the result is then the same to the last bit as
    without the interruption. Raises ValueError, with the differences, if plan, network, data or settings have changed, and
    ContinuableError if a state cannot be saved. The last state is on the disk when this function ends.
    """
    run = _PlanRun(session, plan, checkpoints, final)
    try:
        run.restore()
        for number in range(len(run.done), len(plan)):
            if run.done and not continues(run.done):
                break
            run.run_phase(number)
        run.audit.check()
        validation_logits = run.find_validation_logits()
    finally:
        run.close()
    return PhasesResult(
        done=tuple(run.done),
        resumed=run.is_resumed,
        num_audited=len(run.audit),
        start=run.start,
        validation_images=run.validation_images,
        activations=run.list_activations(),
        validation_logits=validation_logits,
    )


class _PlanRun:
    def __init__(self, session: Session, plan: Plan, checkpoints: Path | None, final: FinalFit | None) -> None:
        self.session, self.plan, self.checkpoints, self.final = session, plan, checkpoints, final
        self.chains = [p.chain or session.chain if isinstance(p, TrainPhase) else session.chain for p in plan]
        # Select all parameters first, so that a policy that does not fit the network fails before anything runs.
        self.selected = [phase.policy.select(chain) for phase, chain in zip(plan, self.chains, strict=True)]
        self._check_mixing()
        gradient = [
            (c, s) for p, c, s in zip(plan, self.chains, self.selected, strict=True) if isinstance(p, TrainPhase)
        ]
        if gradient:
            cuts = [chain.lowest_cut(names) for chain, names in gradient]
            check_augmentation(session, reads_pixels=None in cuts)
            check_stochastic_depth(session.chain, session.gradient.training.drop_path, cuts)
            check_head_dropout(session.chain, session.gradient.training.dropout)
        self.done: list[PhaseResult] = []
        self.start: wise.Weights | None = None
        self.is_resumed = False
        self._initial: wise.Weights = {}  # trained weights before the run, for L2-SP
        self._phase_state: PhaseState = None  # state of the interrupted phase
        self._inputs: PhaseData | None = None  # inputs of the previous phase
        self._validation_logits: NDArray[np.float32] | None = None  # of the previous phase's kept weights
        self._identity = describe_identity(session, plan, final)
        self._writer = StateWriter(checkpoints) if session.is_main and checkpoints is not None else None

    @property
    def validation_images(self) -> EvaluationImages | None:
        return None if self._inputs is None else self._inputs.images

    def list_activations(self) -> Activations | None:
        """Returns `PhasesResult.activations`. A resumed run that does not know its inputs gives None."""
        inputs, train = self._inputs, self.session.data.train
        if inputs is None or inputs.cut is None or inputs.stored is None or inputs.activations is None:
            return None
        if inputs.feed.views != 1:
            return None
        stored = inputs.stored
        if self.final is not None and train.pool_rows is not None:  # a row for each image of the pool
            stored = SelectedStore(stored, train.pool_rows)
        stores = {"train": stored, "validation": inputs.activations}
        return Activations(chain=self.chains[len(self.done) - 1], cut=inputs.cut, stores=stores)

    def find_validation_logits(self) -> NDArray[np.float32] | None:
        """Returns `PhasesResult.validation_logits`. A resumed run computes them again as the interrupted run did."""
        session, last = self.session, self.plan[-1] if self.plan else None
        is_saved = session.resources.precision == "fp32" and session.config.compute.decoder == "exact"
        if (
            self.final is not None
            or not isinstance(last, TrainPhase)
            or last.chain is not None
            or not is_saved
            or len(self.done) < len(self.plan)
        ):
            return None
        if self._validation_logits is None:
            self._inputs = self._inputs or make_phase_data(session, session.chain.lowest_cut(self.selected[-1]))
            with session.chain.part(start=self._inputs.cut) as network:
                compiled = compile_network(network, session.gradient.training)
                self._validation_logits = validate(compiled, session, self._inputs).logits
        return self._validation_logits

    def close(self) -> None:
        """Waits until the last state is saved."""
        if self._writer is not None:
            self._writer.close()

    def restore(self) -> None:
        """Moves the network to its device and, with `resume`, loads the saved state if there is a saved state."""
        session, chain = self.session, self.session.chain
        if session.accelerator.device.type == "cpu":
            keep_freed_memory()
        place_model(chain.model, session.resources)
        if any(isinstance(phase, TrainPhase) and phase.optimization.l2_sp for phase in self.plan):
            # A resumed run starts from the same network, as the state's identity proves.
            self._initial = wise.copy_weights(chain.model, frozenset().union(*self.selected))
        resume = session.config.output.resume
        state = share_state(self.checkpoints, session.accelerator) if resume and self.checkpoints is not None else None
        if state is not None:
            check_same(state["identity"], self._identity)
            if session.is_main and state["batches"] != (now := _describe_batches(session)):
                log.warning(
                    "the saved state is from %s, and the run continues with %s: the result is the same up to rounding if the "
                    "network has no dropout and trains no BatchNorm",
                    state["batches"], now,
                )  # fmt: skip
            _load_model(chain, state["model"])
            self.done = [phase_from_json(row) for row in state["done"]]
            self.start, self._phase_state, self.is_resumed = state["start"], state["phase"], True
            session.costs.note_resume()
            log.info("resuming in phase %d of %d", min(len(self.done) + 1, len(self.plan)), len(self.plan))
        elif session.is_main and self.checkpoints is not None:
            remove_state(self.checkpoints)
        wait_for_everyone()
        self.audit = Audit(chain, None, frozenset().union(*self.selected))  # tensors that no phase trains

    def save(self, phase_state: PhaseState) -> None:
        if self._writer is not None:
            state = {
                "identity": self._identity,
                "batches": _describe_batches(self.session),
                "done": to_json(self.done),
                "phase": phase_state,
                "model": self.session.chain.model.state_dict(),
                "start": self.start,
            }
            self._writer.write(state)
            self.session.note_state()

    def run_phase(self, number: int) -> None:
        phase, session = self.plan[number], self.session.with_chain(self.chains[number])
        if session.is_main and len(self.plan) > 1:
            log.info("phase %d of %d: %s", number + 1, len(self.plan), phase.policy.name)
        if isinstance(phase, SolveHeadPhase):
            solved = _solve(session, phase, self._find_later_cuts(number), final=self.final)
            self.done.append(solved if self.final is None else replace(solved, score=self.final.phases[number].score))
        else:
            if session.gradient.training.wise_ft and phase.chain is None and self.start is None:
                self.start = self._find_start(number)
            self.done.append(self._train(number, phase, session))
        self._phase_state = None
        self.save(None)  # a resumed run starts with the next phase
        wait_for_everyone()

    def _train(self, number: int, phase: TrainPhase, session: Session) -> PhaseResult:
        length = None if self.final is None else self.final.phases[number]
        phase = self._lengthen(phase, length)
        session = session if length is None else session.with_all_images()
        cut = session.chain.lowest_cut(self.selected[number])
        before = self._inputs if phase.through else None
        previous = self.plan[number - 1] if number else None
        started = time.perf_counter()
        with session.costs.part("store"):
            self._inputs = make_phase_data(session, cut, through=phase.through, before=before)
        session.costs.count_images("store", self._inputs.num_computed)
        store_seconds = time.perf_counter() - started
        run = PhaseRun(
            phase=phase,
            session=session,
            inputs=self._inputs,
            save=self.save,
            epochs_before=sum(result.epochs for result in self.done),
            seed_offset=number << 32,  # two phases never use the same seed
            start=self._initial,
            head_scale=previous.head_scale if isinstance(previous, SolveHeadPhase) else 1.0,
            length=length,
        )
        # A phase with its own chain has a new head, which no earlier phase has trained.
        starts_trained = phase.is_trained or (bool(self.done) and phase.chain is None)
        with session.costs.part("train"):
            trained = train_phase(run, starts_trained=starts_trained, resumed=self._phase_state)
        session.costs.count_images("train", trained.new_images)
        self._validation_logits = trained.validation_logits
        return PhaseResult(
            policy=phase.policy.name,
            cut=None if cut is None else cut.name,
            optimizer=phase.optimization.optimizer,
            epochs=phase.epochs,
            lr=phase.optimization.lr,
            lr_scheduler_type=phase.optimization.lr_scheduler_type,
            num_trainable=trained.num_trainable,
            images_per_second=trained.images_per_second,
            kept=trained.kept,
            kept_epoch=trained.kept_epoch,
            score=trained.score,
            history=trained.history,
            cost=PhaseCost(
                store_seconds=store_seconds,
                store_images=self._inputs.num_computed,
                train_seconds=trained.seconds,
                train_images=trained.images,
            ),
        )

    def _lengthen(self, phase: TrainPhase, length: PhaseLength | None) -> TrainPhase:
        """Returns the phase with the epochs that `min_steps` needs or, on all images, with the epochs of the folds."""
        if length is not None:
            return replace(phase, epochs=length.planned_epochs)
        min_steps = self.session.gradient.training.min_steps
        epochs = count_epochs(self.session, phase.epochs, min_steps=min_steps)
        if epochs > phase.epochs and self.session.is_main:
            steps = count_noun(min_steps, "step")
            log.info("training for %d epochs in place of %d, to take %s or more", epochs, phase.epochs, steps)
        return replace(phase, epochs=epochs)

    def _find_start(self, number: int) -> wise.Weights:
        """Returns the weights before the first gradient step. A linear probe replaces a head that is not trained yet."""
        model, phase = self.session.chain.model, self.plan[number]
        gradient = (s for p, s in zip(self.plan, self.selected, strict=True) if isinstance(p, TrainPhase))
        names = frozenset().union(*gradient)
        is_trained = isinstance(phase, TrainPhase) and phase.is_trained
        if is_trained or any(isinstance(p, SolveHeadPhase) for p in self.plan[:number]):
            return wise.copy_weights(model, names)
        head = wise.copy_weights(model, self.session.chain.classifier_parameters)
        _solve(self.session, SolveHeadPhase(), final=self.final)
        start = wise.copy_weights(model, names)
        wise.set_weights(model, head)
        return start

    def _find_later_cuts(self, number: int) -> list[Cut]:
        """Returns the later phases' cuts whose activations one pass over the images can store together with the features.

        A cut is left out if an earlier phase trains layers before the cut, because the stored activations would be outdated.
        """
        session, chain = self.session, self.session.chain
        if session.gradient.training.cache_views != 1:
            return []
        cuts: dict[str, Cut] = {}
        trained: set[str] = set()
        for phase, names in zip(self.plan[number + 1 :], self.selected[number + 1 :], strict=True):
            cut = chain.lowest_cut(names) if isinstance(phase, TrainPhase) and phase.chain is None else None
            if cut is not None and cut != chain.features and trained.isdisjoint(chain.before(cut)[0]):
                cuts[cut.name] = cut
            trained |= names
        num_images = len(session.data.train) + len(session.data.validation)
        storage = session.resources.choose_storage(sum(c.bytes_per_image for c in cuts.values()) * num_images)
        return list(cuts.values()) if storage.kind == "disk" else []

    def _check_mixing(self) -> None:
        augmentation, training = self.session.gradient.augmentation, self.session.gradient.training
        if not augmentation.is_mixing or training.cache_views == 0:
            return
        phases = list(zip(self.plan, self.chains, self.selected, strict=True))
        if self.plan and all(isinstance(p, SolveHeadPhase) or c.lowest_cut(s) is not None for p, c, s in phases):
            raise ValueError(
                f"mixup={augmentation.mixup}, cutmix={augmentation.cutmix}: a phase with a frozen prefix trains on stored "
                "activations, not on images, which mixup and cutmix need: choose --cache_views 0, or omit --mixup and --cutmix"
            )
        without = [p.policy.name for p, c, s in phases if isinstance(p, TrainPhase) and c.lowest_cut(s) is not None]
        if without and self.session.is_main:
            log.info(
                "mixup and cutmix mix no images in the phases %s, which train on stored activations; --cache_views 0 changes "
                "that", ", ".join(without),
            )  # fmt: skip


def _solve(
    session: Session, phase: SolveHeadPhase, beside: Sequence[Cut] = (), *, final: FinalFit | None
) -> PhaseResult:
    """Fits the head on training images, and copies the head into the model. Stores the activations at the cuts `beside`.

    With `final`, the head is fitted on training and validation images.
    """
    with session.costs.part("features"):
        # The test split is scored once, at the end of the run, and not here.
        candidates, computed = readouts.extract_readouts(session.without_test(), sweep="none", beside=beside)
    session.costs.count_images("features", computed)
    with session.costs.part("probe"):
        options = readouts.probe_options(session, phase, refit=final is not None)
        best, _ = readouts.choose_readout(candidates, session, options)
        readouts.install_probe(session.backbone, session.chain, best)
    if final is not None:
        return describe_solution(best, phase, session.data.target)
    score = readouts.score_probe(best, session.data.validation, session.resources)
    log.info("linear probe: validation %s", score.describe())
    return replace(describe_solution(best, phase, session.data.target), score=score)


def describe_identity(session: Session, plan: Plan, final: FinalFit | None) -> dict[str, Any]:
    """Describes network, settings, data and plan as JSON values. A run resumes only from a state with the same description."""
    settings = {k: v for k, v in to_settings(session.config).items() if k not in NOT_COMPARED | BATCHES}
    settings["images_per_step"] = count_images_per_step(session)
    if not session.gradient.training.freeze_batchnorm:
        settings["batch_size"] = session.config.compute.images_per_batch  # BatchNorm's statistics are those of a batch
    if session.gradient.augmentation.is_mixing:
        settings["batches"] = _describe_batches(session)  # images are mixed with others of their batch
    splits = {"train": session.data.train.fingerprint, "validation": session.data.validation.fingerprint}
    network = hash_tensors(session.chain.model.state_dict())  # not its path, which may change
    preprocessing = dict(session.backbone.preprocessing.spec)
    return {
        "format": STATE_FORMAT, "network": network, "preprocessing": preprocessing, **settings, **splits,
        "plan": [phase.identity() for phase in plan], "final": None if final is None else to_json(final.phases),
    }  # fmt: skip


def _describe_batches(session: Session) -> str:
    processes = count_noun(session.accelerator.num_processes, "process")
    batches = count_noun(count_accumulated(session), "batch")
    return f"{processes} with {batches} of {count_noun(session.config.compute.images_per_batch, 'image')} per step"


def check_same(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raises ValueError, with the differences, if a state that was saved with the identity `saved` is of another run."""
    if changes := describe_changes(saved, current):
        raise ValueError(
            f"--resume: the saved state is from a run with other settings: {changes}. Give the same settings (see "
            "checkpoints/config.yaml in the output folder), or start fresh without --resume"
        )


def describe_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Returns each setting that differs between two descriptions of runs, as its flag with both values; "" if none does.

    What follows from the settings, such as the plan, is compared only if no setting differs.

    >>> describe_changes({"lr": 0.1, "plan": [{"lr": 0.1}]}, {"lr": 0.2, "plan": [{"lr": 0.2}]})
    '--lr was 0.1, is 0.2'
    >>> describe_changes({"lr": 0.1, "plan": [{"lr": 0.1}]}, {"lr": 0.1, "plan": [{"lr": 0.2}]})
    'plan[0].lr was 0.1, is 0.2'
    """
    differing = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    settings = [name for name in differing if name not in CONSEQUENCES]
    lines = [
        line
        for name in settings or differing
        for line in _list_changes(TITLES.get(name, f"--{name}"), saved.get(name), current.get(name))
    ]
    return "; ".join(lines)


def _list_changes(name: str, saved: Any, current: Any) -> list[str]:
    """Returns a clause for each value that differs between two JSON values; `name` is the path to them, as in Python."""
    if saved == current:
        return []
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = {**saved, **current}
        return [line for key in keys for line in _list_changes(f"{name}.{key}", saved.get(key), current.get(key))]
    if (
        isinstance(saved, list)
        and isinstance(current, list)
        and any(isinstance(each, dict) for each in saved + current)
    ):
        if len(saved) != len(current):
            return [f"len({name}) was {len(saved)}, is {len(current)}"]
        pairs = enumerate(zip(saved, current, strict=True))
        return [line for i, (old, new) in pairs for line in _list_changes(f"{name}[{i}]", old, new)]
    old, new = ("none" if value is None else repr(value) for value in (saved, current))
    return [f"{name} was {old}, is {new}"]


def _load_model(chain: Chain, saved: Mapping[str, torch.Tensor]) -> None:
    """Copies saved values into the model's tensors in place, because tensors of another memory format round differently."""
    own = chain.model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
