"""Pushes by the real client to a Hub on loopback: the Hub gets exactly the saved files, and no fault loses data."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants

from hf_transfer.cli import main
from hf_transfer.config import AdapterConfig
from hf_transfer.data.sources import PixelSource
from hf_transfer.data.splits import Split
from hf_transfer.hub import publish as module
from hf_transfer.hub.attempts import PushError
from hf_transfer.hub.publish import check_push
from hf_transfer.hub.save import save_model
from hf_transfer.hub.verify import REFERENCE, VerificationError, find_libraries, verify, write_reference
from hf_transfer.network.adapters import add_adapters
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.targets.single_label import SingleLabel
from tests.hub_server import DROP, HubServer, Repository, Token
from tests.test_recipes import TIMEOUT_S
from tests.test_save import LABELS, results_for, write_upstream

TOKENS = {"hf_alice": Token("alice"), "hf_reader": Token("alice", "read"), "hf_bob": Token("bob")}
CARD = "README.md"
# huggingface_hub itself, when it sends a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


def environment(hub: HubServer, folder: Path, token: str | None) -> dict[str, str]:
    """Environment variables of a user of this Hub: caches of their own, and a token."""
    env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home")}
    return env | ({"HF_TOKEN": token} if token else {})


@contextmanager
def signed_in(hub: HubServer, folder: Path, token: str | None) -> Iterator[None]:
    """Inside, this process uses that environment too, although the client read its own at import."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(hub, folder, token).items():
            patch.setenv(name, value)
        for name in ("HF_HUB_OFFLINE", *(() if token else ("HF_TOKEN",))):
            patch.delenv(name, raising=False)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "home" / "hub"))
        yield


