"""Engines run a frozen network over images: as it is, with folded norms, compiled by torch, or by OpenVINO.

A frozen network is only evaluated, so inference engines can run it. An engine takes a module from images to a list of tensors
(see `taps.Extractor`), and returns functions, one for each thread. First, its values are compared with those of the unchanged
module on real images. If they differ, the unchanged module runs.

| engine | runs | on a CPU, MobileNetV2 (docs/speed.md) |
|---|---|---|
| eager | the module as it is | the reference |
| folded | eager, each BatchNorm folded into its convolution, and weights packed | faster, ready at once |
| compiled | torch.compile with frozen weights; with bf16, of a copy in bfloat16 | seconds of compilation |
| openvino | OpenVINO (extra `openvino`) | the fastest, seconds of conversion |

No engine lowers the precision of the run. On some CPUs OpenVINO would choose bfloat16 by itself, so its precision is set.
"""

import copy
import importlib.metadata
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_transfer.config import Engine, Precision
from hf_transfer.network.folding import fold_norms
from hf_transfer.network.packing import pack_convolutions
from hf_transfer.prefix.openvino_core import openvino_core
from hf_transfer.prefix.replaying import Replayed, pays_off, record
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.taps import BatchFunction, Extractor, Logits, replicate
from hf_transfer.threads import open_workers

log = logging.getLogger(__name__)

AGREEMENT = 1e-4  # largest allowed difference from eager in fp32, relative to the largest number of the row


def describe_engine(engine: Engine, precision: Precision) -> str:
    """Returns the engine's name, and what else of the engine may change the values, for cache keys.

    >>> describe_engine("compiled", "fp32"), describe_engine("compiled", "bf16")
    ('compiled', 'compiled bfloat16 copy')
    """
    if engine == "openvino":
        return f"openvino {importlib.metadata.version('openvino')}"
    return "compiled bfloat16 copy" if engine == "compiled" and precision == "bf16" else engine


class Runner(Protocol):
    """A module that an engine has prepared."""

    def functions(self, count: int) -> Sequence[BatchFunction]:
        """Returns `count` functions, each of which one thread may run at the same time as the others."""


@dataclass(frozen=True, kw_only=True)
class ModuleRunner:
    """Runs a module as it is. Each function has its own copy of the module's submodules, and shares its tensors."""

    module: torch.nn.Module
    autocast: Callable[[], Any]

    def functions(self, count: int) -> list[BatchFunction]:
        """Returns `count` functions. All copies are made here, since hooks must not be copied while a module runs."""
        return [self._bind(replicate(self.module)) for _ in range(count)]

    def _bind(self, module: torch.nn.Module) -> BatchFunction:
        def run(batch: torch.Tensor) -> list[torch.Tensor]:
            with torch.no_grad(), self.autocast():  # both apply to the thread that enters them
                values: list[torch.Tensor] = module(batch)
            return values

        return run


def prepare(
    engine: Engine, module: Extractor | Logits, samples: torch.Tensor, resources: Resources, *, count: int = 1
) -> Runner:
    """Returns `module` as `engine` runs it, checked against the unchanged module on real images.

    `samples`: a full batch of inputs (B, ...) on the device, B the batch size of the pass. `count`: number of functions that
    will run at the same time. If the engine fails or its values differ, a warning says why, and the module runs as it is.
    """
    eager = ModuleRunner(module=module, autocast=resources.autocast)
    if engine == "eager":
        return eager
    started = time.perf_counter()
    (reference,) = eager.functions(1)
    expected = reference(samples)
    try:
        runner = _PREPARE[engine](module, samples, resources, count)
        (function,) = runner.functions(1)
        difference = _compare(expected, _run_alone(function, samples))
    except Exception as error:  # noqa: BLE001  engines raise errors of many types for networks that they cannot run
        text = str(error).strip().partition("\n")[0]
        log.warning("engine %s cannot run this network (%s: %s): eager runs it", engine, type(error).__name__, text)
        return eager
    tolerance = engine_tolerance(resources)
    if not difference <= tolerance:
        log.warning(
            "engine %s: values differ from eager by %.2g (relative), more than %.0e: eager runs the network",
            engine, difference, tolerance,
        )  # fmt: skip
        return eager
    seconds = time.perf_counter() - started
    if resources.accelerator.is_main_process:
        log.info("engine %s: prepared in %.1f s, within %.1g of eager", engine, seconds, difference)
    return runner


