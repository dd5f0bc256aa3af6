"""Finds the files of a checkpoint, on the Hub (by id and optional revision) or in a local folder in Hub layout.

Only files that loading needs are downloaded: config, preprocessing, model card and weights. Pickled weights are downloaded only
if a checkpoint has no safetensors.
"""

import difflib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_transfer.confidence.record import CONFIDENCE
from hf_transfer.confidence.record import KEY as CONFIDENCE_KEY
from hf_transfer.config import EMBEDDED_CHECKPOINT, NO_CHECKPOINT
from hf_transfer.locations import find_run, resolve_model
from hf_transfer.network.damage import WEIGHTS, check_files, find_weights, is_pickled, read_json

log = logging.getLogger(__name__)

HTTP_ERRORS = (HfHubHTTPError, httpx2.HTTPError, OSError)  # an error status, or no answer
NAME_TIMEOUT_S = 5

PREPROCESSING = (
    "preprocessor_config.json",
    "processor_config.json",
)  # transformers 5 saves some processors as the latter
OPTIONAL = (*PREPROCESSING, "README.md")
ADAPTER_CONFIG = "adapter_config.json"  # the file in which peft describes an adapter
OPEN_CLIP = "open_clip_config.json"
OTHER_FORMATS = (".bin", ".safetensors", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz", ".tflite", ".gguf")
NAMED = 5  # files in a message
# timm's image towers of open_clip checkpoints, by the last part of the open_clip checkpoint's Hub id.
TIMM_TWINS = {
    "CLIP-ViT-B-32-laion2B-s34B-b79K": "timm/vit_base_patch32_clip_224.laion2b",
    "CLIP-ViT-B-16-laion2B-s34B-b88K": "timm/vit_base_patch16_clip_224.laion2b",
    "CLIP-ViT-L-14-laion2B-s32B-b82K": "timm/vit_large_patch14_clip_224.laion2b",
    "CLIP-ViT-H-14-laion2B-s32B-b79K": "timm/vit_huge_patch14_clip_224.laion2b",
    "CLIP-ViT-g-14-laion2B-s12B-b42K": "timm/vit_giant_patch14_clip_224.laion2b",
    "CLIP-ViT-bigG-14-laion2B-39B-b160k": "timm/vit_gigantic_patch14_clip_224.laion2b",
    "CLIP-ViT-B-32-DataComp.XL-s13B-b90K": "timm/vit_base_patch32_clip_224.datacompxl",
    "CLIP-ViT-B-16-DataComp.XL-s13B-b90K": "timm/vit_base_patch16_clip_224.datacompxl",
    "CLIP-ViT-L-14-DataComp.XL-s13B-b90K": "timm/vit_large_patch14_clip_224.datacompxl",
}
HUB_ID = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint's files and its public name. `id`, `revision` and `base_model` may be published, never the path `folder`."""

    folder: Path
    id: str | None  # Hub id of these weights, if known
    revision: str | None  # commit hash, if the files came from the Hub
    license: str | None
    base_model: str | None = None  # Hub id of the checkpoint that a folder's weights were fine-tuned from, by its card

    @property
    def name(self) -> str:
        """The name for logs and cards: the Hub id if it is known, else the name of the folder, or of the run of a model."""
        return self.id or find_run(self.folder).name

    @property
    def credited(self) -> str | None:
        """The Hub id that a model card names as base model: of these weights, or else of the weights they were made from."""
        return self.id or self.base_model

    def read_config(self) -> dict[str, Any]:
        """Returns the contents of the checkpoint's config.json."""
        return read_json(self.folder / "config.json")


def find_source(checkpoint: str, *, base_model: str | None = None, trust_remote_code: bool = False) -> Source:
    """Finds the files of `checkpoint`: a Hub id (`owner/name` or `owner/name@revision`), a folder of a model
    or of a run, or "embedded".

    `base_model`: the Hub id of the checkpoint, for a local folder with the same weights. Raises ValueError, with the remedy,
    for an unknown id or revision, a gated or private repository, a missing network, or weights in another format.
    """
    if checkpoint == EMBEDDED_CHECKPOINT:
        with resources.as_file(resources.files("hf_transfer") / "assets" / EMBEDDED_CHECKPOINT) as folder:
            return _from_folder(folder, base_model)
    path = Path(resolve_model(checkpoint)).expanduser()
    if _is_folder(path):
        source = _from_folder(path.resolve(), base_model)
    else:
        _check_hub_id(checkpoint)
        source = _from_hub(checkpoint, base_model, trust_remote_code)
    if source.read_config().get("quantization_config") is not None:
        raise ValueError(
            f"{source.name} has quantized weights, which cannot be fine-tuned here: choose the checkpoint that was quantized"
        )
    pickled = [file.name for file in find_weights(source.folder) if is_pickled(file)]
    if pickled:
        log.info("%s: reading tensors, and nothing else, from the pickle %s", source.name, ", ".join(pickled))
    if trust_remote_code and (files := list_code(source.folder)):
        place = "a local folder" if source.revision is None else f"commit {source.revision}"
        template = "running Python code that comes with %s (%s), because of trust_remote_code: %s"
        log.warning(template, source.name, place, ", ".join(files))
    return source


def list_code(folder: Path) -> list[str]:
    """Returns the Python files of the checkpoint in `folder`, and the files of other repositories that the checkpoint names.

    The list is empty if neither the model nor the preprocessing has Python code of its own.
    """
    named: set[str] = set()
    for name in ("config.json", "preprocessor_config.json"):
        auto_map = read_json(folder / name).get("auto_map") if (folder / name).is_file() else None
        references = auto_map.values() if isinstance(auto_map, dict) else ()
        named |= {f"{str(reference).rpartition('.')[0]}.py" for reference in references if reference}
    return sorted(named | {path.name for path in folder.glob("*.py")}) if named else []


def pin_checkpoint(checkpoint: str, source: Source) -> str:
    """Returns `checkpoint` as `owner/name@commit` if `source` came from the Hub, and unchanged otherwise."""
    is_local = checkpoint in (EMBEDDED_CHECKPOINT, NO_CHECKPOINT) or _is_folder(Path(checkpoint).expanduser())
    if is_local or source.revision is None:
        return checkpoint
    return f"{checkpoint.partition('@')[0]}@{source.revision}"


def check_checkpoint(checkpoint: str) -> None:
    """Raises ValueError if `checkpoint` is neither "embedded" nor a sound folder nor a Hub id. Needs no network."""
    if checkpoint == EMBEDDED_CHECKPOINT:
        return
    path = Path(resolve_model(checkpoint)).expanduser()
    if _is_folder(path):
        if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").exists():
            return  # its base is found when it is loaded
        _from_folder(path.resolve(), None)
    else:
        _check_hub_id(checkpoint)


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - pathlib raises an OSError for a name that is too long


def _check_hub_id(checkpoint: str) -> None:
    if not HUB_ID.fullmatch(checkpoint):
        raise ValueError(
            f"checkpoint={checkpoint!r} is neither a folder here nor a Hub id; give a folder in Hub layout, owner/name or "
            "owner/name@revision"
        )
    if "/" not in checkpoint:
        suggested = _find_timm_ids(checkpoint)
        if suggested:
            raise ValueError(
                f"checkpoint={checkpoint!r} is a name in timm, but neither a folder here nor a Hub id: choose "
                f"{' or '.join(suggested[:NAMED])}"
            )


def _find_timm_ids(name: str) -> list[str]:
    """Returns the Hub ids of the weights that timm lists for `name`, an architecture with or without a tag; [] if none.

    The architecture's default weights come first.
    """
    from timm.models import get_pretrained_cfg, list_pretrained

    full, _, _ = name.partition("@")
    architecture, _, _ = full.partition(".")
    names = list_pretrained(f"{architecture}.*")
    if not names:
        return []
    default = get_pretrained_cfg(architecture)
    first = full if full in names else f"{architecture}.{default.tag}" if default else names[0]
    listed = [get_pretrained_cfg(each) for each in sorted(names, key=lambda each: each != first)]
    return [str(each.hf_hub_id) for each in listed if each is not None and each.hf_hub_id]


def _from_folder(folder: Path, base_model: str | None) -> Source:
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    is_complete = "config.json" in files and bool(set(WEIGHTS) & set(files))
    if OPEN_CLIP in files and not is_complete:
        raise ValueError(_explain_open_clip(base_model or folder.name))
    if "config.json" not in files:
        other = [name for name in files if name.endswith(OTHER_FORMATS)]
        reason = f" (its files: {', '.join(other[:NAMED])})" if other else ""
        raise ValueError(
            f"the folder {folder.name!r} has no config.json{reason}: give a folder in Hub layout, such as a run's model/"
        )
    if not is_complete:
        raise ValueError(_explain_weights(folder.name, files))
    check_files(folder)
    card = _card_data(folder)
    recorded = card.get("base_model")
    if isinstance(recorded, list):
        recorded = recorded[0] if recorded else None
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})$", folder.as_posix())
    own_id = f"{cached[1]}/{cached[2]}" if cached else None
    return Source(
        folder=folder,
        id=base_model or own_id,
        revision=cached[3] if cached else None,
        license=_license(folder, card),
        base_model=recorded,
    )


