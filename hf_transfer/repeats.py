"""Runs a recipe once, in folds (`--folds`), beside a sibling (`--train_on_all`) or with several seeds (`--seeds`).

    output_dir/fold_1 ... fold_K      runs without test images; then the model in output_dir is trained on all images
    output_dir/sibling                a run without test images; then the model in output_dir is trained on all images
    output_dir/seed_0, seed_1, ...    runs that equal a run with that seed alone; the model in output_dir is that of the first

Every run is an ordinary run with a folder of its own. With `resume`, finished runs are read from their folders, and an
interrupted run continues. Without an output folder, all results stay in memory.
"""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer import processes
from hf_transfer.accelerator import connect_processes
from hf_transfer.config import NO_CHECKPOINT, GradientConfig, RunConfig
from hf_transfer.data.dataset import Data, load_run_data
from hf_transfer.data.folds import DataFolds, divide, join_pool
from hf_transfer.data.splits import Split
from hf_transfer.locations import CHECKPOINTS, RESULTS, is_finished
from hf_transfer.metrics.bootstrap import mean_interval
from hf_transfer.network.damage import read_json
from hf_transfer.network.fingerprint import hash_tensors
from hf_transfer.reporting.predictions import PREDICTIONS, deactivate, read_predictions
from hf_transfer.reporting.results import describe_run, pin_revisions, public_settings, read_held_out_run, write_config
from hf_transfer.reporting.sentences import describe_folds, describe_seeds
from hf_transfer.runs import open_session, train_session, write_run
from hf_transfer.sealed import replace_file
from hf_transfer.session import Session
from hf_transfer.settings import replace_settings
from hf_transfer.solvers.groups import number_groups
from hf_transfer.strategy import Strategy, make_strategy
from hf_transfer.training.final_fit import (
    EstimatedBy,
    FinalFit,
    HeldOutPredictions,
    combine_held_out,
    covers_train_images,
    round_logits,
)
from hf_transfer.training.phases import NOT_COMPARED, describe_changes
from hf_transfer.training.records import RunResult

log = logging.getLogger(__name__)

PROBE = "linear_probe"
NETWORK = "network"  # file in `checkpoints` with the hash of the weights from which all runs start
Load = Callable[[RunConfig], Data]


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """One finished run: the content of its results.json, its splits, and the logits (N, K) of its predictions by split.

    The logits are those that can be read from predictions.parquet, so that a resumed run has the same.
    """

    results: Mapping[str, Any]
    splits: Mapping[str, Split]
    logits: Mapping[str, NDArray[np.float32]]

    def read_qualities(self, split: str) -> NDArray[np.float64]:
        """Returns how well each image of the split is predicted (N,), such as hit or miss."""
        of_split = self.splits[split]
        return of_split.target.read_outcomes(self.logits[split], of_split.labels).qualities.astype(np.float64)


def run_config(
    config: RunConfig,
    *,
    load: Load | None = None,
    output_dir: Path | None = None,
    unrepeatable: Sequence[str] = (),
) -> tuple[Session, RunResult]:
    """Runs the strategy of `config`, in folds, beside a sibling or with several seeds if the settings ask for it.

    `load` returns the splits for a config (default: the splits in the settings). See `runs.open_session` for the other
    arguments, and for the errors. Raises ValueError, too, if the images cannot be divided into folds, and if a run to resume
    had other settings.
    """
    start = _Start(
        config=config,
        load=load or load_run_data,
        output_dir=output_dir,
        unrepeatable=tuple(unrepeatable),
    )
    if config.repeat.folds:
        session, result = start.run_folds()
    elif config.repeat.train_on_all and isinstance(
        config.strategy, GradientConfig
    ):  # a solved head is fitted on all anyway
        session, result = start.run_sibling()
    elif config.repeat.seeds > 1:
        session, result = start.run_seeds()
    else:
        session = open_session(
            config, load=lambda: start.load(config), output_dir=output_dir, unrepeatable=unrepeatable
        )
        result = train_session(session)
    return session, result


