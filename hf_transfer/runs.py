"""Opens the session (the shared objects) of a run, executes the run, and writes and pushes the results."""

import copy
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import set_seed
from safetensors import SafetensorError

from hf_transfer import processes
from hf_transfer.accelerator import open_accelerator
from hf_transfer.config import (
    EMBEDDED_CHECKPOINT,
    EMBEDDED_DATASET,
    UPSTREAM_DATASET,
    ComputeConfig,
    GradientConfig,
    RunConfig,
)
from hf_transfer.costs import Costs
from hf_transfer.data.dataset import Data, load_run_data
from hf_transfer.data.seen import write_seen
from hf_transfer.errors import ContinuableError
from hf_transfer.exporting.formats import ExportOptions, check_installed
from hf_transfer.flags import read_config
from hf_transfer.hub.exports import export_saved
from hf_transfer.hub.publish import PublishOptions, check_push, publish, publish_command
from hf_transfer.hub.save import save_model
from hf_transfer.hub.verify import REFERENCE, has_own_code, write_reference
from hf_transfer.locations import CHECKPOINTS, CONFIG, SO_FAR
from hf_transfer.logs import without_details
from hf_transfer.network.adapters import Adapted
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.freezing import has_batchnorm
from hf_transfer.out_of_memory import FullMemoryError, is_out_of_memory, suggest_batches
from hf_transfer.output import explains_how_to_continue, replace_results
from hf_transfer.prefix.digests import share_digests
from hf_transfer.prefix.resources import Resources
from hf_transfer.reporting.illustrations import FinishedModel, Illustrations, illustrate
from hf_transfer.reporting.predictions import PREDICTIONS, activate, write_predictions
from hf_transfer.reporting.report_results import describe_estimate
from hf_transfer.reporting.results import describe_run, pin_revisions, public_settings, write_config, write_results
from hf_transfer.reporting.sentences import describe_quality
from hf_transfer.reporting.verdict import describe_kept_model
from hf_transfer.session import Session
from hf_transfer.settings import replace_settings
from hf_transfer.strategy import Strategy
from hf_transfer.training.batch_size import decide_batch_size
from hf_transfer.training.checkpoints import remove_reserves
from hf_transfer.training.final_fit import FinalFit
from hf_transfer.training.finish import finish_target
from hf_transfer.training.records import Json, RunResult

log = logging.getLogger("hf_transfer")


@processes.ending_together()
def open_session(
    config: RunConfig,
    *,
    load: Callable[[], Data] | None = None,
    output_dir: Path | None = None,
    unrepeatable: Sequence[str] = (),
) -> Session:
    """Starts the Accelerator and trackers, writes the config, loads data and network, and returns all of these as a session.

    `load` returns the splits (default: the splits in the settings). The config is written to checkpoints/config.yaml in
    `output_dir`. Without `output_dir`, the run writes only caches.
    `unrepeatable`: sentences about inputs that config.yaml does not contain. Raises ValueError for an error in the settings,
    the data or the checkpoint, and PushError, before any download, if the Hub would refuse the push.
    """
    assert isinstance(config.strategy, Strategy)
    config.strategy.check(config)
    config.strategy.find_network(config)
    accelerator, costs = open_accelerator(config, output_dir), Costs()
    stored = config.compute
    if accelerator.is_main_process:
        stored = _begin_output(config, output_dir, unrepeatable)
    if accelerator.log_with:
        # A tracker may send the settings to a server, so they contain no local path.
        plain = {k: v for k, v in public_settings(config).items() if isinstance(v, bool | int | float | str)}
        accelerator.init_trackers("hf_transfer", config=plain)
    with costs.part("data"):
        with processes.main_first():
            data = load_run_data(config) if load is None else load()
        data.target.check_settings(config.strategy)
        share_digests(data.splits, Resources(accelerator=accelerator, compute=config.compute))
    if accelerator.is_main_process:
        for note in data.notes:
            log.info("%s", note)
    set_seed(config.seed)  # a new head is random
    with costs.part("checkpoint"), processes.main_first():
        backbone = config.strategy.load_backbone(config, data)
    if accelerator.is_main_process and accelerator.num_processes > 1 and _trains_statistics(config, backbone):
        log.info(
            "BatchNorm's statistics are those of each process's own batches, and the network is saved with those of process 0: "
            "the result depends on the number of processes"
        )
    session = Session(
        config=config,
        data=data,
        backbone=backbone,
        accelerator=accelerator,
        costs=costs,
        output_dir=output_dir,
        unrepeatable=tuple(unrepeatable),
    )
    with costs.part("engine"):
        stored = processes.run_on_main(lambda: stored)
        engine = None if stored.engine == "auto" or stored.engine == "measure" else stored.engine
        session = session.with_engine(stored=engine)
    session = decide_batch_size(session, stored=None if stored.batch_size == "auto" else stored.batch_size)
    if session.is_main and output_dir is not None:
        pinned = replace_settings(pin_revisions(session), {"output_dir": str(output_dir)})
        write_config(output_dir / CHECKPOINTS, pinned, unrepeatable)
    return session


