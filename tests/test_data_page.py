"""Every block of docs/data.md runs on data as the page shows. Its config.yaml repeats it, and no local path is published."""

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from hf_transfer.cli import main
from hf_transfer.data.dataset import load_data
from hf_transfer.flags import read_config
from hf_transfer.interrupts import Interrupted, catch_signals, received
from hf_transfer.network.policies import full
from hf_transfer.session import Session
from hf_transfer.strategy import default_config
from hf_transfer.training import phase
from hf_transfer.training.phases import run_phases
from tests.page_files import write_pets
from tests.page_runner import run_page
from tests.pages import ROOT, read_blocks
from tests.sessions import make_session

PAGE = ROOT / "docs" / "data.md"
COMMANDS = [
    line for block in read_blocks(PAGE) for line in block.code.splitlines() if line.startswith("hf-transfer train ")
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the whole page ran, and what it printed."""
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("page")
    write_pets(folder)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run_page(PAGE, folder, patch) == len(list(read_blocks(PAGE))) - 4  # four show files
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def root(page: tuple[Path, str]) -> Path:
    return page[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_config_of_a_command_repeats_it(command: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    words = shlex.split(command)
    output = Path(words[words.index("--output_dir") + 1])
    results = json.loads((output / "results.json").read_text())
    number = sum(results["data"]["num_images"].values())
    assert number == (20 if "--where" in words else 24)
    repeated = load_data(read_config(str(output / "config.yaml"), default_config("linear_probe")).data)
    assert {split.name: split.fingerprint for split in repeated.splits} == results["data"]["fingerprint"]
    assert (repeated.train.groups is not None) == ("--group_column" in words)
    for file in (output / "results.json", output / "model" / "README.md"):
        assert str(root) not in file.read_text()


def test_evaluate_and_python_take_the_columns(page: tuple[Path, str]) -> None:
    assert "test: 7 images" in page[1]
    assert "('cat', 'dog') 11 7\n" in page[1]


def test_every_form_has_a_command() -> None:
    given = {shlex.split(command)[4] for command in COMMANDS}
    assert given >= {
        "pets", "pets.zip", "pets.tar.gz", "pets/labels.csv", "tables/pets.tsv", "pets_with_metadata", "pets.parquet",
        "arrays.parquet", "shards", "tables:fine",
    }  # fmt: skip


def test_absolute_paths_are_not_published(root: Path, tmp_path: Path) -> None:
    for dataset, flags in (
        ("tables:fine", []),
        ("tables/pets.tsv", ["--image_root", f"{root}/pets", "--image_column", "photo", "--label_column", "kind"]),
    ):
        output = tmp_path / dataset.replace("/", "_")
        main(["train", "linear_probe", "--dataset", f"{root}/{dataset}", *flags, "--output_dir", str(output)])
        for file in (output / "results.json", output / "model" / "README.md", output / "report.html"):
            assert str(root) not in file.read_text()


def test_a_run_on_a_table_resumes_to_the_bit(root: Path, tmp_path: Path) -> None:
    """Also from another place: the folder of the images is not compared."""
    plan = [phase.train(full(), epochs=2, lr=1e-3)]
    columns = {"split_column": "split", "group_column": "patient", "where": "year > 2015", "label_columns": ["label"]}
    shutil.copytree(root / "pets", tmp_path / "moved" / "pets")

    def open_run(folder: str, pets: Path, **settings: Any) -> Session:
        few = {"images_per_class": 4, "batch_size": 4, "image_root": str(pets), **columns}
        return make_session("full", tmp_path / folder, dataset=str(pets / "labels.csv"), **few, **settings)

    whole = open_run("whole", root / "pets")
    run_phases(whole, plan, checkpoints=tmp_path / "whole")
    session = open_run("cut", root / "pets")

    def stop(module: torch.nn.Module, *_: Any) -> None:
        if module.training and torch.is_grad_enabled() and not received():
            os.kill(os.getpid(), signal.SIGTERM)

    handle = session.chain.model.register_forward_pre_hook(stop)
    with pytest.raises(Interrupted), catch_signals():
        run_phases(session, plan, checkpoints=tmp_path / "cut")
    handle.remove()
    resumed = open_run("cut", tmp_path / "moved" / "pets", resume=True)
    assert run_phases(resumed, plan, checkpoints=tmp_path / "cut").resumed
    weights = resumed.chain.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in whole.chain.model.state_dict().items())
