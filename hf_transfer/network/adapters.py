"""PEFT adapters on any chain: small trained parts beside frozen maps, which can be merged into them afterwards.

    adapted, chain = add_adapters(backbone, chain, Adapter(method="lora"))
    ... train adapted.policy(): the cut follows from it ...
    merged = merge_adapters(adapted)          # the plain model again

`peft` puts its layers into the plain model; the chain keeps its cuts, since a wrapped map is called where the map was, and
an adapter's parameters lie in the layer of their map. What can be adapted is found by running the network once: no table of
families. Every method here is the identity before its first step (checked), so a head that was solved on the frozen features
stays the right start.
"""

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_transfer.config import EMBEDDED_CHECKPOINT
from hf_transfer.network.backbone import Backbone, load, with_new_head
from hf_transfer.network.chain import Chain
from hf_transfer.network.fingerprint import Identity, describe_modules, hash_tensors, identify, named_tensors
from hf_transfer.network.forward import compute_logits, eval_mode
from hf_transfer.network.methods import METHODS, Adapter
from hf_transfer.network.policies import Policy
from hf_transfer.network.source import ADAPTER_CONFIG, fetch_adapter
from hf_transfer.network.targets import Targets, find_targets, shorten

log = logging.getLogger(__name__)

TASK = "task.json"  # ours, in the same folder: labels, classifier, preprocessing, and a hash of the base's weights
# Of the largest logit, in float32: adapters at their start against none, merged against apart. What is wrong differs by
# per cents; fifty layers of random adapters on MobileNetV2 round to 1.3e-4.
SAME_RELATIVE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Adapted(Backbone):
    """A backbone whose plain model holds adapters. Saved as it is, it is an adapter folder; see `merge_adapters`."""

    network: Any = field(repr=False)  # peft's PeftModel around the same model
    how: Adapter
    targets: tuple[str, ...]
    trained: frozenset[str]  # names of the adapters' parameters
    classifier: str
    num_plain: int  # parameters of the plain model
    base_weights: str  # hash of the plain model without its classifier
    plain_state: frozenset[str] = field(repr=False)  # names in the plain model's state
    buffers: Mapping[str, torch.Tensor] = field(repr=False)  # the plain model's, as they were

    def policy(self) -> Policy:
        """The adapters' parameters and the classifier train."""
        return Policy(
            name=f"adapters({self.how.name})", select=lambda chain: self.trained | set(chain.classifier_parameters)
        )

    @property
    def num_trainable(self) -> int:
        """Numbers that the policy trains: the adapters' and the head's."""
        head = self.model.get_submodule(self.classifier)
        sizes = {name: p.numel() for name, p in self.model.named_parameters()}
        return sum(sizes[name] for name in self.trained) + sum(p.numel() for p in head.parameters())

    @property
    def trainable_share(self) -> float:
        """They, against the parameters of the plain model."""
        return self.num_trainable / self.num_plain

    def describe(self) -> dict[str, Any]:
        """What results.json says of it."""
        return {
            "method": self.how.method,
            "rank": self.how.size if METHODS[self.how.method].has_rank else None,
            "alpha": self.how.scale if METHODS[self.how.method].has_alpha else None,
            "targets": list(self.targets),
            "num_trainable": self.num_trainable,
            "trainable_share": self.trainable_share,
        }


def add_adapters(backbone: Backbone, chain: Chain, how: Adapter) -> tuple[Adapted, Chain]:
    """Puts adapters into the backbone's model, in place; the same backbone and chain, which know of them.

    Raises ValueError, with what is possible, where nothing can be adapted so, and where the chain has no classifier.
    """
    targets = find_targets(chain, how)
    assert chain.classifier is not None
    model = backbone.model
    before = _answer(backbone)
    base_weights = _hash_base(model, chain.classifier)
    plain_state = frozenset(model.state_dict())
    buffers = {n: b.detach().cpu().clone() for n, b in model.named_buffers() if n in plain_state}
    plain = {id(p): p.numel() for p in model.parameters()}
    names, modules = {id(t): n for n, t in named_tensors(model).items()}, describe_modules(model)
    network = _inject(model, how, targets.modules)
    trained = frozenset(n for n, p in model.named_parameters() if p.requires_grad and id(p) not in plain)
    after = _answer(backbone)
    _check_same(before, after, f"{how.method} at its start", "choose another --adapter")
    adapted = Adapted(
        **{f.name: getattr(backbone, f.name) for f in fields(Backbone)},
        network=network,
        how=how,
        targets=tuple(targets.modules),
        trained=trained,
        classifier=chain.classifier,
        num_plain=sum(plain.values()),
        base_weights=base_weights,
        plain_state=plain_state,
        buffers=buffers,
    )
    _say(adapted, targets)
    followed = _follow(chain, targets.modules)
    # Those that are the identity up to rounding (DoRA) have stores of their own.
    return adapted, replace(followed, known_as=_know_plainly(model, names, modules)) if torch.equal(
        before, after
    ) else followed


