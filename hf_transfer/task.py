"""The Python API. A task consists of images, a checkpoint and settings, and `Task.fit` trains with a strategy.

    import hf_transfer as ht

    task = ht.Task("path/to/images", "timm/mobilenetv2_100.ra_in1k", seed=0)
    run = task.fit(ht.lora(rank=8))
    run.test.accuracy, run.predict("photos/"), run.save("runs/mine"), run.push("me/model")

`Task.fit` runs the same code as `hf-transfer train`, so the same settings give bitwise equal weights.
"""

import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hf_transfer.accelerator import connect_processes
from hf_transfer.choosing.rank import SAMPLE, Ranking
from hf_transfer.choosing.rank import rank as rank_checkpoints
from hf_transfer.config import EMBEDDED_CHECKPOINT, ExportPrecision, OptimizerConfig, OutputConfig, RunConfig
from hf_transfer.data.dataset import Data, load_run_data
from hf_transfer.errors import count_noun
from hf_transfer.inference.evaluate import ALL, evaluate_split
from hf_transfer.inference.load import InferenceEngine
from hf_transfer.interrupts import catch_signals
from hf_transfer.metrics.records import Metrics
from hf_transfer.output import explains_how_to_continue, open_folder
from hf_transfer.repeats import run_config
from hf_transfer.run import Run
from hf_transfer.runs import open_session
from hf_transfer.session import Session
from hf_transfer.settings import list_settings, replace_settings
from hf_transfer.strategy import GradientStrategy, Strategy, make_strategy
from hf_transfer.targets.labels import listed
from hf_transfer.training.phase import SolveHeadPhase, TrainPhase

if TYPE_CHECKING:
    from hf_transfer.choosing.advise import Advice

IN_MEMORY = "images in memory"  # name of the data set in logs and cards if the user gives no name
NOT_OF_A_TASK = {  # settings of a run that another method takes
    "output_dir": "give output_dir to Task.fit, or a folder to run.save",
    "overwrite_output_dir": "give overwrite_output_dir to Task.fit",
    "resume": "give resume to Task.fit",
    "export": "call run.export after run.save",
    "export_precision": "call run.export after run.save",
    "push_to_hub": "call run.push after Task.fit",
    "private": "call run.push with PublishOptions(private=True)",
}

_OF_RUNS = list_settings(RunConfig())
ALL_SETTINGS = frozenset(_OF_RUNS)
RANKED = frozenset(
    {name for name, setting in _OF_RUNS.items() if setting.group in ("data", "compute")}
    | {"image_size_px", "trust_remote_code"}
)  # settings that `rank` reads
EVALUATED = RANKED - {"image_size_px", "images_per_class", "validation_fraction"}  # settings that `evaluate` reads

Phases = Sequence[SolveHeadPhase | TrainPhase]


@dataclass(frozen=True, kw_only=True)
class CustomPlan(GradientStrategy):
    """A strategy whose phases the user gives as a list, with the settings of gradient training."""

    in_phases: ClassVar[frozenset[str]] = frozenset({"epochs", *(field.name for field in fields(OptimizerConfig))})

    phases: tuple[SolveHeadPhase | TrainPhase, ...] = ()

    @property
    def name(self) -> str:
        """The name of the strategy in results.json and in the model card."""
        return "custom_plan"

    def plan(self, session: Session) -> Phases:
        """Returns the phases that the user gave."""
        return self.phases


