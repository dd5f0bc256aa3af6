"""The push, with the real client against a Hub on loopback: what arrives is what was trained, and no fault loses anything."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import DROP, HubServer, Repository, Token
from tests.test_recipes import ROOT, TIMEOUT_S, run_recipe

TOKENS = {"hf_alice": Token("alice"), "hf_reader": Token("alice", "read"), "hf_bob": Token("bob")}
ALICE = {"HF_TOKEN": "hf_alice"}
# What people downstream have: the plain libraries, and never us.
PLAIN = """
import json, sys
sys.modules["hf_transfer"] = None
import timm, torch
from PIL import Image
from safetensors import safe_open
from transformers import pipeline
with safe_open(sys.argv[1], framework="pt") as file:
    inputs, expected = file.get_tensor("inputs"), file.get_tensor("logits")
    image = Image.fromarray(file.get_tensor("image_0").numpy())
    labels = json.loads(file.metadata()["labels"])
model = timm.create_model("hf-hub:alice/digits", pretrained=True).eval()
with torch.no_grad():
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-4)
answer = pipeline("image-classification", model="alice/digits")(image)[0]
assert answer["label"] == labels[int(expected[0].argmax())], answer
print("the same")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_recipe("linear_probe", "--readouts", "none", "--output_dir", str(folder))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(TOKENS) as server:
        yield server


def environment(hub: HubServer, folder: Path, **more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    return env | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home")} | more


def push(hub: HubServer, run: Path, *flags: str, verifies: bool = False, **env: str) -> tuple[int, str]:
    """Status and all that was printed of `hf-transfer publish`; where it is not what is tested, without the fresh processes."""
    code = "import sys; from hf_transfer.hub import publish as p; from hf_transfer.cli import main; "
    code += "" if verifies else "p.verify = lambda *_: []; "
    code += "main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "publish", str(run), "--repo_id", "alice/digits", *flags]
    shown = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(hub, run.parent, **env), timeout=TIMEOUT_S
    )
    return shown.returncode, shown.stdout + shown.stderr


def contents(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def is_complete(hub: HubServer, run: Path) -> bool:
    sent = {name: hashlib.sha256(content).hexdigest() for name, content in hub.files("alice/digits").items()}
    return contents(run / "model").items() <= sent.items()


def test_what_arrives_is_what_was_trained_for_people_without_us(hub: HubServer, run: Path) -> None:
    status, shown = push(hub, run, verifies=True, **ALICE)
    assert status == 0, shown
    assert "reloaded by transformers in a fresh process" in shown
    assert "reloaded by timm in a fresh process" in shown
    assert is_complete(hub, run)
    assert "hf_alice" not in shown
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN, str(run / "reference.safetensors")],
        capture_output=True, text=True, check=False, env=environment(hub, run.parent), timeout=TIMEOUT_S,
    )  # fmt: skip
    assert plain.stdout.strip().endswith("the same"), plain.stderr[-2000:]
    # It is a checkpoint like any other: train again from it.
    env = environment(hub, run.parent)
    run_recipe("linear_probe", "--checkpoint", "alice/digits", "--output_dir", str(run.parent / "again"), env=env)
    again = json.loads((run.parent / "again" / "results.json").read_text())
    assert again["checkpoint"]["id"] == "alice/digits"
    assert again["checkpoint"]["revision"] == hub.repositories["alice/digits"].branches["main"]


def test_a_second_push_sends_no_weights_again(hub: HubServer, run: Path) -> None:
    push(hub, run, **ALICE)
    before = len(hub.requests)
    status, shown = push(hub, run, **ALICE)
    assert status == 0, shown
    assert not [r for r in hub.requests[before:] if r.startswith("PUT")]


def test_a_dry_run_sends_nothing(hub: HubServer, run: Path) -> None:
    status, shown = push(hub, run, "--dry_run")
    assert status == 0, shown
    assert "model.safetensors" in shown
    assert hub.requests == []


