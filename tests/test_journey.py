"""From images to a published model, end to end: train, push, load without this package, predict, fine-tune it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hf_transfer.cli import main
from tests.hub_server import HubServer
from tests.test_publish import TOKENS, environment, signed_in
from tests.test_recipes import ROOT, TIMEOUT_S

# What downstream users have: the plain libraries and a token of their own, without this package.
PLAIN = """
import json, re, sys
sys.modules["hf_transfer"] = None
from pathlib import Path
from huggingface_hub import hf_hub_download, snapshot_download
from PIL import Image
from safetensors import safe_open
from transformers import pipeline
import timm, torch
from peft import PeftModel
root, *runs = map(Path, sys.argv[1:])
measured = {}
for name in ("alice/digits", "alice/digits-lora"):
    card = Path(hf_hub_download(name, "README.md")).read_text()
    blocks = re.findall(r"```python\\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == (1 if "lora" in name else 2), blocks
    for code in blocks:
        exec(compile(code, name, "exec"), {})  # image.jpg lies in this folder
    measured[name + " files"] = sorted(p.name for p in Path(snapshot_download(name)).iterdir())
files = sorted((root / "signs" / "test").rglob("*.png"))
images = [Image.open(f) for f in files]
truth = torch.tensor([int(f.parent.name) for f in files])
def log_loss(logits):
    return float(torch.nn.functional.cross_entropy(logits, truth))
answers = pipeline("image-classification", model="alice/digits", top_k=10)(images)
scores = [{a["label"]: a["score"] for a in answer} for answer in answers]
measured["pipeline"] = log_loss(torch.tensor([[row[str(i)] for i in range(10)] for row in scores]).log())
plain = timm.create_model("hf-hub:alice/digits", pretrained=True).eval()
config = json.loads(Path(hf_hub_download("alice/digits-lora", "adapter_config.json")).read_text())
base = timm.create_model(f"hf-hub:{config['base_model_name_or_path']}@{config['revision']}", pretrained=True, num_classes=10)
adapted = PeftModel.from_pretrained(base, "alice/digits-lora").eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=plain))
pixels = torch.stack([transform(i.convert("RGB")) for i in images])
for key, model, run in (("timm", plain, runs[0]), ("peft", adapted, runs[1])):
    with torch.no_grad(), safe_open(run / "reference.safetensors", framework="pt") as file:
        measured[key] = log_loss(model(pixels))
        logits = model(file.get_tensor("inputs"))
        torch.testing.assert_close(logits, file.get_tensor("logits"), rtol=1e-4, atol=1e-4)
