"""The two ends of a run: opening a session from its settings, and writing the folder that others read."""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType, is_tensorboard_available, set_seed

from hf_transfer.config import GradientConfig, RunConfig
from hf_transfer.costs import Costs
from hf_transfer.data.dataset import Data, load_data
from hf_transfer.hub.publish import PublishOptions, check_push, publish
from hf_transfer.hub.save import save_model
from hf_transfer.hub.verify import REFERENCE, write_reference
from hf_transfer.network.adapters import Adapted
from hf_transfer.reporting.results import describe_run, public_settings, write_config, write_results
from hf_transfer.reporting.sentences import describe_accuracy
from hf_transfer.session import Session
from hf_transfer.strategy import Strategy
from hf_transfer.training.records import RunResult

log = logging.getLogger("hf_transfer")

CHATTY = (
    "httpx",
    "httpx2",
    "timm",
    "datasets",
    "transformers",
    "evaluate",
)  # libraries that log what users cannot act on
MIXED_PRECISION = {"auto": None, "fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # in accelerate's words


def open_session(
    config: RunConfig,
    *,
    load: Callable[[], Data] | None = None,
    output_dir: Path | None = None,
    unrepeatable: Sequence[str] = (),
) -> Session:
    """Starts the processes and trackers, writes config.yaml, then loads the data and the network.

    `load` returns the splits; by default they are those that the settings name. Without `output_dir`, nothing but caches is
    written. `unrepeatable`: sentences on what config.yaml cannot repeat. Cheap checks come before the download: raises
    ValueError for whatever is wrong with the settings, the data or the checkpoint, and PushError if a push that was asked for
    would be refused.
    """
    assert isinstance(config.strategy, Strategy)
    config.strategy.check(config)
    accelerator, costs = open_accelerator(config, output_dir), Costs()
    if accelerator.is_main_process:
        if config.output.push_to_hub is not None:
            check_push(config.output.push_to_hub)  # not after hours of training
        if output_dir is not None:
            write_config(output_dir, config, unrepeatable)
    if accelerator.log_with:
        # Trackers send it elsewhere, so it holds no path.
        plain = {k: v for k, v in public_settings(config).items() if isinstance(v, bool | int | float | str)}
        accelerator.init_trackers("hf_transfer", config=plain)
    with costs.part("data"), accelerator.main_process_first():
        data = load_data(config.data) if load is None else load()
    if accelerator.is_main_process:
        for note in data.notes:
            log.info("%s", note)
    set_seed(config.seed)  # a new head is random
    with costs.part("checkpoint"), accelerator.main_process_first():
        backbone = config.strategy.load_backbone(config, data)
    return Session(
        config=config,
        data=data,
        backbone=backbone,
        accelerator=accelerator,
        costs=costs,
        output_dir=output_dir,
        unrepeatable=tuple(unrepeatable),
    )


def execute(session: Session) -> RunResult:
    """Runs the session's strategy: trains, scores, and writes the output folder if there is one."""
    assert isinstance(session.strategy, Strategy)
    with session.costs:
        result = session.strategy.run(session)
        if session.output_dir is not None:
            write_run(session, result)
    session.accelerator.end_training()
    return result


def write_run(session: Session, result: RunResult) -> dict[str, Any]:
    """Writes model/, results.json and report.html from the main process; returns the content of results.json there.

    All processes wait for the files.
    """
    results: dict[str, Any] = {}
    if session.is_main:
        assert session.output_dir is not None
        data, costs = session.data, session.costs
        card = describe_run(session, result)  # with the cost of everything but the saving
        with costs.part("save"):
            save_model(result.backbone, card, session.output_dir / "model")
            write_reference(result.backbone, data.test or data.validation, session.output_dir / REFERENCE)
        results = describe_run(session, result)
        write_results(session.output_dir, results)
        for split, metrics in result.metrics.items():
            log.info("%s: %s", split, describe_accuracy(metrics))
        log.info("wrote %s (model/, results.json, report.html)", session.output_dir)
    session.accelerator.wait_for_everyone()
    return results


def push(session: Session, result: RunResult, repo_id: str) -> str | None:
    """Pushes the written run from the main process; the model's URL there.

    Raises PushError or VerificationError if that does not succeed.
    """
    if not session.is_main:
        return None
    assert session.output_dir is not None
    options = PublishOptions(private=session.config.output.private)
    published = publish(session.output_dir, repo_id, adapter=isinstance(result.backbone, Adapted), options=options)
    log.info("published: %s", published.url)
    return published.url


def start_logging() -> None:
    """Plain lines on stderr: ours from the main process, only errors from libraries and other processes."""
    is_main = PartialState().is_main_process
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s", stream=sys.stderr)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def open_accelerator(config: RunConfig, output_dir: Path | None) -> Accelerator:
    """The processes and precision of a run; what the settings leave open, `accelerate launch` or its config file decides."""
    AcceleratorState._reset_state()  # otherwise the precision of an earlier run in this process stays
    return Accelerator(**_accelerator_options(config, output_dir))


def _accelerator_options(config: RunConfig, output_dir: Path | None) -> dict[str, Any]:
    options: dict[str, Any] = {"mixed_precision": MIXED_PRECISION[config.compute.precision]}
    if not isinstance(config.strategy, GradientConfig):
        return options
    tracker = config.strategy.training.tracker
    if tracker == "auto":
        tracker = "tensorboard" if is_tensorboard_available() else "none"
    known = sorted({kind.value for kind in LoggerType} - {"all"})
    if tracker not in (*known, "none"):
        raise ValueError(f"tracker={tracker!r}: choose auto, none or one of {', '.join(known)}")
    if tracker == "none":
        return options
    return options if output_dir is None else {**options, "log_with": tracker, "project_dir": str(output_dir / "logs")}
