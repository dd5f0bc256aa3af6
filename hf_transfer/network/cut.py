"""A cut splits a network, unchanged, into the function before a tensor and the function after it.

    suffix(prefix(x)) == model(x)

The prefix is the model itself, run until the tensor exists. The suffix is the model itself, run on a placeholder image:
calls that would come before the cut return placeholders of the recorded shape (zero-stride, so they cost nothing), and
the tensor at the cut is replaced by the given one. No layer is moved or copied, so weights, names and hooks stay theirs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hf_transfer.network.forward import compute_logits
from hf_transfer.network.trace import Call, Leaf, Trace


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where the tensor of a cut is read and replaced: a leaf of one call's outputs ("after") or inputs ("before")."""

    side: Literal["after", "before"]
    module: str
    index: int
    leaf: int

    def __str__(self) -> str:
        return f"{self.side}:{self.module}"


@dataclass(frozen=True, kw_only=True)
class Stub:
    """A call that the suffix answers without running it. `leaves` are constants, or shapes to fill."""

    module: str
    index: int
    leaves: tuple[Leaf, ...]
    spec: TreeSpec
    cut_leaf: int | None = None  # the leaf that is the tensor at the cut itself

    def answer(self, activation: torch.Tensor, *, dense: bool) -> Any:
        """What the call returns in a suffix run on `activation` (B, *cut.shape); `dense`: writable placeholders."""
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
    dense: bool = False  # placeholders of full size, for a network that writes into what the prefix's calls return
    repeated: frozenset[str]  # those modules of the stubs and the site that one forward calls more than once

    def __deepcopy__(self, memo: Any) -> "Cut":
        return self  # nothing in it changes, and copies of modules that know it are made for each thread

    @property
    def bytes_per_image(self) -> int:
        """In the cache, at the activation's own dtype."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def possible_sites(trace: Trace, node: int, prefer: str | None = None) -> list[Site]:
    """Where the tensor made by `node` could be read and replaced, likeliest first. Each must still be verified.

    First a module's output (the module `prefer`, then the outermost), then the input of the first module that takes it
    (only where all uses of the tensor lie inside that module), last a module with several outputs.
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
    """Whether every use of the tensor made by `node` happens inside `call`; else swapping its input is not enough."""
    inside: set[int] = set()
    todo = [o.node for o in call.outputs if o.node is not None and o.node != node]
    while todo:
        at = todo.pop()
        if at in inside:
            continue
        inside.add(at)
        todo += [n for n in trace.graph.successors(at) if n != node]
    return all(user in inside for user in trace.graph.predecessors(node))


def make_cut(trace: Trace, name: str, site: Site) -> Cut | None:
    """The cut at `site`; None where its tensor cannot be stored image by image (dimension 0 is not the batch)."""
    target = next(c for c in trace.calls if (c.module, c.index) == (site.module, site.index))
    after = site.side == "after"
    leaf = (target.outputs if after else target.inputs)[site.leaf]
    if not leaf.per_image or leaf.per_image[0] != 1 or any(n is not None for n in leaf.per_image[1:]):
        return None
    assert leaf.dtype is not None
    at = target.end if after else target.start
    enclosing = set(target.ancestors())
    done = [
        c
        for c in trace.calls
        if c.module
        and c.end <= at
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


class _CutReachedError(Exception):
    """Ends the prefix's forward at the cut."""


def run_prefix(
    model: nn.Module, cuts: Sequence[Cut], inputs: torch.Tensor, *, forward: Callable[[torch.Tensor], Any] | None = None
) -> list[torch.Tensor]:
    """The activations (B, *cut.shape) at each of `cuts`, from one forward that ends when the last of them exists.

    `inputs`: pixels (B, 3, H, W), normalised; or what `forward` takes, which runs `model` otherwise (the suffix of an earlier
    cut, say). The caller decides about grad and mode.
    """
    if not cuts:
        return []
    modules = dict(model.named_modules())
    found: dict[int, torch.Tensor] = {}
    counts = [0] * len(cuts)
    reached = _CutReachedError()

    def visit(i: int, tree: Any) -> None:
        counts[i] += 1
        if counts[i] - 1 == cuts[i].site.index:
            found[i] = tree_flatten(tree)[0][cuts[i].site.leaf]
            if len(found) == len(cuts):
                raise reached
            found[i] = found[i].clone()  # what follows may write into it (an in-place activation)

    handles = []
    for i, cut in enumerate(cuts):
        module = modules[cut.site.module]
        if cut.site.side == "after":
            hook = module.register_forward_hook(lambda _, __, output, i=i: visit(i, output))
        else:
            hook = module.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: visit(i, (args, kwargs)), with_kwargs=True
            )
        handles.append(hook)
    try:
        if forward is None:
            compute_logits(model, inputs)
        else:
            forward(inputs)
    except _CutReachedError as error:
        if error is not reached:
            raise  # the model is itself run inside another one's prefix, which ends here
    finally:
        for handle in handles:
            handle.remove()
    return [found[i] for i in range(len(cuts))]


