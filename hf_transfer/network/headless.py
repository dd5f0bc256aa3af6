"""Makes image classifiers of transformers checkpoints that are none: backbones, vision towers, pretraining models.

A classification class of transformers over the same modules is used if, on the same pixels, its last hidden state equals the
original class's, and its pooling is the documented one (`pooler_output`, unless upstream makes the pooler optional). Equal
names of tensors prove nothing, since networks with equal names may compute different functions. Every other backbone gets
`modeling_backbone.BackboneForImageClassification`.
"""

import copy
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING

from hf_transfer.config import Pooling
from hf_transfer.network.forward import eval_mode
from hf_transfer.network.modeling_backbone import (
    BackboneForImageClassification,
    PooledFeature,
    RemoteBackboneForImageClassification,
    name_outputs,
)
from hf_transfer.network.remote_code import RemoteCode
from hf_transfer.network.source import Source
from hf_transfer.network.transformers_models import (
    compare_weights,
    find_heads,
    load_class,
    on_meta_quietly,
    set_labels,
)
from hf_transfer.network.weights import Weights

log = logging.getLogger(__name__)

SAME_RELATIVE = 1e-5  # largest allowed difference of hidden states in float32, relative to the largest value
OTHER_INPUTS = {
    "input_ids": "text",
    "input_values": "audio",
    "input_features": "audio",
    "inputs": "no images",
}


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """The class that a checkpoint was saved from, and the part of it that computes features of an image."""

    config: PreTrainedConfig
    kind: type[PreTrainedModel]
    tower: str  # module name; "": the whole network
    code: RemoteCode | None = None  # the code of `kind`; None: `kind` is a class of transformers

    def is_classifier(self) -> bool:
        """Whether transformers' image-classification class is the original class."""
        return self.kind in own_classes(type(self.config))


