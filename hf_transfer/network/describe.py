"""Formats the tables that `inspect` prints: the network's layers, and the trained parameters and cache size of each policy."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_transfer.config import AdapterConfig
from hf_transfer.errors import count_noun
from hf_transfer.network.adapters import add_adapters
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain, Layer
from hf_transfer.network.cut import Cut
from hf_transfer.network.forward import compute_logits, eval_mode
from hf_transfer.network.part import watch_cuts
from hf_transfer.network.policies import biases, full, head, last, norms
from hf_transfer.network.targets import find_targets, shorten
from hf_transfer.network.timm_models import describe_architecture

BYTES_PER_PARAMETER = 4  # float32
NAMED_LABELS = 3
BYTES_PER_PIXEL = 1  # if the cut is at the pixels, the cache stores uint8 values


@dataclass(frozen=True, kw_only=True)
class StrategyCost:
    """The costs of one policy: the parameters that train, the cut whose activations are stored, and the bytes per image."""

    policy: str
    trainable: int
    share: float  # trainable parameters divided by all parameters
    cut: str
    bytes_per_image: int
    flops_share: float  # FLOPs after the cut, which every epoch computes, divided by the FLOPs of one forward


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What happens to a checkpoint: five lines of text above the table of its layers."""

    network: str  # name, library, class and pooling
    preprocessing: str
    cuts: str
    head: str
    size: str

    def format(self) -> str:
        """Returns the five lines."""
        return "\n".join(f"{name}: {value}" for name, value in dataclasses.asdict(self).items())


def describe_checkpoint(backbone: Backbone, chain: Chain) -> Overview:
    """Returns the overview of a checkpoint that was loaded with its own head if it has one."""
    model: Any = backbone.model
    source, inner = backbone.source, [layer.name for layer in chain.layers[1:-1]]
    saved_as = [name for name in source.read_config().get("architectures") or [] if name != type(model).__name__]
    origin = f", from {saved_as[0]}" if saved_as else ""
    names = " ... ".join(dict.fromkeys((inner[0], inner[-1]))) if inner else "between stem and head"
    layers = f"{count_noun(len(inner), 'layer') if inner else 'no layers'}, {names}"
    labels = ", ".join(backbone.label_names[:NAMED_LABELS])
    more = ", ..." if len(backbone.label_names) > NAMED_LABELS else ""
    word = "labels" if backbone.target.counts_labels else "numbers"
    head = f"trained for {len(backbone.label_names)} {word} ({labels}{more})"
    if backbone.new_head:
        head = "none yet: a new one is trained"
    kind = "not affine, so that no linear probe is solved"
    if chain.head is not None:
        maps = ", ".join(
            f"{name} of {model.get_submodule(name).weight.shape[1]:,} features" for name in chain.head.modules
        )
        kind = f"affine: {maps}"
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    body = sum(sizes.values()) - sum(sizes[name] for name in chain.classifier_parameters)
    weights = backbone.weights
    unused = f"; tensors that stay behind: {weights.count_unused()}" if weights is not None and weights.unused else ""
    built = f", {describe_architecture(model)}" if backbone.library == "timm" else ""
    network = f"{source.name}, {backbone.library} {type(model).__name__}{origin}"
    return Overview(
        network=f"{network}, pooling: {_find_pooling(backbone)}{built}",
        preprocessing=f"{backbone.preprocessing.channels} channels, {backbone.preprocessing.describe()}",
        cuts=f"{len(chain.cuts)} verified cuts; {layers}",
        head=f"{head}; {kind}",
        size=f"{body:,} parameters without the head, {body * BYTES_PER_PARAMETER / 1e6:,.1f} MB{unused}",
    )


def _find_pooling(backbone: Backbone) -> str:
    """Returns the name of the pooling before the classifier, if the model states one."""
    model: Any = backbone.model
    if backbone.library == "transformers":
        return getattr(model.config, "pooling", None) or "that of the class"
    poolings = (getattr(owner, "global_pool", None) for owner in (model, getattr(model, "head", None)))
    names = (getattr(pooling, "pool_type", pooling) for pooling in poolings)
    return next((name for name in names if isinstance(name, str) and name), "that of the class")


def count_flops(chain: Chain) -> tuple[int, dict[str, int]]:
    """Returns the FLOPs (of matrix products and convolutions only) of one image's forward, and the FLOPs before each cut."""
    cuts, before, counter = chain.cuts, dict[str, int](), FlopCounterMode(display=False)

    def note(i: int, _: torch.Tensor) -> None:
        before.setdefault(cuts[i].name, counter.get_total_flops())

    with counter, eval_mode(chain.model), torch.no_grad(), watch_cuts(chain.model, cuts, note):
        compute_logits(chain.model, next(chain.model.parameters()).new_zeros(1, *chain.image_shape))
    return counter.get_total_flops(), before


