"""Measures the speed of a forward pass over a few images, and how far BatchNorm inputs are from the stored statistics."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from hf_transfer.prefix.engines import ModuleRunner
from hf_transfer.prefix.pixels import EvaluationImages
from hf_transfer.prefix.sweep import place_model, sweep
from hf_transfer.prefix.taps import Logits
from hf_transfer.session import Session

MAX_IMAGES = 32
MAX_SHARE = 1 / 16  # largest share of the training images to run on, so that the cost is small
MIN_IMAGES = 8
EPSILON = 1e-5  # lower bound of each variance


@dataclass(frozen=True, kw_only=True)
class ForwardStats:
    """The speed of a forward pass over `num_images` images, and the divergence of BatchNorm inputs from stored statistics."""

    num_images: int
    images_per_second: float  # in the run's precision
    batchnorm_distance: float | None  # in nats; None if the network has no running statistics


def measure_forward(session: Session) -> ForwardStats:
    """Returns the statistics of a forward pass over a few training images, which are spread evenly over the strata.

    Running statistics of the network do not change. BatchNorm inputs are recorded in fp32. If the run has another precision,
    a second forward pass measures the speed in this precision.
    """
    split, resources = session.data.train, session.resources
    count = min(len(split), MAX_IMAGES, max(MIN_IMAGES, round(MAX_SHARE * len(split))))
    by_stratum = np.argsort(split.target.stratify(split.labels), kind="stable")
    rows = np.sort(by_stratum[np.linspace(0, len(split) - 1, count).round().astype(int)]).astype(np.int64)
    images = EvaluationImages(split=split, preprocessing=session.preprocessing)

    def measure_speed(*, in_precision: bool) -> float:
        def wait(_: int, values: list[torch.Tensor]) -> None:
            values[0].sum().item()  # item() waits for the GPU

        autocast = resources.autocast if in_precision else nullcontext
        started = time.perf_counter()
        sweep(ModuleRunner(module=Logits(session.chain.model), autocast=autocast), images, rows, wait, resources)
        return count / (time.perf_counter() - started)

    place_model(session.chain.model, resources)
    with _record_batchnorm_inputs(session.chain.model) as moments:
        speed = measure_speed(in_precision=False)
    if resources.precision != "fp32":
        speed = measure_speed(in_precision=True)
    return ForwardStats(num_images=count, images_per_second=speed, batchnorm_distance=moments.compute_distance())


class _InputMoments:
    """Accumulates the mean and the variance, over images and positions, of the inputs of each module with running statistics.

    `stored` maps the name of a module to the module's running mean (C,) and running variance (C,).
    """

    def __init__(self, stored: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.stored = stored
        self.seen: dict[str, tuple[int, torch.Tensor, torch.Tensor]] = {}  # count, sum (C,), sum of squares (C,)
        self.lock = threading.Lock()

    def add(self, name: str, x: torch.Tensor) -> None:
        # On channels-last inputs, BatchNorm's own kernel is ten times faster than var_mean.
        _, mean, inverse_std = torch.native_batch_norm(x.detach(), None, None, None, None, True, 0.0, EPSILON)
        variance = (inverse_std**-2 - EPSILON).cpu().double()
        mean = mean.cpu().double()
        count = x.numel() // x.shape[1]
        with self.lock:
            seen, total, squares = self.seen.get(name, (0, torch.zeros_like(mean), torch.zeros_like(mean)))
            self.seen[name] = (seen + count, total + count * mean, squares + count * (variance + mean**2))

    def compute_distance(self) -> float | None:
        """Returns the divergence KL(inputs | pretraining inputs) of normal distributions, or None without BatchNorm modules.

        The divergence, in nats, is the median over channels and the mean over modules (arXiv 1603.04779; 1912.08795, eq. 4).
        """
        distances = []
        for name, (count, total, squares) in self.seen.items():
            stored_mean, stored_var = (buffer.cpu().double() for buffer in self.stored[name])
            mean = total / count
            var = (squares / count - mean**2).clamp_min(EPSILON) + EPSILON
            stored_var = stored_var.clamp_min(0) + EPSILON
            kl = 0.5 * (var / stored_var + (mean - stored_mean) ** 2 / stored_var - 1 - (var / stored_var).log())
            # The median ignores dead channels, whose variance ratio is a rounding error.
            distances.append(float(kl.median()))
        return float(np.mean(distances)) if distances else None


@contextmanager
def _record_batchnorm_inputs(model: nn.Module) -> Iterator[_InputMoments]:
    """Records the inputs of BatchNorm modules in the model, and in copies of the model, until the `with` block ends."""
    stored = {
        name: (module._buffers["running_mean"], module._buffers["running_var"])
        for name, module in model.named_modules()
        if isinstance(module._buffers.get("running_mean"), torch.Tensor)
    }
    moments = _InputMoments(stored)

    def record(name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        moments.add(name, inputs[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(record, name)) for name in stored]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
