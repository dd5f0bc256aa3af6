"""config.yaml of a run on a checkpoint and a data set of the Hub names their commits, so that it repeats the run."""

import io
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from huggingface_hub import constants
from PIL import Image

from hf_transfer.config import DataConfig, ModelConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.flags import read_config
from hf_transfer.network.backbone import load
from hf_transfer.network.peft_checkpoints import load_checkpoint
from hf_transfer.network.source import Source, find_source, pin_checkpoint
from hf_transfer.runs import open_session, train_session
from hf_transfer.strategy import default_config
from tests.hub_server import Files, HubServer, Repository
from tests.sessions import make_config
from tests.test_publish import TOKENS, signed_in
from tests.test_timm_checkpoints import VIT, publish, publish_adapter


def make_checkpoint(change: float) -> Files:
    """The files of the embedded checkpoint, with one layer's weights scaled by 1 + `change`."""
    from safetensors.torch import load, save

    folder = Path(str(resources.files("hf_transfer") / "assets" / "embedded"))
    weights = load((folder / "model.safetensors").read_bytes())
    stem = next(name for name in weights if name.endswith(".weight"))
    weights[stem] = weights[stem] * (1 + change)
    return {
        "config.json": ((folder / "config.json").read_bytes(), False),
        "model.safetensors": (save(weights, {"format": "pt"}), True),
    }


def make_dataset(brightness: int) -> Files:
    """A parquet file with 12 images of two classes."""
    generator = np.random.default_rng(brightness)
    pixels = generator.integers(0, brightness, (12, 8, 8, 3), dtype=np.uint8)
    table = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in pixels], "label": [0, 1] * 6},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}),
    )
    file = io.BytesIO()
    table.to_parquet(file)
    # At the root, because the server's list of files has no folders.
    return {"train-00000-of-00001.parquet": (file.getvalue(), True)}


@pytest.mark.parametrize("checkpoint", ["embedded", "none", "{folder}"])
def test_what_is_not_from_the_hub_has_no_commit(checkpoint: str, tmp_path: Path) -> None:
    source = Source(folder=tmp_path, id="bob/upstream", revision="0" * 40, license=None)  # a snapshot in the Hub cache
    name = checkpoint.format(folder=tmp_path)
    assert pin_checkpoint(name, source) == name
    assert pin_checkpoint("bob/upstream", source) == f"bob/upstream@{'0' * 40}"
    assert pin_checkpoint("bob/upstream", replace(source, revision=None)) == "bob/upstream"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(TOKENS) as server, signed_in(server, tmp_path, None):
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        for name in ("bob/upstream", "bob/pets"):
            server.repositories[name] = Repository(name, is_private=False)
        yield server


def test_a_streamed_data_set_is_the_stored_one_at_its_commit(hub: HubServer) -> None:
    commit = hub.repositories["bob/pets"].commit(make_dataset(100), "main")
    streamed = load_data(DataConfig(dataset="bob/pets", streaming=True))
    assert not list(datasets.config.HF_DATASETS_CACHE.glob("**/*.arrow")), "a stream leaves no copy"
    stored = load_data(DataConfig(dataset="bob/pets"))
    assert streamed.revision == stored.revision == commit
    assert streamed.train.fingerprint == stored.train.fingerprint
    last = len(stored.train) - 1
    assert streamed.train.image(last).tobytes() == stored.train.image(last).tobytes()


def test_config_yaml_repeats_the_run_after_the_branches_moved(hub: HubServer, tmp_path: Path) -> None:
    upstream, pets = (hub.repositories[name] for name in ("bob/upstream", "bob/pets"))
    first = (upstream.commit(make_checkpoint(0), "main"), pets.commit(make_dataset(100), "main"))
    names = {"checkpoint": "bob/upstream@main", "dataset": "bob/pets"}
    config = make_config("linear_probe", readouts="none", cv_folds=2, images_per_class=None, **names)
    train_session(open_session(config, output_dir=tmp_path / "run"))
    file = tmp_path / "run" / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    assert (settings["checkpoint"], settings["dataset"]) == (f"bob/upstream@{first[0]}", f"bob/pets@{first[1]}")

    upstream.commit(make_checkpoint(1), "main")
    pets.commit(make_dataset(250), "main")
    again = read_config(str(file), default_config("linear_probe"))
    for name, repeated in (("again", again), ("moved", config)):
        train_session(open_session(repeated, output_dir=tmp_path / name))
    weights = {name: load(str(tmp_path / name / "model")).model.state_dict() for name in ("run", "again", "moved")}
    assert all(torch.equal(value, weights["again"][name]) for name, value in weights["run"].items())
    assert any(not torch.equal(value, weights["moved"][name]) for name, value in weights["run"].items())
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text()) == settings

    requests = len(hub.requests)
    newest = upstream.branches["main"]
    with pytest.MonkeyPatch.context() as patch:  # undone before `signed_in` restores the same constant
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert pin_checkpoint("bob/upstream@main", find_source("bob/upstream@main")) == f"bob/upstream@{newest}"
    assert len(hub.requests) == requests


