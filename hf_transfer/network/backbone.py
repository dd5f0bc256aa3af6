"""Loads or creates image classifiers of timm and transformers, with their preprocessing and the names of their labels.

transformers is imported only for its own checkpoints, since the import takes about a second.
"""

import copy
import difflib
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import timm
import timm.models
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from torch import nn

from hf_transfer.confidence.record import Confidence
from hf_transfer.config import ModelConfig, Pooling
from hf_transfer.network.chain import Chain, build_chain
from hf_transfer.network.damage import explain_damage
from hf_transfer.network.model_args import read_model_args
from hf_transfer.network.preprocessing import (
    Preprocessing,
    load_preprocessing,
    quiet_transformers,
    resize_preprocessing,
)
from hf_transfer.network.source import Source, find_preprocessing, find_source
from hf_transfer.network.timm_models import load_timm, renew_classifier, save_timm
from hf_transfer.network.weights import NoTrainedHeadError, Weights
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.targets.target import Target, read_target

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_transfer.network.headless import Upstream

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A model of an unchanged timm or transformers class, with the model's preprocessing, label names and source files."""

    model: nn.Module  # in float32 and eval mode
    library: Literal["timm", "transformers"]
    preprocessing: Preprocessing
    target: Target  # what the model predicts, with the names of its outputs
    source: Source
    new_head: bool  # whether the classifier was created for these labels and is untrained
    is_auto_class: bool = (
        True  # whether plain timm or AutoModelForImageClassification creates this network from the source
    )
    pooling: Pooling = "auto"  # the setting with which the checkpoint was loaded
    weights: Weights | None = None  # how the tensors of the checkpoint differ from the model's; None: not compared
    confidence: Confidence | None = None  # of a saved or finished model: what it knows about its own confidence

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the model's outputs: of classes, labels or numbers."""
        return self.target.names

    def chain(self, *, cache_dir: Path | None = None) -> Chain:
        """Builds the chain of the model (its layers in order) with `build_chain`."""
        return build_chain(self.model, self.preprocessing.image_shape, cache_dir=cache_dir)


@explain_damage
def load(checkpoint: str | ModelConfig, /, labels: Sequence[str] | Target | None = None, **settings: Any) -> Backbone:
    """Loads the checkpoint's model with its own head, or with a new head if `labels` differ from the checkpoint's labels.

    `checkpoint`: a Hub id (`timm/resnet18.a1_in1k`, `google/vit-base-patch16-224@main`), a folder in Hub layout, or
    "embedded"; or a ModelConfig, which names the checkpoint. `labels`: names of classes, or any target. `settings`: other
    fields of ModelConfig. Raises ValueError if the checkpoint is not found, if labels repeat, if weights are missing or do
    not fit the model, or if the checkpoint does not take images.
    """
    named = checkpoint if isinstance(checkpoint, ModelConfig) else ModelConfig(checkpoint=checkpoint)
    model_config = replace(named, **settings)
    trust_remote_code, pooling = model_config.trust_remote_code, model_config.pooling
    target = None if labels is None else as_target(labels)
    names = None if target is None else target.names
    source = find_source(
        model_config.checkpoint, base_model=model_config.base_model, trust_remote_code=trust_remote_code
    )
    config = source.read_config()
    is_timm = _is_timm(source, config)
    given_args = read_model_args(model_config.model_args)
    upstream = None if is_timm else _find_upstream(source, trust_remote_code, given_args)
    origin = model_config.preprocessing_from
    preprocessing = load_preprocessing(
        source.folder,
        trust_remote_code=trust_remote_code,
        preprocessing_from=None if origin is None else find_preprocessing(origin),
        model_args=given_args,
    )
    if upstream is None:
        loaded = load_timm(source, config, given_args)
        model, own_labels, weights = loaded.model, loaded.label_names, loaded.weights
        is_auto_class = loaded.is_plain and origin is None  # plain timm takes the preprocessing of the base
        if target is None and not own_labels:
            raise NoTrainedHeadError(f"{source.name} has no trained head: give labels for a new head")
        new_head = target is not None and not target.has_outputs_of(read_target(config, own_labels))
        if target is not None and new_head:
            is_auto_class = renew_classifier(model, target.num_outputs) and is_auto_class
    else:
        from hf_transfer.network.headless import Upstream, load_headless, own_classes
        from hf_transfer.network.transformers_models import load_classifier

        if isinstance(upstream, Upstream):
            if names is None:
                raise NoTrainedHeadError(f"{source.name} has no trained head: give labels for a new head")
            own_labels, new_head = (), True
            model, weights = load_headless(source, upstream, names, preprocessing.image_shape, pooling=pooling)
            is_auto_class = type(model) in own_classes(type(upstream.config)) and not given_args
        else:
            model, own_labels, weights = load_classifier(source, upstream, names, trust_remote_code=trust_remote_code)
            is_other = target is not None and not target.has_outputs_of(read_target(config, own_labels))
            new_head = is_other or bool(weights.new)  # a config may name labels whose head the file lacks
            # Otherwise the class comes with the checkpoint's code.
            is_auto_class = type(model)._auto_class is None and not given_args
    backbone = Backbone(
        model=model.float().eval(),
        library="timm" if is_timm else "transformers",
        preprocessing=preprocessing,
        target=target or read_target(config, own_labels),
        source=source,
        new_head=new_head,
        is_auto_class=is_auto_class,
        pooling=pooling,
        weights=weights,
    )
    return with_image_size(backbone, model_config.image_size_px)


