"""Finds the layers of a traced network: its smallest repeated blocks between two possible cuts.

A block is a module with at least two weights (kernels or matrices) whose input and output are tensors that every path from the
image to the logits goes through (`Trace.spine`). Residual blocks, transformer blocks and inverted residuals are blocks, and so
are the stages around them. The smaller blocks inside a block replace the block, unless another module of the same class
contains no block: an inverted residual without a skip connection has possible cuts inside, and is still one layer.
"""

from collections import Counter

from torch import nn

from hf_transfer.network.trace import Call, Trace

FEW_LAYERS = 3  # with fewer layers, modules with one weight also count as blocks: the convolutions of a VGG


def find_layers(model: nn.Module, trace: Trace, classifier: Call | None) -> list[tuple[Call, tuple[int, int]]]:
    """Returns the layers between stem and head with the positions of their inputs and outputs on the main path."""
    modules = dict(model.named_modules())
    declared = getattr(model, "layer_names", None)
    if declared is not None:  # a greedy network lists its layers itself
        return [(c, span) for c, span in _bounded_calls(modules, trace, min_weights=1) if c.module in declared]
    blocks = _find_blocks(modules, trace, min_weights=2)
    if len(blocks) < FEW_LAYERS:
        blocks = _find_blocks(modules, trace, min_weights=1) or blocks
    if not blocks:
        return []
    last_end = blocks[-1][0].end
    stop = classifier.start if classifier else last_end
    # A module with one weight between the last block and the classifier (MobileNet's conv_head) is one more layer, ...
    singles = [
        (call, span)
        for call, span in _bounded_calls(modules, trace, min_weights=1)
        if last_end < call.start < stop and not _is_wrapper(modules[call.module])
    ]
    outer = {call for call, _ in singles}
    norms = {
        start: end
        for call, (start, end) in _bounded_calls(modules, trace, min_weights=0)
        if call.start > last_end and _is_norm(modules[call.module]) and _keeps_grid(trace, start, end)
    }
    # ... together with the norm after it.
    blocks += [(c, (s, norms.get(e, e))) for c, (s, e) in singles if not any(a in outer for a in c.ancestors())]
    return blocks


def _bounded_calls(
    modules: dict[str, nn.Module], trace: Trace, *, min_weights: int
) -> list[tuple[Call, tuple[int, int]]]:
    """Returns the calls of modules with enough weights, with the positions of their inputs and outputs on the main path."""
    position = {node: i for i, node in enumerate(trace.spine)}
    # A call belongs to the head if no parameter comes after it.
    behind = (i for i in reversed(position.values()) if trace.parameters_between(trace.spine[i], 0))
    last = next(behind, 0)
    bounded = []
    for call in trace.calls:
        if not call.module:
            continue
        taken = {i.node for i in call.inputs if i.node is not None and trace.depends_on_image(i)}
        made = [position[o.node] for o in call.outputs if o.node in position]
        if len(taken) != 1 or not made or max(made) > last:
            continue
        start = position.get(taken.pop())
        if start is None or max(made) <= start or _num_weights(modules[call.module]) < min_weights:
            continue
        bounded.append((call, (start, max(made))))
    return bounded


def _find_blocks(
    modules: dict[str, nn.Module], trace: Trace, *, min_weights: int
) -> list[tuple[Call, tuple[int, int]]]:
    spans = dict(_bounded_calls(modules, trace, min_weights=min_weights))
    inner: dict[Call | None, list[Call]] = {}
    for call in spans:
        outer = next((a for a in call.ancestors() if a in spans), None)
        inner.setdefault(outer, []).append(call)

    def kind(call: Call) -> type[nn.Module] | None:
        module_type = type(modules[call.module])
        return None if module_type in (nn.Sequential, nn.ModuleList) else module_type  # containers have no kind

    smallest = {kind(c) for c in spans if c not in inner} - {None}

    def open_up(call: Call) -> list[Call]:
        parts = [] if kind(call) in smallest else inner.get(call, [])
        smaller = [block for part in parts for block in open_up(part)]
        if not smaller:
            return [call]
        whole, bounded = modules[call.module], [modules[c.module] for c in smaller]
        most = 2 * sum(map(_size, bounded)) >= _size(whole)
        if len(bounded) == 1 and not most:
            return [call]  # only a small part of the block lies between cuts, such as a squeeze-excite
        if kind(call) is None:
            return smaller
        if len(bounded) == 1 and (_num_weights(whole) == 1 or kind(smaller[0]) is None):
            return [call]  # the smaller block has the same weights, such as a convolution with a norm
        (start, end), first, last = spans[call], spans[smaller[0]][0], spans[smaller[-1]][1]
        same_grid = _keeps_grid(trace, start, first) and _keeps_grid(trace, last, end)
        has_more = sum(map(_num_weights, bounded)) < _num_weights(whole)
        if same_grid and has_more and (len(bounded) == 1 or not most):
            return [call]  # without downsampling, the rest belongs to the same block: attention, then a residual MLP
        return smaller

    leaves = [block for call in inner.get(None, []) for block in open_up(call)]
    kinds = Counter(kind(c) for c in leaves)
    repeated = [c for c in leaves if kind(c) is not None and kinds[kind(c)] > 1]
    if not repeated:
        return [(c, spans[c]) for c in leaves]
    home = _common_parent([c.module for c in repeated])
    first = min(c.start for c in repeated)
    # A block before the first repeated block is a layer only if both lie in the same module (EfficientNet's blocks.0.0).
    leaves = [c for c in leaves if c.start >= first or (home and c.module.startswith(home + "."))]
    keeping = {kind(c) for c in repeated if _keeps_grid(trace, *spans[c])}
    # If some repeated kinds keep the grid, a repeated kind that always changes the grid is a downsampling. A downsampling
    # belongs to the next block, so it is no layer of its own.
    blocks = [c for c in leaves if not keeping or kinds[kind(c)] == 1 or kind(c) is None or kind(c) in keeping]
    return [(c, spans[c]) for c in blocks]


def _keeps_grid(trace: Trace, start: int, end: int) -> bool:
    """Whether the tensors at positions `start` and `end` of the main path differ in shape only in the number of channels."""
    before, after = trace.shapes[trace.spine[start]], trace.shapes[trace.spine[end]]
    return len(before) == len(after) and sum(a != b for a, b in zip(before, after, strict=True)) <= 1


def _num_weights(module: nn.Module) -> int:
    """Returns the number of kernels and matrices in `module`. A scale of shape (1, 1, C) does not count."""
    return sum(p.ndim >= 4 or sum(size > 1 for size in p.shape) >= 2 for p in module.parameters())


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _is_norm(module: nn.Module) -> bool:
    return _size(module) > 0 and _num_weights(module) == 0


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) == 1


def _common_parent(names: list[str]) -> str:
    parents = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*parents, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
