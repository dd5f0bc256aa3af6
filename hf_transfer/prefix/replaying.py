"""Replays the kernels of a batch as one CUDA graph, so that the host does not launch them one by one.

A network of a few hundred kernels takes the host about 1 ms to launch. A graph saves that time where the device would
otherwise wait for the host: in small networks, or with few images together. It costs a copy of the inputs and of the outputs,
and memory of its own for the activations. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs

No CUDA graph of this file was ever recorded on a GPU: docs/speed.md lists it as unmeasured.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_transfer.prefix.taps import BatchFunction

# Fewer GFLOPs in a batch are computed in less than the 1 ms that their launches take, at the 1,000 TFLOP/s at which the
# largest GPUs of today multiply bfloat16 matrices. This is an estimate.
REPLAYED_GFLOPS = 1000.0
WARM_UP_CALLS = 3


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A recorded batch: `replay` computes `outputs` from `inputs`, which keep their places in memory."""

    inputs: torch.Tensor
    outputs: list[torch.Tensor]
    replay: Callable[[], None]


class Replayed:
    """A function of batches (B, ...) that replays a recording. Several threads may call it, on the same stream."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._lock = threading.Lock()  # another thread must not write the next inputs before the outputs are copied

    def __call__(self, batch: torch.Tensor) -> list[torch.Tensor]:
        """Returns copies of the outputs, since the next replay overwrites them."""
        with self._lock, torch.no_grad():
            self._recording.inputs.copy_(batch)
            self._recording.replay()
            return [output.clone() for output in self._recording.outputs]


def record(function: BatchFunction, samples: torch.Tensor) -> Recording:
    """Records what `function` does with a batch like `samples` on an NVIDIA GPU. The first calls compile and allocate."""
    inputs, current = samples.clone(), torch.cuda.current_stream(samples.device)
    side = torch.cuda.Stream(samples.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            function(inputs)
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Threads that decode images may use the device meanwhile, for example to pin memory.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function(inputs)
    return Recording(inputs=inputs, outputs=outputs, replay=graph.replay)


def pays_off(module: nn.Module, samples: torch.Tensor) -> bool:
    """Whether a GPU computes the batch `samples` in less time than the host needs to launch its kernels."""
    return samples.device.type == "cuda" and count_gflops(module, samples) < REPLAYED_GFLOPS


def count_gflops(module: nn.Module, samples: torch.Tensor) -> float:
    """Returns the GFLOPs of `module` for the batch `samples`, from a forward of its first row."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(samples[:1])
    return len(samples) * int(counter.get_total_flops()) / 1e9