class Task:
    """The images, the checkpoint and the settings of a run, except the settings of the strategy.

    `images`: a folder, file or Hub id, as for `--dataset`; a `datasets.Dataset` or `DatasetDict`; a DataFrame of paths and
    labels; a list of (image, label) pairs; or a dict from split name to any of these (see `data.memory.read_memory`).
    `checkpoint`: a Hub id, a folder, or "embedded"; by default that of the strategy, "embedded" for most. `settings`: settings
    of `hf-transfer train` that do not belong to the strategy, such as `seed`, `images_per_class`, `batch_size`, `precision`.
    `dataset` is the name of images in memory.

    >>> import hf_transfer as ht
    >>> ht.Task("sklearn/digits", images_per_class=10).data.label_names[:3]
    ('0', '1', '2')

    Raises ValueError for an unknown setting or a value that is not allowed.
    """

    def __init__(self, images: Any, checkpoint: str | None = None, **settings: Any) -> None:
        for name in settings:
            if name in NOT_OF_A_TASK:
                raise ValueError(f"Task: {name} is no setting of a task; {NOT_OF_A_TASK[name]}")
        self._has_checkpoint = checkpoint is not None
        values = {"checkpoint": checkpoint or EMBEDDED_CHECKPOINT, **settings}
        self.config, self.images = _read_settings(images, values, where="Task: ")

    @cached_property
    def data(self) -> Data:
        """The splits, loaded and checked at the first access."""
        return load_run_data(self.config, self.images)

    def fit(
        self,
        strategy: Strategy | str | Phases,
        *,
        output_dir: str | Path | None = None,
        overwrite_output_dir: bool = False,
        resume: bool = False,
        **settings: Any,
    ) -> Run:
        """Trains with a strategy, scores the trained network, and returns the run.

        `strategy`: a strategy such as `ht.lora(rank=8)`, its name, or a list of phases from `ht.solve_head` and `ht.train`.
        `settings`: further settings of the strategy, such as `hflip=0.0`. With `output_dir`, the run writes the same folder
        as a recipe, and saves training states, from which `resume=True` continues. A folder with a finished run is refused
        without `resume` or `overwrite_output_dir`. Without `output_dir`, the run writes only caches.
        Raises ValueError for an error in settings, data, checkpoint or folder, and `Interrupted`, which is a
        KeyboardInterrupt, after a signal (SIGINT or SIGTERM).
        """
        strategy = _as_strategy(strategy, settings)
        if output_dir is None and (resume or overwrite_output_dir):
            raise ValueError("resume and overwrite_output_dir need a folder: give output_dir too")
        output = OutputConfig(
            output_dir=None if output_dir is None else str(output_dir),
            overwrite_output_dir=overwrite_output_dir,
            resume=resume,
        )
        with ExitStack() as contexts:
            contexts.enter_context(catch_signals())
            folder = None
            if output_dir is not None:
                connect_processes()
                folder = contexts.enter_context(open_folder(output, strategy.name, dataset=self.config.data.dataset))
                call = f"fit(..., output_dir={str(folder)!r}, resume=True)"
                contexts.enter_context(explains_how_to_continue(call))
            session, result = run_config(
                self._configure(strategy, output),
                load=self._load,
                output_dir=folder,
                unrepeatable=self._list_unrepeatable(strategy),
            )
            return Run(session=session, result=result)

    def advise(self, *, measure: bool = False, budget_s: float | None = None) -> "Advice":
        """Returns advice on the strategy that suits these images and this checkpoint (see `hf-transfer advise`)."""
        from hf_transfer.choosing.advise import advise

        config = self._configure(make_strategy("auto", tracker="none"), OutputConfig())
        session = open_session(config, load=lambda: self.data)
        with session.costs:
            return advise(session, measure=measure, budget_s=budget_s)

    def _configure(self, strategy: Strategy, output: OutputConfig) -> RunConfig:
        config = replace(self.config, strategy=strategy, output=output)
        if not self._has_checkpoint:
            config = replace_settings(config, strategy.task_defaults)
        return config

    def _load(self, config: RunConfig) -> Data:
        """Returns the splits for `config`, whose seed may differ from the task's own."""
        return self.data if config.data == self.config.data else load_run_data(config, self.images)

    def _list_unrepeatable(self, strategy: Strategy) -> list[str]:
        """Returns sentences about the inputs of the run that config.yaml does not contain."""
        lines = [] if self.images is None else ["the images were in memory: give the same images to hf_transfer.Task"]
        if isinstance(strategy, CustomPlan):
            lines.append(f"the plan was made in Python for Task.fit, with {count_noun(len(strategy.phases), 'phase')}:")
            lines += [f"{phase.policy.name}: {json.dumps(phase.identity())}" for phase in strategy.phases]
        return lines