def _from_hub(checkpoint: str, base_model: str | None, trust_remote_code: bool) -> Source:
    repo, _, revision = checkpoint.partition("@")
    unreachable: list[Exception] = []

    def fetch(name: str) -> Path | None:
        """Returns the path of the file `name`, or None if it does not exist, or is not cached while the Hub is unreachable."""
        try:
            return Path(hf_hub_download(repo, name, revision=revision or None))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            unreachable.append(error)
        except EntryNotFoundError:
            pass
        return None

    with _explained(repo, revision):
        config = fetch("config.json")
        if config is not None:
            revision = config.parent.name  # the commit: all files are of one commit, even if the branch moves meanwhile
        weights = next((name for name in WEIGHTS if config and fetch(name)), None)
        if weights is None and unreachable:
            raise unreachable[0]
        if config is None or weights is None:
            siblings = HfApi().model_info(repo, revision=revision or None).siblings or []
            files = sorted(sibling.rfilename for sibling in siblings)
            if OPEN_CLIP in files:
                raise ValueError(_explain_open_clip(repo))
            if config is None:
                raise ValueError(f"{repo} has no config.json: it is not a timm or transformers checkpoint")
            raise ValueError(_explain_weights(repo, files))
        if weights.endswith(".index.json"):
            shards = [file.name for file in find_weights(config.parent)]
            snapshot_download(repo, revision=revision or None, allow_patterns=shards)
        named = [CONFIDENCE] if CONFIDENCE_KEY in read_json(config) else []
        for name in (*OPTIONAL, *named):
            fetch(name)
        if trust_remote_code:
            snapshot_download(repo, revision=revision or None, allow_patterns=["*.py"])
    check_files(config.parent)
    card = _card_data(config.parent)
    return Source(
        folder=config.parent,
        id=base_model or _find_current_name(repo),
        revision=config.parent.name,  # snapshots/<commit>
        license=_license(config.parent, card),
    )


