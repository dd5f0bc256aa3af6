"""The output folder of a run: which folder it is, who may write to it, and how its results appear there.

    with open_folder(config, "lora") as folder:     # chosen, and locked for other runs on all machines that see the folder
        ...
        with replace_results(folder) as staging:    # written beside the old results, which vanish when all is written
            ...

Until the run is finished, its config lives in checkpoints/config.yaml, so that no model ever lies beside another run's config.
"""

import json
import logging
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from hf_transfer.config import OutputConfig
from hf_transfer.data.folders import list_folder
from hf_transfer.errors import ContinuableError
from hf_transfer.interrupts import Interrupted
from hf_transfer.locations import (
    CHECKPOINTS,
    CONFIG,
    LOCK,
    LOCKED_BY,
    MODEL,
    RESULTS,
    SEEN_IMAGES,
    is_finished,
    is_output,
    is_unfinished,
    mark_output,
    read_lock,
)
from hf_transfer.processes import run_on_main

log = logging.getLogger(__name__)

STAGING = ".saving"
OLD_RESULTS = (
    RESULTS, CONFIG, "report.html", "predictions.parquet", SEEN_IMAGES, "reference.safetensors", "merged", "model",
)  # fmt: skip


@contextmanager
def open_folder(output: OutputConfig, strategy: str, *, dataset: str | None = None) -> Iterator[Path]:
    """Chooses and creates the output folder of a run on `dataset`, and locks the folder during the `with` block.

    The main process decides for all processes. Raises ValueError if another run has locked the folder, if the folder contains a
    finished run that the settings neither overwrite nor resume, if it lies inside another run's folder, if it contains images
    of the data set, or if it contains files of somebody else that the run would replace, and OSError if the folder is not
    writable. A folder that the run has created is deleted if the `with` block raises an error before its first state or result,
    unless the run can continue.
    """
    with ExitStack() as locks:

        def choose() -> str:
            missing = [parent for parent in _name_first(output, strategy).parents if not parent.exists()]
            folder, is_created = _name_folder(output, strategy)
            if output.output_dir is not None:
                refuse_nested(folder)
            if dataset is not None:
                refuse_images(folder, dataset)
            refuse_foreign(folder)
            is_created |= locks.enter_context(lock_folder(folder))
            if is_created:  # the stack deletes first, and unlocks then
                locks.push(lambda kind, error, trace: _delete_failed(folder, missing, error))
            if is_finished(folder) and not output.overwrite_output_dir:
                if not output.resume:
                    raise _refuse(folder, "a finished run")
                if not _can_resume(folder, strategy):
                    raise _refuse(folder, "a finished run, and no saved state of this strategy to resume")
            elif is_unfinished(folder) and not output.resume and _has_progress(folder):
                log.warning(
                    "%s has the saved state of an unfinished run, which this run replaces; to continue that run, add --resume, "
                    "and to keep it, choose another --output_dir",
                    folder,
                )
            if output.output_dir is None:
                log.info("output folder: %s", folder)
            if output.resume and not _has_progress(folder):
                log.info("no saved state in %s: starting afresh", folder)
            return str(folder)

        yield Path(run_on_main(choose))


@contextmanager
def lock_folder(folder: Path) -> Iterator[bool]:
    """Creates `folder`, and locks it during the `with` block. The system frees the lock of a process that is killed.

    Yields whether this call has created the folder. Raises ValueError, with the process and host that has the lock, if another
    run has locked the folder.
    """
    path = folder / LOCK
    try:
        is_created = _create(folder)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"output_dir={folder} is a file, or lies below a file: choose a folder") from None
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"output_dir={folder}: another run ({read_lock(folder) or 'just started'}) writes to this folder: choose another "
            "folder, or wait until that run has ended"
        ) from None
    with lock:
        lock.release()  # the `with` statement has acquired the lock a second time
        mark_output(folder)
        yield is_created


def refuse_foreign(folder: Path) -> None:
    """Raises ValueError if a run would replace files in `folder` that no run has written, such as a folder `model`."""
    is_ours = is_finished(folder) or is_unfinished(folder) or (folder / STAGING).exists()
    if is_ours or read_lock(folder).startswith(LOCKED_BY):
        return
    names = [name for name in (*OLD_RESULTS, f"{CHECKPOINTS}/{CONFIG}") if (folder / name).exists()]
    if names:
        raise ValueError(
            f"output_dir={folder} contains {', '.join(names)}, which no run has written and a run would replace: choose "
            "another folder, or move what is there"
        )


def refuse_images(folder: Path, dataset: str) -> None:
    """Raises ValueError if `folder` is the data set or a folder of images in it: what is in an output folder is not read."""
    data, target = Path(dataset).expanduser(), folder.expanduser().resolve()
    if not os.path.isdir(data) or not target.is_dir() or not target.is_relative_to(data.resolve()):  # noqa: PTH112
        return  # a name that is too long is no error
    is_new = not is_output(target, [path.name for path in target.iterdir()])
    if target == data.resolve() or (is_new and any(list_folder(target).all_images())):
        raise ValueError(
            f"output_dir={folder} is a folder of the data set, whose images would be taken for files of the run: choose "
            "another folder"
        )