def evaluate(
    checkpoint: str | Path,
    images: Any,
    *,
    split: str = ALL,
    engine: InferenceEngine = "auto",
    export_precision: ExportPrecision | None = None,
    **settings: Any,
) -> Metrics:
    """Returns the metrics of a saved model on one split of labeled images, or on all of them (see `hf-transfer evaluate`).

    `checkpoint`: the folder of a run or model, or a Hub id. `images`: as for `Task`; their labels are matched to the model's
    labels by name. `engine`, `export_precision`: what runs the network, also an exported file. `settings`: settings of the data
    set and of the machine, such as `label_column` or `batch_size`, and `trust_remote_code`. If images of the run that trained
    the model are among the images, a warning and a note of the metrics say how many.

    >>> import hf_transfer as ht
    >>> ht.evaluate("embedded", "sklearn/digits", split="test").num_samples
    539

    Raises ValueError for an unknown setting, a split that does not exist, or a label that the model lacks.
    """
    config, in_memory = _read_settings(images, settings, where="evaluate: ", taken=EVALUATED)
    return evaluate_split(
        str(checkpoint),
        config.data,
        in_memory,
        split=split,
        compute=config.compute,
        trust_remote_code=config.model.trust_remote_code,
        engine=engine,
        export_precision=export_precision,
    ).metrics


def rank(checkpoints: Sequence[str | Path], images: Any, *, sample: int = SAMPLE, **settings: Any) -> Ranking:
    """Ranks checkpoints by the accuracy of a linear probe on frozen features (see `hf-transfer rank`).

    `checkpoints`: Hub ids or folders. `images`: as for `Task`. `sample`: maximum number of train and validation images; 0: all.
    `settings`: settings of the data set and of the machine, such as `label_column` or `batch_size`, `image_size_px` and
    `trust_remote_code`. A checkpoint that cannot be loaded or scored is skipped and listed in `Ranking.failures`.

    >>> import hf_transfer as ht
    >>> ranking = ht.rank(["embedded"], "sklearn/digits", images_per_class=10)
    >>> ranking.rows[0].name, ranking.rows[0].probe > 0.8
    ('embedded', True)

    Raises ValueError for an unknown setting, no checkpoint, a checkpoint that is given twice, or images without classes.
    """
    config, in_memory = _read_settings(images, settings, where="rank: ", taken=RANKED)
    names = [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints
    return rank_checkpoints([str(name) for name in names], config, in_memory, sample=sample)


def _read_settings(
    images: Any, settings: Mapping[str, Any], *, where: str, taken: frozenset[str] = ALL_SETTINGS
) -> tuple[RunConfig, Any]:
    """Returns the settings of a run, and the images if they are in memory; the settings contain the path of other images.

    Raises ValueError, with a message that starts with `where`, for settings that are unknown, not `taken`, or not allowed.
    """
    if refused := [name for name in settings if name in ALL_SETTINGS - taken]:
        raise ValueError(f"{where}{refused[0]} would change nothing; omit it")
    if not isinstance(images, str | os.PathLike):
        return replace_settings(RunConfig(), {"dataset": IN_MEMORY, **settings}, where=where), images
    if "dataset" in settings:
        raise ValueError(f"{where}images={str(images)!r} and dataset={settings['dataset']!r}: give only one")
    return replace_settings(RunConfig(), {**settings, "dataset": str(images)}, where=where), None


def _as_strategy(strategy: Strategy | str | Phases, settings: dict[str, Any]) -> Strategy:
    if isinstance(strategy, str):
        return make_strategy(strategy, **settings)
    if not isinstance(strategy, Strategy):
        strategy = CustomPlan(phases=_check_phases(strategy))
        if in_phases := [name for name in settings if name in CustomPlan.in_phases]:
            raise ValueError(f"{listed(in_phases)}: phases have settings of their own; give them to ht.train")
    return replace_settings(strategy, settings, where=f"{strategy.name}: ")


def _check_phases(phases: Any) -> tuple[SolveHeadPhase | TrainPhase, ...]:
    kinds = (SolveHeadPhase, TrainPhase)
    if isinstance(phases, list | tuple) and phases and all(isinstance(phase, kinds) for phase in phases):
        return tuple(phases)
    raise ValueError(
        f"strategy={reprlib.repr(phases)}: give a strategy such as ht.lora(), its name such as 'lora', or a list of one or "
        "more phases from ht.solve_head() and ht.train()"
    )


__all__ = ["CustomPlan", "Task", "evaluate", "rank"]
