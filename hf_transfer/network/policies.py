"""A policy says which parameters train, and nothing else; the cut follows from it (`Chain.lowest_cut`)."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import nn

from hf_transfer.network.chain import Chain


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A name for people, and the function from a chain to the names of the parameters that train."""

    name: str
    select: Callable[[Chain], frozenset[str]]


def head() -> Policy:
    """The classifier alone: a linear probe."""
    return Policy(name="head", select=lambda chain: frozenset(chain.classifier_parameters))


def last(k: int) -> Policy:
    """The last `k` layers and the whole head, final norm included. k counts layers, not stages; 0 is the head alone.

    Raises ValueError at selection where the chain has fewer than k layers.
    """

    def select(chain: Chain) -> frozenset[str]:
        if not 0 <= k <= len(chain):
            raise ValueError(f"last(k={k}): this chain has {len(chain)} layers; choose 0 <= k <= {len(chain)}")
        top = chain.layers[len(chain.layers) - 1 - k :]
        return frozenset(name for layer in top for name in layer.parameters)

    return Policy(name=f"last({k})", select=select)


def norms() -> Policy:
    """Every normalisation layer's scale and shift, and the classifier (arXiv 2003.00152, 2304.00776)."""

    def select(chain: Chain) -> frozenset[str]:
        found = {
            f"{name}.{parameter}"
            for name, module in chain.model.named_modules()
            if "norm" in type(module).__name__.lower()
            for parameter, _ in module.named_parameters(recurse=False)
        }
        return frozenset((found & _reaching(chain)) | set(chain.classifier_parameters))

    return Policy(name="norms", select=select)


def biases() -> Policy:
    """Every bias, and the classifier: BitFit (arXiv 2106.10199)."""

    def select(chain: Chain) -> frozenset[str]:
        found = {name for name in _reaching(chain) if name.rpartition(".")[2] == "bias"}
        return frozenset(found | set(chain.classifier_parameters))

    return Policy(name="biases", select=select)


def full() -> Policy:
    """Every parameter that reaches the logits."""
    return Policy(name="full", select=lambda chain: frozenset(_reaching(chain)))


def _reaching(chain: Chain) -> set[str]:
    return {name for layer in chain.layers for name in layer.parameters}


def set_trainable(model: nn.Module, trainable: Collection[str]) -> None:
    """Makes exactly the named parameters require gradients, in place; orphans and all others do not."""
    unknown = set(trainable) - {name for name, _ in model.named_parameters()}
    if unknown:
        raise ValueError(f"not parameters of this model: {', '.join(sorted(unknown)[:5])}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