def make_run(backbone: Backbone, run: Path) -> Path:
    """Writes the output folder of a recipe for this backbone, without training; returns it."""
    rng = np.random.default_rng(0)
    images = PixelSource(rng.integers(0, 256, (3, 40, 52, 3), dtype=np.uint8))
    names = backbone.label_names
    split = Split(
        name="test", source=images, rows=np.arange(3), labels=np.zeros(3, np.int64), target=SingleLabel(names=names)
    )
    results = results_for(backbone)
    save_model(backbone, results, run / "model")
    write_reference(backbone, split, run / REFERENCE)
    (run / "results.json").write_text(json.dumps(results))
    return run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(load("embedded"), tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(TOKENS) as server:
        yield server


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips verification, which has tests of its own, and the waits between attempts."""
    monkeypatch.setattr(module, "verify", lambda *_, **__: ())
    clock = SimpleNamespace(**vars(time) | {"sleep": lambda _: None})
    monkeypatch.setattr("hf_transfer.hub.attempts.time", clock)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)


def push(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str], *flags: str, token: str | None = "hf_alice"
) -> tuple[int, str]:
    """Exit status and output of `hf-transfer publish`."""
    status = 0
    with signed_in(hub, run.parent, token):
        try:
            main(["publish", str(run), "--repo_id", "alice/digits", *flags])
        except SystemExit as end:
            status = int(end.code or 0)
    shown = capsys.readouterr()
    return status, shown.out + shown.err


def contents(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def is_complete(hub: HubServer, model: Path, branch: str = "main") -> bool:
    """Whether the branch has all files of `model`, byte for byte, and the card of this repository."""
    sent = hub.files("alice/digits", branch)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in sent.items() if name != CARD}
    wanted = {name: digest for name, digest in contents(model).items() if name != CARD}
    return wanted.items() <= hashes.items() and b'model="alice/digits"' in sent[CARD]


@pytest.mark.usefixtures("unverified")
def test_a_second_push_sends_no_weights_again(hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    assert push(hub, run, capsys)[0] == 0
    assert is_complete(hub, run / "model")
    assert contents(run) == before
    number = len(hub.requests)
    status, shown = push(hub, run, capsys)
    assert status == 0, shown
    assert "hf_alice" not in shown
    assert not [r for r in hub.requests[number:] if r.startswith("PUT")]


@pytest.mark.usefixtures("unverified")
def test_a_dry_run_sends_nothing(hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown = push(hub, run, capsys, "--dry_run", token=None)
    assert status == 0, shown
    assert "model.safetensors" in shown
    assert hub.requests == []
    assert f"first read the card, {run / 'model' / CARD}\nnext: hf-transfer publish {run} --repo_id" in shown
    card = (run / "model" / CARD).read_text()
    assert "A fresh process without hf_transfer loaded this model" in card
    assert "not verified yet" not in card


def test_a_model_that_is_not_the_measured_one_is_not_pushed(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((run / "model" / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.0, 0.0, 0.0]
    (run / "model" / "config.json").write_text(json.dumps(config))
    status, shown = push(hub, run, capsys)
    assert status == 1
    assert "a different model than the model that was measured" in shown
    assert hub.requests == []


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, "hf auth login"),
        ("hf_wrong", "hf auth login"),
        ("hf_reader", "use a token with write access"),
        ("hf_bob", "a repository of your own"),
    ],
)
def test_a_token_without_write_access_is_explained_before_and_after_training(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str], token: str | None, words: str
) -> None:
    before = contents(run)
    status, shown = push(hub, run, capsys, token=token)
    assert status == 2
    assert words in shown
    assert f"Repeat: hf-transfer publish {run} --repo_id alice/digits" in shown
    assert contents(run) == before
    with signed_in(hub, run.parent, token), pytest.raises(PushError, match=words) as refusal:
        check_push("alice/digits")
    assert "Nothing was trained" in str(refusal.value)
    assert not hub.repositories


def test_a_token_with_write_access_passes_the_check(hub: HubServer, tmp_path: Path) -> None:
    with signed_in(hub, tmp_path, "hf_alice"):
        check_push("alice/digits@v2")
    assert not hub.repositories  # the check creates none


@pytest.mark.usefixtures("unverified")
def test_a_foreign_card_is_replaced_only_with_overwrite(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = Repository("alice/digits", is_private=False)
    theirs.commit({CARD: (b"---\ntags:\n- mine\n---\nby hand", False)}, "main")
    hub.repositories["alice/digits"] = theirs

    def fail_once(number: int) -> None:  # a failed read does not mean that there is no card
        if "resolve" in hub.requests[number] and not hub.faults:
            hub.faults = {number: 500}

    hub.before_answer = fail_once
    status, shown = push(hub, run, capsys)
    assert (status, "--overwrite" in shown) == (2, True), shown
    assert hub.faults
    with signed_in(hub, run.parent, "hf_alice"), pytest.raises(PushError, match="--overwrite"):
        check_push("alice/digits")
    assert hub.files("alice/digits")[CARD].endswith(b"by hand")
    status, shown = push(hub, run, capsys, "--overwrite")
    assert status == 0, shown
    assert is_complete(hub, run / "model")


@pytest.mark.usefixtures("unverified")
def test_a_branch_and_a_pull_request(hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(hub, run, capsys)
    status, shown = push(hub, run, capsys, "--revision", "v2")
    assert status == 0, shown
    assert b'model="alice/digits", revision="v2"' in hub.files("alice/digits", "v2")[CARD]
    status, shown = push(hub, run, capsys, "--create_pr")
    assert status == 0, shown
    assert "discussions" in shown


@pytest.mark.usefixtures("unverified")
def test_private_is_private_or_refused(hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(hub, run, capsys, "--private")[0] == 0
    assert hub.repositories["alice/digits"].is_private
    hub.repositories["alice/digits"].is_private = False
    status, shown = push(hub, run, capsys, "--private")
    assert (status, "make it private in its settings" in shown) == (2, True), shown


@pytest.mark.usefixtures("unverified")
def test_the_hubs_refusal_of_a_card_is_shown(hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = run / "model" / CARD
    card.write_text(card.read_text().replace("license: apache-2.0", "license: Apache, the second"))
    status, shown = push(hub, run, capsys)
    assert (status, '"license" must be one of' in shown) == (2, True), shown


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize(("fault", "may_give_up"), [(500, False), (429, False), (DROP, False), (401, True)])
def test_a_fault_at_any_request_loses_nothing_and_repeating_completes(
    hub: HubServer, run: Path, fault: int, may_give_up: bool
) -> None:
    """One fault at each request of a push in turn: transient ones are retried, others are completed by a second push."""
    before = contents(run)
    gave_up = []
    with signed_in(hub, run.parent, "hf_alice"):
        module.publish(run, "alice/digits")
        number_of_requests = len(hub.requests)
        assert number_of_requests >= 8, hub.requests
        for number in range(number_of_requests):
            for kept in (hub.repositories, hub.blobs, hub.requests):
                kept.clear()
            hub.faults = {number: fault}
            try:
                module.publish(run, "alice/digits")
            except PushError as error:
                gave_up.append(str(error))
                module.publish(run, "alice/digits")
            assert contents(run) == before
            assert is_complete(hub, run / "model"), f"request {number}"
    assert bool(gave_up) == may_give_up
    assert all("Repeat: hf-transfer publish" in message for message in gave_up)


def test_a_push_that_is_killed_is_completed_by_repeating_it(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str], unverified: None
) -> None:
    before = contents(run)
    code = "import sys; from hf_transfer.hub import publish as p; p.verify = lambda *_, **__: ()\n"
    code += "from hf_transfer.cli import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "publish", str(run), "--repo_id", "alice/digits"],
        env=environment(hub, run.parent, "hf_alice"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def kill_at_upload(number: int) -> None:
        if hub.requests[number].startswith("PUT"):
            os.kill(process.pid, signal.SIGKILL)

    hub.before_answer = kill_at_upload
    assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    hub.before_answer = lambda number: None
    assert contents(run) == before
    assert "model.safetensors" not in hub.files("alice/digits")
    status, shown = push(hub, run, capsys)
    assert status == 0, shown
    assert is_complete(hub, run / "model")


def upload(hub: HubServer, name: str, folder: Path) -> None:
    """Puts a folder on the Hub, as its owner."""
    repository = Repository(name, is_private=False)
    repository.commit({p.name: (p.read_bytes(), p.suffix == ".safetensors") for p in folder.iterdir()}, "main")
    hub.repositories[name] = repository


def test_an_adapter_is_sent_as_it_is_or_merged_and_only_with_its_base(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_upstream("ViT", tmp_path / "upstream")
    backbone = load(str(tmp_path / "upstream"), LABELS, base_model="bob/upstream")
    adapted, _ = add_adapters(backbone, backbone.chain(), AdapterConfig(rank=4))
    run = make_run(adapted, tmp_path / "run")
    before = contents(run)
    for flags, remedy in ((("--adapter",), "--merge"), ((), "--base")):
        status, shown = push(hub, run, capsys, *flags)
        assert (status, "bob/upstream, cannot be loaded" in shown, remedy in shown) == (2, True, True), shown
    upload(hub, "bob/upstream", tmp_path / "upstream")
    status, shown = push(hub, run, capsys, "--adapter")
    assert status == 0, shown
    sent = hub.files("alice/digits")
    assert sent["adapter_model.safetensors"] == (run / "model" / "adapter_model.safetensors").read_bytes()
    assert "peft: logits differ by at most" in sent[CARD].decode()
    assert contents(run) == before
    # Pushing the plain checkpoint to the same repository removes the adapter's files. Terms that the user has added are sent.
    (run / "model" / "NOTICE").write_text("terms of the base")
    status, shown = push(hub, run, capsys, "--base", str(tmp_path / "upstream"))
    assert status == 0, shown
    sent = hub.files("alice/digits")
    assert "transformers: logits differ by at most" in sent[CARD].decode()
    assert "model.safetensors" in sent
    assert sent["NOTICE"] == b"terms of the base"
    assert not {"adapter_config.json", "adapter_model.safetensors", "task.json"} & set(sent)
    assert ModelCard(sent[CARD].decode()).data.base_model == "bob/upstream"
    # A different base under the same id is refused.
    write_upstream("Swin", tmp_path / "other")
    upload(hub, "bob/upstream", tmp_path / "other")
    shutil.rmtree(tmp_path / "home")
    status, shown = push(hub, run, capsys)
    assert (status, "cannot be loaded" in shown or "other weights" in shown) == (2, True), shown


def test_flags_that_do_not_go_together_are_refused(hub: HubServer, run: Path) -> None:
    with pytest.raises(ValueError, match="plain checkpoint, not an adapter"):
        module.publish(run, "alice/digits", adapter=True)
    with pytest.raises(ValueError, match="is not a finished run"):
        module.publish(run.parent, "alice/digits")
    for wrong in ("digits", "a/b/c", "alice/", "alice/../x", "https://hub/alice/x"):
        with pytest.raises(ValueError, match="OWNER/NAME"):
            module.publish(run, wrong)
    assert not hub.requests


CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
{more}

class TinyConfig(PretrainedConfig):
    model_type = "tiny-of-its-own"

class TinyForImageClassification(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(3, config.num_labels)
        self.post_init()
    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.head(pixel_values.mean((2, 3))))
"""


def test_a_model_with_code_of_its_own_is_verified_with_trust_remote_code(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_upstream("ViT", tmp_path / "upstream")
    code = tmp_path / "upstream" / "modeling_tiny.py"
    code.write_text(CODE.format(more=""))
    (tmp_path / "upstream" / "model.safetensors").unlink()
    config: dict[str, Any] = {"model_type": "tiny-of-its-own", "id2label": dict(enumerate(LABELS))}
    names = {"AutoConfig": "TinyConfig", "AutoModelForImageClassification": "TinyForImageClassification"}
    config["auto_map"] = {key: f"modeling_tiny.{name}" for key, name in names.items()}
    (tmp_path / "upstream" / "config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file
    from torch import ones, randn

    weights = {"head.weight": randn(3, 3), "head.bias": ones(3)}
    save_file(weights, tmp_path / "upstream" / "model.safetensors", metadata={"format": "pt"})
    backbone = load(str(tmp_path / "upstream"), trust_remote_code=True)
    run = make_run(backbone, tmp_path / "run")
    assert (run / "model" / "modeling_tiny.py").is_file()
    status, shown = push(hub, run, capsys)
    assert status == 0, shown
    sent = hub.files("alice/digits")
    assert 'model="alice/digits", trust_remote_code=True)' in sent[CARD].decode()
    assert "modeling_tiny.py" in sent
    # Code that needs this package would load nowhere else.
    (run / "model" / "modeling_tiny.py").write_text(CODE.format(more="import hf_transfer"))
    with pytest.raises(VerificationError, match="transformers does not load"):
        verify(run / "model", run / REFERENCE, find_libraries(run / "model"))
