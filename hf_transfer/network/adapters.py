"""PEFT adapters: small trainable modules that `peft` adds to a network, and that can be merged into the network's weights.

    adapted, chain = add_adapters(backbone, chain, AdapterConfig(method="lora"))
    ... train the parameters that adapted.policy() selects ...
    merged = merge_adapters(adapted)          # the plain model again

`peft` replaces a module by a wrapper that is called in the same place, so the chain (the network as a sequence of layers) keeps
its cuts. An adapter's parameters belong to the layer of the adapted module. New adapters leave the logits unchanged, which
`add_adapters` checks, so a head that was solved on the frozen features remains the right start.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from hf_transfer.confidence.record import read_confidence
from hf_transfer.config import EMBEDDED_CHECKPOINT, AdapterConfig, ModelConfig
from hf_transfer.errors import count_noun
from hf_transfer.locations import resolve_model
from hf_transfer.network.backbone import Backbone, load, with_new_head
from hf_transfer.network.chain import Chain
from hf_transfer.network.damage import check_weights, read_json
from hf_transfer.network.fingerprint import Identity, describe_modules, hash_tensors, identify, named_tensors
from hf_transfer.network.forward import compute_logits, eval_mode
from hf_transfer.network.head import LinearHead
from hf_transfer.network.methods import make_peft_config
from hf_transfer.network.policies import Policy
from hf_transfer.network.source import ADAPTER_CONFIG, fetch_adapter
from hf_transfer.network.targets import Targets, find_targets, shorten
from hf_transfer.targets.target import read_target

log = logging.getLogger(__name__)

TASK = (
    "task.json"  # this file in an adapter folder has labels, classifier, preprocessing and a hash of the base's weights
)
# Largest allowed change of a logit when adapters are added or merged, relative to the largest logit, in float32. An error
# changes logits by percents. Rounding in fifty layers of MobileNetV2 with random adapters changes logits by 1.3e-4.
SAME_RELATIVE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Adapted(Backbone):
    """A backbone whose model contains adapters. Save the adapters as a folder, or merge them with `merge_adapters`."""

    network: Any = field(repr=False)  # the PeftModel that wraps `model`
    adapter: AdapterConfig
    targets: tuple[str, ...]
    trained: frozenset[str]  # names of the adapters' parameters
    head: LinearHead
    num_plain: int  # parameters of the plain model
    base_weights: str  # hash of the plain model without its head
    plain_state: frozenset[str] = field(repr=False)  # names in the plain model's state dict
    buffers: Mapping[str, torch.Tensor] = field(repr=False)  # buffers of the plain model before training

    def policy(self) -> Policy:
        """Returns the policy that trains the adapters and the classifier."""
        return Policy(
            name=f"adapters({self.adapter.name})", select=lambda chain: self.trained | set(chain.classifier_parameters)
        )

    @property
    def num_trainable(self) -> int:
        """The number of trained parameters in the adapters and in the head."""
        sizes = {name: p.numel() for name, p in self.model.named_parameters()}
        return sum(size for name, size in sizes.items() if name in self.trained or self.head.owns(name))

    @property
    def trainable_share(self) -> float:
        """The number of trained parameters divided by the number of parameters of the plain model."""
        return self.num_trainable / self.num_plain

    def describe(self) -> dict[str, Any]:
        """Returns the entries of results.json that describe the adapters."""
        return {
            "method": self.adapter.method,
            "rank": self.adapter.size if self.adapter.has_rank else None,
            "alpha": self.adapter.scale if self.adapter.has_rank else None,
            "targets": list(self.targets),
            "num_trainable": self.num_trainable,
            "trainable_share": self.trainable_share,
        }


def add_adapters(backbone: Backbone, chain: Chain, adapter: AdapterConfig) -> tuple[Adapted, Chain]:
    """Adds adapters to the backbone's model, in place, and returns the adapted backbone and the chain of its layers.

    Raises ValueError, with possible settings, if no module can be adapted as requested, or if the model has no linear head.
    """
    targets = find_targets(chain, adapter)
    assert chain.head is not None
    model = backbone.model
    before = _probe_logits(backbone)
    base_weights = _hash_base(model, chain.head)
    plain_state = frozenset(model.state_dict())
    buffers = {n: b.detach().cpu().clone() for n, b in model.named_buffers() if n in plain_state}
    plain = {id(p): p.numel() for p in model.parameters()}
    names, modules = {id(t): n for n, t in named_tensors(model).items()}, describe_modules(model)
    network = _inject(model, adapter, targets.modules)
    trained = frozenset(n for n, p in model.named_parameters() if p.requires_grad and id(p) not in plain)
    after = _probe_logits(backbone)
    _check_same(before, after, f"adding {adapter.method} adapters", "choose another method: --adapter")
    adapted = Adapted(
        **{f.name: getattr(backbone, f.name) for f in fields(Backbone)},
        network=network,
        adapter=adapter,
        targets=tuple(targets.modules),
        trained=trained,
        head=chain.head,
        num_plain=sum(plain.values()),
        base_weights=base_weights,
        plain_state=plain_state,
        buffers=buffers,
    )
    _log_adapters(adapted, targets)
    # New adapters may change the logits by rounding (DoRA). Their activations are then stored under keys of their own.
    known_as = _plain_identity(model, names, modules) if torch.equal(before, after) else None
    return adapted, replace(_assign_layers(chain, targets.modules), known_as=known_as)


def _log_adapters(adapted: Adapted, targets: Targets) -> None:
    log.info(
        "added %s to %s (%s): adapters and head have %s trainable parameters, %.2f %% of %s in the plain model",
        adapted.adapter.name, count_noun(len(targets.modules), "module"), ", ".join(shorten(targets.modules)),
        f"{adapted.num_trainable:,}", 100 * adapted.trainable_share, f"{adapted.num_plain:,}",
    )  # fmt: skip
    for line in targets.describe_left_out():
        log.info("%s", line)


def merge_adapters(adapted: Adapted) -> Backbone:
    """Merges the adapters into the adapted modules, in place and on the CPU, and returns the backbone without adapters.

    Raises RuntimeError if merging changes the logits.
    """
    model = adapted.model
    model.cpu()  # a GPU may compute convolutions less precisely than the comparison of logits requires
    before = _probe_logits(adapted)
    with quiet_peft():
        merged = adapted.network.merge_and_unload(safe_merge=True)
    assert merged is model
    # merge_and_unload leaves this attribute on the model, and peft would warn about it when adapters are added again.
    model.__dict__.pop("peft_config", None)
    other = adapted.plain_state ^ set(model.state_dict())
    if other:
        raise RuntimeError(f"merging {adapted.adapter.method} changed tensor names of the model: {sorted(other)[:5]}")
    _check_same(before, _probe_logits(adapted), f"merging {adapted.adapter.method} adapters", "choose --no-merge")
    return Backbone(**{f.name: getattr(adapted, f.name) for f in fields(Backbone)})


def is_adapter_folder(checkpoint: str) -> bool:
    """Whether `checkpoint` is a folder that contains an adapter and no full model."""
    folder = Path(checkpoint).expanduser()
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").exists()


def find_adapter(model: str) -> Path | None:
    """Returns the adapter folder that `model` (a folder, also of a run, or a Hub id) names, or None if it names no adapter.

    Raises ValueError, with the remedy, if the files cannot be downloaded from the Hub.
    """
    if model != EMBEDDED_CHECKPOINT:
        model = resolve_model(model)
    folder: Path | None = Path(model).expanduser()
    if model != EMBEDDED_CHECKPOINT and not Path(model).expanduser().is_dir():
        folder = fetch_adapter(model)
    return folder if folder is not None and is_adapter_folder(str(folder)) else None


def read_base(folder: Path) -> str:
    """Returns the id of the checkpoint that the adapter in `folder` was trained on: `owner/name`, or `owner/name@revision`."""
    config = read_json(folder / ADAPTER_CONFIG)
    base_id, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base_id, str):
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} names no base_model_name_or_path: give an adapter that names its base"
        )
    return f"{base_id}@{revision}" if revision else base_id


def load_adapted(folder: str | Path, *, checkpoint: str | None = None, base: Backbone | None = None) -> Backbone:
    """Loads the base checkpoint of an adapter folder, merges the adapters into it, and returns the plain backbone.

    `checkpoint`: the folder or Hub id of the base checkpoint (None: the id that the adapter folder records). `base`: the base
    checkpoint if it is already loaded; its weights stay unchanged. Raises ValueError if this package did not save the adapter
    folder, or if the adapters were trained on other weights than those of the base checkpoint.
    """
    from peft import PeftModel

    folder = Path(folder).expanduser()
    task = read_task(folder)
    check_weights(folder / "adapter_model.safetensors")  # without this file, peft would load a pickle
    recorded, target = read_base(folder), read_target(task, task["label_names"])
    base_id, _, revision = recorded.partition("@")
    if base is not None:
        base = with_new_head(base, target)
    else:
        # A timm adapter has no such file; its base's preprocessing is the adapter's.
        own = folder / "preprocessor_config.json"
        settings = ModelConfig(
            checkpoint=checkpoint or recorded,
            base_model=base_id,
            preprocessing_from=str(own) if checkpoint is None and own.is_file() else None,
            pooling=task.get("pooling", "auto"),
        )
        base = load(settings, target)
    names = task["classifier"]
    head = LinearHead(modules=(names,) if isinstance(names, str) else tuple(names))  # older folders have one name
    if _hash_base(base.model, head) != task["base_weights"]:
        raise ValueError(
            f"the adapters in {folder.name!r} were trained on other weights than those of "
            f"{checkpoint or base.source.name}: choose the checkpoint that the adapters were trained on"
        )
    try:
        with quiet_peft():
            PeftModel.from_pretrained(base.model, str(folder)).merge_and_unload(safe_merge=True)
    except (SafetensorError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"the adapter in {folder} is damaged or does not fit its base ({error}); download or save the adapter again"
        ) from error
    base.model.__dict__.pop("peft_config", None)
    # The hash proves that these are the recorded checkpoint's weights, even if they were read from another place.
    source = replace(base.source, id=base_id, revision=revision or base.source.revision)
    confidence = read_confidence(folder)
    return replace(base, model=base.model.eval(), source=source, new_head=False, confidence=confidence)


def read_task(folder: Path) -> dict[str, Any]:
    """Returns the contents of task.json in an adapter folder. Raises ValueError if this package did not save the folder."""
    if not is_adapter_folder(str(folder)) or not (folder / TASK).is_file():
        raise ValueError(f"{folder.name!r} is no adapter folder of hf-transfer: it lacks {ADAPTER_CONFIG} or {TASK}")
    task = read_json(folder / TASK)
    missing = sorted({"label_names", "classifier", "base_weights"} - task.keys())
    if missing:
        raise ValueError(f"{folder / TASK} is damaged: it lacks {missing[0]}; save the adapter again")
    return task


def check_saved_apart(adapted: Adapted) -> str:
    """Returns the Hub id of the base checkpoint, after checking that the adapters can be saved without merging.

    Raises ValueError, with the remedy, if the Hub id is unknown, or if peft would mistake an adapted module for the head.
    """
    if adapted.source.id is None:
        raise ValueError(
            f"--no-merge: an adapter folder names its base checkpoint by a Hub id, and {adapted.source.name} is a folder "
            "without a Hub id. Give --base_model owner/name if the Hub has its weights, or save a merged model (--merge)"
        )
    mistaken = [name for name in adapted.targets if name.endswith(adapted.head.modules)]
    if mistaken:
        raise ValueError(
            f"--no-merge: peft takes every module whose name ends with {' or '.join(adapted.head.modules)} for the head, and "
            f"{mistaken[0]}, which has an adapter, is such a module. Save a merged model (--merge), or choose other --targets"
        )
    return adapted.source.id


def _inject(model: nn.Module, adapter: AdapterConfig, targets: Mapping[str, nn.Module]) -> Any:
    import peft  # imported here because the import takes seconds, and runs without adapters do not need peft

    config = make_peft_config(adapter, _as_target_modules(model, targets))
    # The adapters' weights are drawn on the CPU from a seed, so they are equal on every device and in every process.
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(adapter.seed)
        return peft.get_peft_model(model, config)


def _as_target_modules(model: nn.Module, targets: Iterable[str]) -> list[str] | str:
    """Returns the value of peft's setting `target_modules` that selects exactly the modules named in `targets`."""
    names = list(targets)  # peft adapts every module whose name ends with an entry of the list
    matched = [n for n, _ in model.named_modules() if any(n == t or n.endswith("." + t) for t in names)]
    return names if len(matched) == len(names) else "|".join(map(re.escape, names))