def find_upstream(source: Source, config: PreTrainedConfig) -> Upstream:
    """Returns the original class of a checkpoint, without loading its weights.

    Raises ValueError if the class takes text, audio, videos or packed patches, or if transformers does not have the class.
    """
    kind = _find_class(config)
    if kind is None:
        named = ", ".join(config.architectures or [config.model_type])
        raise ValueError(
            f"{source.name}: transformers has no vision model {named}; choose a checkpoint of another architecture"
        )
    upstream = Upstream(config=config, kind=kind, tower="")
    if upstream.is_classifier():
        return upstream
    for owner in (config, getattr(config, "vision_config", config)):
        if getattr(owner, "num_frames", None) or getattr(owner, "num_detection_tokens", None):
            purpose = "takes videos" if getattr(owner, "num_frames", None) else "is a detector"
            raise ValueError(f"{source.name}: {kind.__name__} {purpose}; choose a checkpoint for single images")
    with on_meta_quietly():
        towers = list(_find_towers(kind(config)))
    if not towers:
        given = OTHER_INPUTS.get(kind.main_input_name, kind.main_input_name)
        raise ValueError(f"{source.name}: {kind.__name__} takes {given}; choose a checkpoint that takes images")
    name, tower = towers[-1]
    others = [p.name for p in _inputs(tower)[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if others:
        raise ValueError(
            f"{source.name}: {type(tower).__name__} also takes {', '.join(others)}; choose a checkpoint that takes "
            "images alone (such as a SigLIP checkpoint of fixed resolution)"
        )
    return Upstream(config=config, kind=kind, tower=name)


def load_headless(
    source: Source,
    upstream: Upstream,
    labels: tuple[str, ...],
    image_shape: tuple[int, int, int],
    *,
    pooling: Pooling = "auto",
) -> tuple[PreTrainedModel, Weights]:
    """Returns a classifier with a new head for `labels` on the checkpoint's backbone, and how the checkpoint's tensors differ.

    `pooling`: "class" accepts a classification class whose pooling is not the documented one. Raises ValueError if weights of
    the backbone are missing, if the backbone's output is random, or if `pooling` is "class" and no class fits.
    """
    config = copy.deepcopy(upstream.config)
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0
    whole, info = load_class(upstream.kind, source, config)
    tower: Any = whole.get_submodule(upstream.tower)
    for module in tower.modules():
        if hasattr(module, "is_mae"):  # Hiera masks at random if it is set
            module.is_mae = False
    expected = _compute(source, tower, image_shape)
    other = ""  # the class that computes the hidden states, but has another pooling
    for kind, settings in _candidates(upstream.config, tower) if upstream.code is None else ():
        set_labels(settings, labels)
        loaded = _try_class(source, kind, settings, tower)
        if loaded is None or not (agrees := _compare(loaded[0], expected)).hidden:
            continue
        if agrees.pooled or pooling == "class":
            log.info("%s: the backbone of %s is loaded as %s", source.name, upstream.kind.__name__, kind.__name__)
            loaded[1].log(source)
            return loaded
        other = kind.__name__
    name = type(tower).__name__
    if pooling == "class":
        raise ValueError(
            f"pooling=class: transformers has no image-classification class that computes the hidden states of {name}; choose "
            "pooling=auto"
        )
    weights = compare_weights(source, whole, info, inside=f"{upstream.tower}." if upstream.tower else "")
    inner = {id(p) for p in tower.parameters()}
    outer = {n for n, p in whole.named_parameters() if id(p) not in inner}
    model = _make_generic(tower, expected, labels, upstream.code)
    reason = (
        f"{other} pools otherwise (--pooling class accepts this)" if other else "transformers has no classifier for it"
    )
    log.info(
        "%s: the classifier is a linear head on %s with the pooling %s, since %s. The saved model contains its code, so that "
        "loading it needs trust_remote_code=True", source.name, name, model.config.pooling, reason,
    )  # fmt: skip
    weights = replace(weights, unused=weights.unused | outer)
    weights.log(source)
    return model, weights


@dataclass(frozen=True, kw_only=True)
class _Features:
    """What a backbone computes for two images of noise."""

    pixels: torch.Tensor
    hidden: torch.Tensor  # last hidden state: tokens (B, L, C), or a grid with channels
    pooled: torch.Tensor | None  # (B, F), or None if the backbone has no documented pooling


@dataclass(frozen=True, kw_only=True)
class _Agreement:
    """Whether a classifier computes the original class's last hidden state, and its documented pooled feature."""

    hidden: bool
    pooled: bool


def own_classes(config: type[PreTrainedConfig]) -> tuple[type[PreTrainedModel], ...]:
    """Returns the image-classification classes that transformers has for a config of the class `config`."""
    if config not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return ()
    classes: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[config]
    return classes if isinstance(classes, tuple) else (classes,)


def _find_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Returns the class named in `config.architectures`, or else the class that AutoModel chooses, or None."""
    for name in config.architectures or []:
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and not isinstance(config, getattr(kind, "config_class", None) or ()):
            continue  # model_type, and not this name, chooses the class that transformers loads
        # A Backbone returns feature maps. The model of the same config has the same weights, and returns a last hidden state.
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and not issubclass(kind, BackboneMixin):
            return kind
        own = next((c for c in own_classes(type(config)) if c.__name__ == name), None)
        if own is not None:
            return own
    if not config.architectures and own_classes(type(config)):
        return own_classes(type(config))[0]
    if type(config) not in MODEL_MAPPING:
        return None
    classes: Any = MODEL_MAPPING[type(config)]
    kind = classes[0] if isinstance(classes, tuple) else classes
    return kind if issubclass(kind, PreTrainedModel) else None


def _find_towers(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yields name and module of the networks in `model` that take pixels and have its vision config, each inside the former."""
    vision = type(getattr(model.config, "vision_config", model.config))
    outer = ""
    for name, module in model.named_modules():
        takes_pixels = isinstance(module, PreTrainedModel) and [p.name for p in _inputs(module)[:1]] == ["pixel_values"]
        if takes_pixels and type(module.config) is vision and name.startswith(outer):
            outer = f"{name}." if name else ""
            yield name, module


def _inputs(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _compute(source: Source, tower: PreTrainedModel, image_shape: tuple[int, int, int]) -> _Features:
    """Returns what `tower` computes in eval mode. Raises ValueError if a second run gives something else."""
    pixels = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0))
    arguments: dict[str, torch.Tensor] = {}
    with eval_mode(tower), torch.no_grad():
        try:
            output = name_outputs(tower(pixels))
            hidden = output.last_hidden_state
            if any(p.name == "noise" for p in _inputs(tower)) and hidden.ndim == 3:
                # The order of a masked autoencoder's patches is the order of this noise.
                arguments["noise"] = torch.arange(hidden.shape[1] - 1.0).expand(len(hidden), -1)
            first, again = (name_outputs(tower(pixels, **arguments)) for _ in range(2))
        except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError, LookupError) as error:
            raise ValueError(
                f"{source.name}: {type(tower).__name__} fails on images of {image_shape}: {error}"
            ) from error
    if not torch.equal(first.last_hidden_state, again.last_hidden_state):
        raise ValueError(f"{source.name}: {type(tower).__name__} gives another output at each call, in eval mode too")
    pooled = getattr(first, "pooler_output", None)
    return _Features(
        pixels=pixels, hidden=first.last_hidden_state, pooled=None if pooled is None else pooled.flatten(1)
    )