@dataclass(frozen=True, kw_only=True)
class _Start:
    """The settings, data and output folder that a run starts from."""

    config: RunConfig
    load: Load
    output_dir: Path | None
    unrepeatable: tuple[str, ...]

    def run_folds(self) -> tuple[Session, RunResult]:
        """Runs every fold, and then trains the model on all images."""
        config, count = self.config, self.config.repeat.folds
        first = open_session(
            config, load=lambda: self.load(config), output_dir=self.output_dir, unrepeatable=self.unrepeatable
        )
        first.costs.stop()
        self.check_network(first)
        folds = divide(first.data, count, config.seed)
        config = pin_revisions(first)  # with the engine that was chosen: one engine, one cache
        repeats = []
        for fold in range(count):
            log.info("fold %d of %d", fold + 1, count)
            line = f"this is fold {fold + 1} of {count}: its validation images are those that the other folds train on"
            own = replace(self, config=_alone(config), unrepeatable=(*self.unrepeatable, line))
            repeats.append(own.train(folds.hold_out(fold), f"fold_{fold + 1}"))
        final = _combine(folds, repeats, seed=config.seed)
        assert isinstance(config.strategy, Strategy)
        section = {"count": count, "strategy": config.strategy.name, **_summarize(repeats, "validation")}
        if first.is_main:
            log.info("%s", describe_folds(section))
            log.info("training the model on all %d images", len(folds.pool))
        session = open_session(
            replace(config, output=self.config.output),
            load=folds.keep_all,
            output_dir=self.output_dir,
            unrepeatable=self.unrepeatable,
        )
        return session, train_session(session, final, {"folds": section})

    def run_sibling(self) -> tuple[Session, RunResult]:
        """Runs the sibling, which holds out the validation split, and then trains the model on all images."""
        first = open_session(
            self.config, load=lambda: self.load(self.config), output_dir=self.output_dir, unrepeatable=self.unrepeatable
        )
        first.costs.stop()
        self.check_network(first)
        data, config = first.data, pin_revisions(first)
        total = len(data.train) + len(data.validation)
        pooled = join_pool(data)
        line = "this is the sibling of a model that is trained on train and validation images: it scores no test images"
        # The model is calibrated on the sibling's predictions, which must not be calibrated already.
        alone = replace_settings(_alone(config), {"calibrate": False})
        own = replace(self, config=alone, unrepeatable=(*self.unrepeatable, line))
        # If they select no epoch, validation images do not choose the regularization of a solved head either.
        keeps_last = isinstance(config.strategy, GradientConfig) and config.strategy.training.keep_last_epoch
        sibling = own.train(replace(pooled, test=None, holds_out_validation=keeps_last), "sibling")
        if first.is_main:
            log.info("training the model on all %d images, as long as its sibling", total)
        assert pooled.train.pool is not None
        # A sibling that kept the probe held out each of its training images too, by cross-validation.
        is_crossed = covers_train_images(sibling.results["metrics"]["validation"])
        splits = ["train", "validation"] if is_crossed else ["validation"]
        predictions = HeldOutPredictions(
            run=read_held_out_run(sibling.results),
            rows=np.arange(0 if is_crossed else len(data.train), total),
            logits=np.concatenate([sibling.logits[split] for split in splits]),
        )
        by = EstimatedBy.CROSS_VALIDATION if is_crossed else EstimatedBy.SIBLING
        final = combine_held_out(pooled.train.pool, len(data.train), [predictions], estimated_by=by, seed=config.seed)
        session = open_session(
            replace(config, output=self.config.output, repeat=self.config.repeat),
            load=lambda: pooled,
            output_dir=self.output_dir,
            unrepeatable=self.unrepeatable,
        )
        section = {"seconds": sibling.results["cost"]["seconds"]["total"]}
        return session, train_session(session, final, {"sibling": section})

    def run_seeds(self) -> tuple[Session, RunResult]:
        """Runs every seed, and a linear probe on the same splits; the result is that of the first seed."""
        is_main, engine = connect_processes().is_main_process, self.config.compute.engine
        seeds = [self.config.seed + i for i in range(self.config.repeat.seeds)]
        if self.output_dir is not None and is_main:
            config = replace_settings(self.config, {"output_dir": str(self.output_dir)})
            write_config(self.output_dir / CHECKPOINTS, config, self.unrepeatable)
        kept: tuple[Session, RunResult] | None = None
        runs, probes = [], []
        for seed in seeds:
            own = replace(self, config=_alone(replace_settings(self.config, {"seed": seed, "engine": engine})))
            with processes.main_first():
                data = self.load(own.config)
            if kept is None:  # the network is needed, so a finished run of the first seed continues from its last state
                session = own.open(data, f"seed_{seed}")
                self.check_network(session)
                kept, engine = (session, train_session(session)), session.config.compute.engine
                own = replace(own, config=replace_settings(own.config, {"engine": engine}))
                runs.append(_record(*kept))
            else:
                runs.append(own.train(data, f"seed_{seed}"))
            if self._is_comparable():
                strategy = make_strategy(PROBE, class_balance=own.config.strategy.class_balance)
                probe = replace(own, config=replace(own.config, strategy=strategy))
                probes.append(probe.train(data, f"seed_{seed}/probe"))
        assert kept is not None
        session, result = kept
        section = {"seeds": seeds, **_summarize(runs, *result.metrics), **_compare(runs, probes, seed=seeds[0])}
        result = replace(result, repeats={"seeds": section})
        config = replace(session.config, repeat=self.config.repeat, output=self.config.output)
        session = replace(session, config=config, output_dir=self.output_dir)
        if session.is_main:
            for line in describe_seeds(section):
                log.info("%s", line)
        if self.output_dir is not None:
            write_run(session, result)
        return session, result

    def open(self, data: Data, name: str) -> Session:
        """Opens the session of a run on `data`, whose folder is `name` in the output folder."""
        folder = None if self.output_dir is None else self.output_dir / name
        return open_session(self.config, load=lambda: data, output_dir=folder, unrepeatable=self.unrepeatable)

    def check_network(self, session: Session) -> None:
        """Stores the hash of the weights before training. Raises ValueError if the runs to resume had other weights."""
        if self.output_dir is not None:
            file, network = self.output_dir / CHECKPOINTS / NETWORK, hash_tensors(session.chain.model.state_dict())
            processes.run_on_main(lambda: _check_hash(file, network, resumes=self.config.output.resume))

    def train(self, data: Data, name: str) -> Repeat:
        """Runs the strategy on `data`, or reads the finished run to resume. Its folder is `name` in the output folder."""
        if self.output_dir is not None and self.config.output.resume:
            folder = self.output_dir / name
            finished = processes.run_on_main(lambda: _read_finished(folder, self.config, data))
            if finished is not None:
                log.info("keeping the finished run in %s", folder)
                return finished
        session = self.open(data, name)
        return _record(session, train_session(session))

    def _is_comparable(self) -> bool:
        """Whether a linear probe of the checkpoint is another recipe that makes sense."""
        strategy = self.config.strategy
        assert isinstance(strategy, Strategy)
        return strategy.name != PROBE and self.config.model.checkpoint != NO_CHECKPOINT


