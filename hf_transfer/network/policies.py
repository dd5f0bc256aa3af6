"""Policies: which parameters train. The cut follows from them (`Chain.lowest_cut`)."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from hf_transfer.network.chain import Chain


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A name for logs and results, and the function from a chain to the names of the parameters that train."""

    name: str
    select: Callable[[Chain], frozenset[str]]


def head() -> Policy:
    """The classifier alone: a linear probe."""
    return Policy(name="head", select=lambda chain: frozenset(chain.classifier_parameters))


def last(k: int) -> Policy:
    """The last `k` layers and the whole head, final norm included. k counts layers, not stages; 0 is the head alone.

    Raises ValueError at selection if the chain has fewer than k layers.
    """

    def select(chain: Chain) -> frozenset[str]:
        if not 0 <= k <= len(chain):
            raise ValueError(f"last(k={k}): this chain has {len(chain)} layers; choose 0 <= k <= {len(chain)}")
        top = chain.layers[len(chain.layers) - 1 - k :]
        return frozenset(name for layer in top for name in layer.parameters)

    return Policy(name=f"last({k})", select=select)


def from_layer(name: str) -> Policy:
    """The layer called `name`, or the first layer of the stage `name`, and all after it including the head.

    Raises ValueError at selection, listing layers and stages, if the chain has neither.
    """

    def select(chain: Chain) -> frozenset[str]:
        names = [layer.name for layer in chain.layers]
        starts = {alias: i for i in reversed(range(len(names))) for alias in chain.layers[i].aliases}
        starts |= {layer: i for i, layer in enumerate(names)}
        if name not in starts:
            aliases = [alias for alias in starts if alias not in names]
            known = f"layers are {', '.join(names)}" + (f"; aliases {', '.join(sorted(aliases))}" if aliases else "")
            raise ValueError(f"from_layer({name!r}): no such layer in this chain; its {known}")
        return frozenset(n for layer in chain.layers[starts[name] :] for n in layer.parameters)

    return Policy(name=f"from_layer({name})", select=select)


def norms() -> Policy:
    """The scale and shift of every norm, and the classifier (arXiv 2003.00152, 2304.00776)."""

    def select(chain: Chain) -> frozenset[str]:
        selected = {
            f"{name}.{parameter}"
            for name, module in chain.model.named_modules()
            if is_norm(module)
            for parameter, _ in module.named_parameters(recurse=False)
        }
        return frozenset((selected & _used_parameters(chain)) | set(chain.classifier_parameters))

    return Policy(name="norms", select=select)


def biases() -> Policy:
    """Every bias, and the classifier: BitFit (arXiv 2106.10199)."""

    def select(chain: Chain) -> frozenset[str]:
        selected = {name for name in _used_parameters(chain) if name.rpartition(".")[2] == "bias"}
        return frozenset(selected | set(chain.classifier_parameters))

    return Policy(name="biases", select=select)


def matching(pattern: str) -> Policy:
    """Parameters whose name contains a match of the regular expression `pattern`, and the classifier.

    Raises ValueError if it does not compile, and at selection if it matches no parameter that reaches the logits.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"matching({pattern!r}): not a regular expression: {error}") from error

    def select(chain: Chain) -> frozenset[str]:
        names = [name for layer in chain.layers for name in layer.parameters]
        selected = {name for name in names if expression.search(name)}
        if not selected:
            unused = [name for name in chain.unused_parameters if expression.search(name)]
            but = f" but {unused[0]}, which never reaches the logits" if unused else ""
            word = re.sub(r"\\.|[^\w.]", "", pattern.replace("\\.", ".")) or pattern
            near = difflib.get_close_matches(word, names, n=3, cutoff=0.0)
            raise ValueError(f"matching({pattern!r}): matches no parameter{but}; similar names are {', '.join(near)}")
        return frozenset(selected | set(chain.classifier_parameters))

    return Policy(name=f"matching({pattern})", select=select)


def full() -> Policy:
    """Every parameter that reaches the logits."""
    return Policy(name="full", select=lambda chain: frozenset(_used_parameters(chain)))


def gradual(chain: Chain, phases: int) -> list[Policy]:
    """Gradual unfreezing, from the top down (arXiv 1801.06146, section 3.3): one policy per phase.

    The first trains the classifier, the last everything, and those between `last(k)` with evenly growing k. The paper unfreezes
    one layer at a time, which gives the largest number of phases. Raises ValueError for more phases, or fewer than two.
    """
    # Steps: 0 is the classifier, k the last k layers, `top` everything; the stem is a step if it has parameters.
    top = max(1, len(chain) + bool(chain.layers[0].parameters))
    if not 2 <= phases <= top + 1:
        raise ValueError(
            f"gradual(phases={phases}): this chain has {len(chain)} layers; choose 2 <= phases <= {top + 1}"
        )
    return [head(), *(last(i * top // (phases - 1)) for i in range(1, phases - 1)), full()]


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a norm, of torch or of another library."""
    return "norm" in type(module).__name__.lower()


def _used_parameters(chain: Chain) -> set[str]:
    return {name for layer in chain.layers for name in layer.parameters}
