"""Every command that takes a model takes the output folder of a run too, and every command on runs takes the run's model."""

import json
from pathlib import Path

import pytest
from PIL import Image

import hf_transfer as ht
from hf_transfer.cli import main
from hf_transfer.config import RunConfig
from hf_transfer.locations import find_run, is_finished, is_unfinished, resolve_model
from hf_transfer.network.source import check_checkpoint, find_source
from hf_transfer.reporting.results import write_config

SETTINGS = {"images_per_class": 10, "cache": "none", "engine": "eager"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mine"
    ht.Task("sklearn/digits", **SETTINGS).fit(ht.linear_probe(readouts="none"), output_dir=folder)
    for i in range(2):
        Image.new("RGB", (8, 8), (100 * i, 0, 0)).save(folder.parent / f"{i}.png")
    return folder


def print_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(words)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ("predict", "{}", "{photo}", "--json"),
        ("evaluate", "{}", "--dataset", "sklearn/digits", "--split", "test"),
        ("inspect", "{}"),
    ],
    ids=lambda words: words[0],
)
def test_commands_take_the_run_and_its_model(
    words: tuple[str, ...], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = [
        print_of(capsys, *(word.format(folder, photo=run.parent / "0.png") for word in words))
        for folder in (run, run / "model")
    ]
    assert printed[0] == printed[1]
    assert printed[0]


def test_training_starts_from_a_run(run: Path) -> None:
    check_checkpoint(str(run))
    continued = ht.Task("sklearn/digits", str(run), **SETTINGS).fit(ht.linear_probe(readouts="none"))
    assert continued.test.accuracy == ht.load_run(run / "model").test.accuracy


@pytest.mark.parametrize("folder", ["", "model"])
def test_a_run_that_starts_from_a_run_names_it(folder: str, run: Path) -> None:
    """The folder `model` of every run has the same name."""
    task = ht.Task("sklearn/digits", str(run / folder), **SETTINGS)
    results = task.fit(ht.linear_probe(readouts="none")).results
    assert results["checkpoint"]["id"] == "mine"
    assert results["config"]["checkpoint"] == "mine"
    with pytest.raises(ValueError, match="mine is a folder without a Hub id"):
        task.fit(ht.lora(merge=False))


def test_only_the_folder_of_a_run_is_replaced(run: Path, tmp_path: Path) -> None:
    assert resolve_model(str(run)) == str(run / "model")
    for name in (str(run / "model"), "embedded", "timm/resnet18.a1_in1k", str(tmp_path), str(tmp_path / "missing")):
        assert resolve_model(name) == name
    assert find_run(run / "model") == find_run(run) == run
    assert find_run(tmp_path / "model") == tmp_path / "model"
    assert find_source(str(run)).folder == run / "model"


def test_a_run_that_is_not_finished_is_named(tmp_path: Path) -> None:
    write_config(tmp_path / "checkpoints", RunConfig())
    with pytest.raises(ValueError, match=r"is not finished.*--resume"):
        check_checkpoint(str(tmp_path))


def test_files_of_other_programs_make_no_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({}))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "config.yaml").write_text("dataset: cifar\n")
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert not is_finished(tmp_path)
    assert not is_unfinished(tmp_path)
    assert is_finished(run)


def test_publish_takes_the_model_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "model.safetensors" in print_of(capsys, "publish", str(run / "model"), "--repo_id", "me/model", "--dry_run")
