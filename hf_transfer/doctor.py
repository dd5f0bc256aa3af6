"""Checks the installation, the machine, the Hub and the cache, and trains for a few seconds (`hf-transfer doctor`).

Each check is a function that returns findings. A check that raises an error becomes a finding itself, so one broken part does
not hide the others. Heavy modules are imported inside the checks, because their import may be what is broken.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from hf_transfer.config import EMBEDDED_DATASET
from hf_transfer.errors import count_noun, describe_error
from hf_transfer.locations import PACKAGE, cache_dir, presets_dir, recipes_dir

DISTRIBUTION = "hf-transfer-learning"
SHOWN = ("torch", "torchvision", "timm", "transformers", "datasets", "accelerate", "peft", "huggingface_hub")
HUB_TIMEOUT_S = 5.0
LITTLE_DISK_BYTES = 5 * 10**9
LITTLE_MEMORY_BYTES = 2 * 10**9
SAME_PROBABILITY = 1e-4  # largest difference between the trained and the reloaded model's probabilities
WIDTH = 110  # of the page, in characters


class Status(StrEnum):
    """How serious a finding is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the page. `facts` are values for `--json` that the text does not list."""

    topic: str
    status: Status = Status.OK
    text: str
    remedy: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


Check = Callable[[], Sequence[Finding]]


def examine(checks: Mapping[str, Check] | None = None) -> list[Finding]:
    """Runs the checks (default: all checks), and returns their findings. An error of a check becomes a problem in the list."""
    findings: list[Finding] = []
    for topic, check in (CHECKS if checks is None else checks).items():
        try:
            findings += check()
        except Exception as error:  # noqa: BLE001 - whatever fails, the other checks still run
            text = f"the check failed: {type(error).__name__}: {describe_error(error)}"
            remedy = "if the findings above do not explain the error, report it with this page"
            findings.append(Finding(topic=topic, status=Status.PROBLEM, text=text, remedy=remedy))
    return findings


def worst_status(findings: Sequence[Finding]) -> Status:
    """Returns the most serious status of the findings."""
    return max((finding.status for finding in findings), key=list(Status).index, default=Status.OK)


def format_page(findings: Sequence[Finding]) -> str:
    """Returns the findings as text for a terminal, one paragraph for each finding."""
    lines = []
    for finding in findings:
        start = f"{finding.status:<8} {finding.topic:<10} "
        text = finding.text + (f". Remedy: {finding.remedy}" if finding.remedy else "")
        lines += textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start)) or [start]
    counts = {status: sum(finding.status is status for finding in findings) for status in Status}
    return "\n".join([*lines, "", ", ".join(f"{count} {status}" for status, count in counts.items())])


def format_json(findings: Sequence[Finding]) -> str:
    """Returns the findings and the worst status as JSON."""
    return json.dumps(
        {"status": worst_status(findings), "findings": [asdict(finding) for finding in findings]}, indent=1
    )


def _check_versions() -> list[Finding]:
    from packaging.requirements import Requirement

    versions = {"python": platform.python_version(), DISTRIBUTION: importlib.metadata.version(DISTRIBUTION)}
    findings = []
    for line in importlib.metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        remedy = f"python -m pip install --upgrade '{wanted}'"
        try:
            versions[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            text = f"{requirement.name} is not installed; {DISTRIBUTION} needs {wanted}"
            findings.append(Finding(topic="versions", status=Status.PROBLEM, text=text, remedy=remedy))
            continue
        if not requirement.specifier.contains(versions[requirement.name], prereleases=True):
            text = f"{requirement.name} {versions[requirement.name]} is installed; {DISTRIBUTION} needs {wanted}"
            findings.append(Finding(topic="versions", status=Status.PROBLEM, text=text, remedy=remedy))
    shown = [f"{name} {versions[name]}" for name in (DISTRIBUTION, *SHOWN) if name in versions]
    text = f"Python {versions['python']} on {platform.system()} {platform.machine()}, {', '.join(shown)}"
    return [Finding(topic="versions", text=text, facts=versions), *findings]


def _check_devices() -> list[Finding]:
    import torch

    from hf_transfer.capability import capability_of, list_devices
    from hf_transfer.choices import choose
    from hf_transfer.config import ComputeConfig
    from hf_transfer.prefix.engine_choice import has_openvino

    findings = []
    for device in list_devices():
        described, compute = capability_of(device), ComputeConfig()
        memory_bytes = described.device_memory_bytes or described.memory_bytes
        abilities = {
            "bf16": described.has_bf16, "TF32": described.has_tf32, "AMX": described.has_amx, "float64": described.has_float64,
            "fused optimizers": described.has_fused_optimizers, "torch.compile": described.can_compile,
        }  # fmt: skip
        can, cannot = ([name for name, value in abilities.items() if value is wanted] for wanted in (True, False))
        text = (
            f"{device.type}: {described.device_name}, {memory_bytes / 1e9:.1f} GB, {described.num_cores} usable CPU cores; "
            f"has {', '.join(can) or 'nothing'}; lacks {', '.join(cannot) or 'nothing'}. "
            f"By default, runs compute on {choose(described, compute).describe()}"
        )
        if device.type == "cpu":
            name = (
                f"openvino {importlib.metadata.version('openvino')}" if has_openvino() else "openvino is not installed"
            )
            compiled = ", compiled" if described.can_compile else ""
            text += f"; engines of frozen layers: eager, folded{compiled}; {name}"
        findings.append(Finding(topic="devices", text=text, facts=asdict(described)))
    if not torch.accelerator.is_available() and (torch.version.cuda or shutil.which("nvidia-smi")):
        cause = "torch is built for CUDA" if torch.version.cuda else "this machine has NVIDIA's driver"
        text = f"{cause}, but torch {torch.__version__} finds no GPU, so runs use the CPU"
        remedy = "if this machine has a GPU, check `nvidia-smi`, and install the torch build for your CUDA version"
        findings.append(Finding(topic="devices", status=Status.WARNING, text=text, remedy=remedy))
    return findings


def _check_threads() -> list[Finding]:
    import torch

    from hf_transfer import threads

    cores, setting = threads.count_physical_cores(), os.environ.get("OMP_NUM_THREADS")
    share = max(1, cores // threads.count_neighbors())
    threads.set_num_threads(0, torch.device("cpu"))
    chosen = torch.get_num_threads()
    text = (
        f"a run on the CPU computes with {count_noun(chosen, 'thread')}, on {count_noun(cores, 'usable core')} "
        f"(OMP_NUM_THREADS is {setting or 'not set'}; --num_threads chooses another number)"
    )
    facts = {"num_threads": chosen, "num_cores": cores, "OMP_NUM_THREADS": setting}
    if chosen == share:
        return [Finding(topic="threads", text=text, facts=facts)]
    remedy = f"unset OMP_NUM_THREADS, or give --num_threads {share} to train"
    return [Finding(topic="threads", status=Status.WARNING, text=text, remedy=remedy, facts=facts)]


def _check_memory() -> list[Finding]:
    import psutil

    from hf_transfer.capability import free_memory_bytes, limit_memory

    total = limit_memory(psutil.virtual_memory().total, Path("/"))
    free = min(free_memory_bytes(), total)
    text = f"{free / 1e9:.1f} GB of {total / 1e9:.1f} GB of memory are free"
    facts = {"free_bytes": free, "total_bytes": total}
    if free >= LITTLE_MEMORY_BYTES:
        return [Finding(topic="memory", text=text, facts=facts)]
    remedy = "end other programs, or train with a lower --batch_size and --num_workers"
    return [Finding(topic="memory", status=Status.WARNING, text=text, remedy=remedy, facts=facts)]


def _check_hub() -> list[Finding]:
    from huggingface_hub import constants, get_session, get_token

    from hf_transfer.network.source import HTTP_ERRORS

    endpoint, token = constants.ENDPOINT, get_token()
    facts: dict[str, Any] = {"endpoint": endpoint, "has_token": token is not None, "offline": constants.HF_HUB_OFFLINE}
    if constants.HF_HUB_OFFLINE:
        text = "offline mode (HF_HUB_OFFLINE is set): only cached and local checkpoints and data sets load"
        return [Finding(topic="hub", text=text, facts=facts)]
    try:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        response = get_session().get(f"{endpoint}/api/whoami-v2", headers=headers, timeout=HUB_TIMEOUT_S)
        account = response.json()
    except (*HTTP_ERRORS, ValueError) as error:  # ValueError: the answer is not JSON
        text = f"{endpoint} cannot be reached ({describe_error(error)}), so only cached and local files load"
        remedy = "check network, proxy and HF_ENDPOINT; set HF_HUB_OFFLINE=1 on a machine without a network"
        return [Finding(topic="hub", status=Status.WARNING, text=text, remedy=remedy, facts=facts)]
    if response.status_code == 200:
        role = account.get("auth", {}).get("accessToken", {}).get("role", "unknown")
        text = f"{endpoint} answers; logged in as {account.get('name')}, with a token of the role {role}"
        return [Finding(topic="hub", text=text, facts={**facts, "user": account.get("name"), "role": role})]
    if response.status_code == 401 and token is None:
        text = (
            f"{endpoint} answers; not logged in, as is enough for public models (to push: `hf auth login` or HF_TOKEN)"
        )
        return [Finding(topic="hub", text=text, facts=facts)]
    if response.status_code == 401:
        text = f"{endpoint} refuses the stored token, and would refuse downloads of public models with it too"
        remedy = "`hf auth login` with a new token, or `hf auth logout`, or unset HF_TOKEN"
        return [Finding(topic="hub", status=Status.PROBLEM, text=text, remedy=remedy, facts=facts)]
    text, remedy = f"{endpoint} answers with status {response.status_code}", "try again later, and check HF_ENDPOINT"
    return [Finding(topic="hub", status=Status.WARNING, text=text, remedy=remedy, facts=facts)]


def _check_cache() -> list[Finding]:
    from hf_transfer.prefix.contents import default_bound_bytes, list_caches

    folder = cache_dir()
    facts: dict[str, Any] = {"folder": str(folder)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        text = f"the cache folder {folder} cannot be written to ({describe_error(error)})"
        remedy = "set HF_TRANSFER_CACHE to a folder that you may write to"
        return [Finding(topic="cache", status=Status.PROBLEM, text=text, remedy=remedy, facts=facts)]
    free, entries = shutil.disk_usage(folder).free, list_caches()
    nbytes, damaged = sum(entry.nbytes for entry in entries), [entry.key for entry in entries if not entry.fields]
    limit = default_bound_bytes()
    facts |= {"nbytes": nbytes, "limit_bytes": limit, "free_bytes": free}
    text = (
        f"{folder} is writable; {nbytes / 1e9:.2f} GB of activations (limit {limit / 1e9:.0f} GB, see --cache_gb); "
        f"{free / 1e9:.1f} GB of disk are free"
    )
    if damaged:
        text += f"; {len(damaged)} stores are damaged, or of another version, and only take space"
        remedy = f"`hf-transfer cache --clear {' '.join(damaged[:3])}`"
        return [Finding(topic="cache", status=Status.WARNING, text=text, remedy=remedy, facts=facts)]
    if free >= LITTLE_DISK_BYTES:
        return [Finding(topic="cache", text=text, facts=facts)]
    remedy = "free disk space, run `hf-transfer cache --clear`, or set HF_TRANSFER_CACHE to a folder on another disk"
    return [Finding(topic="cache", status=Status.WARNING, text=text, remedy=remedy, facts=facts)]


def _check_name() -> list[Finding]:
    command, scripts = shutil.which("hf-transfer"), Path(sys.executable).parent
    if os.environ.get("HF_HUB_ENABLE_HF_TRANSFER", "").upper() in ("1", "ON", "YES", "TRUE"):
        text = (
            "HF_HUB_ENABLE_HF_TRANSFER is set. The variable means PyPI's hf-transfer, a download accelerator whose import name "
            "is the same; huggingface_hub below 1.0 would import this package instead"
        )
        return [Finding(topic="name", status=Status.WARNING, text=text, remedy="unset HF_HUB_ENABLE_HF_TRANSFER")]
    text = f"`import hf_transfer` is this package, in {PACKAGE}"
    if command is not None and Path(command).parent.resolve() != scripts.resolve():
        remedy = f"activate this environment, or run `{sys.executable} -m hf_transfer`"
        text += f", but the command `hf-transfer` is {command}, of another environment"
        return [Finding(topic="name", status=Status.WARNING, text=text, remedy=remedy)]
    return [Finding(topic="name", text=text)]


def _check_recipes() -> list[Finding]:
    folder, presets = recipes_dir(), sorted(file.name for file in presets_dir().glob("*.yaml"))
    if not presets or not list(folder.glob("*.py")):
        text, remedy = (
            f"{folder} contains no recipes or no presets",
            f"python -m pip install --force-reinstall {DISTRIBUTION}",
        )
        return [Finding(topic="recipes", status=Status.PROBLEM, text=text, remedy=remedy)]
    text = f"recipes are in {folder}; presets for `accelerate launch --config_file` in {presets_dir()}: {', '.join(presets)}"
    return [Finding(topic="recipes", text=text, facts={"recipes": str(folder), "presets": presets})]


def _check_training() -> list[Finding]:
    """Trains the embedded network on a few digits, saves it, and compares its predictions with those of the saved model."""
    from hf_transfer.inference.predict import load_saved, predict
    from hf_transfer.strategy import make_strategy
    from hf_transfer.task import Task

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hf_transfer-") as folder, _cache_at(Path(folder, "cache")):
        task = Task(EMBEDDED_DATASET, images_per_class=8, cache="memory")
        run = task.fit(make_strategy("last_layers", epochs=1, tracker="none"))
        saved = load_saved(str(run.save(Path(folder, "run")) / "model"))
        images = [task.data.validation[i][0] for i in range(8)]
        trained, reloaded = (predict(b, images, top_k=len(b.label_names)) for b in (run.backbone, saved))
        device = str(next(run.model.parameters()).device)
    differences = [
        abs(dict(zip(a.labels, a.probabilities, strict=True))[label] - probability)
        for a, b in zip(trained, reloaded, strict=True)
        for label, probability in zip(b.labels, b.probabilities, strict=True)
    ]
    seconds, accuracy = time.perf_counter() - started, run.test.accuracy
    facts = {"seconds": seconds, "test_accuracy": accuracy, "largest_difference": max(differences), "device": device}
    text = (
        f"a probe and one epoch of last_layers on {device} reached a test accuracy of {accuracy:.0%} on digits, and the "
        f"saved model predicts the same after reloading ({seconds:.0f} s)"
    )
    if accuracy > 0.5 and max(differences) <= SAME_PROBABILITY:  # chance is 10 %
        return [Finding(topic="self-test", text=text, facts=facts)]
    text = (
        f"training on {device} reached a test accuracy of {accuracy:.0%} on digits (expected: over 50 %), and "
        f"probabilities of the reloaded model differ by {max(differences):.1e} (expected: at most {SAME_PROBABILITY:g})"
    )
    remedy = "try ACCELERATE_USE_CPU=true; if the CPU is right, update the device's driver and torch"
    return [Finding(topic="self-test", status=Status.PROBLEM, text=text, remedy=remedy, facts=facts)]


@contextmanager
def _cache_at(folder: Path) -> Iterator[None]:
    """Makes `folder` the cache folder inside the context, so that a broken cache does not fail the self-test as well."""
    before = os.environ.get("HF_TRANSFER_CACHE")
    os.environ["HF_TRANSFER_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("HF_TRANSFER_CACHE")
        if before is not None:
            os.environ["HF_TRANSFER_CACHE"] = before


CHECKS: Mapping[str, Check] = {
    "versions": _check_versions,
    "name": _check_name,
    "devices": _check_devices,
    "threads": _check_threads,
    "memory": _check_memory,
    "hub": _check_hub,
    "cache": _check_cache,
    "recipes": _check_recipes,
    "self-test": _check_training,
}