def engine_tolerance(resources: Resources) -> float:
    """Returns the largest allowed difference between an engine and eager, relative to the largest number of the row."""
    return {"fp32": AGREEMENT, "bf16": 16 * 2.0**-8, "fp16": 16 * 2.0**-11}[resources.precision]


def _compare(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]) -> float:
    """Returns the largest difference between rows, relative to the largest number of the expected row."""
    largest = 0.0
    for a, b in zip(expected, actual, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"the engine's values have shape {tuple(b.shape)} instead of {tuple(a.shape)}")
        scale = a.flatten(1).abs().amax(1).clamp_min(1e-12)
        relative = (a - b).flatten(1).abs().amax(1) / scale
        largest = max(largest, float(relative.nan_to_num(torch.inf).max()))
    return largest


def _run_alone(function: BatchFunction, batch: torch.Tensor) -> list[torch.Tensor]:
    """Runs `function` in a thread with one torch thread, as `sweep` does on a CPU."""
    if batch.device.type != "cpu":
        return function(batch)

    with open_workers(1) as pool:
        return pool.submit(function, batch).result()


# --- the engines ------------------------------------------------------------------------------------------------------


def _fold(module: Extractor | Logits, samples: torch.Tensor, *, packs: bool = False) -> Extractor | Logits:
    """Returns a copy of `module` with folded norms and, with `packs`, with packed convolutions.

    The copy shares no tensor with `module`, so it computes the same when the network's weights change later.
    """
    copied = copy.deepcopy(module).eval().requires_grad_(False)
    folded = fold_norms(copied, lambda: copied(samples[:1]), kept=copied.kept_modules)
    if packs:
        pack_convolutions(copied, lambda: copied(samples), folded, kept=copied.kept_modules)
    return copied


def _prepare_folded(
    module: Extractor | Logits, samples: torch.Tensor, resources: Resources, count: int
) -> ModuleRunner:
    is_plain = samples.device.type == "cpu" and resources.precision == "fp32"  # packed convolutions compute in float32
    return ModuleRunner(module=_fold(module, samples, packs=is_plain), autocast=resources.autocast)


