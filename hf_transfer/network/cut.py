"""A cut is a tensor at which a network can be split into two functions: the prefix before it and the suffix after it.

    suffix(prefix(x)) == model(x)

A cut records where its tensor is read and replaced, and what earlier calls return. `network.part` runs prefix and suffix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.utils._pytree import TreeSpec, tree_unflatten

from hf_transfer.network.trace import Call, Leaf, Trace


@dataclass(frozen=True, kw_only=True)
class Site:
    """The place where a cut's tensor is read and replaced: a module call's output (side "after") or input (side "before")."""

    side: Literal["after", "before"]
    module: str
    index: int  # zero-based call index
    leaf: int  # index of the tensor among the call's flattened outputs or inputs

    def __str__(self) -> str:
        return f"{self.side}:{self.module}"


@dataclass(frozen=True, kw_only=True)
class Stub:
    """A module call before the cut, for which the suffix returns placeholder outputs instead of running the module."""

    module: str
    index: int
    leaves: tuple[Leaf, ...]  # the outputs: constants, or shapes of tensors whose values do not matter
    spec: TreeSpec
    cut_leaf: int | None = None  # index of the leaf that is the tensor at the cut

    def on(self, device: torch.device) -> "Stub":
        """Returns the stub with its constants on `device`, so that no forward copies them there."""
        if all(leaf.constant is None or leaf.constant.device == device for leaf in self.leaves):
            return self
        leaves = (
            leaf if leaf.constant is None else replace(leaf, constant=leaf.constant.to(device)) for leaf in self.leaves
        )
        return replace(self, leaves=tuple(leaves))

    def answer(self, activation: torch.Tensor, *, dense: bool) -> Any:
        """Returns the outputs of the replaced call: `activation` at the cut, else placeholders, with own memory if `dense`."""
        batch = activation.shape[0]
        answers = []
        for i, leaf in enumerate(self.leaves):
            if i == self.cut_leaf:
                answers.append(activation)
            elif not leaf.is_tensor:
                answers.append(leaf.value)
            else:
                sizes = zip(leaf.shape, leaf.per_image, strict=True)
                shape = [size if each is None else each * batch for size, each in sizes]
                # A zero-stride placeholder costs no memory. Dense placeholders would cost 15-24 % of a training step.
                if leaf.constant is None:
                    value = torch.zeros((), dtype=leaf.dtype, device=activation.device)
                else:
                    value = leaf.constant.to(activation.device)
                placeholder = value.expand(shape)
                answers.append(placeholder.clone(memory_format=torch.contiguous_format) if dense else placeholder)
        return tree_unflatten(answers, self.spec)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A tensor that every path from the image to the logits goes through, so that the network can be split there."""

    name: str  # name of the layer that ends at the cut, or "features" for the input of the classifier
    site: Site
    shape: tuple[int, ...]  # shape of one image's activation
    dtype: torch.dtype
    stubs: tuple[Stub, ...]
    dense: bool = False  # whether placeholders must be writable, since the network modifies them in place
    repeated: frozenset[str]  # the modules among stubs and site that one forward calls more than once
    later: frozenset[str]  # the modules that run after the cut, at least in part

    def __deepcopy__(self, memo: Any) -> "Cut":
        return self  # cuts are immutable, so copies of modules for other threads may share them

    @property
    def bytes_per_image(self) -> int:
        """The size of one image's activation in bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def possible_sites(trace: Trace, node: int, prefer: str | None = None) -> list[Site]:
    """Returns the possible sites, likeliest first, of the tensor that the graph node `node` computes. No site is verified yet.

    First come modules that return only this tensor: the module called `prefer`, then other modules from outer to inner. Then
    comes the first module whose input is the tensor, if all uses of the tensor lie inside it. Last come modules that also
    return other tensors.
    """
    producers = [c for c in trace.calls if c.module and any(o.node == node for o in c.outputs)]
    producers.sort(key=lambda c: (c.module != prefer, c.start - c.end))
    single: list[Site] = []
    several: list[Site] = []
    for call in producers:
        alone = sum(trace.depends_on_image(o) for o in call.outputs) == 1
        (single if alone else several).append(_site("after", call, call.outputs, node))
    made = min((c.end for c in producers), default=0)
    consumers = [c for c in trace.calls if c.module and c.start > made and any(i.node == node for i in c.inputs)]
    before = [_site("before", c, c.inputs, node) for c in consumers[:1] if _takes_every_use(trace, c, node)]
    return single + before + several


def _site(side: Literal["after", "before"], call: Call, leaves: Sequence[Leaf], node: int) -> Site:
    leaf = next(i for i, item in enumerate(leaves) if item.node == node)
    return Site(side=side, module=call.module, index=call.index, leaf=leaf)


def _takes_every_use(trace: Trace, call: Call, node: int) -> bool:
    """Whether only `call` uses the tensor that the graph node `node` computes, so that replacing the call's input is enough."""
    inside: set[int] = set()
    todo = [o.node for o in call.outputs if o.node is not None and o.node != node]
    while todo:
        user = todo.pop()
        if user in inside:
            continue
        inside.add(user)
        todo += [n for n in trace.graph.successors(user) if n != node]
    return all(user in inside for user in trace.graph.predecessors(node))


def make_cut(trace: Trace, name: str, site: Site) -> Cut | None:
    """Returns the cut at `site`, or None if dimension 0 of the tensor at the site is not the batch."""
    target = next(c for c in trace.calls if (c.module, c.index) == (site.module, site.index))
    after = site.side == "after"
    leaf = (target.outputs if after else target.inputs)[site.leaf]
    if not leaf.per_image or leaf.per_image[0] != 1 or any(n is not None for n in leaf.per_image[1:]):
        return None
    assert leaf.dtype is not None
    tick = target.end if after else target.start
    enclosing = set(target.ancestors())
    done = [
        c
        for c in trace.calls
        if c.module
        and c.end <= tick
        and c is not target
        and c not in enclosing
        and any(trace.depends_on_image(o) for o in c.outputs)
    ]
    answered = {*done, target} if after else set(done)
    stubs = [_stub(c) for c in done if not any(a in answered for a in c.ancestors())]
    if after:
        stubs.append(_stub(target, site.leaf))
    involved = {*(s.module for s in stubs), site.module}
    return Cut(
        name=name,
        site=site,
        shape=leaf.shape[1:],
        dtype=leaf.dtype,
        stubs=tuple(stubs),
        repeated=frozenset(c.module for c in trace.calls if c.index > 0 and c.module in involved),
        later=frozenset(c.module for c in trace.calls if c.end > tick),
    )


def _stub(call: Call, cut_leaf: int | None = None) -> Stub:
    assert call.output_spec is not None
    return Stub(
        module=call.module, index=call.index, leaves=tuple(call.outputs), spec=call.output_spec, cut_leaf=cut_leaf
    )
