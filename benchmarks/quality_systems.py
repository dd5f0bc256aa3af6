"""The systems of benchmarks/quality.py: strategies of ours, and what users have today, each on the same drawn images.

A system takes a `Job` and returns the probabilities of all test images in the order of the data set. Seconds count from loading
the images and the checkpoint until the test images are scored and the model is saved; imports do not count. `cpu_seconds`: CPU
time of all threads over the same work, which other processes change less.
"""

import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lines import Cell, Line, read_lines  # benchmarks/lines.py
from numpy.typing import NDArray

STRATEGIES = ("auto", "linear_probe", "last_layers", "lora", "probe_then_full", "full")
LEFT_OUT = "auto_left_out"
PEERS = ("trainer_defaults", "trainer_tuned", "fastai")
SYSTEMS = (*STRATEGIES, LEFT_OUT, *PEERS)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One system on one cell."""

    system: str
    cell: Cell
    dataset: str
    checkpoint: str
    epochs: int | None  # None: the system's own number
    precision: str
    image_size_px: int | None  # None: the size of the checkpoint
    threads: int | None  # None: each system's own choice
    num_workers: int | None  # None: each system's own choice
    has_fresh_cache: bool
    leads: Path  # runs that the expectations of `auto_left_out` are fitted to
    advice: Path  # where these runs lie

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells this run from others in a file of lines."""
        return (*self.cell, self.system, self.epochs, self.precision, self.image_size_px)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run: the line for the file, without what is common to all, and the test labels."""

    line: Line
    labels: list[int]
    label_names: list[str]


def family(system: str) -> str:
    """Returns whose code a system runs. Each family gets a process of its own, because libraries change each other."""
    return system.split("_")[0] if system in PEERS else "ours"


def start_worker() -> None:
    """Makes this process start others as the platform does by default, and end when its parent is gone."""
    multiprocessing.set_start_method(
        None, force=True
    )  # this one was spawned, and its data loaders would be spawned too

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_job(job: Job) -> Outcome:
    """Runs a job in this process."""
    import torch
    from vs_trainer import describe_machine  # benchmarks/vs_trainer.py

    import hf_transfer as ht

    scratch = Path(tempfile.mkdtemp(prefix="quality-"))
    settings: dict[str, Any] = {
        "images_per_class": job.cell.images_per_class or None,
        "seed": job.cell.seed,
        "precision": job.precision,
        "image_size_px": job.image_size_px,
        "num_workers": job.num_workers,
        "num_threads": job.threads,
    }
    task = ht.Task(job.dataset, job.checkpoint, **{k: v for k, v in settings.items() if v is not None})
    try:
        with _cache_of(job, scratch):
            run = {"trainer": run_trainer, "fastai": run_fastai, "ours": run_ours}[family(job.system)]
            started = time.process_time()
            probabilities, line = run(job, task, scratch)
            cpu_seconds = time.process_time() - started
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    assert task.data.test is not None
    labels = task.data.test.labels
    of_labels = probabilities[np.arange(len(labels)), labels]
    scores = {
        "test_accuracy": float((probabilities.argmax(1) == labels).mean()),
        "log_loss": float(-np.log(np.maximum(of_labels, np.finfo(np.float32).tiny)).mean()),
        "num_test": len(labels),
        "predicted": probabilities.argmax(1).tolist(),
    }
    machine = describe_machine(torch.get_num_threads())
    return Outcome(
        line={**scores, **line, "cpu_seconds": cpu_seconds, "machine": machine},
        labels=labels.tolist(),
        label_names=list(task.data.label_names),
    )


Scored = tuple[NDArray[np.float32], Line]
"""Probabilities (N, K) of the test images, and figures of the run."""


def run_ours(job: Job, task: Any, scratch: Path) -> Scored:
    """Runs a strategy from Python as a user does, with the defaults that it has."""
    import hf_transfer as ht
    from hf_transfer.choosing import decide
    from hf_transfer.prefix import extract
    from hf_transfer.reporting.predictions import PREDICTIONS, read_predictions
    from hf_transfer.training import evaluate, plan, readouts

    assert all((decide, extract, evaluate, plan, readouts))  # imported before the clock starts
    is_probe = job.system == "linear_probe"
    steps: Mapping[str, Any] = {} if is_probe else {"tracker": "none"} | ({"epochs": job.epochs} if job.epochs else {})
    name = "auto" if job.system == LEFT_OUT else job.system
    with _expectations_of(job):
        started = time.perf_counter()
        run = task.fit(getattr(ht, name)(**steps), output_dir=scratch / "run")
        seconds = time.perf_counter() - started
    validation, results = run.results["metrics"]["validation"], run.results
    line: Line = {
        "seconds": seconds,
        "validation_accuracy": validation["accuracy"],
        "num_validation": validation["num_samples"],
        "kept": results["plan"][-1]["kept"],
        "settings": {"plan": run.plan, "epochs": [phase["epochs"] for phase in results["plan"]]},
    }
    if advice := results["details"].get("advice"):
        line["advice"] = {name: advice[name] for name in ("images_per_class", "similarity", "cell", "recommended")}
        line["auto"] = results["details"]["auto"]
    return read_predictions(scratch / "run" / PREDICTIONS, task.data.target)["test"], line


def run_trainer(job: Job, task: Any, scratch: Path) -> Scored:
    """Runs transformers' published example on the training and validation images together."""
    import datasets
    import scipy
    import torch
    import trainer_example  # benchmarks/trainer_example.py

    files, labels = list_training_files(job, task.data, scratch)
    columns = {
        "train": (files, labels),
        "test": (list_files(job, task.data.test, scratch), task.data.test.labels.tolist()),
    }
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(task.data.label_names))}
    )
    data = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict({"image": [str(f) for f in named], "label": of_split}, features)
            for split, (named, of_split) in columns.items()
        }
    )
    arguments = {**trainer_example.SETTINGS[job.system.removeprefix("trainer_")]}
    arguments |= {"num_train_epochs": job.epochs} if job.epochs else {}
    shared = {"seed": job.cell.seed, "use_cpu": not torch.cuda.is_available()}
    shared |= {job.precision: True} if job.precision != "fp32" else {}
    shared |= {"dataloader_num_workers": job.num_workers} if job.num_workers is not None else {}
    _set_threads(job)
    result = trainer_example.train(
        job.checkpoint, data, str(scratch), {**arguments, **shared}, image_size_px=job.image_size_px
    )
    return scipy.special.softmax(result.logits, 1), {"seconds": result.seconds, "settings": arguments}