def _say(adapted: Adapted, targets: Targets) -> None:
    log.info(
        "%s on %d maps (%s): %s parameters train, the head's among them, %.2f %% of %s",
        adapted.how.name, len(targets.modules), ", ".join(shorten(targets.modules)), f"{adapted.num_trainable:,}",
        100 * adapted.trainable_share, f"{adapted.num_plain:,}",
    )  # fmt: skip
    for line in targets.describe_left_out():
        log.info("%s", line)


def merge_adapters(adapted: Adapted) -> Backbone:
    """The backbone with its plain model, in place and on the CPU: the adapters are added into the maps that they stood beside.

    Raises RuntimeError where the merged network answers otherwise than the adapted one.
    """
    model = adapted.model
    model.cpu()  # a GPU may convolve in fewer bits than are compared here
    before = _answer(adapted)
    with _quiet():
        merged = adapted.network.merge_and_unload(safe_merge=True)
    assert merged is model
    # merge_and_unload leaves this behind, and a second injection would warn of it.
    model.__dict__.pop("peft_config", None)
    other = adapted.plain_state ^ set(model.state_dict())
    if other:
        raise RuntimeError(f"merging {adapted.how.method} left another network: {', '.join(sorted(other)[:5])}")
    _check_same(before, _answer(adapted), f"merged {adapted.how.method}", "keep it apart (--no-merge)")
    return Backbone(**{f.name: getattr(adapted, f.name) for f in fields(Backbone)})


def is_adapter_folder(checkpoint: str) -> bool:
    """Whether it is a folder that holds an adapter, and no checkpoint."""
    folder = Path(checkpoint).expanduser()
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").exists()


def find_adapter(model: str) -> Path | None:
    """The folder of an adapter: `model` itself, or the files of a Hub id, which are fetched; None for a checkpoint.

    Raises ValueError for what the Hub refuses, with what to do.
    """
    folder: Path | None = Path(model).expanduser()
    if model != EMBEDDED_CHECKPOINT and not Path(model).expanduser().is_dir():
        folder = fetch_adapter(model)
    return folder if folder is not None and is_adapter_folder(str(folder)) else None


def read_base(folder: Path) -> str:
    """The base that an adapter folder records: `owner/name`, with `@revision` where one is known."""
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    base_id, revision = config["base_model_name_or_path"], config.get("revision")
    return f"{base_id}@{revision}" if revision else str(base_id)


def load_adapted(folder: str | Path, *, checkpoint: str | None = None, base: Backbone | None = None) -> Backbone:
    """The plain backbone of an adapter folder that this package saved, with the adapters merged.

    `checkpoint`: a folder or id of its base, where the id that it records cannot be reached. `base`: that base, loaded
    already, which stays as it is: for several adapters beside one. Raises ValueError for a folder of another origin, and for a
    base whose weights are not those that the adapters were trained on.
    """
    from peft import PeftModel

    folder = Path(folder).expanduser()
    task = read_task(folder)
    recorded = read_base(folder)
    base_id, _, revision = recorded.partition("@")
    if base is not None:
        base = with_new_head(base, task["label_names"])
    else:
        base = load(checkpoint or recorded, task["label_names"], base_model=base_id)
    if _hash_base(base.model, task["classifier"]) != task["base_weights"]:
        raise ValueError(
            f"the adapters of {folder.name!r} were trained on other weights than those of "
            f"{checkpoint or base.source.name}: name the checkpoint that they were trained on"
        )
    with _quiet():
        PeftModel.from_pretrained(base.model, str(folder)).merge_and_unload(safe_merge=True)
    base.model.__dict__.pop("peft_config", None)
    # The same weights, so the recorded origin, wherever they were read from.
    source = replace(base.source, id=base_id, revision=revision or base.source.revision)
    return replace(base, model=base.model.eval(), source=source, new_head=False)


def read_task(folder: Path) -> dict[str, Any]:
    """What the adapter folder records of its task: label_names, classifier, library, base_weights and preprocessing."""
    if not is_adapter_folder(str(folder)) or not (folder / TASK).is_file():
        raise ValueError(f"{folder.name!r} has no {ADAPTER_CONFIG} and {TASK}: it is no adapter folder of this package")
    task: dict[str, Any] = json.loads((folder / TASK).read_text())
    return task


