"""Every command of docs/data.md runs on data as the page shows. Its config.yaml repeats it, and no local path is published."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_transfer.cli import main
from hf_transfer.data.dataset import load_data
from hf_transfer.flags import read_config
from hf_transfer.interrupts import Interrupted, catch_signals, received
from hf_transfer.network.policies import full
from hf_transfer.session import Session
from hf_transfer.strategy import default_config
from hf_transfer.training import phase
from hf_transfer.training.phases import run_phases
from tests.sessions import make_session

TEXT = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
COMMANDS = [line.strip() for line in TEXT.splitlines() if re.match(r"( {4})?hf-transfer train ", line)]
[CODE] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
ROWS = [
    {
        "label": ("cat", "dog")[i % 2],
        "split": "train" if i < 16 else "test",
        "patient": f"p{i // 2}",
        "year": 2015 + i % 7,
    }
    for i in range(24)
]


def picture(i: int) -> Image.Image:
    return Image.new("RGB", (8, 6), (9 * i, 200 * (i % 2), 40))


def encoded(i: int) -> bytes:
    stream = io.BytesIO()
    picture(i).save(stream, "PNG")
    return stream.getvalue()


def write_table(file: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    file.parent.mkdir(exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_shard(file: Path, numbers: list[int]) -> None:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for i in numbers:
            for suffix, content in {"png": encoded(i), "cls": str(i % 2).encode()}.items():
                member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_everything(root: Path) -> None:
    """Writes the same 24 images in every form of the page."""
    paths = [f"{row['split']}/{row['label']}/{i}.png" for i, row in enumerate(ROWS)]
    for i, path in enumerate(paths):
        for file in (root / "pets" / path, root / "pets_with_metadata" / f"{i}.png"):
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(i).save(file)
    shutil.make_archive(str(root / "pets"), "zip", root, "pets")
    shutil.make_archive(str(root / "pets"), "gztar", root / "pets")
    named = list(zip(paths, ROWS, strict=True))
    write_table(root / "pets" / "labels.csv", [{"image": path, **row} for path, row in named])
    renamed = [{"photo": path, "kind": row["label"]} for path, row in named]
    write_table(root / "tables" / "pets.tsv", renamed, "\t")
    beside = [{"file_name": f"{i}.png", "label": row["label"], "split": row["split"]} for i, row in enumerate(ROWS)]
    write_table(root / "pets_with_metadata" / "metadata.csv", beside)
    labels = [row["label"] for row in ROWS]
    images = [{"bytes": encoded(i), "path": None} for i in range(24)]
    table = datasets.Dataset.from_dict({"image": images, "kind": labels}).cast_column("image", datasets.Image())
    table.to_parquet(root / "pets.parquet")
    features = datasets.Features({"image": datasets.Array3D((6, 8, 3), "uint8"), "label": datasets.Value("string")})
    arrays = {"image": [np.asarray(picture(i)).tolist() for i in range(24)], "label": labels}
    datasets.Dataset.from_dict(arrays, features).to_parquet(root / "arrays.parquet")
    write_shard(root / "shards" / "train-000.tar", list(range(16)))
    write_shard(root / "shards" / "test-000.tar", list(range(16, 24)))
    for name in ("coarse", "fine"):
        (root / "tables" / name).mkdir()
        table.rename_column("kind", "label").to_parquet(root / "tables" / name / "train.parquet")
    lines = "".join(f"- config_name: {name}\n  data_files: {name}/train.parquet\n" for name in ("coarse", "fine"))
    (root / "tables" / "README.md").write_text(f"---\nconfigs:\n{lines}---\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("page")
    write_everything(folder)
    return folder


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves the csv open
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_and_its_config_repeats_it(command: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    words = shlex.split(command)
    output = Path(words[words.index("--output_dir") + 1])
    shutil.rmtree(output, ignore_errors=True)
    main(words[1:])
    results = json.loads((output / "results.json").read_text())
    number = sum(results["data"]["num_images"].values())
    assert number == (20 if "--where" in words else 24)
    repeated = load_data(read_config(str(output / "config.yaml"), default_config("linear_probe")).data)
    assert {split.name: split.fingerprint for split in repeated.splits} == results["data"]["fingerprint"]
    assert (repeated.train.groups is not None) == ("--group_column" in words)
    for file in (output / "results.json", output / "model" / "README.md"):
        assert str(root) not in file.read_text()


def test_evaluate_takes_the_columns(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    [command] = re.findall(r"    hf-transfer (evaluate .*)", TEXT)
    if not Path("runs/folder/model").is_dir():
        main(["train", "linear_probe", "--dataset", "pets", "--output_dir", "runs/folder"])
    main(shlex.split(command))
    assert "test: 7 images" in capsys.readouterr().out


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


def test_the_code_runs(root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "('cat', 'dog') 11 7\n"
