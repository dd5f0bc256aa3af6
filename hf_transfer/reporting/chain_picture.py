"""Describes, for the report, which layers of the chain each phase left frozen and which it trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_transfer.network.chain import Chain


@dataclass(frozen=True, kw_only=True)
class LayerBox:
    """One layer of the chain in the drawing. `num_parameters` counts the layer's own parameters."""

    name: str
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class PhaseRow:
    """One phase in the drawing: the layers from `first_trained` on may train, and those before are frozen.

    A stage of a greedy stack had no layers after `last_grown` but a head of its own.
    """

    policy: str
    cut: str
    first_trained: int
    num_trainable: int
    last_grown: int


@dataclass(frozen=True, kw_only=True)
class ChainPicture:
    """The layers from stem to head, and a row for each phase."""

    layers: tuple[LayerBox, ...]
    phases: tuple[PhaseRow, ...]

    @property
    def num_parameters(self) -> int:
        """The number of parameters of the network."""
        return sum(layer.num_parameters for layer in self.layers)


def lay_out_chain(
    chain: Chain, plan: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]] = ()
) -> ChainPicture | None:
    """Returns the drawing of the phases in `plan` (as in results.json), or None if a phase has a cut that is not in the chain.

    `stages`: the stages of a greedy stack, as in `details` of results.json, which are the first phases.
    A plan has other cuts than the finished network if the network grew while it trained, as a greedy stack does.
    """
    starts = {layer.cut.name: i + 1 for i, layer in enumerate(chain.layers) if layer.cut is not None}
    starts |= {"pixels": 0, "features": len(chain.layers) - 1}
    if chain.features is not None:
        starts[chain.features.name] = len(chain.layers) - 1
    if not plan or any(phase["cut"] not in starts for phase in plan):
        return None
    positions, last = {layer.name: i for i, layer in enumerate(chain.layers)}, len(chain.layers) - 1
    grown = [positions.get(stage["layer"], last) for stage in stages] + [last] * (len(plan) - len(stages))
    sizes = {name: parameter.numel() for name, parameter in chain.model.named_parameters()}
    return ChainPicture(
        layers=tuple(
            LayerBox(name=layer.name, num_parameters=sum(sizes[name] for name in layer.parameters))
            for layer in chain.layers
        ),
        phases=tuple(
            PhaseRow(
                policy=phase["policy"],
                cut=phase["cut"],
                first_trained=starts[phase["cut"]],
                num_trainable=phase["num_trainable"],
                last_grown=last_grown,
            )
            for phase, last_grown in zip(plan, grown, strict=True)
        ),
    )