def _candidates(
    config: PreTrainedConfig, tower: PreTrainedModel
) -> Iterator[tuple[type[PreTrainedModel], PreTrainedConfig]]:
    """Yields classification classes that may have the modules of `tower`, each with the checkpoint's settings."""
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        yield own_classes(type(config))[0], copy.deepcopy(config)
        return
    settings = tower.config.to_dict()
    for known in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        kind = own_classes(known)[0]
        if known.sub_configs.get("vision_config") is type(tower.config):
            yield kind, known(vision_config=settings)  # type: ignore[call-arg]
        elif not known.sub_configs and kind.base_model_prefix == tower.base_model_prefix:
            own = set(known().to_dict()) - {
                "model_type",
                "architectures",
                "transformers_version",
                "id2label",
                "label2id",
            }
            yield kind, known(**{name: value for name, value in settings.items() if name in own})


def _try_class(
    source: Source, kind: type[PreTrainedModel], config: PreTrainedConfig, tower: PreTrainedModel
) -> tuple[PreTrainedModel, Weights] | None:
    """Returns the checkpoint as a model of the class `kind`, or None if weights outside the class's head are missing."""
    try:
        model, info = load_class(kind, source, config)
    except (ValueError, RuntimeError) as error:
        log.debug("%s cannot be created for %s: %s", kind.__name__, source.name, error)
        return None
    heads = find_heads(model).parameters
    try:
        return model, compare_weights(source, model, info, heads)
    except ValueError as error:
        log.debug("%s does not fit %s: %s", source.name, kind.__name__, error)
    # The class may not know the file's names of a tower's tensors, but its module may have the names of the tower's module.
    inner, state = _find_backbone(model), tower.state_dict()
    if inner is None or len(model.state_dict()) != len(state) + len(heads):
        return None  # a norm between the tower and the head, for example
    if {n: t.shape for n, t in inner.state_dict().items()} != {n: t.shape for n, t in state.items()}:
        return None
    inner.load_state_dict(state)
    return model, Weights(new=heads, identity=frozenset(), unused=frozenset())


def _find_backbone(model: PreTrainedModel) -> PreTrainedModel | None:
    """Returns the one network inside the classifier `model`, or None if there are several or none."""
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else None


