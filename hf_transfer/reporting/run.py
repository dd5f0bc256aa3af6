"""A run from its first line to its folder: the accelerator, the log, the costs, and what is written at the end."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import LoggerType, is_tensorboard_available, set_seed

from hf_transfer.config import RecipeConfig, TrainConfig
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.hub.publish import PublishOptions, check_push, publish
from hf_transfer.hub.save import save_model
from hf_transfer.hub.verify import REFERENCE, write_reference
from hf_transfer.network.adapters import Adapted
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.reporting.results import describe_run, without_paths, write_config, write_run
from hf_transfer.training.costs import Costs

log = logging.getLogger("hf_transfer")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a recipe holds while it runs."""

    config: RecipeConfig
    accelerator: Accelerator
    costs: Costs
    output_dir: Path

    def finish(
        self,
        *,
        strategy: str,
        plan: list[Mapping[str, Any]],
        data: Data,
        backbone: Backbone,
        metrics: Mapping[str, Any],
        curves: list[Mapping[str, Any]],
        details: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Writes model/, results.json and report.html from the main process, and pushes them if asked; returns the results.

        All processes wait for the files, none for the push. Raises PushError or VerificationError where that did not succeed.
        """
        results: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            described: dict[str, Any] = {
                "strategy": strategy,
                "plan": plan,
                "config": self.config,
                "data": data,
                "backbone": backbone,
                "metrics": metrics,
                "curves": curves,
                "details": details,
            }
            card = describe_run(**described, cost=self.costs.to_dict())  # of all but the saving
            with self.costs.part("save"):
                save_model(backbone, card, self.output_dir / "model")
                write_reference(backbone, data.test or data.validation, self.output_dir / REFERENCE)
            results = describe_run(**described, cost=self.costs.to_dict())
            write_run(self.output_dir, results)
            for split, scores in metrics.items():
                low, high = scores["accuracy_interval"]
                log.info(
                    "%s: accuracy %.1f %% (95 %% interval %.1f to %.1f, %d images)",
                    split, 100 * scores["accuracy"], 100 * low, 100 * high, scores["num_samples"],
                )  # fmt: skip
            log.info("wrote %s (model/, results.json, report.html)", self.output_dir)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        repo_id = self.config.push_to_hub
        if repo_id is not None and self.accelerator.is_main_process:
            options = PublishOptions(private=self.config.private)
            found = publish(self.output_dir, repo_id, adapter=isinstance(backbone, Adapted), options=options)
            log.info("published: %s", found.url)
        return results


def start_run(config: RecipeConfig) -> Run:
    """Seeds, logging on the main process, and config.yaml in the output folder."""
    accelerator = Accelerator(**_accelerator_options(config))
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    for chatty in ("httpx", "httpx2", "timm", "datasets", "transformers", "evaluate"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    set_seed(config.seed)
    output_dir = Path(config.output_dir)
    if accelerator.is_main_process:
        if config.push_to_hub is not None:
            check_push(config.push_to_hub)  # not after hours of training
        write_config(output_dir, config)
    if accelerator.log_with:
        # Trackers send it elsewhere.
        plain = {k: v for k, v in without_paths(config).items() if isinstance(v, bool | int | float | str)}
        accelerator.init_trackers("hf_transfer", config=plain)
    return Run(config=config, accelerator=accelerator, costs=Costs(), output_dir=output_dir)


def read_data(run: Run) -> Data:
    """The data; the main process says what was decided about it."""
    with run.costs.part("data"), run.accelerator.main_process_first():
        data = load_data(run.config)
    if run.accelerator.is_main_process:
        for note in data.notes:
            log.info("%s", note)
    return data


def load_inputs(run: Run) -> tuple[Data, Backbone]:
    """The data, then the checkpoint with a head for its labels: the cheap checks come before the download."""
    config = run.config
    data = read_data(run)
    with run.costs.part("checkpoint"), run.accelerator.main_process_first():
        backbone = load(
            config.checkpoint,
            data.label_names,
            base_model=config.base_model,
            trust_remote_code=config.trust_remote_code,
        )
    return data, backbone


def _accelerator_options(config: RecipeConfig) -> dict[str, Any]:
    """What the flags of training say; where they say nothing, what `accelerate launch` or its config file says."""
    if not isinstance(config, TrainConfig):
        return {}
    precision = None if config.mixed_precision == "no" else config.mixed_precision
    tracker = config.tracker
    if tracker == "auto":
        tracker = "tensorboard" if is_tensorboard_available() else "none"
    known = {kind.value for kind in LoggerType}
    if tracker not in (known - {"all"}) | {"none"}:
        raise ValueError(f"tracker={tracker!r}: choose auto, none or one of {', '.join(sorted(known - {'all'}))}")
    chosen = {} if tracker == "none" else {"log_with": tracker, "project_dir": str(Path(config.output_dir) / "logs")}
    return {"mixed_precision": precision, **chosen}