def _find_current_name(repo: str) -> str:
    """Returns the repository's name on the Hub, which redirects from the old name of a renamed repository.

    Returns `repo` if the Hub cannot be asked.
    """
    try:
        name = HfApi().model_info(repo, timeout=NAME_TIMEOUT_S).id
    except (OfflineModeIsEnabled, *HTTP_ERRORS):
        return repo  # the files are in the local cache
    if name != repo:
        log.info("%s was renamed on the Hub: its name is now %s, which is recorded", repo, name)
    return str(name)


def find_preprocessing(origin: str) -> Path:
    """Finds the preprocessing that `origin` names: a folder, a preprocessor_config.json, or a Hub id (`owner/name[@revision]`).

    Returns the path of the folder or file. No weights are downloaded. Raises ValueError in the same cases as `find_source`.
    """
    path = Path(origin).expanduser()
    if path.exists():
        return path.resolve()
    if not HUB_ID.fullmatch(origin):
        raise ValueError(
            f"preprocessing_from={origin!r}: neither a file or folder here nor a Hub id (owner/name or owner/name@revision)"
        )
    repo, _, revision = origin.partition("@")
    files: list[str] = []
    unreachable: list[Exception] = []
    with _explained(repo, revision):
        for name in (*PREPROCESSING, "config.json"):
            try:
                files.append(hf_hub_download(repo, name, revision=revision or None))
            except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
                unreachable.append(error)
            except EntryNotFoundError:
                pass
        if not files and unreachable:
            raise unreachable[0]
    if not files:
        raise ValueError(f"preprocessing_from={origin!r}: the repository has neither {' nor '.join(PREPROCESSING)}")
    return Path(files[0]).parent