def check_saved_apart(adapted: Adapted) -> str:
    """The upstream id that an adapter folder records.

    Raises ValueError, naming the remedy, where none is known, and where peft would take adapted maps for the head.
    """
    if adapted.source.id is None:
        raise ValueError(
            f"--no-merge: an adapter folder names the checkpoint that it belongs to by its Hub id, and {adapted.source.name} "
            "does not record one. Give --base_model owner/name, or save a merged model (--merge)"
        )
    mistaken = [name for name in adapted.targets if name.endswith(adapted.classifier)]
    if mistaken:
        raise ValueError(
            f"--no-merge: peft finds the head by the end of its name ({adapted.classifier}), as which it would take "
            f"{mistaken[0]} too: save a merged model (--merge), or choose other --targets"
        )
    return adapted.source.id


def _inject(model: nn.Module, how: Adapter, targets: Mapping[str, nn.Module]) -> Any:
    import peft  # here: its import takes seconds, which a run without adapters does not pay

    method = METHODS[how.method]
    config = getattr(peft, method.config)(
        target_modules=_as_target_modules(model, targets), **method.options(how, targets)
    )
    # CPU and seed: the same adapters on every device and process.
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(how.seed)
        return peft.get_peft_model(model, config)


def _as_target_modules(model: nn.Module, targets: Iterable[str]) -> list[str] | str:
    """For peft, which matches a list by the ends of names: where those hit more, a regular expression of full names."""
    names = list(targets)
    hit = [n for n, _ in model.named_modules() if any(n == t or n.endswith("." + t) for t in names)]
    return names if len(hit) == len(names) else "|".join(map(re.escape, names))


def _follow(chain: Chain, targets: Iterable[str]) -> Chain:
    """The chain after injection: what stands in a target's place lies in the target's layer."""
    owners = {name: i for i, layer in enumerate(chain.layers) for name in (*layer.parameters, *layer.buffers)}
    places = {t: owners[n] for t in targets for n in owners if n.rpartition(".")[0] == t}

    def place(name: str) -> int | None:
        if name in owners:
            return owners[name]
        parts = name.split(".")
        return next((places[p] for i in range(len(parts)) if (p := ".".join(parts[:i])) in places), None)

    parameters: list[list[str]] = [[] for _ in chain.layers]
    buffers: list[list[str]] = [[] for _ in chain.layers]
    orphans = []
    for found, items in ((parameters, chain.model.named_parameters()), (buffers, chain.model.named_buffers())):
        for name, _ in items:
            i = place(name)
            if i is not None:
                found[i].append(name)
            elif found is parameters:
                orphans.append(name)
    layers = tuple(
        replace(layer, parameters=tuple(p), buffers=tuple(b))
        for layer, p, b in zip(chain.layers, parameters, buffers, strict=True)
    )
    return replace(chain, layers=layers, orphans=tuple(orphans))


def _know_plainly(model: nn.Module, plain: Mapping[int, str], modules: Mapping[str, str]) -> Callable[[], Identity]:
    """The plain network's identity as long as the adapters are at their start; the adapted network's own from then on.

    `plain`: the name of each tensor before injection, by its id; `modules`: the plain network's modules, described.
    """
    names = {name: plain.get(id(tensor), "") for name, tensor in named_tensors(model).items()}

    def hash_added() -> str:
        return hash_tensors({name: tensor for name, tensor in named_tensors(model).items() if not names[name]})

    start, known = hash_added(), Identity(tensor_names=names, modules=modules)
    return lambda: known if hash_added() == start else identify(model)


def _answer(backbone: Backbone) -> torch.Tensor:
    """Logits (2, K) of the same two noise images each time."""
    noise = torch.randn(2, *backbone.preprocessing.image_shape, generator=torch.Generator().manual_seed(0))
    with eval_mode(backbone.model), torch.no_grad():
        return compute_logits(backbone.model, noise.to(next(backbone.model.parameters()).device))


def _hash_base(model: nn.Module, classifier: str) -> str:
    return hash_tensors({n: t for n, t in model.state_dict().items() if not n.startswith(classifier + ".")})


def _check_same(before: torch.Tensor, after: torch.Tensor, what: str, remedy: str) -> None:
    difference = float((after - before).abs().max() / before.abs().max().clamp(min=1.0))
    if not difference <= SAME_RELATIVE:
        raise RuntimeError(f"{what}: logits differ by {difference:.2g} (relative); {remedy}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, peft does not warn of what is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.")
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
        yield