def test_a_model_that_is_not_the_measured_one_stays(hub: HubServer, run: Path) -> None:
    config = json.loads((run / "model" / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.0, 0.0, 0.0]
    (run / "model" / "config.json").write_text(json.dumps(config))
    status, shown = push(hub, run, verifies=True, **ALICE)
    assert status == 2
    assert "another model than the one that was measured" in shown
    assert hub.requests == []


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, "hf auth login"),
        ({"HF_TOKEN": "hf_wrong"}, "hf auth login"),
        ({"HF_TOKEN": "hf_reader"}, "take one with write access"),
        ({"HF_TOKEN": "hf_bob"}, "a --repo_id of your own"),
    ],
)
def test_who_may_not_write_is_told_why(hub: HubServer, run: Path, env: dict[str, str], words: str) -> None:
    before = contents(run)
    status, shown = push(hub, run, **env)
    assert status == 2
    assert words in shown
    assert "Traceback" not in shown
    assert contents(run) == before
    assert not hub.repositories


def test_another_ones_card_is_not_replaced_unasked(hub: HubServer, run: Path) -> None:
    theirs = Repository("alice/digits", is_private=False)
    theirs.commit({"README.md": (b"---\ntags:\n- mine\n---\nby hand", False)}, "main")
    hub.repositories["alice/digits"] = theirs
    status, shown = push(hub, run, **ALICE)
    assert (status, "--overwrite" in shown) == (2, True), shown
    assert hub.files("alice/digits")["README.md"].endswith(b"by hand")
    status, shown = push(hub, run, "--overwrite", **ALICE)
    assert status == 0, shown
    assert is_complete(hub, run)


def test_a_branch_and_a_pull_request(hub: HubServer, run: Path) -> None:
    push(hub, run, **ALICE)
    status, shown = push(hub, run, "--revision", "v2", **ALICE)
    assert status == 0, shown
    assert "model.safetensors" in hub.files("alice/digits", "v2")
    status, shown = push(hub, run, "--create_pr", **ALICE)
    assert status == 0, shown
    assert "discussions" in shown


# One process for all pushes: importing takes longer than a push.
FAULTS = """
import hashlib, os, sys
from pathlib import Path
from tests.hub_server import HubServer, Token
run, fault = Path(sys.argv[1]), int(sys.argv[2])
with HubServer({"hf_alice": Token("alice")}) as hub:
    os.environ["HF_ENDPOINT"] = hub.url
    from hf_transfer.hub import publish as module
    module.verify = lambda *_: []  # tested for itself; here it would only take time
    model = {p.name: p.read_bytes() for p in (run / "model").iterdir()}

    def push():
        module.publish(run, "alice/digits", first_wait_s=0.001)

    push()
    number_of_requests = len(hub.requests)
    assert number_of_requests >= 5, hub.requests
    gave_up = 0
    for number in range(number_of_requests):
        for kept in (hub.repositories, hub.blobs, hub.requests):
            kept.clear()
        hub.faults = {number: fault}
        try:
            push()
        except module.PushError as error:
            assert "repeat" in str(error).lower(), error
            gave_up += 1
            push()
        assert {p.name: p.read_bytes() for p in (run / "model").iterdir()} == model
        assert model.items() <= hub.files("alice/digits").items(), f"request {number}"
    print(number_of_requests, gave_up)
"""


@pytest.mark.parametrize(("fault", "may_give_up"), [(500, False), (429, False), (DROP, False), (401, True)])
def test_a_fault_at_any_request_loses_nothing_and_repeating_completes(
    hub: HubServer, run: Path, fault: int, may_give_up: bool
) -> None:
    """The fault comes once, at each request of a push in turn; what passes is waited for; who gave up repeats the command."""
    env = environment(hub, run.parent, **ALICE)
    shown = subprocess.run(
        [sys.executable, "-c", FAULTS, str(run), str(fault)],
        capture_output=True, text=True, check=False, env=env, cwd=ROOT, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr[-2000:]
    _, gave_up = map(int, shown.stdout.split())
    assert bool(gave_up) == may_give_up


def test_a_push_that_is_killed_is_completed_by_repeating_it(hub: HubServer, run: Path) -> None:
    before = contents(run)
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_transfer.cli", "publish", str(run), "--repo_id", "alice/digits"],
        env=environment(hub, run.parent, **ALICE), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def kill_at_upload(number: int) -> None:
        if hub.requests[number].startswith("PUT"):
            os.kill(process.pid, signal.SIGKILL)

    hub.before_answer = kill_at_upload
    assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    hub.before_answer = lambda number: None
    assert contents(run) == before
    assert "model.safetensors" not in hub.files("alice/digits")
    status, shown = push(hub, run, **ALICE)
    assert status == 0, shown
    assert is_complete(hub, run)
