"""Finds the head of a network: the linear maps whose weighted sum is the logits.

    logits = sum over the maps m and the positions i of  share[m, i] * (weight[m] @ input[m, i] + bias[m])

Most networks have one map, whose input is one vector per image. Distilled networks average two maps of two tokens, CrossViT
averages the maps of its branches, EfficientViM weighs the maps of its stages by a softmax, and CLIP's attention pooling maps
every position and keeps one. In all these networks, the logits are linear in the inputs of the maps, so one linear probe on
these inputs can be solved and written back into the maps. The shares are measured, so no table of architectures is needed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_transfer.network.cut import Cut
from hf_transfer.network.forward import eval_mode
from hf_transfer.network.part import Part
from hf_transfer.network.trace import Call, Trace

MEASURED_IMAGES = 2
LINEAR_RELATIVE = 1e-5  # largest allowed difference from a weighted sum in float32, relative to the largest logit


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """The linear maps whose weighted sum is the logits: each a Linear, or a Conv2d with one position per kernel."""

    modules: tuple[str, ...]
    is_direct: bool = True  # whether there is one map, whose input is the activation at the cut before the classifier

    def owns(self, name: str) -> bool:
        """Whether the parameter or buffer called `name` belongs to one of the maps."""
        return name.startswith(tuple(f"{module}." for module in self.modules))


@dataclass(frozen=True, kw_only=True)
class HeadInput:
    """An input of the head: the maps that take the input, and for each map the shares (P,) of its P positions in the logits.

    The features of the input are the sum of its positions, weighted by the sum of the shares.
    """

    modules: tuple[str, ...]
    shares: tuple[torch.Tensor, ...]

    @property
    def total(self) -> torch.Tensor:
        """The sum (P,) of the shares of all maps."""
        return torch.stack(self.shares).sum(0)


def find_classifier(model: nn.Module, trace: Trace) -> Call | None:
    """Returns the call of the linear map from one vector per image to the logits, or None if there is no such map."""
    modules = dict(model.named_modules())
    for call in reversed([c for c in trace.calls if _is_map(modules[c.module], trace.logits_shape[-1])]):
        (taken, *others), made = call.inputs, call.outputs[0].node
        if (
            not others
            and taken.node in trace.spine
            and made in trace.spine
            and modules[call.module].weight[0].numel() == math.prod(taken.shape[1:])
            and not trace.parameters_between(made, 0)
        ):
            return call
    return None


def find_maps(model: nn.Module, trace: Trace) -> tuple[str, ...]:
    """Returns the names, in call order, of the linear maps to K outputs between which and the logits there is no other.

    The logits may still depend on the maps in any way, which `measure_inputs` checks.
    """
    modules = dict(model.named_modules())
    maps = {c.outputs[0].node: c for c in trace.calls if _is_map(modules[c.module], trace.logits_shape[-1])}
    reached: set[int] = set()
    todo = [0]
    while todo:
        node = todo.pop()
        if node not in reached:
            reached.add(node)
            todo += [] if node in maps else trace.graph.successors(node)
    return tuple(dict.fromkeys(call.module for node, call in maps.items() if node in reached))


def measure_inputs(
    model: nn.Module, image_shape: tuple[int, int, int], head: LinearHead, cut: Cut
) -> tuple[HeadInput, ...]:
    """Returns the inputs of the head, after measuring the shares of its maps in the logits. `cut` lies before all maps.

    Maps of the same vector per image share one input. Raises ValueError if the logits are not a weighted sum of the maps'
    outputs, with the same shares for every image and class (an example is a maximum over positions).
    """
    if head.is_direct:
        return (HeadInput(modules=head.modules, shares=(torch.ones(1),)),)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():  # also where the caller has turned gradients off
        inputs, outputs, logits = _run_on_noise(model, image_shape, head, cut, generator)
        gradients = torch.autograd.grad(logits[:, 0].sum(), list(outputs.values()), materialize_grads=True)
    shares = {name: gradient[0, :, 0] for name, gradient in zip(outputs, gradients, strict=True)}
    _, outputs, logits = _run_on_noise(model, image_shape, head, cut, generator)
    if any(outputs[name].shape[1] != len(share) for name, share in shares.items()):
        raise ValueError(f"the number of positions of {', '.join(head.modules)} varies from image to image")
    expected = sum(torch.einsum("bpk,p->bk", outputs[name], share) for name, share in shares.items())
    if not (expected - logits).abs().max() <= LINEAR_RELATIVE * logits.abs().max():
        raise ValueError(f"the logits are not a weighted sum of the linear maps {', '.join(head.modules)}")
    groups: list[list[str]] = []
    for name, taken in inputs.items():
        same = (g for g in groups if taken.shape[1] == 1 and torch.equal(inputs[g[0]], taken))
        group = next(same, None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    measured = tuple(HeadInput(modules=tuple(g), shares=tuple(shares[n].cpu() for n in g)) for g in groups)
    if min(float(i.total.sum()) for i in measured) <= 0:
        raise ValueError(f"one of the linear maps {', '.join(head.modules)} has no positive share in the logits")
    return measured


def read_inputs(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    inputs: Sequence[HeadInput],
    cut: Cut,
    activation: torch.Tensor,
) -> torch.Tensor:
    """Returns the concatenated features (B, F) of the head's inputs, for the activation (B, *cut.shape) at the cut `cut`."""
    with eval_mode(model), torch.no_grad(), watch_features(model, inputs) as read:
        _run_from(model, image_shape, cut, activation)
    return read()


