"""A cut splits a network, unchanged, into the function before a tensor and the function after it.

    suffix(prefix(x)) == model(x)

A cut records where its tensor is read and replaced, and what the calls before it return; `network.part` runs the two sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._pytree import TreeSpec, tree_unflatten

from hf_transfer.network.trace import Call, Leaf, Trace


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where the tensor of a cut is read and replaced: a leaf of one call's outputs ("after") or inputs ("before")."""

    side: Literal["after", "before"]
    module: str
    index: int  # zero-based call index
    leaf: int

    def __str__(self) -> str:
        return f"{self.side}:{self.module}"


@dataclass(frozen=True, kw_only=True)
class Stub:
    """A call before the cut, which a suffix answers without running it. `leaves` are constants, or shapes to fill."""

    module: str
    index: int
    leaves: tuple[Leaf, ...]
    spec: TreeSpec
    cut_leaf: int | None = None  # index of the leaf that is the tensor at the cut

    def answer(self, activation: torch.Tensor, *, dense: bool) -> Any:
        """The call's output in a suffix that runs on `activation` (B, *cut.shape); `dense`: writable placeholders."""
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
                # Zero-stride: a dense placeholder would cost 15-24 % of a step.
                if leaf.constant is None:
                    value = torch.zeros((), dtype=leaf.dtype, device=activation.device)
                else:
                    value = leaf.constant.to(activation.device)
                placeholder = value.expand(shape)
                answers.append(placeholder.clone(memory_format=torch.contiguous_format) if dense else placeholder)
        return tree_unflatten(answers, self.spec)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A tensor that every path from the image to the logits goes through."""

    name: str  # the layer that ends here, or "features": the input of the classifier
    site: Site
    shape: tuple[int, ...]  # of one image
    dtype: torch.dtype
    stubs: tuple[Stub, ...]
    dense: bool = False  # full-size placeholders, for a network that writes into the outputs of calls before the cut
    repeated: frozenset[str]  # modules of the stubs and the site that one forward calls more than once

    def __deepcopy__(self, memo: Any) -> "Cut":
        return self  # it is immutable, and each thread copies the modules that refer to it

    @property
    def bytes_per_image(self) -> int:
        """Of one activation, in its own dtype."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def possible_sites(trace: Trace, node: int, prefer: str | None = None) -> list[Site]:
    """Where the tensor made by `node` could be read and replaced, likeliest first. Each must still be verified.

    First the output of a module (of the module `prefer`, then of the outermost), then the input of the first module that takes
    the tensor (if all its uses lie inside that module), last a module with several outputs.
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
    """Whether every use of the tensor made by `node` happens inside `call`; otherwise replacing its input is not enough."""
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
    """The cut at `site`; None if its tensor cannot be stored image by image (dimension 0 is not the batch)."""
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
    )


def _stub(call: Call, cut_leaf: int | None = None) -> Stub:
    assert call.output_spec is not None
    return Stub(
        module=call.module, index=call.index, leaves=tuple(call.outputs), spec=call.output_spec, cut_leaf=cut_leaf
    )
