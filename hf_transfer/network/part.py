"""A part of a network: the function between two cuts, run by the network itself.

Up to its end the model runs as it is, until the tensor exists. From its start it runs on a placeholder image: calls that would
come before the start return placeholders of the recorded shape (zero-stride, so they cost nothing), and the tensor at the start
is replaced by the given one. No layer is moved or copied, so weights, names and hooks stay the model's.
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
    """The network between two cuts: activations at `start` (None: normalized images) -> activations at its end (none: logits).

    With `heads`, one for each of `ends`, it returns their logits instead, concatenated: (B, len(ends) * K).

    Use it as a context manager; inside, a network with a start answers the calls before it with placeholders, so run nothing
    else on that network. A part without a start is always ready. Trains under torch.compile (one graph, no recompilation from
    batch to batch) and DistributedDataParallel. Its parameters are the network's own; freeze those before the start.

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
        # A module whose call is answered and whose input is read counts both on their own.
        repeated = start.repeated if start is not None else ()
        self._turns = {(side, module): 0 for module in repeated for side in ("forward", "before")}
        self._patched: list[tuple[nn.Module, Any]] = []
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: an image (3, H, W), or an activation at the start."""
        return self.image_shape if self.start is None else self.start.shape

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits (B, K), or the activation (B, *shape) at the part's one end, of `inputs` (B, *input_shape).

        Raises RuntimeError outside the context if the part has a start.
        """
        if self.heads is not None:
            logits = [head(a) for head, a in zip(self.heads.values(), self.activations(inputs), strict=True)]
            return logits[0] if len(logits) == 1 else torch.cat(logits, 1)
        if self.ends:
            (activation,) = self.activations(inputs)
            return activation
        return self._run(inputs)

    def activations(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Activations (B, *shape) at each of `ends`, from one forward that stops when the last of them exists.

        The caller decides about gradients and modes.
        """
        reached: dict[int, torch.Tensor] = {}
        stop = _EndReachedError()

        def keep(i: int, activation: torch.Tensor) -> None:
            reached[i] = activation
            if len(reached) == len(self.ends):
                raise stop
            reached[i] = activation.clone()  # later calls may write into it (an in-place activation function)

        if self.ends:
            try:
                with watch_cuts(self.network, self.ends, keep):
                    self._run(inputs)
            except _EndReachedError as error:
                if error is not stop:
                    raise  # this network is itself run inside another part, whose end is reached
        return [reached[i] for i in range(len(self.ends))]

    def count_flops(self) -> int:
        """FLOPs of one input's forward. Matrix products and convolutions only."""
        with eval_mode(self), torch.no_grad(), FlopCounterMode(display=False) as counter:
            self(next(self.parameters()).new_zeros(1, *self.input_shape))
        return int(counter.get_total_flops())

    def _run(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits of the network, from the start on."""
        if self.start is None:
            return compute_logits(self.network, inputs)
        if self.start.stubs and not self._patched and self._hook is None:
            raise RuntimeError(
                "a part with a start runs inside `with part:` only; outside, the network starts at the image"
            )
        placeholder = torch.zeros((), dtype=inputs.dtype, device=inputs.device)
        # A copy: the network may write into it (an in-place activation function), and the caller's may be a view into a cache.
        self._activation = inputs.clone()
        for key in self._turns:
            self._turns[key] = 0
        logits = compute_logits(self.network, placeholder.expand(inputs.shape[0], *self.image_shape))
        self._activation = None
        return logits

    def __enter__(self) -> Self:
        if self.start is None:
            return self
        modules = dict(self.network.named_modules())
        tables: dict[str, dict[int, Stub]] = {}
        for stub in self.start.stubs:
            tables.setdefault(stub.module, {})[stub.index] = stub
        for name, table in tables.items():
            module = modules[name]
            self._patched.append((module, module.__dict__.get("forward")))
            module.forward = self._make_answer(name, module.forward, table)
        site = self.start.site
        if site.side == "before":
            self._hook = modules[site.module].register_forward_pre_hook(self._swap_input, with_kwargs=True)
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
        """Zero-based index of this call of `module` in this forward; modules that are called once are not counted."""
        if (side, module) not in self._turns:
            return 0
        turn = self._turns[side, module]
        self._turns[side, module] = turn + 1
        return turn

    def _make_answer(self, name: str, forward: Any, table: dict[int, Stub]) -> Any:
        """A forward that returns placeholders at the calls in `table`."""

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
    """Ends a forward once the last activation exists."""


@contextmanager
def watch_cuts(network: nn.Module, cuts: Sequence[Cut], visit: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Inside, `visit(i, activation)` is called when a forward of `network` reaches `cuts[i]`."""
    modules = dict(network.named_modules())
    calls = [0] * len(cuts)

    def count(i: int, tree: Any) -> None:
        calls[i] += 1
        if calls[i] - 1 == cuts[i].site.index:
            visit(i, tree_flatten(tree)[0][cuts[i].site.leaf])

    handles = []
    for i, cut in enumerate(cuts):
        module = modules[cut.site.module]
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