def price_strategies(chain: Chain) -> list[StrategyCost]:
    """Returns the cost of each policy that suits every network."""
    policies = [head(), *(last(k) for k in (1, 2, 4) if k < len(chain)), norms(), biases(), full()]
    total_flops, before = count_flops(chain)
    sizes = {name: p.numel() for name, p in chain.model.named_parameters()}
    costs = []
    for policy in policies:
        names = policy.select(chain)
        cut = chain.lowest_cut(names)
        trainable = sum(sizes[n] for n in names)
        pixel_bytes = int(torch.Size(chain.image_shape).numel()) * BYTES_PER_PIXEL
        costs.append(
            StrategyCost(
                policy=policy.name,
                trainable=trainable,
                share=trainable / max(1, sum(sizes.values())),
                cut=_describe_cut(chain, cut),
                bytes_per_image=cut.bytes_per_image if cut is not None else pixel_bytes,
                flops_share=1 - (before[cut.name] / total_flops if cut is not None and total_flops else 0.0),
            )
        )
    return costs


def _describe_cut(chain: Chain, cut: Cut | None) -> str:
    if cut is None:
        return "at the pixels"
    return "before the classifier" if cut == chain.features else f"after {cut.name}"


def list_chain(chain: Chain) -> dict[str, Any]:
    """Returns the chain's layers and the costs of the policies as JSON values."""
    sizes = {name: p.numel() for name, p in chain.model.named_parameters()}
    layers = [
        {
            "name": layer.name,
            "aliases": list(layer.aliases),
            "num_parameters": sum(sizes[n] for n in layer.parameters),
            "activation": None if layer.cut is None else list(layer.cut.shape),
        }
        for layer in chain.layers
    ]
    strategies = [dataclasses.asdict(cost) for cost in price_strategies(chain)]
    return {"layers": layers, "strategies": strategies, "unused_parameters": list(chain.unused_parameters)}


def format_chain(chain: Chain) -> str:
    """Returns a table of the chain's layers and a table of policies, as text for a terminal."""
    total, before = count_flops(chain)
    sizes = {name: p.numel() for name, p in chain.model.named_parameters()}
    rows: list[tuple[str, ...]] = [("", "layer", "parameters", "activation", "bytes/image", "FLOPs", "aliases")]
    reached = 0
    for i, layer in enumerate(chain.layers):
        until = before.get(layer.cut.name, total) if layer.cut is not None else (total if i else 0)
        share = (until - reached) / total if total else 0.0
        reached = until
        rows.append(_make_row(i, layer, sum(sizes[n] for n in layer.parameters), share))
    strategies: list[tuple[str, ...]] = [("strategy", "trains", "share", "cut", "cache, bytes/image", "FLOPs left")]
    strategies += [
        (s.policy, f"{s.trainable:,}", f"{100 * s.share:.2f} %", s.cut, f"{s.bytes_per_image:,}",
         f"{100 * s.flops_share:.1f} %")
        for s in price_strategies(chain)
    ]  # fmt: skip
    lines = [*_align(rows), "", *_align(strategies)]
    if chain.unused_parameters:
        lines += ["", f"frozen parameters that never reach the logits: {', '.join(chain.unused_parameters)}"]
    lines += ["", *chain.notes] if chain.notes else []
    return "\n".join(lines)


def format_adapters(backbone: Backbone, chain: Chain, adapter: AdapterConfig) -> str:
    """Adds adapters to the backbone's model, and returns a table of the adapted modules and their trainable parameters."""
    targets = find_targets(chain, adapter)
    adapted, adapted_chain = add_adapters(backbone, chain, adapter)
    sizes = {name: p.numel() for name, p in adapted.model.named_parameters()}

    def make_row(name: str, count: int, trained: int) -> tuple[str, ...]:
        return name, str(count), f"{trained:,}", f"{100 * trained / adapted.num_plain:.2f} %"

    rows: list[tuple[str, ...]] = [("target", "modules", "trains", "share")]
    for kind in shorten(targets.modules):
        names = [name for name in targets.modules if shorten([name]) == [kind]]
        prefixes = tuple(f"{name}." for name in names)
        rows.append(make_row(kind, len(names), sum(sizes[n] for n in adapted.trained if n.startswith(prefixes))))
    rows.append(make_row("adapters", len(targets.modules), sum(sizes[n] for n in adapted.trained)))
    maps = () if chain.head is None else chain.head.modules
    rows.append(make_row(f"{', '.join(maps)}, the head", len(maps), sum(sizes[n] for n in chain.classifier_parameters)))
    cut = _describe_cut(chain, adapted_chain.lowest_cut(adapted.policy().select(adapted_chain)))
    return "\n".join([adapter.name, "", *_align(rows), "", f"cut: {cut}", *targets.describe_left_out()])


def _make_row(index: int, layer: Layer, parameters: int, share: float) -> tuple[str, ...]:
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
