"""Estimates time and memory of a strategy before training, from the measured speed of the network.

Time is counted in forward passes; a backward pass through some layers costs two forward passes through them. Memory is the
sum of weights, gradients, Adam's two moments, the moving average, the best weights so far, and the activations that one
batch stores for the backward pass.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from hf_transfer.config import TrainingConfig
from hf_transfer.costs import anonymous_memory_bytes
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.describe import count_flops
from hf_transfer.network.policies import Policy
from hf_transfer.session import Session
from hf_transfer.training.evaluate import AGREEING_IMAGES
from hf_transfer.training.steps import CPU_BATCH, CPU_STORED_BATCH, count_epochs

COPIES_OF_TRAINED = 5  # gradient, two moments, moving average, best weights so far
FORWARDS_PER_STEP = 3.0  # one forward pass, and a backward pass that costs two forward passes


@dataclass(frozen=True, kw_only=True)
class Price:
    """The estimated time and memory of a strategy."""

    seconds: float
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Pricing:
    """Estimates the costs of strategies from a session and the speed measured on the session's images."""

    session: Session
    images_per_second: float  # of a forward pass of one process in the precision of the run
    probe_seconds: float  # time of the solver for one head
    step_images_per_second: float | None = None  # of a forward pass within a training step; None: `images_per_second`

    def price_probe(self) -> Price:
        """Estimates a linear probe: one pass over the images, and one solved head. Existing caches reduce the true cost."""
        return Price(seconds=self._pass_seconds + self.probe_seconds, memory_bytes=self._base_bytes)

    def price_steps(
        self,
        training: TrainingConfig,
        policy: Policy,
        *,
        passes: int,
        solves_head: bool,
        forwards: float = FORWARDS_PER_STEP,
        trained_share: float | None = None,
    ) -> Price:
        """Estimates gradient steps on the parameters of `policy`, after `passes` passes over the images.

        `training`: settings of the strategy, of which `epochs` and `min_steps` are read. `solves_head`: whether a solver fits
        the head first. `trained_share` replaces the policy's share of trained parameters.
        """
        chain, data = self.session.chain, self.session.data
        names = policy.select(chain)
        cut = chain.lowest_cut(names)
        sizes = {name: p.numel() for name, p in chain.model.named_parameters()}
        weights = sum(sizes.values())
        trained = sum(sizes[n] for n in names) if trained_share is None else int(trained_share * weights)
        train, validation = len(data.train), len(data.validation)
        step_speed = self.step_images_per_second or self.images_per_second
        epoch = self._share_above(cut) * (forwards * train / step_speed + validation / self.images_per_second)
        epochs = count_epochs(self.session, training.epochs, min_steps=training.min_steps)
        first = passes * self._pass_seconds + (self.probe_seconds if solves_head else 0.0)
        # At the end, the validation logits of the last epoch are compared with those of the saved network.
        agreeing = min(validation, AGREEING_IMAGES) / self.images_per_second
        seconds = first + (epochs * epoch + agreeing) / self._num_processes
        cpu_batch = CPU_BATCH if cut is None else CPU_STORED_BATCH
        batch = cpu_batch if self._on_cpu else self.session.config.compute.images_per_batch
        memory = self._base_bytes + 4 * COPIES_OF_TRAINED * trained + batch * self._activation_bytes(cut)
        return Price(seconds=seconds, memory_bytes=int(memory))

    @property
    def _on_cpu(self) -> bool:
        return self.session.resources.device.type == "cpu"

    @property
    def _pass_seconds(self) -> float:
        num_images = len(self.session.data.train) + len(self.session.data.validation)
        return num_images / self.images_per_second / self._num_processes

    @property
    def _num_processes(self) -> int:
        """The number of processes, which share the images of each pass and each step."""
        return int(self.session.accelerator.num_processes)

    @property
    def _base_bytes(self) -> int:
        parameters = sum(p.numel() for p in self.session.chain.model.parameters())
        return anonymous_memory_bytes() if self._on_cpu else 4 * parameters

    def _share_above(self, cut: Cut | None) -> float:
        """Returns the FLOPs of the layers after `cut` as a share of the FLOPs of a forward pass."""
        total, before = self._flops
        return 1.0 if cut is None or not total else 1 - before[cut.name] / total

    @cached_property
    def _flops(self) -> tuple[int, dict[str, int]]:
        return count_flops(self.session.chain)

    @cached_property
    def _known_activation_bytes(self) -> dict[str | None, int]:
        return {}

    def _activation_bytes(self, cut: Cut | None) -> int:
        """Returns `count_activation_bytes`, which runs the network, once for all strategies that train the same layers."""
        known, name = self._known_activation_bytes, None if cut is None else cut.name
        if name not in known:
            known[name] = count_activation_bytes(self.session.chain, cut)
        return known[name]


def count_activation_bytes(chain: Chain, cut: Cut | None) -> int:
    """Returns the bytes that autograd stores per image for the layers after `cut`. If `cut` is None, all layers count."""
    like = next(chain.model.parameters())
    own = {t.untyped_storage().data_ptr() for t in (*chain.model.parameters(), *chain.model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    flags = {n: p.requires_grad for n, p in chain.model.named_parameters()}
    try:
        chain.model.requires_grad_(True)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.enable_grad(), hooks, chain.part(start=cut) as part:
            output = part(torch.zeros(1, *part.input_shape, device=like.device))
        del output
    finally:
        for name, p in chain.model.named_parameters():
            p.requires_grad_(flags[name])
    return sum(kept.values())
