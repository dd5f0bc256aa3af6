"""Records one forward of a network: its module calls, and the tensors that every path from image to logits goes through.

A network can be split at the dominators of its autograd graph: the nodes that every path from the logits back to the image goes
through (Lengauer and Tarjan, 1979, as implemented in networkx). So no table of architectures is needed. A second forward with
another batch size shows which dimension of each tensor is the batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten

from hf_transfer.network.forward import compute_logits, eval_mode

TRACE_BATCHES = (2, 3)


@dataclass(kw_only=True, slots=True)
class Leaf:
    """One of the flattened inputs or outputs of a module call: the description of a tensor, or a value of another type."""

    value: Any = None
    is_tensor: bool = False
    shape: tuple[int, ...] = ()
    per_image: tuple[int | None, ...] = ()  # size per image of dimensions that grow with the batch; None for others
    dtype: torch.dtype | None = None
    node: int | None = None  # the autograd node that computed the tensor
    constant: torch.Tensor | None = field(default=None, compare=False, repr=False)  # value, if equal for all images


@dataclass(kw_only=True, slots=True, eq=False)
class Call:
    """One call of a module. `start` and `end` are event numbers, between which the events of all calls inside this call lie."""

    module: str
    index: int  # zero-based call index of this module in the forward
    parent: "Call | None"
    start: int
    end: int = 0
    inputs: list[Leaf] = field(default_factory=list)  # flattened (args, kwargs)
    outputs: list[Leaf] = field(default_factory=list)
    output_spec: TreeSpec | None = None

    def ancestors(self) -> Iterator["Call"]:
        """Yields the calls that contain this call, innermost first."""
        call = self.parent
        while call is not None:
            yield call
            call = call.parent


@dataclass(kw_only=True)
class Trace:
    """The record of one forward without its activations. Each node of the autograd graph is represented by a number."""

    calls: list[Call]
    graph: "nx.DiGraph[int]"  # edges lead from a node to the nodes whose results it uses
    spine: list[int]  # the main path: dominators in order, from the image to the node that computes the logits
    from_image: frozenset[int]  # nodes whose result depends on the image
    parameters: dict[int, str]  # leaf node -> parameter name
    logits_shape: tuple[int, ...]

    @cached_property
    def shapes(self) -> dict[int, tuple[int, ...]]:
        """The shape of each node's tensor, for nodes whose tensor is an input or output of a module."""
        leaves = (leaf for call in self.calls for leaf in (*call.inputs, *call.outputs))
        return {leaf.node: leaf.shape for leaf in leaves if leaf.node is not None}

    def depends_on_image(self, leaf: Leaf) -> bool:
        """Whether `leaf` is a tensor whose values depend on the image."""
        return leaf.node is not None and leaf.node in self.from_image

    def parameters_between(self, start: int | None, end: int) -> set[str]:
        """Returns the names of the parameters used after the node `start` (None: after the image) and up to the node `end`."""
        reached: set[int] = set()
        todo = [end]
        while todo:
            node = todo.pop()
            if node in reached or node == start:
                continue
            reached.add(node)
            todo += self.graph.successors(node)
        return {self.parameters[n] for n in reached if n in self.parameters}


def trace(model: nn.Module, image_shape: tuple[int, int, int]) -> Trace:
    """Records a forward of `model` on random images (B, *image_shape), in eval mode.

    Leaves the model's weights, buffers, modes and requires_grad flags unchanged. Raises ValueError if the module calls depend
    on the batch size, or if no gradient reaches the image.
    """
    first, graph = _record(model, image_shape, TRACE_BATCHES[0])
    second, _ = _record(model, image_shape, TRACE_BATCHES[1])
    if [(c.module, c.index) for c in first] != [(c.module, c.index) for c in second]:
        raise ValueError(f"{type(model).__name__} calls other modules at another batch size, and cannot be traced")
    for a, b in zip(first, second, strict=True):
        for leaf, other in zip(a.outputs + a.inputs, b.outputs + b.inputs, strict=True):
            leaf.per_image = _sizes_per_image(leaf.shape, other.shape)
            leaf.constant = _constant_rows(leaf.constant, other.constant)
    return Trace(calls=first, **graph)


