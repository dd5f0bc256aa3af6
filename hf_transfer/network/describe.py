"""What `inspect` prints: the chain as a table, and what each strategy would train and store."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_transfer.network.adapters import add_adapters
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain, Layer
from hf_transfer.network.cut import Cut
from hf_transfer.network.forward import compute_logits, eval_mode
from hf_transfer.network.methods import Adapter
from hf_transfer.network.part import watch_cuts
from hf_transfer.network.policies import Policy, biases, full, head, last, norms
from hf_transfer.network.targets import find_targets, shorten

BYTES_OF_A_PIXEL = 1  # uint8: what a cut at the pixels stores


@dataclass(frozen=True, kw_only=True)
class StrategyCost:
    """What a policy would train, where its cut would be, and what the cache would hold."""

    policy: str
    trainable: int
    share: float  # of all parameters
    cut: str
    bytes_per_image: int
    flops_share: float  # of one forward: what remains to be computed each time


def count_flops(chain: Chain) -> tuple[int, dict[str, int]]:
    """(FLOPs of one image's forward, FLOPs before each cut by name). Matrix products and convolutions only."""
    cuts, before, counter = chain.cuts, dict[str, int](), FlopCounterMode(display=False)

    def note(i: int, _: torch.Tensor) -> None:
        before.setdefault(cuts[i].name, counter.get_total_flops())

    with counter, eval_mode(chain.model), torch.no_grad(), watch_cuts(chain.model, cuts, note):
        compute_logits(chain.model, next(chain.model.parameters()).new_zeros(1, *chain.image_shape))
    return counter.get_total_flops(), before


def price_strategies(chain: Chain, policies: list[Policy] | None = None) -> list[StrategyCost]:
    """What each policy would cost; by default the ones that every chain has."""
    if policies is None:
        policies = [head(), *(last(k) for k in (1, 2, 4) if k < len(chain)), norms(), biases(), full()]
    total_flops, before = count_flops(chain)
    sizes = {name: p.numel() for name, p in chain.model.named_parameters()}
    found = []
    for policy in policies:
        names = policy.select(chain)
        cut = chain.lowest_cut(names)
        trainable = sum(sizes[n] for n in names)
        found.append(
            StrategyCost(
                policy=policy.name,
                trainable=trainable,
                share=trainable / max(1, sum(sizes.values())),
                cut=f"after {cut.name}" if cut is not None and cut != chain.features else _place(cut),
                bytes_per_image=cut.bytes_per_image if cut is not None else _pixel_bytes(chain),
                flops_share=1 - (before[cut.name] / total_flops if cut is not None and total_flops else 0.0),
            )
        )
    return found


def _place(cut: Cut | None) -> str:
    return "at the pixels" if cut is None else "before the classifier"


def _pixel_bytes(chain: Chain) -> int:
    return int(torch.Size(chain.image_shape).numel()) * BYTES_OF_A_PIXEL


def format_chain(chain: Chain) -> str:
    """The table of layers, then the table of strategies, as text for a terminal."""
    total, before = count_flops(chain)
    sizes = {name: p.numel() for name, p in chain.model.named_parameters()}
    rows: list[tuple[str, ...]] = [("", "layer", "parameters", "activation", "bytes/image", "FLOPs", "aliases")]
    reached = 0
    for i, layer in enumerate(chain.layers):
        until = before.get(layer.cut.name, total) if layer.cut is not None else (total if i else 0)
        share = (until - reached) / total if total else 0.0
        reached = until
        rows.append(_row(i, layer, sum(sizes[n] for n in layer.parameters), share))
    strategies: list[tuple[str, ...]] = [("strategy", "trains", "share", "cut", "cache, bytes/image", "FLOPs left")]
    strategies += [
        (s.policy, f"{s.trainable:,}", f"{100 * s.share:.2f} %", s.cut, f"{s.bytes_per_image:,}",
         f"{100 * s.flops_share:.1f} %")
        for s in price_strategies(chain)
    ]  # fmt: skip
    lines = [*_align(rows), "", *_align(strategies)]
    if chain.orphans:
        lines += ["", f"orphans (never reach the logits; frozen): {', '.join(chain.orphans)}"]
    lines += ["", *chain.notes] if chain.notes else []
    return "\n".join(lines)


def format_adapters(backbone: Backbone, chain: Chain, how: Adapter) -> str:
    """What `how` adapts and what it would train, kind of target by kind, as text; leaves the model with adapters in it."""
    targets = find_targets(chain, how)
    adapted, follows = add_adapters(backbone, chain, how)
    sizes = {name: p.numel() for name, p in adapted.model.named_parameters()}
    rows: list[tuple[str, ...]] = [("target", "maps", "trains", "share")]
    for kind in shorten(targets.modules):
        names = [name for name in targets.modules if shorten([name]) == [kind]]
        trained = sum(sizes[n] for n in adapted.trained if n.startswith(tuple(f"{name}." for name in names)))
        rows.append((kind, str(len(names)), f"{trained:,}", f"{100 * trained / adapted.num_plain:.2f} %"))
    trained = sum(sizes[n] for n in adapted.trained)
    rows.append(("adapters", str(len(targets.modules)), f"{trained:,}", f"{100 * trained / adapted.num_plain:.2f} %"))
    head = sum(sizes[n] for n in chain.classifier_parameters)
    rows.append((f"{chain.classifier}, the head", "1", f"{head:,}", f"{100 * head / adapted.num_plain:.2f} %"))
    cut = follows.lowest_cut(adapted.policy().select(follows))
    place = _place(cut) if cut is None or cut == chain.features else f"after {cut.name}"
    return "\n".join([how.name, "", *_align(rows), "", f"cut: {place}", *targets.describe_left_out()])


def _row(index: int, layer: Layer, parameters: int, share: float) -> tuple[str, ...]:
    cut = layer.cut
    shape = "x".join(map(str, cut.shape)) if cut is not None else ""
    stored = f"{cut.bytes_per_image:,}" if cut is not None else ""
    return str(index), layer.name, f"{parameters:,}", shape, stored, f"{100 * share:.1f} %", ", ".join(layer.aliases)


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [all(not c or c[0].isdigit() for c in (row[i] for row in rows[1:])) for i in range(len(rows[0]))]
    return [
        "  ".join(
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]
