"""The folders of caches and of the package's recipes, and names in an output folder."""

import json
import logging
import os
import shlex
import socket
from collections.abc import Collection
from pathlib import Path

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent
CONFIG, RESULTS = "config.yaml", "results.json"  # files of an output folder
SO_FAR = "so_far"  # folder of an output folder: a run folder with the best model of a run that is not finished
SEEN_IMAGES = "seen_images.npy"  # file of an output folder: hashes of the images that trained or selected the model
MODEL = "model"  # folder of an output folder: the trained model in Hub layout
CHECKPOINTS = "checkpoints"  # folder of an output folder: the saved states and, until the run is finished, config.yaml
LOCK = ".lock"  # file of each folder that this package writes: runs, audits, explanations
LOCKED_BY = "process"  # the first word of this file
# Names in every results.json and config.yaml of a run. Other programs write files of the same names.
RESULTS_KEYS = frozenset({"strategy", "plan", "config"})
CONFIG_KEYS = frozenset({"dataset", "checkpoint", "overwrite_output_dir"})


def cache_dir() -> Path:
    """Returns the cache folder: $HF_TRANSFER_CACHE, else $HF_HOME/hf_transfer, else ~/.cache/huggingface/hf_transfer."""
    if own := os.environ.get("HF_TRANSFER_CACHE"):
        return Path(own).expanduser().absolute()
    home = os.environ.get("HF_HOME")
    return ((Path(home).expanduser() if home else Path.home() / ".cache" / "huggingface") / "hf_transfer").absolute()


def chain_dir() -> Path:
    """Returns the folder of files that list, for each network structure, the verified cuts (places to split the network)."""
    return cache_dir() / "chains"


def manifest_dir() -> Path:
    """Returns the folder of manifests, which list the hashes of the files in image folders."""
    return cache_dir() / "manifests"


def find_manifests(cache: str) -> Path | None:
    """Returns the folder of manifests that a run with the setting `cache` reads and writes; None for "none"."""
    return None if cache == "none" else manifest_dir()


def store_dir() -> Path:
    """Returns the folder of stored pixels and activations."""
    return cache_dir() / "activations"


def unpacked_dir() -> Path:
    """Returns the folder of unpacked archives of images."""
    return cache_dir() / "unpacked"


_reported: set[Path] = set()


def report_unwritable(error: OSError) -> None:
    """Logs once per cache folder that nothing can be written there, and that the run continues without."""
    folder = cache_dir()
    if folder not in _reported:
        _reported.add(folder)
        log.warning("%s; the run continues without storing on disk", describe_unwritable(error))


def describe_unwritable(error: OSError) -> str:
    """Returns a sentence that names the cache folder, the error of writing there, and the remedy."""
    reason = "a file has the name of a folder" if isinstance(error, FileExistsError) else error.strerror or str(error)
    remedy = "set HF_TRANSFER_CACHE to a writable folder with free space"
    return f"cannot write to the cache folder {cache_dir()} ({reason}): {remedy}"


def recipes_dir() -> Path:
    """Returns the recipes' folder, which lies inside an installed package, or beside the package in a Git clone."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def presets_dir() -> Path:
    """Returns the folder of the configuration files for `accelerate launch --config_file`."""
    return recipes_dir() / "accelerate"


def is_finished(folder: Path) -> bool:
    """Returns whether `folder` contains a finished run: a results.json that a run has written."""
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(results, dict) and results.keys() >= RESULTS_KEYS


def is_unfinished(folder: Path) -> bool:
    """Returns whether `folder` contains an unfinished run: a checkpoints/config.yaml that a run has written."""
    try:
        lines = (folder / CHECKPOINTS / CONFIG).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    return {line.partition(":")[0] for line in lines} >= CONFIG_KEYS  # a run writes one line `name: value` per setting


def mark_output(folder: Path) -> None:
    """Writes to `folder/.lock` which process of this package writes to the folder, so that `is_output` knows the folder."""
    (folder / LOCK).write_text(f"{LOCKED_BY} {os.getpid()} on {socket.gethostname()}")


def read_lock(folder: Path) -> str:
    """Returns the process and host that have, or had, the lock of `folder`; "" if there is no lock."""
    try:
        return (folder / LOCK).read_text(errors="replace")
    except OSError:
        return ""


def is_output(folder: Path, names: Collection[str]) -> bool:
    """Returns whether this package has written `folder`, which contains `names`: a run, an audit or explanations."""
    return (
        (LOCK in names and read_lock(folder).startswith(LOCKED_BY))
        or (RESULTS in names and is_finished(folder))
        or (CHECKPOINTS in names and is_unfinished(folder))
    )


def resolve_model(name: str) -> str:
    """Returns the model folder of a run if `name` is the run's output folder, and any other name (a Hub id, ...) unchanged.

    Raises ValueError if the run in the folder is not finished.
    """
    folder = Path(name).expanduser()
    if not os.path.isdir(folder) or (folder / "config.json").exists():  # noqa: PTH112 - a long name is no error
        return name
    if (folder / RESULTS).is_file() and (folder / MODEL).is_dir():
        return str(folder / MODEL)
    if is_unfinished(folder):
        raise ValueError(
            f"{name}: the run in this folder is not finished, so it has no model; give a finished run, or finish this one with "
            f"hf-transfer train STRATEGY --config {shlex.quote(str(folder / CHECKPOINTS / CONFIG))} --resume, where STRATEGY "
            "is the one that it started with"
        )
    return name


def find_run(folder: str | Path) -> Path:
    """Returns the output folder of the run whose model folder is `folder`, or else `folder`."""
    path = Path(folder).expanduser()
    is_model = path.name == MODEL and (path.parent / RESULTS).is_file()
    return path.parent if is_model else path


def find_recipe(name: str) -> Path | None:
    """Returns the YAML file of the recipe `name`, such as `lora` or `lora.yaml`; None if no recipe has this name."""
    file = recipes_dir() / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    return file if file.is_file() and Path(name).parent == Path() else None
