"""The output folder: one run at a time, no run overwritten unasked, and never one run's model beside another's config."""

import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import hf_transfer as ht
from hf_transfer import output, runs
from hf_transfer.auditing.files import open_audit_folder
from hf_transfer.cli import main
from hf_transfer.config import OutputConfig
from hf_transfer.errors import ContinuableError, describe_error
from hf_transfer.hub.save import save_model
from hf_transfer.interrupts import Interrupted
from hf_transfer.locations import is_unfinished
from hf_transfer.out_of_memory import FullMemoryError, is_out_of_memory
from hf_transfer.output import (
    explains_how_to_continue,
    find_free_folder,
    lock_folder,
    make_resume_command,
    open_folder,
    replace_results,
)
from hf_transfer.runs import push, train_session
from hf_transfer.training.records import RunResult
from tests.run_folders import RESULTS, leave
from tests.sessions import make_session

HOLD = """
import sys
from hf_transfer.config import OutputConfig, RunConfig
from hf_transfer.output import open_folder
try:
    with open_folder(OutputConfig(output_dir=sys.argv[1]), "lora"):
        print("runs", flush=True)
        sys.stdin.read()
except ValueError as error:
    print(error, flush=True)
"""


def test_of_two_runs_started_at_once_one_is_refused(tmp_path: Path) -> None:
    """Real processes; the system frees the lock of the one that is killed."""
    command = [sys.executable, "-W", "ignore", "-c", HOLD, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    try:
        lines = {process.stdout.readline().strip(): process for process in both}
        holder = lines.pop("runs")
        [refused] = lines
        assert f"another run (process {holder.pid} on {os.uname().nodename}) writes to this folder" in refused
        with pytest.raises(ValueError, match=f"process {holder.pid} "), lock_folder(tmp_path / "run"):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with lock_folder(tmp_path / "run"):
            pass
    finally:
        for process in both:
            process.kill()
            process.communicate()


def choose(**settings: Any) -> Path:
    with open_folder(OutputConfig(**settings), "lora") as folder:
        return folder


def test_a_named_folder_with_a_finished_run_is_refused_unless_asked(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    named = {"output_dir": str(folder)}
    assert choose(**named) == folder
    assert choose(**named) == folder  # it is unfinished
    (folder / "results.json").write_text(json.dumps(RESULTS))
    with pytest.raises(
        ValueError, match=r"contains a finished run: choose another folder, or .*--overwrite_output_dir"
    ):
        choose(**named)
    assert choose(**named, overwrite_output_dir=True) == folder
    (folder / "checkpoints").mkdir()
    for strategy, state in (("lora", "nothing"), ("full", "state.safetensors")):
        (folder / "results.json").write_text(json.dumps({**RESULTS, "strategy": strategy}))
        (folder / "checkpoints" / state).touch()
        with pytest.raises(ValueError, match="no saved state of this strategy to resume"):
            choose(**named, resume=True)
    (folder / "results.json").write_text(json.dumps(RESULTS))
    assert choose(**named, resume=True) == folder
    assert (folder / "results.json").exists()  # until the new run is finished
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        choose(output_dir=str(tmp_path / "file"))


def test_a_run_says_that_it_replaces_the_state_of_an_unfinished_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    leave(folder, "checkpoints/config.yaml")
    line = f"{folder} has the saved state of an unfinished run, which this run replaces; to continue that run, add --resume"
    choose(output_dir=str(folder))
    assert line not in caplog.text, "nothing is lost"
    (folder / "checkpoints" / "state.safetensors").touch()
    choose(output_dir=str(folder), resume=True)
    assert line not in caplog.text
    choose(output_dir=str(folder))
    assert line in caplog.text


def test_a_tracker_that_is_not_installed_is_an_error_and_no_run_without_tracking(tmp_path: Path) -> None:
    absent = next(name for name in ("wandb", "comet_ml", "aim", "swanlab") if importlib.util.find_spec(name) is None)
    message = f"tracker='{absent}': the package {absent} is not installed; pip install {absent}, or choose none"
    task = ht.Task("sklearn/digits", images_per_class=8)
    with pytest.raises(ValueError, match=re.escape(message)):
        task.fit(ht.full(epochs=1, tracker=absent), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["model", "config.yaml", "report.html", "results.json", "checkpoints/config.yaml"])
def test_files_that_no_run_has_written_are_not_replaced(name: str, tmp_path: Path) -> None:
    """A folder `model` of the user's project, for example."""
    foreign = tmp_path / "project" / name
    (foreign if name == "model" else foreign.parent).mkdir(parents=True)
    (foreign / "weights.bin" if name == "model" else foreign).write_text("precious")
    project = tmp_path / "project"
    before = sorted(project.rglob("*"))
    with (
        pytest.raises(ValueError, match=f"contains {name}, which no run has written"),
        open_folder(OutputConfig(output_dir=str(project), overwrite_output_dir=True), "full"),
    ):
        pass
    with pytest.raises(ValueError, match=f"contains {name}, which no run has written"):
        ht.Task("sklearn/digits", images_per_class=2).fit(ht.linear_probe(readouts="none")).save(project)
    assert sorted(project.rglob("*")) == before
    assert (foreign / "weights.bin" if name == "model" else foreign).read_text() == "precious"


@pytest.mark.parametrize("left", ["results.json", "checkpoints/config.yaml"])
@pytest.mark.parametrize("inside", ["model", "model/new", "new"])
def test_a_folder_inside_another_run_is_refused(left: str, inside: str, tmp_path: Path) -> None:
    """Publishing the model of that run would push the other run's report, which shows images."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    leave(tmp_path / "run", left)
    folder = tmp_path / "run" / inside
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        ValueError, match=f"output_dir={folder} lies inside the folder of another run, {tmp_path}/run: "
    ):
        choose(output_dir=str(folder), overwrite_output_dir=True)
    with pytest.raises(ValueError, match="lies inside the folder of another run"):
        ht.Run(folder=tmp_path).save(folder)
    assert sorted(tmp_path.rglob("*")) == before
    assert choose(output_dir=str(tmp_path / "run_2")) == tmp_path / "run_2"


@pytest.mark.parametrize("content", ["{}", "[1]", "a: 1\n- b", "\xff", ""])
def test_a_folder_inside_a_project_with_files_of_the_same_names_is_no_folder_inside_a_run(
    content: str, tmp_path: Path
) -> None:
    """A project may have a folder `model` beside the results of another program, and the config of its checkpoints."""
    for name in ("results.json", "checkpoints/config.yaml", "model/weights.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="latin-1")
    folder = tmp_path / "runs" / "x"
    assert choose(output_dir=str(folder)) == folder


def test_what_an_interrupted_run_has_left_is_replaced(tmp_path: Path) -> None:
    for left in (".lock", ".saving/x", "checkpoints/config.yaml"):
        folder = tmp_path / left.replace("/", "_")
        (folder / "model").mkdir(parents=True)
        leave(folder, left)
        with open_folder(OutputConfig(output_dir=str(folder)), "full") as opened:
            assert opened == folder


def test_without_a_name_a_run_takes_the_next_folder_and_resume_the_newest_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [choose() for _ in range(3)]
    assert [str(folder) for folder in folders] == ["runs/lora", "runs/lora_2", "runs/lora_3"]
    for i, name in enumerate(("lora_2", "lora", "lora_x")):
        leave(Path("runs", name), "checkpoints/config.yaml")
        os.utime(Path("runs", name, "checkpoints", "config.yaml"), (i, i))
    assert choose(resume=True) == Path("runs/lora")
    assert find_free_folder(Path("runs/full")) == Path("runs/full")


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    "saved", ["", "checkpoints/state.safetensors", "fold_1/checkpoints/probe/state.safetensors", "so_far/results.json"]
)
@pytest.mark.parametrize("error", [ValueError, ContinuableError, Interrupted])
def test_a_run_that_fails_before_it_saves_anything_leaves_no_folder(
    error: type[BaseException], saved: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"output_dir": "runs/new"} if named else {}
    folder = Path("runs/new" if named else "runs/lora")

    def fail(error: BaseException, *names: str) -> None:
        with open_folder(OutputConfig(**settings), "lora") as opened:
            for name in filter(None, names):
                (opened / name).parent.mkdir(parents=True, exist_ok=True)
                (opened / name).touch()
            raise error

    is_left = error is not ValueError or bool(saved)
    with pytest.raises(error):
        fail(error(2), "checkpoints/config.yaml", saved)
    assert folder.exists() == is_left
    with pytest.raises(ValueError, match="again"):
        fail(ValueError("again"))
    assert folder.exists() == is_left, "a folder that was there stays"
    assert Path("runs").exists() == is_left, "in a data set, an empty folder is a class"


@pytest.mark.parametrize("name", ["photos", "photos/cat", "photos/train"])
def test_a_folder_of_images_is_no_output_folder_of_a_run_on_them(name: str, tmp_path: Path) -> None:
    for image in ("photos/cat/1.png", "photos/train/dog/1.png"):
        (tmp_path / image).parent.mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / image)
    config, before = OutputConfig(output_dir=str(tmp_path / name)), sorted(tmp_path.rglob("*"))
    message = f"output_dir={tmp_path / name} is a folder of the data set"
    with pytest.raises(ValueError, match=message), open_folder(config, "lora", dataset=str(tmp_path / "photos")):
        pass
    with pytest.raises(ValueError, match=message):
        open_audit_folder(str(tmp_path / name), overwrite=False, dataset=str(tmp_path / "photos"))
    assert sorted(tmp_path.rglob("*")) == before
    for folder in (tmp_path / name / "new", tmp_path / name / "new", tmp_path):
        with open_folder(OutputConfig(output_dir=str(folder)), "lora", dataset=str(tmp_path / "photos")) as opened:
            assert opened == folder


def test_a_run_starts_inside_its_data_set_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        Path("ab"[i % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i, 0, 90 * (i % 2))).save(Path("ab"[i % 2], f"{i}.png"))
    main(["audit", "--dataset", "."])
    for run in ("runs/linear_probe", "runs/linear_probe_2"):
        main(["train", "linear_probe", "--readouts", "none", "--dataset", "."])
        results = json.loads(Path(run, "results.json").read_text())
        assert results["label_names"] == ["a", "b"]
        assert "Folders that hf_transfer has written are not read: 'runs'." in results["data"]["notes"]
    main(["predict", "runs/linear_probe", ".", "--explain", "why"])
    capsys.readouterr()
    main(["predict", "runs/linear_probe", ".", "--json"])
    assert len(json.loads(capsys.readouterr().out)) == 12


@pytest.mark.parametrize("check", ["refuse_nested", "refuse_foreign"])
def test_a_run_that_is_refused_leaves_the_folder_of_the_run_that_was_faster(
    check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both start when there is no folder. The faster one locks it while the other one is at `check`."""
    output_config = OutputConfig(output_dir=str(tmp_path / "new"))
    with ExitStack() as faster:

        def be_slower(_: Path) -> None:
            monkeypatch.undo()
            faster.enter_context(open_folder(output_config, "lora"))

        monkeypatch.setattr(output, check, be_slower)
        with pytest.raises(ValueError, match=r"another run \(process"), open_folder(output_config, "lora"):
            pass
        assert (tmp_path / "new" / ".lock").is_file()
        with pytest.raises(ValueError, match="of the faster run"), faster:
            raise ValueError("of the faster run")
    assert not (tmp_path / "new").exists()


def test_a_folder_is_deleted_while_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted = []

    def look(folder: Path, **options: Any) -> None:
        with pytest.raises(ValueError, match="another run"), lock_folder(folder):
            pass
        deleted.append(folder)

    monkeypatch.setattr(output.shutil, "rmtree", look)
    with pytest.raises(ValueError, match="early"), open_folder(OutputConfig(output_dir=str(tmp_path / "new")), "lora"):
        raise ValueError("early")
    assert deleted == [tmp_path / "new"]


def test_a_failed_run_does_not_take_the_place_of_the_run_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    for time, name in enumerate(("lora", "lora_2")):
        leave(Path("runs", name), "checkpoints/config.yaml")
        os.utime(Path("runs", name, "checkpoints", "config.yaml"), (time, time))
    assert choose(resume=True) == Path("runs/lora_2")
    assert "no saved state in runs/lora_2: starting afresh" in caplog.text
    caplog.clear()
    Path("runs/lora/checkpoints/state.safetensors").touch()
    assert choose(resume=True) == Path("runs/lora")
    assert "afresh" not in caplog.text
    with pytest.raises(SystemExit):
        main(["train", "full", "--dataset", "typo"])
    assert [path.name for path in Path("runs").iterdir() if path.name.startswith("full")] == []


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder with the results of an old run."""
    (tmp_path / "model").mkdir()
    for name in ("model/weights", "config.yaml", "results.json", "report.html"):
        (tmp_path / name).write_text("old")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "config.yaml").write_text("new")
    return tmp_path


def test_results_are_replaced_all_at_once(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before every change in the folder, whatever lies there is of one run, and results.json means that all is there."""
    names = ("results.json", "config.yaml", "model/weights", "report.html")
    seen = []

    def look(call: Any) -> Any:
        def looking(path: Path, *arguments: Any, **options: Any) -> Any:
            runs = {name: (finished / name).read_text() for name in names if (finished / name).exists()}
            assert len(set(runs.values())) <= 1
            assert "results.json" not in runs or len(runs) >= 3  # a new run may have no report
            seen.append(runs)
            return call(path, *arguments, **options)

        return looking

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, look(getattr(Path, name)))
    with replace_results(finished) as staging:
        (staging / "model").mkdir()
        for name in ("model/weights", "config.yaml", "results.json"):
            (staging / name).write_text("new")
    assert {} in seen
    assert {path.name for path in finished.iterdir()} == {"model", "config.yaml", "results.json"}
    assert (finished / "model" / "weights").read_text() == "new"


def test_an_error_while_writing_leaves_the_old_results(finished: Path) -> None:
    with pytest.raises(FileNotFoundError), replace_results(finished) as staging:
        (staging / "no folder" / "config.yaml").write_text("new")
    assert (finished / "config.yaml").read_text() == "old"
    assert (finished / "checkpoints" / "config.yaml").exists()
    assert not (finished / ".saving").exists()


def test_a_full_disk_at_the_end_loses_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the folder, and the resumed run only saves."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_full_disk(*arguments: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        save_model(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_model", save_on_full_disk)
        with pytest.raises(ContinuableError, match=f"results cannot be written to {tmp_path} .*free disk space"):
            train_session(make_session("full", tmp_path, epochs=1))
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not (tmp_path / "results.json").exists()
    assert is_unfinished(tmp_path)
    result = train_session(make_session("full", tmp_path, epochs=1, resume=True))
    assert result.resumed
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert not (tmp_path / "checkpoints" / "config.yaml").exists()


