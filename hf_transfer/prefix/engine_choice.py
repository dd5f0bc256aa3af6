"""Decides which engine runs the frozen network (see `engines`): by a rule, or by measuring the engines on this machine."""

import importlib.util
import logging
import time
from dataclasses import dataclass
from typing import get_args

import numpy as np
from torch import nn

from hf_transfer.capability import capability_of
from hf_transfer.config import Engine
from hf_transfer.errors import count_noun
from hf_transfer.network.folding import has_foldable_norms
from hf_transfer.network.part import Part
from hf_transfer.prefix.pixels import Images
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.sweep import place_model, prepare_for, sweep
from hf_transfer.prefix.taps import Logits
from hf_transfer.processes import run_on_main

log = logging.getLogger(__name__)

ENGINES: tuple[Engine, ...] = get_args(Engine)
MEASURED_IMAGES = 64
# An engine is worth its preparation above this number of GFLOPs in all images of a run (measured in docs/speed.md).
FOLDING_GFLOPS = 50.0
OPENVINO_GFLOPS = {True: 700.0, False: 2500.0}  # by whether the network has norms that can be folded


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What `choose_engine` decides from: the device, the network, the number of images, and the installed engines."""

    device_type: str
    precision: str
    num_images: int
    gflops_per_image: float
    has_foldable_norms: bool
    has_openvino: bool
    can_compile: bool = False


def choose_engine(work: Workload) -> Engine:
    """Returns the engine that `--engine auto` uses. Equal workloads have equal engines, on any machine.

    `compiled` is never chosen: on the CPUs that were measured it is slower than the others, and on a GPU it was not measured.

    >>> choose_engine(Workload(device_type="cpu", precision="fp32", num_images=2000, gflops_per_image=0.6,
    ...                        has_foldable_norms=True, has_openvino=False))
    'folded'
    """
    gflops = work.num_images * work.gflops_per_image
    if work.device_type != "cpu" or gflops < FOLDING_GFLOPS:
        return "eager"
    if work.has_openvino and work.precision != "fp16" and gflops >= OPENVINO_GFLOPS[work.has_foldable_norms]:
        return "openvino"
    return "folded" if work.has_foldable_norms else "eager"


def list_candidates(work: Workload) -> list[Engine]:
    """Returns the engines that can run this workload, for `--engine measure`."""
    is_cpu = work.device_type == "cpu"
    possible = {
        "eager": True,
        "folded": work.has_foldable_norms,
        "compiled": work.can_compile,
        "openvino": is_cpu and work.has_openvino and work.precision != "fp16",
    }
    return [engine for engine in ENGINES if possible[engine]]


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def check_engine(engine: Engine, *, device_type: str, precision: str, can_compile: bool) -> None:
    """Raises ValueError if `engine` cannot run on this device, in this precision, or with what is installed."""
    if engine == "openvino":
        if not has_openvino():
            raise ValueError(
                "engine='openvino': OpenVINO is not installed; pip install 'hf-transfer-learning[openvino]'"
            )
        if device_type != "cpu":
            raise ValueError(f"engine='openvino' runs on a CPU, and this run uses {device_type}; choose --engine eager")
        if precision == "fp16":
            raise ValueError("engine='openvino' has no fp16 on a CPU; choose --precision fp32 or bf16")
    if engine == "compiled" and not can_compile:
        needed = "a C++ compiler" if device_type == "cpu" else "Triton"
        raise ValueError(f"engine='compiled': torch.compile needs {needed}, which is missing; choose --engine folded")


def decide_engine(
    model: nn.Module,
    images: Images,
    resources: Resources,
    *,
    image_shape: tuple[int, int, int],
    num_images: int,
    stored: Engine | None = None,
) -> Engine:
    """Returns the engine of a run, the same on every process: the requested engine, `stored`, or the choice of the rule.

    `images`: images on which `measure` times the engines. `num_images`: all images that will pass through the network.
    `stored`: the engine of the interrupted run that this run resumes. Raises ValueError if the engine cannot run here.
    """
    requested, device = resources.compute.engine, resources.device
    capability = capability_of(device)
    given = stored if requested in ("auto", "measure") else requested
    if given is not None:
        assert given in ENGINES
        check_engine(given, device_type=device.type, precision=resources.precision, can_compile=capability.can_compile)
        return given

    def decide() -> Engine:
        place_model(model, resources)
        work = _describe_work(model, resources, image_shape, num_images)
        engine = choose_engine(work) if requested == "auto" else _measure(model, images, resources, work)
        log.info(
            "engine %s runs the frozen layers (%s of %.2g GFLOPs; --engine chooses another)",
            engine, count_noun(num_images, "image"), work.gflops_per_image,
        )  # fmt: skip
        return engine

    return run_on_main(decide)


def limit_engine(
    engine: Engine, model: nn.Module, resources: Resources, *, image_shape: tuple[int, int, int], num_images: int
) -> Engine:
    """Returns the engine for a pass over some of a run's images, the same on every process.

    This is the run's engine `engine`, or an engine that is ready sooner, if `num_images` images are too few for `engine`.
    """
    if engine == "eager":
        return engine

    def decide() -> Engine:
        place_model(model, resources)
        chosen = choose_engine(_describe_work(model, resources, image_shape, num_images))
        return min(engine, chosen, key=ENGINES.index)  # ENGINES is in the order of preparation times

    return run_on_main(decide)


def _describe_work(
    model: nn.Module, resources: Resources, image_shape: tuple[int, int, int], num_images: int
) -> Workload:
    return Workload(
        device_type=resources.device.type,
        precision=resources.precision,
        num_images=num_images,
        gflops_per_image=Part(model, image_shape).count_flops() / 1e9,
        has_foldable_norms=has_foldable_norms(model),
        has_openvino=has_openvino(),
        can_compile=capability_of(resources.device).can_compile,
    )


def _measure(model: nn.Module, images: Images, resources: Resources, work: Workload) -> Engine:
    """Returns the engine with the shortest estimated time for all images, including its preparation."""
    module = Logits(model)
    rows = np.arange(min(len(images), MEASURED_IMAGES))
    estimates: dict[Engine, float] = {}
    for engine in list_candidates(work):
        started = time.perf_counter()
        runner = prepare_for(module, images, rows, engine, resources)
        ready = time.perf_counter()
        sweep(runner, images, rows, lambda start, values: None, resources)
        rate = len(rows) / (time.perf_counter() - ready)
        estimates[engine] = ready - started + work.num_images / rate
        log.info("engine %s: ready in %.1f s, then %.0f images/s", engine, ready - started, rate)
    return min(estimates, key=lambda engine: estimates[engine])
