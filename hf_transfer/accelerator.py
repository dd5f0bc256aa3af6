"""Starts what a run computes with: connects the launched processes, and opens their Accelerator."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, get_int_from_env, is_tensorboard_available, parse_flag_from_env

from hf_transfer import logs, processes
from hf_transfer.capability import jpeg_device
from hf_transfer.config import GradientConfig, RunConfig
from hf_transfer.data.jpegs import check_jpeg_decoder
from hf_transfer.errors import count_noun
from hf_transfer.locations import presets_dir
from hf_transfer.prefix.resources import Resources
from hf_transfer.threads import set_num_threads
from hf_transfer.training.sharding import prepare_sharding, uses_shards

log = logging.getLogger("hf_transfer")

MIXED_PRECISION = {"auto": None, "fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # our name -> accelerate's name


def start_logging(*, is_quiet: bool = False) -> None:
    """Sends log lines to stderr: all lines of the main process unless `is_quiet`, and only errors of other processes."""
    is_main = connect_processes().is_main_process
    logs.start_logging(logging.INFO if is_main and not is_quiet else logging.ERROR)


def connect_processes() -> PartialState:
    """Connects the processes that a launcher started. The first call decides, for the Accelerator too."""
    _refuse_deepspeed()
    return processes.start(cpu=_uses_cpu())


def open_accelerator(config: RunConfig, output_dir: Path | None) -> Accelerator:
    """Returns the run's Accelerator. `accelerate launch` or its config file decides options that the settings do not give.

    Raises RuntimeError if a launcher started several processes that would train independently of each other, and ValueError
    for DeepSpeed, for a tracker that is not installed, or for `decoder device` if torchvision cannot decode a JPEG.
    """
    is_alone = "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ  # accelerate may set WORLD_SIZE itself
    connect_processes()
    AcceleratorState._reset_state()  # forget the precision of an earlier run in this process
    accelerator = Accelerator(cpu=_uses_cpu(), **_accelerator_options(config, output_dir))
    set_num_threads(config.compute.num_threads, accelerator.device)
    choices = Resources(accelerator=accelerator, compute=config.compute).choices
    if accelerator.device.type == "cuda":  # torch's own default rounds the products of convolutions to TF32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = choices.tf32
    if config.compute.decoder == "device":
        check_jpeg_decoder(jpeg_device(accelerator.device))
    if accelerator.is_main_process:
        log.info("computing on %s; %s", choices.describe(), count_noun(torch.get_num_threads(), "CPU thread"))
    started = get_int_from_env(["WORLD_SIZE"], 1)
    if started != accelerator.num_processes:
        raise RuntimeError(
            f"the launcher started {started} processes (WORLD_SIZE), but accelerate connected {accelerator.num_processes}: "
            "each process would train alone and write to the same folder"
        )
    if is_alone and accelerator.num_processes == 1:
        log.warning(
            "MASTER_ADDR is set, but WORLD_SIZE is not: this process trains alone. To train in several processes, start them "
            "with `accelerate launch` or `torchrun`"
        )
    if uses_shards(accelerator):
        prepare_sharding(config.strategy)
    elif parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.is_main_process:
        log.warning(
            "accelerate's config asks for FSDP, which needs a GPU: each process trains a whole copy of the network"
        )
    processes.watch()
    return accelerator


def _refuse_deepspeed() -> None:
    """Raises ValueError, before DeepSpeed is imported, if `accelerate launch` was started with DeepSpeed."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "distributed_type=DEEPSPEED: DeepSpeed's engine would replace the optimizer steps, which hf_transfer takes itself; "
            f"launch with {presets_dir() / 'multi_gpu.yaml'}, or with fsdp2.yaml beside it to divide the network among GPUs"
        )


def _uses_cpu() -> bool:
    """Whether the run is on the CPU. Without this argument, several processes on a CPU would not connect."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


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
    if tracker not in {kind.value for kind in get_available_trackers()}:  # accelerate would warn, and track nothing
        raise ValueError(
            f"tracker={tracker!r}: the package {tracker} is not installed; pip install {tracker}, or choose none"
        )
    return options if output_dir is None else {**options, "log_with": tracker, "project_dir": str(output_dir / "logs")}
