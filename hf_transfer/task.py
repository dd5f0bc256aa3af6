"""The Python API. A task consists of images, a checkpoint and settings, and `Task.fit` trains with a strategy.

    import hf_transfer as ht

    task = ht.Task("path/to/images", "timm/mobilenetv2_100.ra_in1k", seed=0)
    run = task.fit(ht.lora(rank=8))
    run.test.accuracy, run.predict("photos/"), run.save("runs/mine"), run.push("me/model")

`Task.fit` runs the same code as `hf-transfer train`, so the same settings give bitwise equal weights.
"""

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hf_transfer.accelerator import connect_processes
from hf_transfer.config import EMBEDDED_CHECKPOINT, OptimizerConfig, OutputConfig, RunConfig, StrategyConfig
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.interrupts import catch_signals
from hf_transfer.locations import find_manifests
from hf_transfer.output import explains_how_to_continue, open_folder
from hf_transfer.repeats import run_config
from hf_transfer.run import Run
from hf_transfer.runs import open_session
from hf_transfer.session import Session
from hf_transfer.settings import replace_settings
from hf_transfer.strategy import GradientStrategy, Strategy
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
        is_name = isinstance(images, str | os.PathLike)
        for name in settings:
            if name in NOT_OF_A_TASK:
                raise ValueError(f"Task: {name} is no setting of a task; {NOT_OF_A_TASK[name]}")
        if is_name and "dataset" in settings:
            raise ValueError(f"Task: images={str(images)!r} and dataset={settings['dataset']!r}: give only one")
        self.images = None if is_name else images
        dataset = str(images) if is_name else settings.pop("dataset", IN_MEMORY)
        self._has_checkpoint = checkpoint is not None
        values = {"dataset": dataset, "checkpoint": checkpoint or EMBEDDED_CHECKPOINT, **settings}
        self.config = replace_settings(RunConfig(), values, where="Task: ")

    @cached_property
    def data(self) -> Data:
        """The splits, loaded and checked at the first access."""
        return load_data(self.config.data, self.images, manifests=find_manifests(self.config.compute.cache))

    def fit(
        self,
        strategy: Strategy | Phases,
        *,
        output_dir: str | Path | None = None,
        overwrite_output_dir: bool = False,
        resume: bool = False,
        **settings: Any,
    ) -> Run:
        """Trains with a strategy, scores the trained network, and returns the run.

        `strategy`: a strategy such as `ht.lora(rank=8)`, or a list of phases from `ht.solve_head` and `ht.train`.
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
        from hf_transfer.strategy import make_strategy

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
        if config.data == self.config.data:
            return self.data
        return load_data(config.data, self.images, manifests=find_manifests(config.compute.cache))

    def _list_unrepeatable(self, strategy: Strategy) -> list[str]:
        """Returns sentences about the inputs of the run that config.yaml does not contain."""
        lines = [] if self.images is None else ["the images were in memory: give the same images to hf_transfer.Task"]
        if isinstance(strategy, CustomPlan):
            lines.append(f"the plan was made in Python for Task.fit, with {len(strategy.phases)} phases:")
            lines += [f"{phase.policy.name}: {json.dumps(phase.identity())}" for phase in strategy.phases]
        return lines


def _as_strategy(strategy: Strategy | Phases, settings: dict[str, Any]) -> Strategy:
    if not isinstance(strategy, StrategyConfig):
        strategy = CustomPlan(phases=tuple(strategy))
        if in_phases := [name for name in settings if name in CustomPlan.in_phases]:
            raise ValueError(f"{listed(in_phases)}: phases have settings of their own; give them to ht.train")
    assert isinstance(strategy, Strategy)
    return replace_settings(strategy, settings, where=f"{strategy.name}: ")


__all__ = ["CustomPlan", "Task"]
