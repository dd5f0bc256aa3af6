"""What one pass over images stores: for each tap, a function of the activation at a cut. `Extractor` computes all taps."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_transfer.network.casting import cast_weights
from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.head import HeadInput, watch_features
from hf_transfer.network.part import Part

BatchFunction = Callable[[torch.Tensor], list[torch.Tensor]]
"""Takes a batch on the device, and returns float32 tensors, each with a row per image. It runs without gradients."""


@dataclass(frozen=True, kw_only=True)
class Tap:
    """A request to store the output of the module `keep` (for example a pooling) for the activation at a cut.

    With `joins`, taps with the same `keep` and equal activation shapes share one call of `keep` per batch.
    """

    cut: Cut
    pooling: str = "none"
    shape: tuple[int, ...]  # shape of one image's stored value
    through: Cut | None = None  # a later cut, if `keep` runs the layers up to that cut
    keep: nn.Module = field(default_factory=nn.Identity, repr=False)
    joins: bool = False  # for a `keep` that takes longer to set up than to copy activations


def count_bytes(taps: Mapping[str, Tap]) -> int:
    """Returns the bytes per image of all taps together, in float32."""
    return sum(4 * math.prod(tap.shape) for tap in taps.values())


def tap_activation(cut: Cut) -> Tap:
    """Returns the tap that stores the whole activation at `cut`."""
    return Tap(cut=cut, shape=cut.shape)


def replicate(module: nn.Module) -> nn.Module:
    """Returns a copy for another thread, in eval mode. Modules (with their hooks) are copied, tensors are shared."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    copied: nn.Module = copy.deepcopy(module, shared).eval()
    return copied


class Extractor(nn.Module):
    """The function from images (B, C, H, W), or from activations at the cut `start`, to the values of all taps, in order."""

    def __init__(self, chain: Chain, taps: Mapping[str, Tap], *, start: Cut | None = None) -> None:
        super().__init__()
        self.num_taps = len(taps)
        cuts = {tap.cut.name: tap.cut for tap in taps.values()}
        self.part = Part(chain.model, chain.image_shape, start=start, ends=list(cuts.values()))
        # Each group of taps has one `keep` and activations of one shape. A tap is (its position, the position of its cut).
        groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        keeps: dict[tuple[int, ...], nn.Module] = {}
        order = list(cuts)
        for i, tap in enumerate(taps.values()):
            key = (id(tap.keep), *tap.cut.shape) if tap.joins else (i,)
            groups.setdefault(key, []).append((i, order.index(tap.cut.name)))
            keeps[key] = tap.keep
        self.keeps = nn.ModuleList(keeps.values())
        self.groups = tuple(groups.values())

    @property
    def kept_modules(self) -> set[nn.Module]:
        """The modules whose own inputs or outputs are read, so that they must keep computing these tensors."""
        sites = [cut.site for cut in (*self.part.ends, *([self.part.start] if self.part.start else []))]
        return {self.part.network.get_submodule(site.module) for site in sites}

    def cast_network(self, dtype: torch.dtype) -> None:
        """Converts the weights of the network to `dtype`, in place. The taps' own modules still take and have float32."""
        self.keeps = nn.ModuleList([replicate(keep) for keep in self.keeps])  # they may contain the network's modules
        cast_weights(self.part.network, dtype)

    def forward(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Returns the float32 values (B, *shape) of each tap. The module must be in eval mode, under `no_grad`."""
        with self.part:
            activations = self.part.activations(inputs)
        values: list[torch.Tensor] = [inputs] * self.num_taps
        for keep, members in zip(self.keeps, self.groups, strict=True):
            given = [activations[cut].float() for _, cut in members]
            kept = keep(given[0] if len(given) == 1 else torch.cat(given))
            for (i, _), value in zip(members, kept.split(len(inputs)), strict=True):
                values[i] = value
        return values


class Logits(nn.Module):
    """The function from images (B, C, H, W) to the logits (B, K) of a whole network, as a list of one tensor."""

    num_values = 1

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def kept_modules(self) -> set[nn.Module]:
        """No module: only the logits are read."""
        return set()

    def cast_network(self, dtype: torch.dtype) -> None:
        """Converts the weights of the network to `dtype`, in place."""
        cast_weights(self.model, dtype)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Returns the float32 logits (B, K), as a list of one tensor."""
        return [compute_logits(self.model, images).float()]


class LogitsAndFeatures(Logits):
    """The function from images (B, C, H, W) to the logits (B, K) of a whole network and the features (B, F) of its head."""

    num_values = 2

    def __init__(self, model: nn.Module, inputs: Sequence[HeadInput]) -> None:
        super().__init__(model)
        self.inputs = tuple(inputs)

    @property
    def kept_modules(self) -> set[nn.Module]:
        """The linear maps whose inputs are read."""
        return {self.model.get_submodule(i.modules[0]) for i in self.inputs}

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Returns the float32 logits (B, K) and features (B, F)."""
        with watch_features(self.model, self.inputs) as read:
            logits = compute_logits(self.model, images).float()
        return [logits, read().float()]