def _alone(config: RunConfig) -> RunConfig:
    """Returns the settings of one of the runs, which neither repeats nor pushes anything."""
    return replace_settings(
        config, {"folds": 0, "train_on_all": False, "seeds": 1, "push_to_hub": None, "private": False}
    )


def _record(session: Session, result: RunResult) -> Repeat:
    target = session.data.target
    logits = {split: round_logits(target, each) for split, each in result.logits.items()}
    return Repeat(results=describe_run(session, result), splits=_name(session.data), logits=logits)


def _name(data: Data) -> dict[str, Split]:
    return {str(split.name): split for split in data.splits}


def _check_hash(file: Path, network: str, *, resumes: bool) -> None:
    if resumes and file.is_file() and file.read_text() != network:
        raise ValueError(
            f"--resume: the runs in {file.parents[1]} started from other weights than this checkpoint has now. Give the same "
            "checkpoint, or start fresh without --resume in another folder"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, network.encode())


def _read_finished(folder: Path, config: RunConfig, data: Data) -> Repeat | None:
    """Returns the finished run in `folder`, or None. Raises ValueError if the run had other settings or other images."""
    if not is_finished(folder):
        return None
    results = read_json(folder / RESULTS)
    settings = {n: v for n, v in public_settings(config).items() if n not in NOT_COMPARED}
    fingerprints = {str(split.name): split.fingerprint for split in data.splits}
    current = {**settings, **fingerprints}
    stored = {**results["config"], **results["data"]["fingerprint"]}
    if changes := describe_changes({name: stored.get(name) for name in current}, current):
        raise ValueError(
            f"--resume: the run in {folder} had other settings: {changes}. Give the same settings, or start fresh without "
            "--resume in another folder"
        )
    activated = read_predictions(folder / PREDICTIONS, data.target)
    logits = {split: deactivate(data.target, each) for split, each in activated.items()}
    return Repeat(results=results, splits=_name(data), logits=logits)