def refuse_nested(folder: Path) -> None:
    """Raises ValueError if `folder` lies inside the folder of another run, which may be deleted, or published, as a whole."""
    for parent in folder.expanduser().resolve().parents:
        if (is_finished(parent) and (parent / MODEL).is_dir()) or is_unfinished(parent):
            raise ValueError(
                f"output_dir={folder} lies inside the folder of another run, {parent}: choose a folder outside of it"
            )


def find_free_folder(folder: Path) -> Path:
    """Creates and returns `folder` or, if that exists, the folder with the first free number, such as `lora_2`."""
    for number in count(1):
        free = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            free.mkdir(parents=True)
        except FileExistsError:
            continue
        return free
    raise AssertionError("not reached")


@contextmanager
def replace_results(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to write all results to. After the `with` block, these replace the old results in `folder`.

    At every moment, `folder` contains a whole old run, parts of one run without results.json, or the whole new run.
    """
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for name in OLD_RESULTS:  # results.json first: without it, nobody takes the rest for a finished run
            old = folder / name
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)
        for new in sorted(staging.iterdir(), key=lambda path: (path.name == RESULTS, path.name)):
            new.replace(folder / new.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    (folder / CHECKPOINTS / CONFIG).unlink(missing_ok=True)
    if (folder / CHECKPOINTS).is_dir() and not any((folder / CHECKPOINTS).iterdir()):
        (folder / CHECKPOINTS).rmdir()


@contextmanager
def explains_how_to_continue(remedy: str, *errors: type[Exception]) -> Iterator[None]:
    """Adds `remedy`, the command or call that continues the run, to Interrupted, to ContinuableError and to `errors`."""
    try:
        yield
    except Interrupted as error:
        error.remedy = error.remedy or remedy
        raise
    except Exception as error:
        if isinstance(error, (ContinuableError, *errors)):
            error.add_note(f"Then continue with {remedy}")
        raise


def make_resume_command(strategy: str, folder: Path) -> str:
    """Returns the command that continues the unfinished run in `folder`."""
    launcher = [name for name in os.environ if name.startswith("ACCELERATE_") or name == "WORLD_SIZE"]
    program = ["accelerate", "launch", "-m", "hf_transfer"] if launcher else ["hf-transfer"]
    command = shlex.join([*program, "train", strategy, "--config", str(folder / CHECKPOINTS / CONFIG), "--resume"])
    processes = os.environ.get("WORLD_SIZE", "1")
    return command if processes == "1" else f"{command} (and the options of the launcher for {processes} processes)"


def _refuse(folder: Path, content: str) -> ValueError:
    return ValueError(
        f"output_dir={folder} contains {content}: choose another folder, or replace the run with --overwrite_output_dir"
    )


def _can_resume(folder: Path, strategy: str) -> bool:
    """Returns whether a finished run of `strategy` left a state, with which the network, data and settings are compared."""
    has_states = any((folder / CHECKPOINTS).glob("**/*.safetensors"))
    return has_states and json.loads((folder / RESULTS).read_text()).get("strategy") == strategy


def _create(folder: Path) -> bool:
    """Creates `folder` unless it exists. Returns whether this process has created it, even if others try at the same moment."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.is_dir():
            raise
        return False
    return True


def _name_first(output: OutputConfig, strategy: str) -> Path:
    """Returns the output folder if no other run has one of this name."""
    return Path("runs") / strategy if output.output_dir is None else Path(output.output_dir).expanduser()


def _name_folder(output: OutputConfig, strategy: str) -> tuple[Path, bool]:
    """Returns the output folder, and whether this call has created it.

    A run to resume is the newest unfinished one that has saved something, and otherwise the newest unfinished one.
    """
    default = _name_first(output, strategy)
    if output.output_dir is not None:
        return default, False
    if output.resume:
        named = [folder for folder in default.parent.glob(f"{strategy}*") if _is_numbered(folder, strategy)]
        started = [folder for folder in named if is_unfinished(folder)]
        saved = [folder for folder in started if _has_progress(folder)]
        if started:
            return max(saved or started, key=lambda each: (each / CHECKPOINTS / CONFIG).stat().st_mtime), False
    return find_free_folder(default), True


def _has_progress(folder: Path) -> bool:
    """Returns whether the run in `folder`, or one of its folds or seeds, has saved a state or a result."""
    return any(any(folder.rglob(name)) for name in (f"{CHECKPOINTS}/**/*.safetensors", RESULTS))


def _delete_failed(folder: Path, missing: Sequence[Path], error: BaseException | None) -> None:
    """Deletes the folder of a run that ended by an error with nothing to continue from, so that no other run resumes it.

    `missing`: the folders above it that did not exist before. They are deleted too if they are empty, because an empty folder
    in a data set is a class.
    """
    if isinstance(error, Exception) and not isinstance(error, ContinuableError) and not _has_progress(folder):
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()


def _is_numbered(folder: Path, strategy: str) -> bool:
    number = folder.name.removeprefix(strategy)
    return not number or (number[0] == "_" and number[1:].isdigit())
