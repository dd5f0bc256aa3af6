"""Loads timm checkpoints as people publish them, and checks that all weights outside the classifier are the checkpoint's own.

A config.json may lack arguments that only the checkpoint's model card names (`--model_args`), or may have settings of a feature
extractor. timm's own filter translates the names of tensors, so this module compares what comes out of this filter.
"""

import inspect
import json
import logging
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import timm.layers
import timm.models
import timm.models._builder as builder
import torch
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import nn

from hf_transfer.logs import log_once
from hf_transfer.network.damage import find_weights, read_tensors
from hf_transfer.network.fingerprint import describe_modules
from hf_transfer.network.model_args import is_unsafe_argument
from hf_transfer.network.source import Source
from hf_transfer.network.weights import (
    Weights,
    find_changed_weights,
    on_meta,
    shorten_names,
    starts_as_identity,
)

log = logging.getLogger(__name__)

ENCODER = "_enc"  # end of the names of timm's encoders of multimodal models, which have no classifier
# Names of tensors that only the pretraining task needs begin so, beside those of decoders and text towers.
PRETRAINING_ONLY = ("mask_token", "logit_scale", "logit_bias", "encoder.aligner.", "encoder.merger.")
# Arguments that timm adds only if it loads its own weights, which transformers' TimmWrapper does not let timm do. So they are
# given, and published, explicitly: otherwise TimmWrapper would compute other logits from the saved file.
ONLY_PRETRAINED: Mapping[str, Mapping[str, Any]] = {"fbnetc_100": {"bn_eps": 1e-3}}


@dataclass(frozen=True, kw_only=True)
class TimmModel:
    """A timm checkpoint's network, and the labels of its classifier (() if it has none)."""

    model: nn.Module
    label_names: tuple[str, ...]
    weights: Weights
    is_plain: bool  # whether timm creates the same network from the checkpoint's files


@dataclass(frozen=True, kw_only=True)
class _Architecture:
    """The arguments of `timm.create_model`, without num_classes. All are JSON values, since they are published."""

    name: str
    arguments: Mapping[str, Any]


def save_timm(model: nn.Module, folder: Path, **settings: Any) -> None:
    """Saves `model` as timm's `save_for_hf` does, also if tensors share memory (as in CoaT), which safetensors refuses."""

    def copy_shared(_: nn.Module, state: dict[str, torch.Tensor], *__: Any) -> None:
        seen = set()
        for name, tensor in state.items():
            if tensor.data_ptr() in seen:
                state[name] = tensor.clone()
            seen.add(tensor.data_ptr())

    handle = model.register_state_dict_post_hook(copy_shared)
    try:
        timm.models.save_for_hf(model, str(folder), safe_serialization=True, **settings)
    finally:
        handle.remove()


def load_timm(source: Source, config: Mapping[str, Any], given: Mapping[str, Any]) -> TimmModel:
    """Returns a timm checkpoint's network with its own classifier. `given`: the setting model_args.

    Raises ValueError if weights outside the classifier are missing, if the file has other weights of the network's layers, or
    if timm cannot create the network.
    """
    arguments = _read_arguments(source, config)
    cfg = {k: v for k, v in (config.get("pretrained_cfg") or {}).items() if k not in ("source", "custom_load")}
    name = _find_classifier(source, config["architecture"])
    # An encoder may have a pooling that its classifier does not know.
    is_default = "" in (arguments.get("global_pool"), cfg.get("global_pool")) or name != config["architecture"]
    if is_default:
        arguments.pop("global_pool", None)
        cfg.pop("global_pool", None)
    arguments |= {k: v for k, v in given.items() if (k, v) != ("global_pool", "")}
    arguments = {**ONLY_PRETRAINED.get(name, {}), **arguments}
    architecture = _find_architecture(source, name, arguments)
    counts = (config.get("num_classes"), cfg.get("num_classes"), 0)
    num_classes = int(next(count for count in counts if count is not None))
    weights = {name.removeprefix("timm_model."): tensor for name, tensor in read_tensors(source.folder)}
    if is_default or "global_pool" in given:
        architecture = _keep_norm(architecture, weights)
    cfg |= {"architecture": architecture.name, "num_classes": num_classes, "state_dict": weights}
    model, loaded = _create(source, architecture, cfg)
    loaded.log(source)
    if is_default and "global_pool" not in arguments:
        log.info("%s names no pooling: the default of %s, %r, is used and saved", source.name, architecture.name,
                 getattr(model, "global_pool", "its own"))  # fmt: skip
    is_projection = num_classes > 0 and _is_projection(config)
    if is_projection:
        log.info("%s: its %d outputs are a projection and no classes, so a new head replaces the projection",
                 source.name, num_classes)  # fmt: skip
    _log_changed(source, model, weights, loaded)
    log_once(log, f"{source.name}: timm {describe_architecture(model)}")
    has_classes = not (is_projection or loaded.new)
    return TimmModel(
        model=model,
        label_names=_read_label_names(config, num_classes) if has_classes else (),
        weights=loaded,
        is_plain=not (given or is_default or loaded.identity) and _is_one_file(source),
    )


