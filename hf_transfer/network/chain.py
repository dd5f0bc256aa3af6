"""The chain of a network: its layers in order, each between two verified cuts (tensors at which the network can be split).

Freezing, caching, layer-wise learning rates and greedy growth all use the chain. Each parameter belongs to at most one layer.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from hf_transfer.errors import count_noun
from hf_transfer.locations import report_unwritable
from hf_transfer.network.cut import Cut, Site, make_cut, possible_sites
from hf_transfer.network.fingerprint import (
    Identity,
    describe_modules,
    hash_part,
    hash_tensors,
    identify,
    library_versions,
    named_tensors,
)
from hf_transfer.network.forward import compute_logits, eval_mode
from hf_transfer.network.head import LinearHead, find_classifier, find_maps, measure_inputs
from hf_transfer.network.layers import find_layers
from hf_transfer.network.part import Part
from hf_transfer.network.trace import Call, Trace, trace
from hf_transfer.sealed import read_sealed, write_sealed

log = logging.getLogger(__name__)

STEM, HEAD = "stem", "head"  # the first and the last layer
FEATURES = "features"  # the cut before the classifier: one vector per image
VERIFIED_RELATIVE = 1e-5  # largest allowed difference of logits in float32, relative to the largest logit
CHAIN_FORMAT = 5  # increase it when the code may find other cuts in the same network


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The part of a network between two neighboring cuts. `parameters` and `buffers` name the layer's tensors in the model."""

    name: str
    aliases: tuple[str, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    cut: Cut | None  # the cut at the end of the layer; None for the head


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The layers of a network from stem to head. Every layer except the head ends at a verified cut."""

    model: nn.Module
    image_shape: tuple[int, int, int]
    layers: tuple[Layer, ...]
    head: LinearHead | None  # the linear maps whose weighted sum is the logits; None if the logits are no such sum
    features: Cut | None  # the cut before these linear maps, from which a linear probe computes its features
    unused_parameters: tuple[str, ...]  # names of parameters that never reach the logits: frozen, and saved unchanged
    notes: tuple[str, ...]  # sentences for the user: which cuts were dropped, and why
    # Returns the identity that cache keys use, if this network equals another one (new adapters change no activation).
    known_as: Callable[[], Identity] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Returns the number of layers between stem and head. The policy `last(k)` counts the same layers."""
        return len(self.layers) - 2

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """All cuts of the network, ordered from the image to the logits."""
        inner = [layer.cut for layer in self.layers if layer.cut is not None]
        return (*inner, self.features) if self.features is not None else tuple(inner)

    def layer(self, name: str) -> Layer:
        """Returns the layer called `name`. Raises ValueError, with the names of all layers, if no layer has that name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ValueError(f"{name!r} is no layer of this chain; its layers are {', '.join(x.name for x in self.layers)}")

    def cut(self, name: str) -> Cut:
        """Returns the cut called `name`. Raises ValueError, with the names of all cuts, if no cut has that name."""
        for cut in self.cuts:
            if cut.name == name:
                return cut
        raise ValueError(f"{name!r} is no cut of this chain; its cuts are {', '.join(c.name for c in self.cuts)}")

    @property
    def classifier_parameters(self) -> tuple[str, ...]:
        """The names of the parameters of the linear head, or of the whole last layer if the head is not linear."""
        last = self.layers[-1].parameters
        return last if self.head is None else tuple(n for n in last if self.head.owns(n))

    def lowest_cut(self, trainable: Collection[str]) -> Cut | None:
        """Returns the last cut whose prefix has no parameter in `trainable`, or None if the stem has a trainable parameter."""
        unknown = set(trainable) - {n for layer in self.layers for n in layer.parameters}
        if unknown:
            raise ValueError(f"not parameters of this chain: {', '.join(sorted(unknown)[:5])}")
        if self.features is not None and set(trainable) <= set(self.classifier_parameters):
            return (
                self.features if self.features.stubs else None
            )  # without stubs, the features are computed from the image
        below: Cut | None = None
        for layer in self.layers:
            if not set(trainable).isdisjoint(layer.parameters):
                return below
            below = layer.cut
        return below

    def before(self, cut: Cut | None) -> tuple[list[str], list[str]]:
        """Returns the names of the parameters and of the buffers in the prefix, the part of the network before `cut`."""
        if cut is None:
            return [], []
        if cut == self.features:
            own = set(self.classifier_parameters)
            names = [n for layer in self.layers for n in layer.parameters if n not in own]
            return names, [n for layer in self.layers for n in layer.buffers]
        end = next(i for i, layer in enumerate(self.layers) if layer.cut == cut) + 1
        prefix = self.layers[:end]
        return [n for x in prefix for n in x.parameters], [n for x in prefix for n in x.buffers]

    def run_prefix(self, cuts: Sequence[Cut], images: torch.Tensor) -> list[torch.Tensor]:
        """Returns the activations (B, *cut.shape) at each cut in `cuts`, from one forward in eval mode without gradients.

        `images`: normalized (B, 3, H, W), on the model's device. Trainable layers may use the returned activations as inputs,
        since the forward runs under no_grad and not under inference_mode.
        """
        part = Part(self.model, self.image_shape, ends=cuts)
        with eval_mode(self.model), torch.no_grad(), part:
            return part.activations(images)

    def fingerprint(self, cuts: Sequence[Cut]) -> dict[str, str]:
        """Returns a dict from the name of each cut to a hash of the weights and the structure of the network before the cut."""
        identity = self.known_as() if self.known_as else identify(self.model)
        names = identity.tensor_names
        hashes = {names[n]: hash_tensors({names[n]: t}) for n, t in named_tensors(self.model).items() if names[n]}
        parameters = [names[n] for n, _ in self.model.named_parameters() if names[n]]
        return {
            cut.name: hash_part(
                identity,
                hashes,
                parameters,
                before=[names[n] for n in self.before(cut)[0] if names[n]],
                called=[cut.site.module, *(stub.module for stub in cut.stubs)],
            )
            for cut in cuts
        }

    def replicate(self) -> "Chain":
        """Returns a copy of the chain for another thread. Modules (with their hooks) are copied, tensors are shared."""
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        return replace(self, model=copy.deepcopy(self.model, shared))

    def part(self, start: Cut | None = None, end: Cut | None = None) -> Part:
        """Returns the part of the network between two cuts. Enter the part as a context manager before it runs (see `Part`)."""
        return Part(self.model, self.image_shape, start=start, ends=() if end is None else (end,))


def build_chain(model: nn.Module, image_shape: tuple[int, int, int], *, cache_dir: Path | None = None) -> Chain:
    """Builds the chain of `model` for images of `image_shape` (3, H, W).

    Every cut is verified: the split network must give the logits of the whole network. The weights are perturbed for this test,
    since weights near zero (new layer scales) hide a wrong cut. Verified cuts are stored in `cache_dir` for the next call. The
    chain of a network without interior cuts has only stem and head, and its field `notes` says which cut remains.
    """
    notes: list[str] = []
    try:
        seen = trace(model, image_shape)
    except ValueError as error:
        everything = tuple(n for n, _ in model.named_parameters())
        return Chain(
            model=model,
            image_shape=image_shape,
            layers=(_empty(STEM), replace(_empty(HEAD), parameters=everything)),
            head=None,
            features=None,
            unused_parameters=(),
            notes=(f"this network has no cuts, so no activations can be cached: {error}",),
        )
    classifier = find_classifier(model, seen)
    ends = _layer_ends(model, seen, classifier)
    verified = _verified(model, image_shape, seen, ends, cache_dir)
    dropped = [name for name, _ in ends if name not in verified]
    if dropped:
        notes.append(f"no verified cut after {', '.join(dropped)}: each of these layers is merged into the next one")
    kept = [(name, node) for name, node in ends if name in verified]
    owners, shared = _partition(seen, [node for _, node in kept])
    if shared:
        verb = "is" if len(shared) == 1 else "are"
        notes.append(
            f"{count_noun(len(shared), 'parameter')} {verb} used on both sides of a cut ({min(shared)}, ...): such cuts are "
            "dropped, and the layers around them are merged"
        )
    illegal = {i for low, high in shared.values() for i in range(low, high)}
    # Segments lie between the verified cuts. Each illegal cut that is dropped merges two segments.
    legal = [i for i in range(len(kept)) if i not in illegal]
    segment_of = {name: sum(i < segment for i in legal) for name, segment in owners.items()}
    cuts = [verified[kept[i][0]] for i in legal]
    features = cuts[-1] if cuts and cuts[-1].name == FEATURES else None
    inner = cuts[:-1] if features else cuts
    if not inner:
        fallback = "only the cut before the classifier" if features else "no cut, so no activations can be cached"
        notes.append(f"this network has no interior cuts; there is {fallback}")
    head = LinearHead(modules=(classifier.module,)) if classifier else None
    if features is None:
        try:
            head, features = _find_sum(model, image_shape, seen, inner)
        except ValueError as error:
            notes.append(f"no linear probe can be solved: {error}")
    return Chain(
        model=model,
        image_shape=image_shape,
        layers=_make_layers(model, inner, segment_of, _assign_buffers(model, seen, inner)),
        head=head,
        features=features,
        unused_parameters=tuple(n for n, _ in model.named_parameters() if n not in segment_of),
        notes=tuple(notes),
    )


def _find_sum(
    model: nn.Module, image_shape: tuple[int, int, int], seen: Trace, inner: Sequence[Cut]
) -> tuple[LinearHead, Cut]:
    """Returns the linear maps whose weighted sum is the logits, and the last cut before them: the image if `inner` is empty.

    Raises ValueError if the logits are no such sum.
    """
    image = Site(side="before", module="", index=0, leaf=0)
    cut = replace(inner[-1], name=FEATURES) if inner else make_cut(seen, FEATURES, image)
    head = LinearHead(modules=find_maps(model, seen), is_direct=False)
    if cut is None or not head.modules:
        raise ValueError("no linear map computes the logits")
    measure_inputs(model, image_shape, head, cut)
    return head, cut


def _empty(name: str) -> Layer:
    return Layer(name=name, aliases=(), parameters=(), buffers=(), cut=None)


def _layer_ends(model: nn.Module, seen: Trace, classifier: Call | None) -> list[tuple[str, int]]:
    """Returns, for the stem, each layer and the features in order, the name and the graph node that computes the output tensor.

    If the last layer and the features have the same output tensor, the graph node appears twice, under two names.
    """
    # These names are reserved, so a module called "head" (SelecSLS) is part of the chain's head.
    layers = [(c, span) for c, span in find_layers(model, seen, classifier) if c.module not in (STEM, HEAD, FEATURES)]
    # A layer that is called several times ends with the last call, since both sides of an earlier cut would use its weights.
    last_end = {call.module: end for call, (_, end) in layers}
    ends = [(call.module, seen.spine[end]) for call, (_, end) in layers if end == last_end[call.module]]
    if layers and layers[0][1][0] > 0:
        ends.insert(0, (STEM, seen.spine[layers[0][1][0]]))
    if classifier is not None:
        ends += [(FEATURES, leaf.node) for leaf in classifier.inputs if leaf.node in seen.spine]  # exactly one input
    return ends


def _partition(seen: Trace, nodes: Sequence[int]) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Divides the network into segments, of which segment i ends at the graph node `nodes[i]`.

    Returns the last segment that uses each parameter, and the first and last segment that use each shared parameter.
    """
    segments: dict[str, set[int]] = {}
    boundaries = [*nodes, 0]
    for i, end in enumerate(boundaries):
        for name in seen.parameters_between(boundaries[i - 1] if i else None, end):
            segments.setdefault(name, set()).add(i)
    owners = {name: max(users) for name, users in segments.items()}
    return owners, {name: (min(users), max(users)) for name, users in segments.items() if len(users) > 1}


def _make_layers(
    model: nn.Module, cuts: list[Cut], segment_of: Mapping[str, int], layer_of_buffer: Mapping[str, int]
) -> tuple[Layer, ...]:
    """Returns the layers from stem to head. The head contains the segments on both sides of the cut called features."""
    names = [*(c.name for c in cuts), HEAD]
    parameters: list[list[str]] = [[] for _ in names]
    for name, _ in model.named_parameters():
        if name in segment_of:
            parameters[min(segment_of[name], len(cuts))].append(name)
    layers = [
        Layer(
            name=name,
            aliases=_aliases(name, names),
            parameters=tuple(parameters[i]),
            buffers=tuple(n for n, layer in layer_of_buffer.items() if layer == i),
            cut=cuts[i] if i < len(cuts) else None,
        )
        for i, name in enumerate(names)
    ]
    return tuple(layers if layers[0].name == STEM else [_empty(STEM), *layers])


def _aliases(name: str, names: list[str]) -> tuple[str, ...]:
    """Returns the names of the modules that contain the layer called `name`, without modules that contain all layers."""
    parts = name.split(".")
    aliases = []
    for i in range(1, len(parts)):
        alias = ".".join(parts[:i])
        inside = sum(n.startswith(alias + ".") for n in names)
        if inside < sum("." in n for n in names):
            aliases.append(alias)
    return tuple(aliases)


def _assign_buffers(model: nn.Module, seen: Trace, cuts: list[Cut]) -> dict[str, int]:
    """Returns each buffer's layer number. A buffer belongs to the layer in which the last call of the buffer's module ends."""
    ticks = []
    for cut in cuts:
        call = next(c for c in seen.calls if (c.module, c.index) == (cut.site.module, cut.site.index))
        ticks.append(call.end if cut.site.side == "after" else call.start)
    last_end: dict[str, int] = {}
    for call in seen.calls:
        last_end[call.module] = max(call.end, last_end.get(call.module, 0))
    ends = {name: last_end.get(name.rpartition(".")[0], 0) for name, _ in model.named_buffers()}
    return {name: sum(tick < end for tick in ticks) for name, end in ends.items()}


# --- verification -----------------------------------------------------------------------------------------------------


def _verified(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    seen: Trace,
    ends: list[tuple[str, int]],
    cache_dir: Path | None,
) -> dict[str, Cut]:
    """Returns the verified cuts by name. A file in the folder `cache_dir` stores the cuts for later calls."""
    remembered = cache_dir / f"{_structure_key(model, image_shape, ends)}.json" if cache_dir else None
    known = _read_cuts(remembered, seen) if remembered else None
    if known is not None:
        return known
    candidates = {
        name: [
            replace(cut, dense=dense)
            for site in possible_sites(seen, node, prefer=name)
            if (cut := make_cut(seen, name, site)) is not None
            for dense in (False, True)
        ]
        for name, node in ends
    }
    verified = _verify(model, image_shape, candidates)
    if remembered is not None:
        _write_cuts(remembered, verified)
    return verified


def _read_cuts(file: Path, seen: Trace) -> dict[str, Cut] | None:
    """Returns the verified cuts that `file` lists, or None if the file is missing, unreadable or damaged."""
    try:
        sites = {name: (Site(**site), bool(dense)) for name, (site, dense) in read_sealed(file).items()}
    except OSError as error:
        log.debug("no verified cuts in %s: %s", file, error)
        return None
    except (ValueError, TypeError, AttributeError) as error:
        log.warning("discarding the damaged file of verified cuts %s (%s)", file, error)
        return None
    cuts = {name: (make_cut(seen, name, site), dense) for name, (site, dense) in sites.items()}
    return {name: replace(cut, dense=dense) for name, (cut, dense) in cuts.items() if cut is not None}


def _write_cuts(file: Path, cuts: Mapping[str, Cut]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(file, {name: (cut.site.__dict__, cut.dense) for name, cut in cuts.items()})
    except OSError as error:
        report_unwritable(error)


def _structure_key(model: nn.Module, image_shape: tuple[int, int, int], ends: list[tuple[str, int]]) -> str:
    structure = {
        "format": CHAIN_FORMAT,
        "versions": library_versions(),
        "image_shape": image_shape,
        "modules": describe_modules(model),
        "parameters": [(n, list(p.shape)) for n, p in model.named_parameters()],
        "ends": ends,
    }
    return hashlib.sha256(json.dumps(structure).encode()).hexdigest()[:32]


def _verify(model: nn.Module, image_shape: tuple[int, int, int], candidates: dict[str, list[Cut]]) -> dict[str, Cut]:
    """Returns, for each name, the first candidate cut at which the split network computes the whole network's logits."""
    # The model is copied because functional_call does not restore weights of modules registered under two names (CoaT).
    model = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(1)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)

    verified: dict[str, Cut] = {}
    with torch.no_grad():
        for parameter in model.parameters():
            # The perturbation is at least 0.02, since weights that stay near zero would hide errors before them.
            spread = max(float(parameter.std()), 0.02) if parameter.numel() > 1 and parameter.ndim > 1 else 1.0
            parameter.add_(0.1 * spread * noise(parameter))
        pixels = noise(next(model.parameters()).new_empty(2, *image_shape))
        whole = compute_logits(model, pixels)
        scale = whole.abs().max().clamp(min=1.0)
        likeliest = {name: options[0] for name, options in candidates.items() if options}
        prefix = Part(model, image_shape, ends=list(likeliest.values()))
        at_likeliest = dict(zip(likeliest, prefix.activations(pixels), strict=True))
        for name, options in candidates.items():
            for cut in options:
                activation = at_likeliest.pop(name, None)
                if activation is None:
                    activation = Part(model, image_shape, ends=[cut])(pixels)
                try:
                    with Part(model, image_shape, start=cut) as suffix:
                        difference = (suffix(activation) - whole).abs().max() / scale
                except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
                    # The network fails on placeholders, so it cannot be cut at this site.
                    log.debug("cut %s: the network cannot be split at %s: %s", name, cut.site, error)
                    continue
                if difference <= VERIFIED_RELATIVE:
                    verified[name] = cut
                    break
    return verified
