"""What a strategy will cost, estimated from the network's measured speed before anything trains.

Time is counted in forwards of the network: a backward costs twice the forward of what it goes through. Memory: weights,
gradients, Adam's two moments, the moving average, the kept weights, and the activations that the backward of one batch needs,
which are counted.
"""

from dataclasses import dataclass

import torch

from hf_transfer.costs import anonymous_memory_bytes
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.describe import count_flops
from hf_transfer.network.policies import Policy
from hf_transfer.session import Session
from hf_transfer.training.steps import CPU_BATCH

COPIES_OF_TRAINED = 5  # gradient, two moments, moving average, kept weights
FORWARDS_PER_STEP = 3.0  # a forward, and a backward that costs two


@dataclass(frozen=True, kw_only=True)
class Price:
    """Estimated, not measured."""

    seconds: float
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Pricing:
    """What estimates are made from: the session, and a speed that was measured on its images."""

    session: Session
    images_per_second: float  # of a forward in the run's precision
    probe_seconds: float  # of solving for a head

    def price_probe(self) -> Price:
        """One pass over the images, and one convex problem. Caches that exist make it cheaper."""
        return Price(seconds=self._pass_seconds + self.probe_seconds, memory_bytes=self._base_bytes)

    def price_steps(
        self,
        epochs: int,
        policy: Policy,
        *,
        passes: int,
        solves_head: bool,
        forwards: float = FORWARDS_PER_STEP,
        trained_share: float | None = None,
    ) -> Price:
        """Gradient steps on `policy`, after `passes` over the images and, if asked, a solved head.

        `trained_share`: of the parameters, if it is not those of the policy that train.
        """
        chain, data = self.session.chain, self.session.data
        names = policy.select(chain)
        cut = chain.lowest_cut(names)
        sizes = {name: p.numel() for name, p in chain.model.named_parameters()}
        weights = sum(sizes.values())
        trained = sum(sizes[n] for n in names) if trained_share is None else int(trained_share * weights)
        train, validation = len(data.train), len(data.validation)
        epoch = self._share_above(cut) * (forwards * train + validation) / self.images_per_second
        first = passes * self._pass_seconds + (self.probe_seconds if solves_head else 0.0)
        # The saved network is scored once from files.
        seconds = first + epochs * epoch + validation / self.images_per_second
        batch = CPU_BATCH if self._on_cpu else self.session.config.compute.batch_size
        memory = self._base_bytes + 4 * COPIES_OF_TRAINED * trained + batch * count_activation_bytes(chain, cut)
        return Price(seconds=seconds, memory_bytes=int(memory))

    @property
    def _on_cpu(self) -> bool:
        return self.session.resources.device.type == "cpu"

    @property
    def _pass_seconds(self) -> float:
        return (len(self.session.data.train) + len(self.session.data.validation)) / self.images_per_second

    @property
    def _base_bytes(self) -> int:
        parameters = sum(p.numel() for p in self.session.chain.model.parameters())
        return anonymous_memory_bytes() if self._on_cpu else 4 * parameters

    def _share_above(self, cut: Cut | None) -> float:
        """Share of a forward's FLOPs after `cut`."""
        total, before = count_flops(self.session.chain)
        return 1.0 if cut is None or not total else 1 - before[cut.name] / total


def count_activation_bytes(chain: Chain, cut: Cut | None) -> int:
    """What autograd keeps of one image for the backward of the network after `cut`, or of all of it."""
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