def _is_timm(source: Source, config: Mapping[str, Any]) -> bool:
    """Whether `config` describes a timm model. Raises ValueError if it describes no transformers model either."""
    is_timm = "architecture" in config and config.get("model_type") in (None, "timm_wrapper")
    if not is_timm and not config.keys() & {"model_type", "auto_map"}:
        raise ValueError(
            f"{source.name}: config.json names neither a timm architecture nor a transformers model_type; choose another"
        )
    return is_timm


def with_image_size(backbone: Backbone, image_size_px: int | None) -> Backbone:
    """Returns the backbone for square images with sides of `image_size_px` (None: of its own size), and their preprocessing.

    Tables of positions are resized, and all other weights are shared. Raises ValueError, with sizes that are possible, if the
    network or its preprocessing cannot have this size.
    """
    before = backbone.preprocessing
    if image_size_px is None or before.image_shape[1:] == (image_size_px, image_size_px):
        return backbone
    from hf_transfer.network.image_size import resize_network

    model = resize_network(backbone.model, before.image_shape, image_size_px)
    preprocessing = resize_preprocessing(before, image_size_px)
    size = f"{image_size_px}x{image_size_px}"
    log.info("%s: images of %s pixels in place of %dx%d", backbone.source.name, size, before.height_px, before.width_px)
    return replace(backbone, model=model, preprocessing=preprocessing, is_auto_class=False)


def as_target(labels: Sequence[str] | Target) -> Target:
    """Returns `labels`, or the target of classes with these names. Raises ValueError if a name repeats, or for one class."""
    target = labels if isinstance(labels, Target) else SingleLabel(names=tuple(labels))
    repeated = sorted({name for name in target.names if target.names.count(name) > 1})
    if repeated or len(target.names) < (2 if target.has_classes else 1):
        raise ValueError(f"labels must be two or more different names; {len(target.names)} given, repeated {repeated}")
    return target


def _find_upstream(
    source: Source, trust_remote_code: bool, given_args: Mapping[str, Any]
) -> "Upstream | PreTrainedConfig":
    """Returns the config of an image classifier of transformers, or the original class of any other checkpoint."""
    from transformers import AutoConfig

    from hf_transfer.network.headless import Upstream, find_upstream
    from hf_transfer.network.remote_code import check_trust, explained_code, find_remote_class
    from hf_transfer.network.transformers_models import apply_model_args, register_own_classes

    register_own_classes()
    check_trust(source, trust_remote_code=trust_remote_code)
    with explained_code(source), quiet_transformers():
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    apply_model_args(config, given_args)
    auto_map = getattr(config, "auto_map", None) or {}
    if "AutoModelForImageClassification" in auto_map:
        return config
    if trust_remote_code and auto_map:
        kind, code = find_remote_class(source, config)
        return Upstream(config=config, kind=kind, tower="", code=code)
    upstream = find_upstream(source, config)
    return config if upstream.is_classifier() else upstream


