"""Draws what the page "How it works" explains: the graph in which cuts are found, and what each cut stores and saves."""

from collections.abc import Mapping

from svg import draw_box, draw_page, draw_path, draw_text  # scripts/svg.py

from hf_transfer.network.chain import Chain
from hf_transfer.network.describe import count_flops
from hf_transfer.network.trace import Trace, trace

NODE, STEP = 40, 44  # px: width of a node, and distance between nodes


def draw_graph(chain: Chain, first: str, last: str) -> str:
    """Returns the part of the autograd graph between the ends of the layers `first` and `last`, with its dominators filled."""
    recorded = trace(chain.model, chain.image_shape)
    names = _name_nodes(chain, recorded)
    ends = {layer.name: _find_end(recorded, layer.name, chain) for layer in chain.layers[:-1]}
    start, stop = recorded.spine.index(ends[first]), recorded.spine.index(ends[last])
    nodes = _order_nodes(recorded, recorded.spine[start], recorded.spine[stop])
    x = {node: 12 + STEP * i for i, node in enumerate(nodes)}
    parts = [draw_text(12, 20, f"From the end of {first} to the end of {last}: each line is a tensor", "bold")]
    y = 92
    for node in nodes:
        for used in recorded.graph.successors(node):
            if used not in x:
                continue
            left, right = x[used] + NODE, x[node]
            is_skip = right - left > STEP
            path = f"M{left - 6:.1f} {y}C{left + 20:.1f} 40 {right - 20:.1f} 40 {right + 6:.1f} {y}" if is_skip else ""
            parts.append(draw_path(path or f"M{left:.1f} {y + 13}H{right:.1f}", "line"))
    cuts = {node: name for name, node in ends.items() if node in x}
    for node in nodes:
        is_dominator = node in recorded.spine
        parts.append(draw_box(x[node], y, NODE, 26, "trained" if is_dominator else "run"))
        style = "tiny light" if is_dominator else "tiny"
        parts.append(draw_text(x[node] + NODE / 2, y + 17, names.get(node, "add"), style, "middle"))
        if node in cuts:
            middle = x[node] + NODE
            parts.append(draw_path(f"M{middle:.1f} {y - 8}V{y + 36}", "cut"))
            parts.append(draw_text(middle, y + 49, cuts[node], "small bold", "middle" if node != nodes[-1] else "end"))
    parts += [
        draw_box(12, 160, 12, 12, "trained"), draw_text(29, 170, "dominator: every path goes through it", "quiet small"),
        draw_box(240, 160, 12, 12, "run"), draw_text(257, 170, "a path leads around it", "quiet small"),
        draw_path("M400 158V174", "cut"), draw_text(408, 170, "verified cut: the output of a module", "quiet small"),
    ]  # fmt: skip
    return draw_page("Two residual blocks as a graph: only tensors that every path goes through are cuts", 184, parts)


def draw_costs(chain: Chain) -> str:
    """Returns two bars for each cut: what is stored for one image, and the share of the FLOPs that each step still runs."""
    total, before = count_flops(chain)
    pixels = int(chain.image_shape[0] * chain.image_shape[1] * chain.image_shape[2])
    cuts = [("pixels", pixels, 1.0)]
    cuts += [(cut.name, cut.bytes_per_image, 1 - before[cut.name] / total) for cut in chain.cuts]
    most = max(stored for _, stored, _ in cuts)
    parts = [
        draw_text(12, 20, "cut after", "bold"), draw_text(110, 20, "stored, bytes per image", "bold"),
        draw_text(420, 20, "FLOPs of the network after the cut", "bold"),
    ]  # fmt: skip
    for i, (name, stored, left) in enumerate(cuts):
        y = 32 + 22 * i
        parts += [
            draw_text(12, y + 12, name, "small"),
            draw_box(110, y, max(1.0, 210 * stored / most), 15, "stored"),
            draw_text(116 + 210 * stored / most, y + 12, f"{stored:,}", "small quiet"),
            draw_box(420, y, max(1.0, 210 * left), 15, "trained"),
            draw_text(426 + 210 * left, y + 12, f"{100 * left:.1f} %", "small quiet"),
        ]
    return draw_page(
        "What each cut of the embedded checkpoint stores, and what remains to run", 40 + 22 * len(cuts), parts
    )


def _find_end(recorded: Trace, layer: str, chain: Chain) -> int:
    """Returns the graph node of the tensor at the end of `layer`."""
    cut = chain.cut(layer)
    call = next(c for c in recorded.calls if (c.module, c.index) == (cut.site.module, cut.site.index))
    node = (call.outputs if cut.site.side == "after" else call.inputs)[cut.site.leaf].node
    assert node is not None
    return node


def _name_nodes(chain: Chain, recorded: Trace) -> Mapping[int, str]:
    """Returns the last part of the name of the first leaf module that computes each node."""
    modules = dict(chain.model.named_modules())
    names: dict[int, str] = {}
    for call in sorted(recorded.calls, key=lambda call: call.end):
        if any(modules[call.module].children()):
            continue
        for output in call.outputs:
            if output.node is not None:
                names.setdefault(output.node, call.module.rpartition(".")[2])
    return names


def _order_nodes(recorded: Trace, start: int, stop: int) -> list[int]:
    """Returns the nodes between two dominators that depend on the image, inputs first."""
    ordered: list[int] = []

    def visit(node: int) -> None:
        if node in ordered or node not in recorded.from_image:
            return
        if node != start:
            for used in recorded.graph.successors(node):
                visit(used)
        ordered.append(node)

    visit(stop)
    return ordered