@pytest.mark.parametrize("error", [OSError("disk full"), Interrupted(signal.SIGINT)])
def test_a_push_that_ends_early_names_the_command_that_repeats_the_push(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is finished, so the command is `publish`, not `train --resume`."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(runs, "publish", fail)
    session = make_session("full", tmp_path)
    result = RunResult(backbone=session.backbone, phases=(), metrics={})
    with pytest.raises(type(error)), explains_how_to_continue("hf-transfer train"):
        push(session, result, "me/model")
    assert describe_error(error).endswith(f"ontinue with hf-transfer publish {tmp_path} --repo_id me/model")


def test_a_run_that_fails_early_can_be_repeated_and_leaves_the_old_run(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    task = ht.Task(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere"):
        task.fit(ht.linear_probe(), output_dir=tmp_path, overwrite_output_dir=True)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "checkpoints", "results.json"}
    with pytest.raises(ValueError, match="give output_dir too"):
        task.fit(ht.linear_probe(), resume=True)


def test_the_command_that_continues_uses_the_launcher_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("ACCELERATE_") or n == "WORLD_SIZE"]:
        monkeypatch.delenv(name)
    short = "train lora --config runs/x/checkpoints/config.yaml --resume"
    assert make_resume_command("lora", Path("runs/x")) == f"hf-transfer {short}"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert make_resume_command("lora", Path("runs/x")).startswith(f"accelerate launch -m hf_transfer {short} (and ")


@pytest.mark.parametrize(
    ("error", "settings", "pair"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), {}, "--batch_size 8 --gradient_accumulation_steps 2"),
        (MemoryError(), {"batch_size": 9}, "--batch_size 3 --gradient_accumulation_steps 3"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
            {"gradient_accumulation_steps": 3},
            "--batch_size 8 --gradient_accumulation_steps 6",
        ),
        (MemoryError(), {"batch_size": 1}, "--gradient_checkpointing"),
    ],
)
def test_full_memory_names_the_batches_that_give_the_same_result(
    error: Exception, settings: dict[str, Any], pair: str
) -> None:
    session = make_session("full", **settings)

    def fail(*_: Any) -> None:
        raise error

    session.chain.model.register_forward_pre_hook(fail)
    with pytest.raises(FullMemoryError, match=f"batch_size={session.config.compute.batch_size} and .*{pair}"):
        train_session(session)


def test_a_real_allocation_that_fails_is_recognized() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert not is_out_of_memory(RuntimeError("no card"))