def create(
    architecture: str,
    labels: Sequence[str] | Target,
    *,
    image_size_px: int | None = None,
    model_args: str | None = None,
    seed: int = 0,
) -> Backbone:
    """Creates a model with random weights and a head for `labels`.

    `architecture`: a timm name, or a transformers model type (`vit`, `convnext`, ...) with its default sizes. `image_size_px`:
    the side of the square input; None: the architecture's default. `model_args`: a JSON object with arguments of timm's
    constructor, or with fields of the transformers config. Raises ValueError if the architecture is unknown, or does not
    accept `image_size_px` or `model_args`.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    given, target = read_model_args(model_args), as_target(labels)
    check_architecture(architecture)
    if architecture in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return _create_transformers(architecture, target, image_size_px, given, seed)
    torch.manual_seed(seed)
    size = {} if image_size_px is None else {"input_size": (3, image_size_px, image_size_px)}
    arguments: dict[str, Any] = {"num_classes": target.num_outputs, **given}
    try:
        model: Any = timm.create_model(architecture, **arguments)
        if image_size_px is not None and hasattr(model, "set_input_size"):
            model = timm.create_model(architecture, img_size=image_size_px, **arguments)
    except (TypeError, AssertionError, ValueError) as error:
        settings = f"image_size_px={image_size_px}{f' and model_args={model_args}' if given else ''}"
        raise ValueError(f"{architecture} cannot be created with {settings}: {error}") from error
    config = resolve_data_config({}, model=model) | size | {"crop_pct": 1.0}
    model.pretrained_cfg.update({k: config[k] for k in ("input_size", "crop_pct", "interpolation", "mean", "std")})
    with tempfile.TemporaryDirectory(prefix="hf_transfer-") as parent:
        # The model is saved as a checkpoint folder, so that it is loaded like every other checkpoint.
        folder = Path(parent, architecture)
        described = {"model_config": {"label_names": list(target.names)}, "model_args": given or None}
        save_timm(model, folder, **described)
        return replace(load(str(folder), target), new_head=True)


def check_architecture(name: str) -> None:
    """Raises ValueError, with similar names, if neither timm nor transformers has the architecture `name`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    known = [*timm.list_models(), *MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES]
    if name == "timm_wrapper" or not (timm.is_model(name) or name in known):
        near = ", ".join(difflib.get_close_matches(name, known, n=3))
        raise ValueError(
            f"architecture={name!r}: neither timm nor transformers has an architecture of this name"
            f"; {f'similar names: {near}' if near else 'timm.list_models() lists the names of timm'}"
        )


def with_new_head(backbone: Backbone, labels: Sequence[str] | Target) -> Backbone:
    """Returns a copy of the backbone with an untrained head for `labels`."""
    target = as_target(labels)
    model: Any = copy.deepcopy(backbone.model)
    is_auto_class = backbone.is_auto_class
    if backbone.library == "timm":
        is_auto_class = renew_classifier(model, target.num_outputs) and is_auto_class
    else:
        from hf_transfer.network.transformers_models import renew_heads

        renew_heads(model, target.names)
    return replace(backbone, model=model.eval(), target=target, new_head=True, is_auto_class=is_auto_class)


def _create_transformers(
    model_type: str, target: Target, image_size_px: int | None, model_args: dict[str, Any], seed: int
) -> Backbone:
    from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessor

    from hf_transfer.network.transformers_models import apply_model_args, set_labels

    config = AutoConfig.for_model(model_type)
    apply_model_args(config, model_args)
    set_labels(config, target.names)
    size_px = image_size_px or getattr(config, "image_size", None) or 224
    if hasattr(config, "image_size"):
        config.image_size = size_px
    torch.manual_seed(seed)
    try:
        model = AutoModelForImageClassification.from_config(config)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise ValueError(f"{model_type} cannot be created with image_size_px={size_px}: {error}") from error
    processor = ViTImageProcessor(size={"height": size_px, "width": size_px}, resample=Image.Resampling.BICUBIC)
    with tempfile.TemporaryDirectory(prefix="hf_transfer-") as parent:
        folder = Path(parent, model_type)
        with quiet_transformers():
            model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return replace(load(str(folder), target), new_head=True)