class Suffix(nn.Module):
    """What follows a cut, as a network: activations (B, *cut.shape) -> logits (B, K).

    Use it as a context manager; inside, `model` answers the calls before the cut with placeholders, so run nothing else
    on it. Trains under torch.compile (one graph, no recompilation from batch to batch) and DistributedDataParallel. Its
    parameters are the model's own; freeze those before the cut.
    """

    def __init__(self, model: nn.Module, cut: Cut, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.model = model
        self.cut = cut
        self.image_shape = image_shape
        self._activation: torch.Tensor | None = None
        # Two counters for a module that is answered at one call and read at another.
        self._turns = {(side, module): 0 for module in cut.repeated for side in ("forward", "before")}
        self._patched: list[tuple[nn.Module, Any]] = []
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """Logits (B, K) of activations (B, *cut.shape). Raises RuntimeError outside the context."""
        if self.cut.stubs and not self._patched and self._hook is None:
            raise RuntimeError("Suffix runs inside `with suffix:` only; outside, the model runs from the image")
        placeholder = torch.zeros((), dtype=activation.dtype, device=activation.device)
        # A copy: what follows may write into it (an in-place activation), and the caller's may be a view into a cache.
        self._activation = activation.clone()
        for key in self._turns:
            self._turns[key] = 0
        logits = compute_logits(self.model, placeholder.expand(activation.shape[0], *self.image_shape))
        self._activation = None
        return logits

    def __enter__(self) -> Self:
        modules = dict(self.model.named_modules())
        tables: dict[str, dict[int, Stub]] = {}
        for stub in self.cut.stubs:
            tables.setdefault(stub.module, {})[stub.index] = stub
        for name, table in tables.items():
            module = modules[name]
            self._patched.append((module, module.__dict__.get("forward")))
            module.forward = self._answering(name, module.forward, table)
        if self.cut.site.side == "before":
            self._hook = modules[self.cut.site.module].register_forward_pre_hook(self._swap_input, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for module, own_forward in self._patched:
            if own_forward is None:
                del module.forward
            else:
                module.forward = own_forward
        self._patched = []
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _turn(self, side: str, module: str) -> int:
        """The index of this call of `module` in this forward; modules called once are not counted."""
        if (side, module) not in self._turns:
            return 0
        turn = self._turns[side, module]
        self._turns[side, module] = turn + 1
        return turn

    def _answering(self, name: str, forward: Any, table: dict[int, Stub]) -> Any:
        def answer(*args: Any, **kwargs: Any) -> Any:
            stub = table.get(self._turn("forward", name))
            if stub is None:
                return forward(*args, **kwargs)
            assert self._activation is not None
            return stub.answer(self._activation, dense=self.cut.dense)

        return answer

    def _swap_input(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._turn("before", self.cut.site.module) != self.cut.site.index:
            return None
        leaves, spec = tree_flatten((args, kwargs))
        leaves[self.cut.site.leaf] = self._activation
        return tree_unflatten(leaves, spec)