def _combine(folds: DataFolds, repeats: Sequence[Repeat], *, seed: int) -> FinalFit:
    """Returns the final fit, with the predictions of all folds in the order of the pool."""
    predictions = [
        HeldOutPredictions(
            run=read_held_out_run(repeat.results),
            rows=np.flatnonzero(folds.fold_of == fold),
            logits=repeat.logits["validation"],
        )
        for fold, repeat in enumerate(repeats)
    ]
    return combine_held_out(folds.pool, len(folds.data.train), predictions, estimated_by=EstimatedBy.FOLDS, seed=seed)


def _summarize(repeats: Sequence[Repeat], *splits: str) -> dict[str, Any]:
    """Returns the seconds of each run, and for each split the mean, standard deviation and values of each metric."""
    summary: dict[str, Any] = {}
    for split in splits:
        rows = [repeat.results["metrics"][split] for repeat in repeats]
        values = {name: [row[name] for row in rows] for name, value in rows[0].items() if isinstance(value, float)}
        summary[split] = {
            name: {"mean": statistics.fmean(each), "std": statistics.stdev(each), "values": each}
            for name, each in values.items()
            if None not in each
        }
    return {"metrics": summary, "seconds": [repeat.results["cost"]["seconds"]["total"] for repeat in repeats]}


def _compare(runs: Sequence[Repeat], probes: Sequence[Repeat], *, seed: int) -> dict[str, Any]:
    """Returns the gain in quality, such as accuracy, over the probes on the same images, with its 95 % bootstrap interval.

    If all seeds score the same images (of a stored split), an image's gain is its mean over the seeds. Validation images that
    each seed drew count once for each seed; the interval draws the images of one content together. Returns {} without probes.
    """
    if not probes:
        return {}
    split = "test" if "test" in runs[0].logits else "validation"
    gains = [run.read_qualities(split) - probe.read_qualities(split) for run, probe in zip(runs, probes, strict=True)]
    is_stored = len({run.results["data"]["fingerprint"][split] for run in runs}) == 1
    per_image = np.mean(gains, axis=0) if is_stored else np.concatenate(gains)
    groups = number_groups([run.splits[split] for run in (runs[:1] if is_stored else runs)])
    interval = mean_interval(per_image, seed=seed, groups=groups)
    return {
        "gain_over_probe": {
            "split": split,
            "metric": runs[0].splits[split].target.image_quality,
            "mean": float(per_image.mean()),
            "interval": None if interval is None else list(interval),
            "values": [float(each.mean()) for each in gains],
        }
    }