def test_a_renamed_repository_is_recorded_by_its_new_name(hub: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    commit = hub.repositories["bob/upstream"].commit(make_checkpoint(0), "main")
    hub.renamed["alice/old"] = "bob/upstream"
    with caplog.at_level(logging.INFO):
        source = load("alice/old").source
    assert (source.id, source.revision) == ("bob/upstream", commit)
    assert "alice/old was renamed on the Hub: its name is now bob/upstream, which is recorded" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bob/gated", "bob/gated is gated: accept the terms on its Hub page, then run `hf auth login`"),
        ("bob/private", "the Hub has no model 'bob/private' that you may read: check the id, or run `hf auth login`"),
        ("bob/missing", "the Hub has no model 'bob/missing' that you may read"),
        ("bob/upstream@v2", "bob/upstream has no revision 'v2': choose a branch, tag or commit of bob/upstream"),
    ],
)
def test_what_the_hub_refuses_ends_in_one_line(hub: HubServer, name: str, message: str) -> None:
    hub.repositories["bob/upstream"].commit(make_checkpoint(0), "main")
    for other in ("gated", "private"):
        hub.repositories[f"bob/{other}"] = Repository(f"bob/{other}", other == "private", is_gated=other == "gated")
        hub.repositories[f"bob/{other}"].commit(make_checkpoint(0), "main")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_a_mistyped_run_folder_is_not_taken_for_a_hub_id_alone(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/probe/model").mkdir(parents=True)
    Path("bob").mkdir()
    meant = (
        "runs/probee: no such folder (did you mean 'runs/probe'?), and no model of this name could be read from the Hub"
    )
    with pytest.raises(ValueError, match=re.escape(f"{meant} (the Hub has none that you may read;")):
        load("runs/probee")
    with pytest.raises(ValueError, match=re.escape("bob/missing: no such folder, and no model of this name could be")):
        load("bob/missing")
    with pytest.MonkeyPatch.context() as patch:  # undone before `signed_in` restores the same constant
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match=re.escape(f"{meant} (it cannot be reached: no network, or")):
            load("runs/probee")


def test_a_peft_repository_is_pinned_at_its_own_commit(hub: HubServer, tmp_path: Path) -> None:
    def read(folder: Path) -> Files:
        return {path.name: (path.read_bytes(), path.suffix == ".safetensors") for path in folder.iterdir()}

    publish(tmp_path / "upstream", **VIT)
    publish_adapter(tmp_path / "upstream", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "upstream"), "bob/upstream"))
    hub.repositories["bob/upstream"].commit(read(tmp_path / "upstream"), "main")
    hub.repositories["bob/adapter"] = Repository("bob/adapter", is_private=False)
    commit = hub.repositories["bob/adapter"].commit(read(tmp_path / "adapter"), "main")
    backbone = load_checkpoint(ModelConfig(checkpoint="bob/adapter"), ("cat", "dog"))
    assert (backbone.source.id, backbone.source.revision) == ("bob/adapter", commit)
    assert pin_checkpoint("bob/adapter", backbone.source) == f"bob/adapter@{commit}"
    assert not backbone.is_auto_class


def test_pickles_are_downloaded_only_without_safetensors(hub: HubServer, tmp_path: Path) -> None:
    files = make_checkpoint(0)
    weights = io.BytesIO()
    torch.save(safetensors.torch.load(files["model.safetensors"][0]), weights)
    hub.repositories["bob/upstream"].commit({**files, "pytorch_model.bin": (weights.getvalue(), True)}, "main")
    expected = load("bob/upstream").model.state_dict()
    assert not any(".bin" in request for request in hub.requests)
    hub.repositories["bob/pickled"] = Repository("bob/pickled", is_private=False)
    pickled = {"config.json": files["config.json"], "pytorch_model.bin": (weights.getvalue(), True)}
    hub.repositories["bob/pickled"].commit(pickled, "main")
    assert all(torch.equal(t, expected[n]) for n, t in load("bob/pickled").model.state_dict().items())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "model.pth"], "bob/other has none of model.safetensors, .* (its weights: model.pth)"),
        (["open_clip_config.json", "open_clip_model.safetensors"], "bob/other is an open_clip checkpoint"),
        (["README.md"], "bob/other has no config.json"),
    ],
)  # fmt: skip
def test_a_repository_in_another_format_ends_in_one_line(hub: HubServer, files: list[str], message: str) -> None:
    hub.repositories["bob/other"] = Repository("bob/other", is_private=False)
    hub.repositories["bob/other"].commit(dict.fromkeys(files, (b"{}", False)), "main")
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        load("bob/other")