@processes.ending_together()
def train_session(
    session: Session, final: FinalFit | None = None, repeats: Mapping[str, Json] | None = None
) -> RunResult:
    """Trains with the session's strategy, scores the network, and writes the output folder if the session has one.

    `final`: how to train on all images, after runs that held images out. `repeats`: what these runs gave, for results.json.
    Raises FullMemoryError, with the settings that need less memory, if the memory of the machine or of the device is full.
    """
    strategy = session.strategy
    assert isinstance(strategy, Strategy)
    if session.output_dir is not None:
        session = replace(session, save_so_far=_save_so_far)
    with session.costs:
        try:
            result = strategy.run(session) if final is None else strategy.run(session, final)
            result = replace(finish_target(session, result), repeats=repeats or {})
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise FullMemoryError(suggest_batches(session)) from error
        if session.output_dir is not None:
            write_run(session, result)
    while session.accelerator.trackers:  # each run has trackers of its own
        session.accelerator.trackers.pop().finish()
    return result


def write_run(session: Session, result: RunResult) -> dict[str, Any]:
    """Writes all files of a finished run in the main process, while the other processes wait, and logs what they say.

    Returns the content of results.json in the main process, and {} in the other processes. Raises ContinuableError if the disk
    refuses a file; an older run in the folder is then unchanged.
    """
    results: dict[str, Any] = {}
    if session.is_main:
        assert session.output_dir is not None
        results = _write_results(session, result, session.output_dir, is_illustrated=True)
        if kept := describe_kept_model(results):
            log.info("%s", kept)
        for split, metrics in result.metrics.items():
            estimate = describe_estimate(metrics.details)
            if estimate:
                is_selected = bool(metrics.details.get("is_selected"))
            else:
                is_selected = result.is_selected(holds_out_validation=session.data.holds_out_validation)
            if "test" not in result.metrics and (result.is_chosen or is_selected):
                optimistic = "optimistic, because these images also selected the model"
                estimate = f"{estimate}; {optimistic}" if estimate else optimistic
            log.info("%s: %s%s", split, describe_quality(metrics), f"; {estimate}" if estimate else "")
        for note in result.metrics["test" if "test" in result.metrics else "validation"].notes:
            log.info("%s", note)
        log.info("wrote %s (model/, results.json, predictions.parquet, report.html)", session.output_dir)
        shutil.rmtree(session.output_dir / SO_FAR, ignore_errors=True)
        remove_reserves(session.output_dir / CHECKPOINTS)
    processes.wait_for_everyone()
    return results


def _save_so_far(session: Session, result: RunResult) -> None:
    """Writes the best result so far of an unfinished run to a run folder of its own, in place of an older one."""
    assert session.output_dir is not None
    folder = session.output_dir / SO_FAR
    session = replace(session, config=replace_settings(session.config, {"push_to_hub": None, "private": False}))
    # Finishing scales the head in place, but the run goes on with this network, and finishes it again if it is kept.
    copied = replace(result, backbone=replace(result.backbone, model=copy.deepcopy(result.backbone.model)))
    with without_details():  # the run has not ended, so nothing else is said of this model
        finished = finish_target(session, copied)
        if session.is_main:
            with session.costs.part("save"):
                _write_results(session.with_output(folder), finished, folder, is_illustrated=False)
    if session.is_main:
        log.info("%s contains the best model so far, until the run is finished", folder)
    processes.wait_for_everyone()


def _write_results(session: Session, result: RunResult, folder: Path, *, is_illustrated: bool) -> dict[str, Any]:
    """Writes all files of a run. `is_illustrated`: whether the report shows images. Raises ContinuableError."""
    try:
        return _write_files(session, result, folder, is_illustrated=is_illustrated)
    except (OSError, SafetensorError) as error:
        raise ContinuableError(
            f"the results cannot be written to {folder} ({error}): free disk space, or make the folder writable"
        ) from error


def _write_files(session: Session, result: RunResult, folder: Path, *, is_illustrated: bool) -> dict[str, Any]:
    data, costs = session.data, session.costs
    card = describe_run(session, result)  # the card's cost does not include saving
    with replace_results(folder) as staging:
        with costs.part("save"):
            save_model(result.backbone, card, staging / "model")
            write_reference(result.backbone, data.test or data.validation, staging / REFERENCE)
        with costs.part("report"):
            illustrations = _illustrate(session, result, card) if is_illustrated else None
        results = describe_run(session, result)
        write_predictions(staging / PREDICTIONS, data.splits, result.logits)
        write_seen(staging, [data.train, data.validation])
        write_config(staging, pin_revisions(session), session.unrepeatable)
        write_results(staging, results, illustrations)
    return results


