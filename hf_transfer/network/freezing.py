"""Freezes parameters, puts frozen modules in eval mode, and checks that no frozen tensor changed.

`requires_grad=False` alone is not enough: a BatchNorm in train mode updates its running statistics at every forward.
"""

from collections.abc import Collection, Mapping

import torch
from torch import nn

from hf_transfer.network.chain import Chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.fingerprint import hash_tensors

NAMED_IN_ERROR = 5


class FrozenChangedError(RuntimeError):
    """A frozen tensor changed, so the activations in the cache no longer belong to the network."""


def set_trainable(model: nn.Module, trainable: Collection[str]) -> None:
    """Sets requires_grad, in place: True for the parameters named in `trainable`, False for all other parameters."""
    unknown = set(trainable) - {name for name, _ in model.named_parameters()}
    if unknown:
        raise ValueError(f"not parameters of this model: {', '.join(sorted(unknown)[:5])}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)


def set_modes(chain: Chain, cut: Cut | None, trainable: Collection[str], *, freeze_batchnorm: bool = False) -> None:
    """Puts the model in train mode and its frozen modules in eval mode, in place. Call it at the start of each epoch.

    Frozen are the modules before `cut`, modules without parameters that no call after `cut` reaches (position encodings, which
    may be random in train mode), and every BatchNorm whose parameters are all frozen. If `freeze_batchnorm` is true, every
    BatchNorm is frozen. Any module with running statistics counts as a BatchNorm.
    """
    chain.model.train()
    for module in _modules_before(chain.model, cut) | _frozen_norms(chain.model, trainable, freeze_batchnorm):
        module.training = False  # eval() would also switch submodules, such as the dropout in timm's BatchNorm


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a module of `model` has running statistics, in any mode."""
    return any(isinstance(m._buffers.get("running_mean"), torch.Tensor) for m in model.modules())


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether a BatchNorm of `model` is in train mode, so that an image's output depends on the other images of the batch."""
    return any(m.training and isinstance(m._buffers.get("running_mean"), torch.Tensor) for m in model.modules())


class Audit:
    """Detects changes of frozen tensors. The constructor hashes each frozen tensor, and `check` compares the hashes.

    The frozen tensors are all parameters that do not train, all buffers before the cut (also non-persistent buffers), and the
    running statistics after the cut that `set_modes` freezes.
    """

    def __init__(
        self, chain: Chain, cut: Cut | None, trainable: Collection[str], *, freeze_batchnorm: bool = False
    ) -> None:
        self._model = chain.model
        frozen_norms = _frozen_norms(chain.model, trainable, freeze_batchnorm)
        parameters = [name for name, _ in chain.model.named_parameters() if name not in trainable]
        statistics = [
            f"{prefix}.{name}" if prefix else name
            for prefix, module in chain.model.named_modules()
            if module in frozen_norms
            for name, _ in module.named_buffers(recurse=False)
        ]
        names = {*parameters, *chain.before(cut)[1], *statistics}
        tensors = _tensors(chain.model)
        self._hashes = {name: hash_tensors({name: tensors[name]}) for name in sorted(names)}

    def __len__(self) -> int:
        """Returns the number of frozen tensors that `check` compares."""
        return len(self._hashes)

    def check(self) -> None:
        """Raises FrozenChangedError, with names, if a frozen tensor is missing or has changed in value, shape or dtype."""
        tensors = _tensors(self._model)
        changed = [n for n, kept in self._hashes.items() if n not in tensors or hash_tensors({n: tensors[n]}) != kept]
        if not changed:
            return
        more = ", ..." if len(changed) > NAMED_IN_ERROR else ""
        raise FrozenChangedError(
            f"{len(changed)} of {len(self)} frozen tensors changed: {', '.join(changed[:NAMED_IN_ERROR])}{more}. The cached "
            "activations therefore no longer belong to this network. Running statistics change if a BatchNorm runs in train "
            "mode: call set_modes in each epoch. Frozen weights change only if code outside the optimizer writes to them"
        )


def _tensors(model: nn.Module) -> Mapping[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _modules_before(model: nn.Module, cut: Cut | None) -> set[nn.Module]:
    """Returns the modules that run only before `cut`, and the modules without parameters that do not run after it."""
    if cut is None:
        return set()
    modules = dict(model.named_modules())
    # A module without state (a dropout) may run on both sides of the cut. Its mode is then the mode of the suffix, since
    # the prefix always runs in eval mode (Chain.run_prefix). A module with state would have made the cut illegal.
    stubs = {s.module for s in cut.stubs if s.module not in cut.repeated or _has_state(modules[s.module])}
    before = {inner for name in stubs for inner in modules[name].modules()}
    elsewhere = {
        module
        for name, module in model.named_modules(remove_duplicate=False)
        if not any(name == stub or name.startswith(stub + ".") for stub in stubs)
    }
    # Position encodings serve both sides of the cut, and a forward may use a module without calling it (timm's DINOv3).
    later = {modules[name] for name in cut.later if name in modules}
    unreached = {m for m in modules.values() if m not in later and next(m.parameters(), None) is None}
    return {module for module in before if module not in elsewhere or _has_state(module)} | unreached


def _has_state(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _frozen_norms(model: nn.Module, trainable: Collection[str], freeze_batchnorm: bool) -> set[nn.Module]:
    """Returns the frozen BatchNorms: all if `freeze_batchnorm` is true, else each without a parameter in `trainable`."""
    training = {id(parameter) for name, parameter in model.named_parameters() if name in trainable}
    frozen = set()
    for module in model.modules():
        if isinstance(module._buffers.get("running_mean"), torch.Tensor):
            own = {id(parameter) for parameter in module.parameters(recurse=False)}
            if freeze_batchnorm or (own and own.isdisjoint(training)):
                frozen.add(module)
    return frozen
