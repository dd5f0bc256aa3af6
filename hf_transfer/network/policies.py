"""Policies. A policy selects the parameters that train. Every layer before the first of these parameters stays frozen."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from hf_transfer.network.chain import Chain


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A rule that selects the parameters that train. `select` returns their names for a chain (a network's layers)."""

    name: str
    select: Callable[[Chain], frozenset[str]]


def head() -> Policy:
    """Trains only the classifier, which gives a linear probe."""
    return Policy(name="head", select=lambda chain: frozenset(chain.classifier_parameters))


def last(k: int) -> Policy:
    """Trains the last `k` layers and the whole head, including the final norm. `last(0)` trains only the head.

    `k` counts layers, not stages. `select` raises ValueError if the chain has fewer than k layers.
    """

    def select(chain: Chain) -> frozenset[str]:
        if not 0 <= k <= len(chain):
            raise ValueError(f"last(k={k}): this chain has {len(chain)} layers; choose 0 <= k <= {len(chain)}")
        top = chain.layers[len(chain.layers) - 1 - k :]
        return frozenset(name for layer in top for name in layer.parameters)

    return Policy(name=f"last({k})", select=select)


def from_layer(name: str) -> Policy:
    """Trains the layer or stage called `name`, all later layers, and the head.

    `select` raises ValueError, with the names of all layers and stages, if no layer or stage has that name.
    """

    def select(chain: Chain) -> frozenset[str]:
        names = [layer.name for layer in chain.layers]
        starts = {alias: i for i in reversed(range(len(names))) for alias in chain.layers[i].aliases}
        starts |= {layer: i for i, layer in enumerate(names)}
        if name not in starts:
            aliases = [alias for alias in starts if alias not in names]
            known = f"layers are {', '.join(names)}" + (f"; aliases {', '.join(sorted(aliases))}" if aliases else "")
            raise ValueError(f"from_layer({name!r}): this chain has no such layer; its {known}")
        return frozenset(n for layer in chain.layers[starts[name] :] for n in layer.parameters)

    return Policy(name=f"from_layer({name})", select=select)


def norms() -> Policy:
    """Trains the scale and shift of every normalization layer, and the classifier (arXiv 2003.00152, 2304.00776)."""

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
    """Trains every bias, and the classifier (BitFit, arXiv 2106.10199).

    Biases of attention are often parameters of their own, such as `q_bias` and `in_proj_bias`.
    """

    def select(chain: Chain) -> frozenset[str]:
        selected = {name for name in _used_parameters(chain) if re.search(r"(^|[._])bias$", name)}
        return frozenset(selected | set(chain.classifier_parameters))

    return Policy(name="biases", select=select)


def matching(pattern: str) -> Policy:
    """Trains the parameters whose names contain a match of the regular expression `pattern`, and the classifier.

    Raises ValueError if the pattern does not compile. `select` raises ValueError if the pattern matches no layer's parameter.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"matching({pattern!r}): this is not a regular expression: {error}") from error

    def select(chain: Chain) -> frozenset[str]:
        names = [name for layer in chain.layers for name in layer.parameters]
        selected = {name for name in names if expression.search(name)}
        if not selected:
            unused = [name for name in chain.unused_parameters if expression.search(name)]
            but = f" but {unused[0]}, which never reaches the logits" if unused else ""
            word = re.sub(r"\\.|[^\w.]", "", pattern.replace("\\.", ".")) or pattern
            near = difflib.get_close_matches(word, names, n=3, cutoff=0.0)
            raise ValueError(f"matching({pattern!r}) matches no parameter{but}; similar names are {', '.join(near)}")
        return frozenset(selected | set(chain.classifier_parameters))

    return Policy(name=f"matching({pattern})", select=select)


def full() -> Policy:
    """Trains every parameter that reaches the logits."""
    return Policy(name="full", select=lambda chain: frozenset(_used_parameters(chain)))


def gradual(chain: Chain, phases: int) -> list[Policy]:
    """Returns one policy per phase of gradual unfreezing, from the last layer to the first (arXiv 1801.06146, section 3.3).

    The first phase trains the classifier, the last phase trains all parameters, and the phases between train `last(k)` with
    evenly growing k. Raises ValueError for fewer than two phases, or for more phases than layers, stem and head.
    """
    # Step 0 is the classifier, step k the last k layers, and step `top` all. The stem is a step if it has parameters.
    top = max(1, len(chain) + bool(chain.layers[0].parameters))
    if not 2 <= phases <= top + 1:
        raise ValueError(
            f"gradual(phases={phases}): this chain has {len(chain)} layers; choose 2 <= phases <= {top + 1}"
        )
    return [head(), *(last(i * top // (phases - 1)) for i in range(1, phases - 1)), full()]


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a normalization layer, of torch or of another library."""
    return "norm" in type(module).__name__.lower()


def _used_parameters(chain: Chain) -> set[str]:
    return {name for layer in chain.layers for name in layer.parameters}
