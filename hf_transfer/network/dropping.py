"""Stochastic depth (arXiv 1603.09382) and dropout before the classifier, at rates other than the checkpoint's own.

    with stochastic_depth(chain, 0.1), head_dropout(chain, 0.2):
        ...                                               # training steps; in eval mode nothing is dropped

The rates apply inside the context only. Afterwards the network has its own modules and rates again, so what is saved is as
published. In stochastic depth, a residual branch of an image is left out, in train mode, with a probability that grows
linearly from 0 in the first residual block to the rate in the last one. In timm and transformers, a module (or None) called
`drop_path`, `drop_path1`, ... marks such a branch.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers.drop import drop_path
from torch import nn
from torch.nn import functional

from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.forward import compute_logits, eval_mode

_DROP_PATH = re.compile(r"drop_path\d*")


class _StochasticDepth(nn.Module):
    """Drops the branch of random images. It has the mode of its block, which `set_modes` puts in eval mode if it is frozen."""

    def __init__(self, block: nn.Module, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self._block = (block,)  # in a tuple, because a block cannot be a submodule of its own submodule

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """Returns the branch (B, ...), 0 for dropped images and scaled up for all others."""
        kept: torch.Tensor = drop_path(branch, self.rate, self._block[0].training)
        return kept


def check_stochastic_depth(chain: Chain, rate: float | None, cuts: Collection[Cut | None]) -> None:
    """Raises ValueError if the rate is above 0, but no block after one of `cuts` (None: the image) has a branch to drop."""
    if not rate:
        return
    name, blocks = type(chain.model).__name__, _find_blocks(chain.model)
    if not blocks:
        raise ValueError(f"drop_path={rate:g}: {name} has no blocks with stochastic depth; omit --drop_path")
    trained = {n for cut in cuts for n, _ in chain.model.named_parameters() if n not in chain.before(cut)[0]}
    if not any(n.startswith(f"{block}.") for block in blocks for n in trained):
        raise ValueError(
            f"drop_path={rate:g}: no block with stochastic depth trains; train more layers, or omit --drop_path"
        )


def check_head_dropout(chain: Chain, rate: float | None) -> None:
    """Raises ValueError if the rate is above 0, but the network has no linear classifier before which to drop."""
    if rate and chain.head is None:
        raise ValueError(
            f"dropout={rate:g}: {type(chain.model).__name__} has no linear classifier before which to drop; omit --dropout"
        )


@contextmanager
def stochastic_depth(chain: Chain, rate: float | None) -> Iterator[None]:
    """Inside the context, the blocks of the chain's model have stochastic depth up to `rate`. None: their own rates.

    Enter the context before a part of the network (`Chain.part`), which changes modules too.
    """
    blocks = {} if rate is None else _find_blocks(chain.model)
    undo: list[Callable[[], None]] = []
    try:
        for number, (name, attributes) in enumerate(blocks.items()):
            block = chain.model.get_submodule(name)
            share = number / (len(blocks) - 1) if len(blocks) > 1 else 1.0
            own_rate = (rate or 0.0) * share
            undo += [_replace(block, attribute, _StochasticDepth(block, own_rate)) for attribute in attributes]
        yield
    finally:
        for each in reversed(undo):
            each()


@contextmanager
def head_dropout(chain: Chain, rate: float | None, own: Collection[str] = ()) -> Iterator[None]:
    """Inside the context, the inputs of the classifier are dropped at `rate` in train mode. None: the network's own dropout.

    `own`: the network's own dropouts there (`find_head_dropouts`), which are off meanwhile. Enter the context after a part of
    the network, whose hooks replace the inputs of modules.
    """
    if rate is None or chain.head is None:
        yield
        return

    def drop(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (functional.dropout(inputs[0], rate, module.training), *inputs[1:])

    # timm's classifiers without a dropout module drop features at the rate `drop_rate`.
    functional_rates = [(m, "drop_rate") for m in chain.model.modules() if hasattr(m, "forward_head")]
    rates = [*functional_rates, *((chain.model.get_submodule(name), "p") for name in own)]
    former = [(module, name, getattr(module, name)) for module, name in rates if hasattr(module, name)]
    hooks = [chain.model.get_submodule(name).register_forward_pre_hook(drop) for name in chain.head.modules]
    try:
        for module, name, _ in former:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in former:
            setattr(module, name, value)
        for hook in hooks:
            hook.remove()


def find_head_dropouts(chain: Chain) -> list[str]:
    """Returns the names of the dropouts whose output, in eval mode, is the input of the classifier. Runs the network once."""
    if chain.head is None:
        return []
    taken: list[torch.Tensor] = []
    made: list[tuple[str, torch.Tensor]] = []  # all outputs stay in memory, so that no two have the same address
    modules = dict(chain.model.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
        for name in chain.head.modules
    ]
    for name, module in modules.items():
        if isinstance(module, nn.Dropout):
            hooks.append(module.register_forward_hook(lambda _, __, output, name=name: made.append((name, output))))
    try:
        like = next(chain.model.parameters())
        with eval_mode(chain.model), torch.no_grad():
            compute_logits(chain.model, like.new_zeros(1, *chain.image_shape))
    finally:
        for hook in hooks:
            hook.remove()
    addresses = {tensor.data_ptr() for tensor in taken}
    return sorted({name for name, output in made if output.data_ptr() in addresses})


def _find_blocks(model: nn.Module) -> dict[str, list[str]]:
    """Returns the attributes for stochastic depth of each block, by the block's name, from the first block to the last."""

    def find(module: nn.Module) -> list[str]:
        if not getattr(module, "has_skip", True):  # timm's inverted residuals without a skip connection
            return []
        names = [name for name in (*module._modules, *vars(module)) if _DROP_PATH.fullmatch(name)]
        return [name for name in names if _is_site(getattr(module, name))]

    found = {name: find(module) for name, module in model.named_modules()}
    return {name: attributes for name, attributes in found.items() if attributes}


def _is_site(value: Any) -> bool:
    return value is None or isinstance(value, nn.Identity) or "DropPath" in type(value).__name__


def _replace(block: nn.Module, attribute: str, module: nn.Module) -> Callable[[], None]:
    """Sets an attribute of the block to `module`. Returns the function that undoes this."""
    former, was_module = getattr(block, attribute), attribute in block._modules

    def undo() -> None:
        if not was_module:
            delattr(block, attribute)  # a plain attribute again, not a missing module
        setattr(block, attribute, former)

    setattr(block, attribute, module)
    return undo