@contextmanager
def watch_features(model: nn.Module, inputs: Sequence[HeadInput]) -> Iterator[Callable[[], torch.Tensor]]:
    """Yields a function that returns the concatenated features (B, F) of the head's inputs in the model's last forward."""
    taken: dict[str, torch.Tensor] = {}

    def keep(name: str, module: nn.Module, given: torch.Tensor, _: torch.Tensor) -> None:
        taken[name] = _by_position(module, given)

    def read() -> torch.Tensor:
        features = [torch.einsum("bpf,p->bf", taken[i.modules[0]], i.total.to(taken[i.modules[0]])) for i in inputs]
        return torch.cat(features, 1)

    with _watch_maps(model, [i.modules[0] for i in inputs], keep):
        yield read


def count_features(model: nn.Module, inputs: Sequence[HeadInput]) -> int:
    """Returns the number of features of all inputs of the head together."""
    return sum(_get_map(model, i.modules[0]).weight[0].numel() for i in inputs)


def write_probe(model: nn.Module, inputs: Sequence[HeadInput], weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Writes a linear probe, `weight` (K, F) and `bias` (K,), into the head's maps, so that the logits are those of the probe.

    Maps of the same input get equal weights, and all maps get equal biases. Raises ValueError if no map has a bias.
    """
    share = _share_of_bias(model, inputs)
    start = 0
    with torch.no_grad():
        for i in inputs:
            for name in i.modules:
                linear = _get_map(model, name)
                size = linear.weight[0].numel()
                linear.weight.copy_(weight[:, start : start + size].reshape(linear.weight.shape))
                if linear.bias is not None:
                    linear.bias.copy_(bias / share)
            start += size


def scale_outputs(
    model: nn.Module, inputs: Sequence[HeadInput], factors: torch.Tensor, offsets: torch.Tensor | None = None
) -> None:
    """Changes the head so that each logit is its old value times its factor (K,), plus its offset (K,). In place.

    Raises ValueError if there are offsets and no map has a bias.
    """
    share = 1.0 if offsets is None else _share_of_bias(model, inputs)
    with torch.no_grad():
        for name in (name for i in inputs for name in i.modules):
            linear = _get_map(model, name)
            by_output = factors.to(linear.weight).view(-1, *[1] * (linear.weight.ndim - 1))
            linear.weight.mul_(by_output)
            if linear.bias is not None:
                linear.bias.mul_(factors.to(linear.bias))
                if offsets is not None:
                    linear.bias.add_(offsets.to(linear.bias) / share)


def read_probe(model: nn.Module, inputs: Sequence[HeadInput]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weight (K, F) and the bias (K,) of the head as one linear map of the features of all its inputs."""
    weights, biases = [], []
    for i in inputs:
        maps, totals = [_get_map(model, name) for name in i.modules], [float(share.sum()) for share in i.shares]
        weights.append(sum(t / sum(totals) * m.weight.detach().flatten(1) for t, m in zip(totals, maps, strict=True)))
        biases += [t * m.bias.detach() for t, m in zip(totals, maps, strict=True) if m.bias is not None]
    weight = torch.cat([torch.as_tensor(w) for w in weights], 1)
    return weight, torch.stack(biases).sum(0) if biases else weight.new_zeros(len(weight))


def has_bias(model: nn.Module, head: LinearHead) -> bool:
    """Whether a map of the head has a bias."""
    return any(_get_map(model, name).bias is not None for name in head.modules)


def check_bias(model: nn.Module, inputs: Sequence[HeadInput]) -> None:
    """Raises ValueError if no map of the head has a bias, into which the bias of a probe could be written."""
    _share_of_bias(model, inputs)


def _share_of_bias(model: nn.Module, inputs: Sequence[HeadInput]) -> float:
    """Returns the sum of the shares of all maps that have a bias."""
    shares = [
        float(share.sum())
        for i in inputs
        for name, share in zip(i.modules, i.shares, strict=True)
        if _get_map(model, name).bias is not None
    ]
    if not shares:
        names = ", ".join(name for i in inputs for name in i.modules)
        raise ValueError(f"the classifier {names} has no bias for the probe: choose the strategy full")
    return sum(shares)


def _run_on_noise(
    model: nn.Module, image_shape: tuple[int, int, int], head: LinearHead, cut: Cut, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """Runs the part after `cut` on random activations, with random numbers in place of the outputs of the head's maps.

    Returns the inputs (B, P, F) and the random outputs (B, P, K) of the maps by name, and the logits (B, K). Random outputs
    show how the logits depend on the maps even if the maps' weights are zero. Raises ValueError if a map does not run.
    """
    device = next(model.parameters()).device
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def replace(name: str, module: nn.Module, given: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        inputs[name] = _by_position(module, given)
        output = outputs[name] = noise(*_by_position(module, made).shape).requires_grad_()
        # * 1.0 keeps in-place operations away from the leaf tensor.
        return (output.transpose(1, 2) if isinstance(module, nn.Conv2d) else output).reshape(made.shape) * 1.0

    with eval_mode(model), torch.enable_grad(), _watch_maps(model, head.modules, replace):
        logits = _run_from(model, image_shape, cut, noise(MEASURED_IMAGES, *cut.shape))
    if set(outputs) != set(head.modules) or not logits.requires_grad:
        raise ValueError(f"not every linear map of {', '.join(head.modules)} runs after the cut {cut.name}")
    return inputs, outputs, logits


def _run_from(model: nn.Module, image_shape: tuple[int, int, int], cut: Cut, activation: torch.Tensor) -> torch.Tensor:
    with Part(model, image_shape, start=cut) as tail:
        logits: torch.Tensor = tail(activation)
    return logits


@contextmanager
def _watch_maps(
    model: nn.Module, names: Iterable[str], visit: Callable[[str, nn.Module, torch.Tensor, torch.Tensor], Any]
) -> Iterator[None]:
    """Calls `visit(name, module, input, output)` after every call of a module in `names`. A result replaces the output."""
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: visit(name, module, args[0], output)
        )
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_position(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """Returns an input or output of a linear map as (B, P, C), where P is the number of positions."""
    if not isinstance(module, nn.Conv2d):
        return tensor.reshape(len(tensor), -1, tensor.shape[-1])
    if module.kernel_size != (1, 1) or module.stride != (1, 1) or module.groups != 1:
        raise ValueError("a convolution of the head reads several positions at once, or some of the channels")
    return tensor.flatten(2).transpose(1, 2)


def _get_map(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear | nn.Conv2d)
    return linear


def _is_map(module: nn.Module, num_classes: int) -> bool:
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return False
    return module.weight.shape[0] == num_classes
