"""Freezes what does not train, in weights and in mode: no gradient, eval mode, and an audit that nothing changed.

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
    """A frozen tensor changed: the run does not follow its plan, and cached activations are stale."""


def set_trainable(model: nn.Module, trainable: Collection[str]) -> None:
    """Makes exactly the named parameters require gradients, in place."""
    unknown = set(trainable) - {name for name, _ in model.named_parameters()}
    if unknown:
        raise ValueError(f"not parameters of this model: {', '.join(sorted(unknown)[:5])}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)


def set_modes(chain: Chain, cut: Cut | None, trainable: Collection[str], *, freeze_batchnorm: bool = False) -> None:
    """Puts the model in train mode and its frozen modules in eval mode, in place. Call it at the start of each epoch.

    Frozen are the modules before `cut`, and every BatchNorm (any module with running statistics) that has parameters but none
    that trains; with `freeze_batchnorm`, every BatchNorm.
    """
    chain.model.train()
    for module in _modules_before(chain.model, cut) | _frozen_norms(chain.model, trainable, freeze_batchnorm):
        module.training = False  # not eval(): timm's BatchNorm contains a dropout, which may stay in train mode


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether a module with running statistics is in train mode: its output then depends on the whole batch."""
    return any(m.training and isinstance(m._buffers.get("running_mean"), torch.Tensor) for m in model.modules())


class Audit:
    """Law 3 at run time: hashes of everything that must not change, taken at construction and compared by `check`.

    Audited are all parameters that do not train, all buffers before the cut (also non-persistent ones), and the running
    statistics after it that `set_modes` freezes.
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
        """Number of audited tensors."""
        return len(self._hashes)

    def check(self) -> None:
        """Raises FrozenChangedError, naming the tensors, if any has other bytes, shape or dtype, or is missing."""
        tensors = _tensors(self._model)
        changed = [n for n, kept in self._hashes.items() if n not in tensors or hash_tensors({n: tensors[n]}) != kept]
        if not changed:
            return
        more = ", ..." if len(changed) > NAMED_IN_ERROR else ""
        raise FrozenChangedError(
            f"{len(changed)} of {len(self)} frozen tensors changed: {', '.join(changed[:NAMED_IN_ERROR])}{more}. Frozen "
            "tensors must keep every bit: cached activations no longer belong to this network, and the run does not follow its "
            "plan. Running statistics change if a BatchNorm runs in train mode (see set_modes); weights, if something other "
            "than this phase's optimizer writes to them"
        )


def _tensors(model: nn.Module) -> Mapping[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _modules_before(model: nn.Module, cut: Cut | None) -> set[nn.Module]:
    """The modules that run only before `cut`: those of its stubs, with all their submodules."""
    if cut is None:
        return set()
    modules = dict(model.named_modules())
    # A module without state (a dropout) may be called on both sides of the cut. Its mode is then the suffix's, since the
    # prefix always runs in eval mode (Chain.run_prefix). A module with state would have made the cut illegal.
    stubs = {s.module for s in cut.stubs if s.module not in cut.repeated or _has_state(modules[s.module])}
    before = {inner for name in stubs for inner in modules[name].modules()}
    elsewhere = {
        module
        for name, module in model.named_modules(remove_duplicate=False)
        if not any(name == stub or name.startswith(stub + ".") for stub in stubs)
    }
    return {module for module in before if module not in elsewhere or _has_state(module)}


def _has_state(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _frozen_norms(model: nn.Module, trainable: Collection[str], freeze_batchnorm: bool) -> set[nn.Module]:
    """Modules with running statistics that have parameters but none that trains; or all with running statistics."""
    training = {id(parameter) for name, parameter in model.named_parameters() if name in trainable}
    frozen = set()
    for module in model.modules():
        if isinstance(module._buffers.get("running_mean"), torch.Tensor):
            own = {id(parameter) for parameter in module.parameters(recurse=False)}
            if freeze_batchnorm or (own and own.isdisjoint(training)):
                frozen.add(module)
    return frozen