def _sizes_per_image(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int | None, ...]:
    return tuple(a // TRACE_BATCHES[0] if a != b else None for a, b in zip(first, second, strict=True))


def _constant_rows(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """Returns a tensor's value in both forwards if all images have the same value (position encodings), and else None."""
    if first is None or second is None:
        return None
    if first.shape == second.shape:
        return first if torch.equal(first, second) else None
    row = first[:1].clone()
    same = first.shape[1:] == second.shape[1:] and all(bool((t == row).all()) for t in (first, second))
    return row if same else None


def _record(model: nn.Module, image_shape: tuple[int, int, int], batch: int) -> tuple[list[Call], dict[str, Any]]:
    """Runs the model once on `batch` images, and returns the module calls and a dict of the other fields of `Trace`."""
    reference = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, *image_shape, generator=generator).to(reference.device, reference.dtype)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    # Some networks (timm's LeViT, EfficientFormer) cache derived attention biases in eval mode, and train() clears that cache.
    # It is cleared before the forward so that the graph reaches the parameters, and after it so that no cache keeps the graph.
    model.train()
    recorder = _Recorder(model)
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        with eval_mode(model), torch.enable_grad(), recorder:
            leaf = image.requires_grad_(True)
            # * 1.0 gives the image a graph node, and keeps in-place operations away from the leaf tensor.
            logits = compute_logits(model, leaf * 1.0)
        graph = _read_graph(model, logits, leaf)
        ids: dict[Any, int] = graph.pop("ids")
        for call in recorder.calls:
            for item in call.inputs + call.outputs:
                item.node = ids.get(recorder.nodes[id(item)]) if id(item) in recorder.nodes else None
    finally:
        model.train()
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return recorder.calls, graph


class _Recorder:
    """Records, through forward hooks, every module call that happens in the `with` block."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Call] = []
        self.nodes: dict[int, Any] = {}  # id(leaf) -> autograd node; while a node is referenced, its id stays unique
        self._model = model
        self._stack: list[Call] = []
        self._clock = 0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "_Recorder":
        for name, module in self._model.named_modules():
            counter = iter(range(1 << 30))
            self._handles += [
                module.register_forward_pre_hook(self._before(name, counter), with_kwargs=True),
                # always_call: a network may stop another one in the middle of its forward (`modeling_greedy.Body`).
                module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _before(self, name: str, counter: Iterator[int]) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            parent = self._stack[-1] if self._stack else None
            call = Call(module=name, index=next(counter), parent=parent, start=self._tick())
            call.inputs = [self._describe(leaf) for leaf in tree_flatten((args, kwargs))[0]]
            self.calls.append(call)
            self._stack.append(call)

        return hook

    def _after(self, _: nn.Module, __: Any, ___: Any, output: Any) -> None:
        call = self._stack.pop()
        call.end = self._tick()
        leaves, call.output_spec = tree_flatten(output)
        call.outputs = [self._describe(leaf) for leaf in leaves]
        for described, leaf in zip(call.outputs, leaves, strict=True):
            if described.is_tensor and not leaf.requires_grad:
                described.constant = leaf.clone()

    def _describe(self, value: Any) -> Leaf:
        if not isinstance(value, torch.Tensor):
            return Leaf(value=value)
        leaf = Leaf(is_tensor=True, shape=tuple(value.shape), dtype=value.dtype)
        if value.grad_fn is not None:
            self.nodes[id(leaf)] = value.grad_fn
        return leaf


def _read_graph(model: nn.Module, logits: torch.Tensor, image: torch.Tensor) -> dict[str, Any]:
    """Returns the fields of `Trace` that describe the autograd graph of `logits`, and as "ids" the number of each node."""
    if logits.grad_fn is None:
        raise ValueError(f"{type(model).__name__}: no gradient reaches the logits, so the network cannot be traced")
    names = {id(p): n for n, p in model.named_parameters()}  # a tied parameter appears only under its first name
    ids: dict[Any, int] = {logits.grad_fn: 0}
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_node(0)
    parameters: dict[int, str] = {}
    source: int | None = None
    todo = [logits.grad_fn]
    while todo:
        node = todo.pop()
        leaf = getattr(node, "variable", None)
        if leaf is image:
            source = ids[node]
        elif leaf is not None and id(leaf) in names:
            parameters[ids[node]] = names[id(leaf)]
        for used, _ in node.next_functions:
            if used is None:
                continue
            if used not in ids:
                ids[used] = len(ids)
                todo.append(used)
            graph.add_edge(ids[node], ids[used])
    if source is None:
        raise ValueError(f"{type(model).__name__}: no gradient reaches the image, so the network cannot be traced")
    dominator_of = nx.immediate_dominators(graph, 0)
    spine: list[int] = []
    node_id = source
    while node_id != 0:
        node_id = dominator_of[node_id]
        spine.append(node_id)
    return {
        "ids": ids,
        "graph": graph,
        "spine": spine,
        "from_image": frozenset(nx.ancestors(graph, source) | {source}),
        "parameters": parameters,
        "logits_shape": tuple(logits.shape),
    }