def fetch_adapter(model: str) -> Path | None:
    """Downloads the PEFT adapter of a Hub repository (`owner/name[@revision]`), or returns None if the repository has none.

    Raises ValueError in the same cases as `find_source`.
    """
    if not HUB_ID.fullmatch(model):
        return None
    repo, _, revision = model.partition("@")
    with _explained(repo, revision):
        try:
            hf_hub_download(repo, ADAPTER_CONFIG, revision=revision or None)
        except (EntryNotFoundError, OfflineModeIsEnabled):
            return None  # EntryNotFoundError also means that the file is not cached and there is no network
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=["*.json", "*.safetensors"]))


@contextmanager
def _explained(repo: str, revision: str) -> Iterator[None]:
    """Replaces errors of the Hub in the `with` block by a ValueError that names the remedy."""
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(f"{repo} is gated: accept the terms on its Hub page, then run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo} has no revision {revision!r}: choose a branch, tag or commit of {repo}") from error
    except RepositoryNotFoundError as error:
        if missing := _describe_missing_folder(repo):
            raise ValueError(
                f"{missing} (the Hub has none that you may read; for a private model, run `hf auth login`)"
            ) from error
        raise ValueError(
            f"the Hub has no model {repo!r} that you may read: check the id, or run `hf auth login` for a private model"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if missing := _describe_missing_folder(repo):
            raise ValueError(f"{missing} (it cannot be reached: no network, or HF_HUB_OFFLINE=1)") from error
        raise ValueError(
            f"{repo} is not in the local Hub cache, and the Hub cannot be reached (no network, or HF_HUB_OFFLINE=1). "
            f"Remedy: run `hf download {repo}` on a machine with a network, or choose a local folder"
        ) from error
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is not a Hub id: {error}") from error
    except HfHubHTTPError as error:
        raise ValueError(f"the download of {repo} from the Hub failed ({error}): try again") from error


def _describe_missing_folder(name: str) -> str:
    """Returns the start of the error message for a Hub id that may be a mistyped folder: its parent is here. Otherwise ""."""
    parent = Path(name).parent
    if "/" not in name or not _is_folder(parent):
        return ""
    close = difflib.get_close_matches(Path(name).name, [path.name for path in parent.iterdir() if path.is_dir()], n=1)
    meant = f" (did you mean '{parent / close[0]}'?)" if close else ""
    return f"{name}: no such folder{meant}, and no model of this name could be read from the Hub"


def _explain_weights(name: str, files: Sequence[str]) -> str:
    """Returns the error message for a checkpoint whose `files` contain no weights that can be read."""
    other = [file for file in files if file.endswith(OTHER_FORMATS)]
    return (
        f"{name} has none of {', '.join(WEIGHTS)} (its weights: {', '.join(other[:NAMED]) or 'none'}). Remedy: ask the author "
        "for safetensors, or load the weights with the author's own code and save them with timm or transformers"
    )


def _explain_open_clip(name: str) -> str:
    twin = TIMM_TWINS.get(name.rpartition("/")[2])
    remedy = (
        f"choose --checkpoint {twin}, its image tower"
        if twin
        else "search the organization timm on the Hub for its image tower"
    )
    return f"{name} is an open_clip checkpoint, which neither timm nor transformers describes: {remedy}"


def _card_data(folder: Path) -> dict[str, Any]:
    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (ValueError, TypeError, AttributeError):  # a damaged card is no obstacle to loading the weights
        return {}
    return {key: data.get(key) for key in ("base_model", "license", "license_name")}


def _license(folder: Path, card: dict[str, Any]) -> str | None:
    config = read_json(folder / "config.json")
    pretrained = config.get("pretrained_cfg")
    name = (
        card.get("license_name")
        or card.get("license")
        or config.get("license")
        or (pretrained.get("license") if isinstance(pretrained, dict) else None)
    )
    return str(name) if name else None