class _InBfloat16(nn.Module):
    """Runs a module whose network has bfloat16 weights. Values at the taps are float32."""

    def __init__(self, module: Extractor | Logits) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Returns the values of the taps for float32 inputs (B, ...)."""
        values: list[torch.Tensor] = self.module(inputs.to(torch.bfloat16))
        return values


def _export(module: Extractor | Logits, samples: torch.Tensor, resources: Resources) -> nn.Module:
    """Returns the torch.export program of `module`, with folded norms, for batches of the size of `samples`.

    With bf16, the weights are cast once, here, and activations stay in bfloat16 between the layers. Autocast stays on for the
    few layers that compute in float32 by themselves. With fp16, weights stay in float32 under autocast, since sums over many
    layers, which autocast leaves in float32, may exceed the largest fp16 number; torch's freezing casts the weights once.
    """
    program: nn.Module = _fold(module, samples)
    if resources.precision == "bf16":
        assert isinstance(program, Extractor | Logits)
        program.cast_network(torch.bfloat16)
        program = _InBfloat16(program)
    with torch.no_grad(), resources.autocast():
        return torch.export.export(program, (samples,), strict=False).module()


@dataclass(frozen=True, kw_only=True)
class _FixedBatch:
    """Runs a function that takes batches of one size: the last rows of a smaller batch are filled with its first row."""

    function: BatchFunction
    size: int

    def __call__(self, batch: torch.Tensor) -> list[torch.Tensor]:
        count = len(batch)
        if count < self.size:
            batch = torch.cat([batch, batch[:1].expand(self.size - count, *batch.shape[1:])])
        return [value[:count] for value in self.function(batch)]


@dataclass(frozen=True, kw_only=True)
class _CompiledRunner:
    function: BatchFunction
    size: int

    def functions(self, count: int) -> list[BatchFunction]:
        """Returns the same function `count` times: several threads may call it."""
        return [_FixedBatch(function=self.function, size=self.size)] * count


def _prepare_compiled(
    module: Extractor | Logits, samples: torch.Tensor, resources: Resources, count: int
) -> _CompiledRunner:
    options: dict[str, Any] = {"freezing": True}
    if samples.device.type == "cpu":
        options["cpp.threads"] = 1  # each thread of the pass runs its own batch
    program = torch.compile(_export(module, samples, resources), dynamic=False, options=options)

    def run(batch: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad(), resources.autocast():
            return list(program(batch))

    function = Replayed(record(run, samples)) if pays_off(module, samples) else run
    return _CompiledRunner(function=function, size=len(samples))


class _OpenVinoRunner:
    def __init__(self, compiled: Any, size: int) -> None:
        self.compiled, self.size = compiled, size

    def functions(self, count: int) -> list[BatchFunction]:
        """Returns `count` functions, each with its own inference request."""
        return [_FixedBatch(function=self._bind(), size=self.size) for _ in range(count)]

    def _bind(self) -> BatchFunction:
        request = self.compiled.create_infer_request()
        outputs = range(len(self.compiled.outputs))

        def run(batch: torch.Tensor) -> list[torch.Tensor]:
            request.infer({0: batch.detach().contiguous().numpy()}, share_inputs=True)
            return [torch.from_numpy(request.get_output_tensor(i).data.copy()) for i in outputs]

        return run


class _FixedComputation(TorchDispatchMode):
    """Raises TypeError if Python reads numbers from a tensor: a trace would repeat the choice that they made for one batch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            raise TypeError(f"{func} makes the computation depend on the numbers in a batch")
        return func(*args, **(kwargs or {}))


def _trace(module: Extractor | Logits, samples: torch.Tensor) -> Any:
    """Returns the TorchScript graph of `module`, with folded norms, for batches of the size of `samples`.

    Preparing a network takes a third of the time that it takes from a torch.export program. Raises TypeError if the computation
    depends on the numbers in the batch.
    """
    folded = _fold(module, samples)
    with torch.no_grad(), warnings.catch_warnings():
        with _FixedComputation():  # type: ignore[no-untyped-call]
            folded(samples[:1])
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and asks about what _FixedComputation has checked
        return torch.jit.trace(lambda batch: tuple(folded(batch)), (samples,), check_trace=False)


def _prepare_openvino(
    module: Extractor | Logits, samples: torch.Tensor, resources: Resources, count: int
) -> _OpenVinoRunner:
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    # openvino.convert_model takes longer for the same, and reports the conversion to OpenVINO's makers.
    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(_trace(module, samples))  # a variable, since the frontend keeps no reference
    model = frontend.convert(frontend.load(decoder))
    model.reshape(list(samples.shape))
    settings = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[resources.precision],
        "INFERENCE_NUM_THREADS": count,
        "NUM_STREAMS": count,
        "ENABLE_CPU_PINNING": False,  # several processes would pin their threads to the same cores
    }
    return _OpenVinoRunner(openvino_core().compile_model(model, "CPU", settings), len(samples))


_PREPARE: dict[Engine, Callable[[Extractor | Logits, torch.Tensor, Resources, int], Runner]] = {
    "folded": _prepare_folded,
    "compiled": _prepare_compiled,
    "openvino": _prepare_openvino,
}