def _illustrate(session: Session, result: RunResult, results: Mapping[str, Any]) -> Illustrations | None:
    """Returns what the report shows beyond results.json; None for a run without predictions."""
    if not result.logits:
        return None
    backbone, data = result.backbone, session.data
    model = FinishedModel(backbone=backbone, chain=session.chain_of(backbone), features=result.features)
    activated = {name: activate(data.target, logits) for name, logits in result.logits.items()}
    return illustrate(data.splits, activated, model, results)


def check_export(config: RunConfig) -> None:
    """Raises ValueError, before training, if the settings ask for an export that cannot be written."""
    output = config.output
    if output.export == "none":
        return
    check_installed(ExportOptions(format=output.export, precision=output.export_precision))
    if not getattr(config.strategy, "merge", True):
        raise ValueError(
            f"export={output.export!r}: an adapter is exported merged; omit --no-merge, or run hf-transfer export with "
            "--output_dir later"
        )


@processes.ending_together()
def export_run(session: Session) -> None:
    """Exports the model of the written run to its model folder, in the main process, while the other processes wait.

    Raises ExportError if an exported file differs from the trained network. The run itself is finished.
    """
    output, folder = session.config.output, session.output_dir
    assert output.export != "none"
    assert folder is not None
    if session.is_main:
        options = ExportOptions(format=output.export, precision=output.export_precision)
        command = f"hf-transfer export {folder} --format {options.format} --export_precision {options.precision}"
        trusts_code = session.config.model.trust_remote_code or has_own_code(folder / "model")
        with explains_how_to_continue(command, OSError, RuntimeError):  # only the export is left
            for record in export_saved(folder, options, trust_remote_code=trusts_code):
                log.info("wrote %s (%.1f MB)", folder / "model" / record.file, record.size_bytes / 1e6)
    processes.wait_for_everyone()


@processes.ending_together()
def push(session: Session, result: RunResult, repo_id: str) -> str | None:
    """Pushes the written run to the Hub and returns the model's URL. In other processes than the main process, returns None.

    Raises VerificationError if the saved model differs from the trained network, and PushError if the push fails.
    """
    if not session.is_main:
        return None
    assert session.output_dir is not None
    options, adapter = PublishOptions(private=session.config.output.private), isinstance(result.backbone, Adapted)
    command = publish_command(session.output_dir, repo_id, options, adapter=adapter)
    with explains_how_to_continue(command, OSError):  # the run is finished: only the push is left
        published = publish(session.output_dir, repo_id, adapter=adapter, options=options)
    log.info("published: %s", published.url)
    return published.url


def _begin_output(config: RunConfig, output_dir: Path | None, unrepeatable: Sequence[str]) -> ComputeConfig:
    """Checks the push, and writes the config of a run that decides anew. Returns what the run to resume has decided, if any.

    The run can be repeated, or resumed, even if it is killed before it is finished. What an interrupted run decided stays
    until it is decided again. Raises PushError if the Hub would refuse the push.
    """
    if config.output.push_to_hub is not None:
        check_push(config.output.push_to_hub)  # before hours of training
    if output_dir is None:
        return config.compute
    stored = _read_decided(output_dir, config) if config.output.resume else config.compute
    if stored is config.compute:
        resumable = replace_settings(config, {"output_dir": str(output_dir)})
        write_config(output_dir / CHECKPOINTS, resumable, unrepeatable)
    return stored


def _read_decided(output_dir: Path, config: RunConfig) -> ComputeConfig:
    """Returns the settings of the unfinished run in `output_dir`, with the engine and the batch size that it decided.

    Returns those of `config` if the unfinished run has no config, or a damaged one; the saved state has its settings too.
    """
    try:
        return read_config(str(output_dir / CHECKPOINTS / CONFIG), config).compute
    except ValueError:
        return config.compute


def _trains_statistics(config: RunConfig, backbone: Backbone) -> bool:
    """Whether training uses a BatchNorm in train mode."""
    strategy = config.strategy
    is_frozen = not isinstance(strategy, GradientConfig) or strategy.training.freeze_batchnorm
    return not is_frozen and has_batchnorm(backbone.model)


def warn_of_embedded(config: RunConfig) -> None:
    """Logs a warning in the main process if the embedded network, which is the default, is used for images of another kind."""
    is_embedded = config.model.checkpoint == EMBEDDED_CHECKPOINT
    if (
        is_embedded
        and config.data.dataset not in (EMBEDDED_DATASET, UPSTREAM_DATASET)
        and PartialState().is_main_process
    ):
        log.warning(
            "checkpoint embedded, the default, is a tiny network that was trained on handwritten digits; for your images,"
            " choose a pretrained one, such as --checkpoint timm/mobilenetv2_100.ra_in1k"
        )