def _assign_layers(chain: Chain, targets: Iterable[str]) -> Chain:
    """Returns a copy of the chain in which the tensors of each adapter belong to the layer of the adapted module."""
    owners = {name: i for i, layer in enumerate(chain.layers) for name in (*layer.parameters, *layer.buffers)}
    layer_of_target = {t: owners[n] for t in targets for n in owners if n.rpartition(".")[0] == t}

    def find_layer(name: str) -> int | None:
        if name in owners:
            return owners[name]
        parts = name.split(".")
        outer = (".".join(parts[:i]) for i in range(len(parts)))
        return next((layer_of_target[o] for o in outer if o in layer_of_target), None)

    parameters: list[list[str]] = [[] for _ in chain.layers]
    buffers: list[list[str]] = [[] for _ in chain.layers]
    unused = []
    for by_layer, items in ((parameters, chain.model.named_parameters()), (buffers, chain.model.named_buffers())):
        for name, _ in items:
            i = find_layer(name)
            if i is not None:
                by_layer[i].append(name)
            elif by_layer is parameters:
                unused.append(name)
    layers = tuple(
        replace(layer, parameters=tuple(p), buffers=tuple(b))
        for layer, p, b in zip(chain.layers, parameters, buffers, strict=True)
    )
    return replace(chain, layers=layers, unused_parameters=tuple(unused))


