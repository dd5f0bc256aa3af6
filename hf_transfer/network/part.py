"""Runs a part of a network: the function between two cuts (tensors at which the network can be split).

A part that ends at a cut runs the network's forward until the tensor at that cut exists. A part that starts at a cut runs the
network's forward on a placeholder image: module calls before the cut return zero-stride placeholders of the recorded shapes,
and the given activation replaces the tensor at the cut. No module is moved or copied, so weights, names and hooks are shared.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from hf_transfer.network.cut import Cut, Stub
from hf_transfer.network.forward import compute_logits, eval_mode


class Part(nn.Module):
    """The part of a network from the cut `start` (None: from the image) to the cut in `ends` (empty: to the logits).

    With `heads` (one head for each cut in `ends`) the part returns the concatenated logits (B, len(ends) * K) of the heads.

    A part with a start must be used as a context manager. Inside the context, run nothing else on the network, since module
    calls before the start return placeholders. A part trains under torch.compile (one graph, no recompilation from batch to
    batch) and under DistributedDataParallel. It has all parameters of the network; freeze the parameters before the start.

        with chain.part(start=cut) as suffix:
            logits = suffix(activations)
    """

    ignored_attributes = frozenset({"start", "ends", "image_shape", "_activation", "_turns", "_patched", "_hook"})

    def __init__(
        self,
        network: nn.Module,
        image_shape: tuple[int, int, int],
        *,
        start: Cut | None = None,
        ends: Sequence[Cut] = (),
        heads: nn.ModuleDict | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.heads = heads
        self.start = start
        self.ends = tuple(ends)
        self.image_shape = image_shape
        self._activation: torch.Tensor | None = None
        # Calls are counted separately for placeholder outputs ("forward") and for replaced inputs ("before").
        repeated = start.repeated if start is not None else ()
        self._turns = {(side, module): 0 for module in repeated for side in ("forward", "before")}
        self._patched: list[tuple[nn.Module, Any]] = []
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input: an image (3, H, W), or the activation at the start."""
        return self.image_shape if self.start is None else self.start.shape

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns logits (B, K), or the activation (B, *shape) if the part ends at a cut, for `inputs` (B, *input_shape).

        Raises RuntimeError if the part starts at a cut and is called outside its `with` block.
        """
        if self.heads is not None:
            logits = [head(a) for head, a in zip(self.heads.values(), self.activations(inputs), strict=True)]
            return logits[0] if len(logits) == 1 else torch.cat(logits, 1)
        if self.ends:
            (activation,) = self.activations(inputs)
            return activation
        return self._run(inputs)

    def activations(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Returns the activations (B, *shape) at each cut in `ends`, from one forward that stops when all activations exist.

        This method changes neither gradient settings nor train and eval modes.
        """
        reached: dict[int, torch.Tensor] = {}
        stop = _EndReachedError()

        def keep(i: int, activation: torch.Tensor) -> None:
            reached[i] = activation
            # torch.export cannot trace a module that raises. It removes the layers after the ends, which nothing uses.
            if len(reached) == len(self.ends) and not torch.compiler.is_exporting():
                raise stop
            reached[i] = activation.clone()  # later modules may write into the activation (an in-place ReLU)

        if self.ends:
            try:
                with watch_cuts(self.network, self.ends, keep):
                    self._run(inputs)
            except _EndReachedError as error:
                if error is not stop:
                    raise  # this part runs inside another part, and the end of the other part is reached
        return [reached[i] for i in range(len(self.ends))]

    def count_flops(self) -> int:
        """Returns the FLOPs of one input's forward. Only matrix products and convolutions count."""
        with eval_mode(self), torch.no_grad(), FlopCounterMode(display=False) as counter:
            self(next(self.parameters()).new_zeros(1, *self.input_shape))
        return int(counter.get_total_flops())

    def _run(self, inputs: torch.Tensor) -> torch.Tensor:
        """Runs the network from the cut `start` on, and returns the logits."""
        if self.start is None:
            return compute_logits(self.network, inputs)
        if self.start.stubs and not self._patched and self._hook is None:
            raise RuntimeError(
                "this part starts at a cut, so call it inside `with part:`; outside, the network starts at the image"
            )
        placeholder = torch.zeros((), dtype=inputs.dtype, device=inputs.device)
        # The inputs are copied because the network may write into them (an in-place ReLU), and they may be a view of a cache.
        self._activation = inputs.clone()
        for key in self._turns:
            self._turns[key] = 0
        logits = compute_logits(self.network, placeholder.expand(inputs.shape[0], *self.image_shape))
        self._activation = None
        return logits

    def __enter__(self) -> Self:
        if self.start is None:
            return self
        device = next(self.network.parameters()).device
        tables: dict[str, dict[int, Stub]] = {}
        for stub in self.start.stubs:
            tables.setdefault(stub.module, {})[stub.index] = stub.on(device)
        for name, table in tables.items():
            module = self.network.get_submodule(name)
            self._patched.append((module, module.__dict__.get("forward")))
            module.forward = self._make_answer(name, module.forward, table)
        site = self.start.site
        if site.side == "before":
            module = self.network.get_submodule(site.module)
            self._hook = module.register_forward_pre_hook(self._swap_input, with_kwargs=True)
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
        """Returns how many calls of the module named `module` preceded the current call in this forward."""
        if (side, module) not in self._turns:
            return 0
        turn = self._turns[side, module]
        self._turns[side, module] = turn + 1
        return turn

    def _make_answer(self, name: str, forward: Any, table: dict[int, Stub]) -> Any:
        """Returns a replacement of `forward` that returns placeholders for the calls whose numbers are keys of `table`."""

        def answer(*args: Any, **kwargs: Any) -> Any:
            stub = table.get(self._turn("forward", name))
            if stub is None:
                return forward(*args, **kwargs)
            assert self._activation is not None
            assert self.start is not None
            return stub.answer(self._activation, dense=self.start.dense)

        return answer

    def _swap_input(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        assert self.start is not None
        site = self.start.site
        if self._turn("before", site.module) != site.index:
            return None
        leaves, spec = tree_flatten((args, kwargs))
        leaves[site.leaf] = self._activation
        return tree_unflatten(leaves, spec)


class _EndReachedError(Exception):
    """Stops a forward once all requested activations exist."""


@contextmanager
def watch_cuts(network: nn.Module, cuts: Sequence[Cut], visit: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Calls `visit(i, activation)` whenever a forward of `network` in the `with` block reaches the cut `cuts[i]`."""
    calls = [0] * len(cuts)

    def count(i: int, tree: Any) -> None:
        calls[i] += 1
        if calls[i] - 1 == cuts[i].site.index:
            visit(i, tree_flatten(tree)[0][cuts[i].site.leaf])

    handles = []
    for i, cut in enumerate(cuts):
        module = network.get_submodule(cut.site.module)
        if cut.site.side == "after":
            hook = module.register_forward_hook(lambda _, __, output, i=i: count(i, output))
        else:
            hook = module.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: count(i, (args, kwargs)), with_kwargs=True
            )
        handles.append(hook)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