def run_fastai(job: Job, task: Any, scratch: Path) -> Scored:
    """Runs fastai's `fine_tune`, which holds out a fifth of the training and validation images together."""
    try:
        import fastai_example  # benchmarks/fastai_example.py
    except ImportError as error:
        raise SystemExit(f"fastai: {error}; install it by `pip install 'hf-transfer-learning[peers]'`") from error

    if job.precision == "fp16":
        raise SystemExit("fastai: --precision fp16 is not supported here; choose fp32 or bf16")
    files, labels = list_training_files(job, task.data, scratch)
    _set_threads(job)
    result = fastai_example.train(
        job.checkpoint,
        files,
        labels,
        list_files(job, task.data.test, scratch),
        str(scratch),
        seed=job.cell.seed,
        epochs=job.epochs or fastai_example.EPOCHS,
        bf16=job.precision == "bf16",
        num_workers=job.num_workers,
        image_size_px=job.image_size_px,
    )
    return result.probabilities, {"seconds": result.seconds, "settings": result.settings}


def list_training_files(job: Job, data: Any, scratch: Path) -> tuple[list[Path], list[int]]:
    """Returns the files and labels of the training and validation images together, as users give them to a peer."""
    splits = (data.train, data.validation)
    files = [file for split in splits for file in list_files(job, split, scratch)]
    return files, np.concatenate([split.labels for split in splits]).tolist()


def list_files(job: Job, split: Any, scratch: Path) -> list[Path]:
    """Returns the file of each image. Images that are not files of their own are written as PNG, before the clock starts."""
    files = []
    for i in range(len(split)):
        file = Path(job.dataset, split.image_name(i))
        if not file.is_file():
            file = scratch / split.name / f"{i:06d}.png"
            file.parent.mkdir(exist_ok=True)
            split.image(i).save(file)
        files.append(file)
    return files


def _set_threads(job: Job) -> None:
    import torch

    if job.threads:
        torch.set_num_threads(job.threads)


@contextmanager
def _expectations_of(job: Job) -> Iterator[None]:
    if job.system != LEFT_OUT:
        yield
        return
    from fit_contenders import contenders_without  # benchmarks/fit_contenders.py

    with contenders_without(job.cell.set, read_lines([job.leads]), read_lines([job.advice])):
        yield


@contextmanager
def _cache_of(job: Job, scratch: Path) -> Iterator[None]:
    if not job.has_fresh_cache:
        yield
        return
    own = os.environ.pop("HF_TRANSFER_CACHE", None)
    os.environ["HF_TRANSFER_CACHE"] = str(scratch / "cache")
    try:
        yield
    finally:
        del os.environ["HF_TRANSFER_CACHE"]
        os.environ |= {} if own is None else {"HF_TRANSFER_CACHE": own}