print(json.dumps(measured))
"""


@dataclass
class Journey:
    """The folder of the runs, the Hub, and the output of each command."""

    root: Path
    hub: HubServer
    refused: str
    pushed: str
    again: str

    def results(self, run: str) -> dict[str, Any]:
        results: dict[str, Any] = json.loads((self.root / run / "results.json").read_text())
        return results


def recipe(name: str, *arguments: str, env: dict[str, str], launcher: tuple[str, ...] = ()) -> tuple[int, str]:
    command = [sys.executable, *launcher, str(ROOT / "recipes" / f"{name}.py"), *arguments]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=TIMEOUT_S)
    return shown.returncode, shown.stdout + shown.stderr


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journey]:
    """A probe of a local checkpoint on local images, pushed at the second attempt; then LoRA on the pushed model."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("cellar")
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images[:400], digits.target[:400], strict=True)):
        folder = root / "signs" / ("test" if i >= 300 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).save(folder / f"{i}.png")
    (root / "signs" / "train" / "0" / "broken.png").write_bytes(b"no image")
    (root / "signs" / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\nHand-written signs.")
    Image.open(next((root / "signs" / "test" / "3").iterdir())).save(root / "image.jpg")
    shutil.copytree(str(resources.files("hf_transfer") / "assets" / "embedded"), root / "upstream")
    with HubServer(TOKENS) as hub:
        env = environment(hub, root, "hf_alice") | {"HF_TRANSFER_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}

        def refuse_the_commit(number: int) -> None:
            if "/commit/" in hub.requests[number]:
                hub.faults[number] = 403

        hub.before_answer = refuse_the_commit
        status, refused = recipe(
            "linear_probe", "--checkpoint", str(root / "upstream"), "--base_model", "bob/upstream",
            "--dataset", str(root / "signs"), "--on_bad_image", "skip", "--readouts", "none",
            "--output_dir", str(root / "probe"), "--push_to_hub", "alice/digits", env=env,
        )  # fmt: skip
        hub.before_answer = lambda number: None
        assert status != 0, refused
        command = re.search(r"Repeat: hf-transfer (publish .*)", refused)
        assert command is not None, refused[-2000:]
        shown = subprocess.run(
            [sys.executable, "-m", "hf_transfer.cli", *shlex.split(command[1])],
            capture_output=True, text=True, check=False, env=env, timeout=TIMEOUT_S,
        )  # fmt: skip
        assert shown.returncode == 0, shown.stderr
        status, again = recipe(
            "lora", "--checkpoint", "alice/digits", "--dataset", str(root / "signs"), "--on_bad_image", "skip",
            "--epochs", "3", "--lr", "1e-2", "--rank", "4", "--no-merge", "--output_dir", str(root / "lora"),
            # So that an epoch beats the probe, which is nearly perfect: select by log-loss, without regularization.
            "--select_by", "log_loss", "--label_smoothing", "0", "--ema_decay", "0", "--crop_scale", "1", "--hflip", "0",
            "--color_jitter", "0", "--images_per_class", "12",
            "--push_to_hub", "alice/digits-lora", "--private",
            env=env | {"ACCELERATE_USE_CPU": "true"},
            launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        )  # fmt: skip
        assert status == 0, again[-3000:]
        yield Journey(root=root, hub=hub, refused=refused, pushed=shown.stdout + shown.stderr, again=again)


def test_a_push_that_fails_after_training_loses_nothing(journey: Journey) -> None:
    assert "the token may not write to 'alice'" in journey.refused
    assert journey.results("probe")["metrics"]["test"]["accuracy"] > 0.8
    for line in ("reloaded by transformers in a fresh process", "reloaded by timm in a fresh process", "published: "):
        assert line in journey.pushed


def test_only_the_main_process_pushes(journey: Journey) -> None:
    commits = [r for r in journey.hub.requests if "/api/models/alice/digits-lora/commit/" in r]
    assert len(commits) == 1


def test_a_published_model_is_a_checkpoint_to_train_from(journey: Journey) -> None:
    checkpoint = journey.results("lora")["checkpoint"]
    assert checkpoint["id"] == "alice/digits"
    assert checkpoint["revision"] == journey.hub.repositories["alice/digits"].branches["main"]
    config = json.loads(journey.hub.files("alice/digits-lora")["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("alice/digits", checkpoint["revision"])


def test_users_without_this_package_get_the_trained_models_predictions(journey: Journey) -> None:
    """The cards' snippets run unchanged; pipeline, timm and peft give the run's log-loss over all test images."""
    shown = subprocess.run(
        [sys.executable, "-c", PLAIN, str(journey.root), str(journey.root / "probe"), str(journey.root / "lora")],
        capture_output=True, text=True, check=False, timeout=TIMEOUT_S, cwd=journey.root,
        env=environment(journey.hub, journey.root / "theirs", "hf_alice"),
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr[-3000:]
    measured = json.loads(shown.stdout.splitlines()[-1])
    probe, lora = (journey.results(run)["metrics"]["test"] for run in ("probe", "lora"))
    assert probe["num_samples"] == 100
    # The log-loss depends on every image; the tolerance covers rounding, which differs with the batch size.
    assert measured["pipeline"] == pytest.approx(probe["nll"], rel=1e-3)
    assert measured["timm"] == pytest.approx(probe["nll"], rel=1e-3)
    assert measured["peft"] == pytest.approx(lora["nll"], rel=1e-3)
    assert lora["nll"] != pytest.approx(probe["nll"], rel=0.1)
    assert {"config.json", "model.safetensors", "README.md"} <= set(measured["alice/digits files"])
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(measured["alice/digits-lora files"])


def test_the_hub_copy_is_evaluated_and_private_models_stay_private(
    journey: Journey, capsys: pytest.CaptureFixture[str]
) -> None:
    with signed_in(journey.hub, journey.root / "ours", "hf_alice"):
        main(
            [
                "evaluate",
                "alice/digits-lora",
                "--dataset",
                str(journey.root / "signs" / "test"),
                "--split",
                "train",
                "--json",
            ]
        )
    scores = json.loads(capsys.readouterr().out)
    assert scores["num_samples"] > 50
    for token in (None, "hf_bob"):
        with signed_in(journey.hub, journey.root / str(token), token), pytest.raises(SystemExit):
            main(["predict", "alice/digits-lora", str(journey.root / "image.jpg")])
        assert "no model 'alice/digits-lora' that you may read" in capsys.readouterr().err


def test_the_card_names_base_license_and_data(journey: Journey) -> None:
    card = journey.hub.files("alice/digits")["README.md"].decode()
    assert "base_model: bob/upstream" in card
    assert "license: cc-by-sa-4.0" in card  # the base's Apache-2.0 permits it, the data's terms bind
    assert "`signs`" in card
    assert "Skipped 1 of 301 train images that cannot be read" in card
    assert "images per second in features" in card
    for name in re.findall(r"!\[.*?\]\((.*?)\)", card):
        assert name in journey.hub.files("alice/digits")


def test_no_token_and_no_local_path_is_published(journey: Journey) -> None:
    published = {
        f"{name}: {path}": content
        for name in ("alice/digits", "alice/digits-lora")
        for path, content in journey.hub.files(name).items()
    }
    for run in ("probe", "lora"):
        for file in ("results.json", "report.html"):
            published[f"{run}: {file}"] = (journey.root / run / file).read_bytes()
        # Some trackers send what they log elsewhere.
        published |= {str(log): log.read_bytes() for log in (journey.root / run / "logs").rglob("*") if log.is_file()}
    published["the push's log"] = journey.pushed.encode()
    for name, content in published.items():
        for secret in ("hf_alice", str(journey.root), "cellar", str(ROOT), str(Path.home())):
            assert secret.encode() not in content, (name, secret)
        if not name.endswith(".safetensors"):  # whose bytes may contain a short name by chance
            assert not re.search(rb"\b" + re.escape(os.uname().nodename).encode() + rb"\b", content), name