def renew_classifier(model: nn.Module, num_classes: int) -> bool:
    """Gives `model` an untrained classifier, in place. Returns whether `timm.create_model` creates the same tensors.

    RepViT loses its distillation classifier here, which `timm.create_model` with the same number of classes creates.
    """
    own: Any = model
    had_classes, before = own.num_classes > 0, set(own.state_dict())
    # Before the reset, which may write arguments here that the checkpoint does not name.
    arguments = {name: value for name, value in own._model_args.items() if name != "num_classes"}
    own.reset_classifier(num_classes)
    if had_classes and set(own.state_dict()) == before:
        return True
    with on_meta():
        plain = timm.create_model(own.pretrained_cfg["architecture"], num_classes=num_classes, **arguments)
    return set(own.state_dict()) == set(plain.state_dict())


def _read_label_names(config: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    """Returns the names of a timm checkpoint's classes, as transformers' TimmWrapperConfig finds them.

    They are the names in config.json, or else the names of an ImageNet whose number of classes the checkpoint has. Names that
    are not as many as the classes do not count.
    """
    names = config.get("label_names")
    subset = infer_imagenet_subset(dict(config)) if names is None else None
    if subset:
        info = ImageNetInfo(subset)
        descriptions = info.label_descriptions(as_dict=True)
        names = [descriptions[synset] for synset in info.label_names()]
    by_number = (config.get("id2label") or {}) if names is None else dict(enumerate(names))
    known = {int(number): str(name) for number, name in by_number.items()} if len(by_number) == num_classes else {}
    return tuple(known.get(i, f"LABEL_{i}") for i in range(num_classes))


def _read_arguments(source: Source, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the constructor arguments in config.json. Raises ValueError if some would make timm load other files."""
    # timm itself may have written num_classes into model_args, and it must not be passed twice.
    arguments = {k: v for k, v in (config.get("model_args") or {}).items() if k != "num_classes"}
    # A downloaded config must not make timm load other files, since some of these may be pickles.
    loading = [k for k in arguments if is_unsafe_argument(k)]
    if loading or not timm.is_model(config["architecture"]):
        unsafe = f"model_args {loading}" if loading else f"architecture {config['architecture']!r}"
        raise ValueError(
            f"{source.name}: config.json has {unsafe}; choose a checkpoint with only an architecture of timm and its arguments"
        )
    return arguments


def _find_classifier(source: Source, name: str) -> str:
    """Returns the architecture `name`, or the classifier over it if `name` is timm's image encoder of a multimodal model."""
    if not name.endswith(ENCODER):
        return name
    classifier = name.removesuffix(ENCODER)
    if not timm.is_model(classifier):
        raise ValueError(
            f"{source.name}: {name} is an encoder, for which timm has no classifier; choose another architecture"
        )
    log.info("%s: the encoder %s is loaded and saved as %s, timm's classifier over it", source.name, name, classifier)
    return classifier


def _is_one_file(source: Source) -> bool:
    """Whether timm reads the checkpoint's weights, which it does not if they are in shards."""
    files = find_weights(source.folder)
    return len(files) == 1 and files[0].name in ("model.safetensors", "pytorch_model.bin")


# --- weights ----------------------------------------------------------------------------------------------------------


def _create(
    source: Source, architecture: _Architecture, pretrained_cfg: Mapping[str, Any]
) -> tuple[nn.Module, Weights]:
    """Returns the network with the checkpoint's weights, and how the file's tensors differ from the network's."""
    differences = Weights(new=frozenset(), identity=frozenset(), unused=frozenset())

    def complete(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        nonlocal differences
        if hasattr(model, "encoder") and not any(name.startswith("encoder.") for name in state):
            state = {f"encoder.{name}": tensor for name, tensor in state.items()}
        differences = _compare(source, architecture, state, model)
        own = model.state_dict()
        absent = {n for n in own if n in differences.new or n.rpartition(".")[0] in differences.identity}
        return {n: t for n, t in state.items() if n not in differences.unused} | {n: own[n] for n in absent}

    try:
        with _after_filter(complete):
            model: nn.Module = timm.create_model(
                architecture.name,
                pretrained=True,
                pretrained_cfg=dict(pretrained_cfg),
                num_classes=pretrained_cfg["num_classes"],
                **architecture.arguments,
            )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source.name}: the weights do not fit {architecture.name}: {reason}") from error
    except (TypeError, LookupError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"{source.name}: timm cannot create {architecture.name} with {_format(architecture.arguments)}: {error}"
        ) from error
    model.pretrained_cfg.pop("state_dict", None)  # type: ignore[operator, union-attr]
    return model, differences


def _log_changed(source: Source, model: nn.Module, weights: Mapping[str, torch.Tensor], differences: Weights) -> None:
    """Logs the names of the tensors outside the classifier that equal no tensor of the file."""
    known = {n for n, t in model.state_dict().items() if n in weights and torch.equal(t, weights[n].to(t.dtype))}
    known |= {n for n in model.state_dict() if n.rpartition(".")[0] in differences.identity}
    known |= {n for n in model.state_dict() if n.endswith(".num_batches_tracked")} | set(_tensors_of_heads(model))
    if len(known) < len(model.state_dict()) and (changed := find_changed_weights(model, source.folder, known)):
        log.info("%s: timm computed these tensors from the file's (merged, summed or at another size): %s",
                 source.name, shorten_names(changed))  # fmt: skip


@contextmanager
def _after_filter(change: Callable[[dict[str, torch.Tensor], nn.Module], dict[str, torch.Tensor]]) -> Iterator[None]:
    """Makes timm load `change(state, model)` in place of `state`, the tensors after timm's own filter, in the `with` block."""
    load_pretrained = builder.load_pretrained

    def load(model: nn.Module, **settings: Any) -> None:
        own_filter = settings.pop("filter_fn", None)

        def filter_fn(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
            state = dict(state)
            if own_filter is not None:
                try:
                    state = own_filter(state, model)
                except TypeError:  # as in timm: some filters have one parameter
                    state = own_filter(state)
            return change(state, model)

        load_pretrained(model, filter_fn=filter_fn, **settings)

    builder.load_pretrained = load  # type: ignore[assignment]
    try:
        yield
    finally:
        builder.load_pretrained = load_pretrained


def _compare(
    source: Source, architecture: _Architecture, state: Mapping[str, torch.Tensor], model: nn.Module
) -> Weights:
    """Compares the names of the tensors of the file and of `model`. Raises ValueError if they are not of one network."""
    own = {name for name in model.state_dict() if not name.endswith(".num_batches_tracked")}
    absent, unexpected = own - set(state), set(state) - set(model.state_dict())
    head = set(_tensors_of_heads(model, state))
    new = absent & head if head & own <= absent else set()
    identity = {name for name in absent - new if starts_as_identity(model, name, unexpected)}
    missing = absent - new - identity
    children = {name for name, _ in model.named_children()}
    # Tensors of a module that the network has, or of no module, are those of another network, not of a decoder or text tower.
    foreign = {
        name
        for name in unexpected - head
        if (name.partition(".")[0] in children or "." not in name) and not name.startswith(PRETRAINING_ONLY)
    }
    # timm itself sums or repeats the kernels of the first convolution for another number of channels.
    first = model.pretrained_cfg.get("first_conv") or ()  # type: ignore[operator, union-attr]
    adapted = head | {f"{name}.weight" for name in ((first,) if isinstance(first, str) else first)}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    reshaped = {name for name in shapes.keys() & state.keys() - adapted if state[name].shape != shapes[name]}
    problems = {
        "lacks weights outside the head": missing,
        f"has weights that {architecture.name} lacks": foreign,
        f"has weights of other shapes than {architecture.name}": reshaped,
    }
    if any(problems.values()):
        example = (
            '{"global_pool": "avg"}'
            if any(name.startswith("attn_pool.") for name in missing)
            else '{"init_values": 1e-5}'
        )
        listed = " and ".join(f"{problem}: {shorten_names(names)}" for problem, names in problems.items() if names)
        raise ValueError(
            f"{source.name} {listed}. Remedy: if the model card creates the network with "
            f"arguments that config.json lacks, give them, such as --model_args '{example}'"
        )
    return Weights(
        new=frozenset(new),
        identity=frozenset(name.rpartition(".")[0] for name in identity),
        unused=frozenset(unexpected),
    )


def _tensors_of_heads(model: nn.Module, state: Mapping[str, torch.Tensor] | None = None) -> list[str]:
    """Returns the names of the classifiers' tensors in `state` and in the network."""
    own: Any = model.pretrained_cfg
    default = timm.get_pretrained_cfg(own["architecture"])
    heads: set[str] = set()
    for cfg in (own, default.to_dict() if default else {}):
        names = cfg.get("classifier") or ()
        heads |= {names} if isinstance(names, str) else set(names)
    prefixes = tuple(f"{name}." for name in heads)
    return [name for name in {*model.state_dict(), *(state or {})} if name.startswith(prefixes)]


def _is_projection(config: Mapping[str, Any]) -> bool:
    """Whether the outputs are features of a CLIP-like image tower, which have no labels, and not classes."""
    cfg = config.get("pretrained_cfg") or {}
    if config.get("label_names") or cfg.get("label_names") or infer_imagenet_subset(dict(config)):
        return False
    return "clip" in f"{config['architecture']} {cfg.get('tag') or ''}".lower()


# --- arguments --------------------------------------------------------------------------------------------------------


def _find_architecture(source: Source, name: str, arguments: Mapping[str, Any]) -> _Architecture:
    """Returns arguments that plain timm accepts and that create the network that `arguments` describe.

    timm itself accepts names of activations and norms. Of other layers, it accepts only the class, which config.json cannot
    contain. Then the network is described by another architecture of timm, which has these layers by default.
    """
    named = {k: layer for k, v in arguments.items() if (layer := _find_layer(v)) is not None}
    try:
        if named:
            with on_meta():
                timm.create_model(name, num_classes=0, **arguments)
        return _Architecture(name=name, arguments=arguments)
    except TypeError as error:
        if "'str' object" not in str(error):
            raise ValueError(f"{source.name}: timm cannot create {name} with {_format(arguments)}: {error}") from error
    twin = _find_twin(name, {**arguments, **named})
    if twin is None:
        raise ValueError(
            f"{source.name}: plain timm creates no {name} with {_format(arguments)} from a config.json, so the trained model "
            "could not be published; choose a checkpoint of another architecture"
        )
    log.info("%s: %s with %s is saved as %s, since timm reads no classes of layers from a config.json", source.name, name,
             _format(arguments), twin.name)  # fmt: skip
    return twin


def _keep_norm(architecture: _Architecture, names: Container[str]) -> _Architecture:
    """Returns the architecture with the norm before the pooling if the file has this norm, and no norm behind the pooling.

    Some poolings of timm move the norm behind the pooling, where the file's norm would compute something else.
    """
    if "norm.weight" not in names or "fc_norm.weight" in names:
        return architecture
    with on_meta():
        model = timm.create_model(architecture.name, num_classes=0, **architecture.arguments)
    known = inspect.signature(type(model)).parameters
    setting = next((name for name in ("fc_norm", "use_fc_norm") if name in known), None)
    if setting is None or "fc_norm.weight" not in model.state_dict():
        return architecture
    return replace(architecture, arguments={**architecture.arguments, setting: False})


def _find_layer(value: Any) -> Any:
    """Returns the class or function that `value` names in timm.layers or torch.nn, or None."""
    if not isinstance(value, str):
        return None
    layer = getattr(timm.layers, value, None) or getattr(nn, value, None)
    return layer if callable(layer) else None


def _find_twin(name: str, wanted: Mapping[str, Any]) -> _Architecture | None:
    """Returns an architecture with JSON arguments that creates the same modules as `name` with the arguments `wanted`."""
    try:
        with on_meta():
            reference = timm.create_model(name, num_classes=0, **wanted)
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"timm cannot create {name} with {_format(wanted)}: {error}") from error
    described = _describe_network(reference)
    target = _constructor_arguments(name, wanted)
    size = getattr(getattr(reference, "patch_embed", None), "img_size", None)
    module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    for other in timm.list_models(module=module):
        own = _constructor_arguments(other, {})
        layers = {k: v for k, v in target.items() if callable(v) and k in wanted}
        if any(own.get(k) is not v for k, v in layers.items() if k not in ("act_layer", "norm_layer")):
            continue
        changed = {k: target.get(k) for k in sorted({*target, *own}) if target.get(k) != own.get(k)}
        arguments = {k: _to_json(v) for k, v in changed.items()} | ({"img_size": list(size)} if size else {})
        try:
            json.dumps(arguments)
            with on_meta():
                twin = timm.create_model(other, num_classes=0, **arguments)
        except (TypeError, ValueError, KeyError, AssertionError, RuntimeError):
            continue
        if _describe_network(twin) == described:
            return _Architecture(name=other, arguments=arguments)
    return None


def _to_json(value: Any) -> Any:
    """Returns what config.json contains for a constructor argument: a layer's name, and False for None, which timm ignores."""
    return False if value is None else getattr(value, "__name__", value)


def _describe_network(model: nn.Module) -> Any:
    for name in ("_model_args", "pretrained_model_args", "_traits"):
        model.__dict__.pop(name, None)
    return describe_modules(model), {name: tensor.shape for name, tensor in model.state_dict().items()}


def _constructor_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments with which timm's function for the architecture `name` calls the constructor; creates nothing."""

    class _Stop(Exception):  # noqa: N818 - no error
        pass

    def stop(*_: Any, **settings: Any) -> None:
        raise _Stop({k: v for k, v in settings.items() if k not in _BUILDER_SETTINGS})

    function = timm.models.model_entrypoint(name)
    module: Any = sys.modules[function.__module__]
    build = module.build_model_with_cfg
    module.build_model_with_cfg = stop
    try:
        function(**arguments)
    except _Stop as stopped:
        return dict(stopped.args[0])
    finally:
        module.build_model_with_cfg = build
    return {}


_BUILDER_SETTINGS = frozenset({
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "model_cfg", "feature_cfg", "pretrained_strict"),
    *("pretrained_filter_fn", "cache_dir", "kwargs_filter", "pretrained_model_args"),
})  # fmt: skip


def describe_architecture(model: nn.Module) -> str:
    """Returns the architecture, its arguments, and the classes of the activations, norms and perceptrons, as text.

    Networks with other activations have equal names and shapes of tensors, so that only people can compare this text with the
    model card.
    """
    own: Any = model
    modules = {type(m).__name__: type(m).__module__ for m in model.modules()}
    layers = sorted(n for n, m in modules.items() if "activation" in m or "Norm" in n or "LU" in n or "Mlp" in n)
    arguments = {name: value for name, value in getattr(own, "_model_args", {}).items() if name != "num_classes"}
    given = f" with {_format(arguments)}" if arguments else ""
    return f"architecture {own.pretrained_cfg['architecture']}{given}, layers {', '.join(layers)}"


def _format(arguments: Mapping[str, Any]) -> str:
    return json.dumps(dict(arguments), default=str)