def _compare(model: PreTrainedModel, expected: _Features) -> _Agreement:
    """Runs the classifier `model` on the images of `expected`, and compares what its backbone and its head receive."""
    backbone = _find_backbone(model)
    if backbone is None:
        return _Agreement(hidden=False, pooled=False)
    seen: dict[str, Any] = {}
    inputs: list[torch.Tensor] = []
    handles = [backbone.register_forward_hook(lambda _, __, output: seen.update(output=output))]
    for name in find_heads(model).linear:
        head = model.get_submodule(name)
        handles.append(head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(1))))
    try:
        with eval_mode(model), torch.no_grad():
            model(pixel_values=expected.pixels)
    finally:
        for handle in handles:
            handle.remove()
    return _Agreement(
        hidden=_is_same(getattr(seen["output"], "last_hidden_state", seen["output"][0]), expected.hidden),
        pooled=_leaves_out_pooler(backbone) or any(_contains(each, expected.pooled) for each in inputs),
    )


def _leaves_out_pooler(backbone: PreTrainedModel) -> bool:
    """Whether upstream makes the pooler optional (ViT, DeiT, BEiT): its classifiers leave out the pretraining task's pooler."""
    return "add_pooling_layer" in inspect.signature(type(backbone).__init__).parameters


def _contains(features: torch.Tensor, pooled: torch.Tensor | None) -> bool:
    """Whether `features` (B, F) are the pooled feature, or begin with it (DINOv2's classifier appends the mean of the grid)."""
    return pooled is None or _is_same(features[:, : pooled.shape[1]], pooled)


def _is_same(value: torch.Tensor, expected: torch.Tensor) -> bool:
    scale = expected.abs().max()
    return value.shape == expected.shape and bool((value - expected).abs().max() <= SAME_RELATIVE * scale)


def _make_generic(
    tower: PreTrainedModel, expected: _Features, labels: tuple[str, ...], code: RemoteCode | None
) -> BackboneForImageClassification:
    """Returns a classifier around `tower`, which it shares, with a new head. `code`: the code of the class of `tower`."""
    settings = tower.config.to_dict()
    for name in ("transformers_version", "architectures", "_name_or_path", "dtype", "id2label", "label2id", "auto_map"):
        settings.pop(name, None)
    pooling, skipped, size = _choose_pooling(tower.config, expected)
    chosen: dict[str, Any] = {"pooling": pooling, "skipped_tokens": skipped, "num_features": size}
    kind: type[BackboneForImageClassification] = BackboneForImageClassification
    description = {"module": type(tower).__module__, "class": type(tower).__name__, "config": settings}
    if code is not None:
        kind, chosen["name_or_path"] = RemoteBackboneForImageClassification, code.origin
        description = {"class": code.reference, "config": settings}
    named = {n: type(m) for n, m in tower.named_modules()}
    for arguments in ({}, {"add_pooling_layer": False}):
        config = kind.config_class(backbone={**description, "arguments": arguments}, **chosen)
        set_labels(config, labels)
        with on_meta_quietly():
            model = kind(config)
        if {n: type(m) for n, m in model.backbone.named_modules()} == named:
            break
    else:
        raise ValueError(f"{type(tower).__name__} cannot be created again from its config; choose another checkpoint")
    model.backbone = tower
    model.head = nn.Linear(size, len(labels))
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _choose_pooling(config: PreTrainedConfig, features: _Features) -> tuple[PooledFeature, int, int]:
    """Returns the pooling, the number of tokens before the grid, and the size of the pooled feature."""
    if features.pooled is not None:
        return "pooler_output", 0, features.pooled.shape[1]
    shape, (height, width) = features.hidden.shape, features.pixels.shape[2:]
    if len(shape) == 4:
        first = shape[2] * width == shape[3] * height
        return ("channels_first", 0, shape[1]) if first else ("channels_last", 0, shape[3])
    patch = getattr(config, "patch_size", None)
    rows, columns = (patch, patch) if isinstance(patch, int) else (patch or (0, 0))
    grid = (height // rows) * (width // columns) if rows and columns else shape[1]
    return "tokens", max(shape[1] - grid, 0), shape[2]