def _plain_identity(model: nn.Module, plain: Mapping[int, str], modules: Mapping[str, str]) -> Callable[[], Identity]:
    """Returns a function whose result is the plain network's identity until an adapter changes, and later another identity.

    `plain` maps each tensor's id to the tensor's name in the plain network. `modules` describes the plain network's modules.
    """
    names = {name: plain.get(id(tensor), "") for name, tensor in named_tensors(model).items()}

    def hash_added() -> str:
        return hash_tensors({name: tensor for name, tensor in named_tensors(model).items() if not names[name]})

    start, identity = hash_added(), Identity(tensor_names=names, modules=modules)
    return lambda: identity if hash_added() == start else identify(model)


def _probe_logits(backbone: Backbone) -> torch.Tensor:
    """Returns the backbone's logits (2, K) for two fixed images of noise."""
    noise = torch.randn(2, *backbone.preprocessing.image_shape, generator=torch.Generator().manual_seed(0))
    with eval_mode(backbone.model), torch.no_grad():
        return compute_logits(backbone.model, noise.to(next(backbone.model.parameters()).device))


def _hash_base(model: nn.Module, head: LinearHead) -> str:
    return hash_tensors({n: t for n, t in model.state_dict().items() if not head.owns(n)})


def _check_same(before: torch.Tensor, after: torch.Tensor, label: str, remedy: str) -> None:
    difference = float((after - before).abs().max() / before.abs().max().clamp(min=1.0))
    if not difference <= SAME_RELATIVE:
        raise RuntimeError(f"{label} changed the logits by {difference:.2g} (relative to the largest logit): {remedy}")


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hides the warnings of peft while the `with` block runs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.")
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
        yield
