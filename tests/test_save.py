"""Law 7, published = trained: a process without this package loads the saved folder and computes the same logits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.models
import torch
import transformers
from PIL import Image

from hf_transfer.hub.card_data import make_card_data
from hf_transfer.hub.save import save_model
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.readout import build_variant, find_readouts
from tests.families import FAMILIES, make_model

LABELS = ("ant", "bee", "Wespe, groß")
SIZES = ((40, 52), (64, 48), (33, 33))

LOADER = """
import sys
sys.modules["hf_transfer"] = None  # importing it fails, as if it were not installed
import json, timm, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
reloaded = {}
for folder in sys.argv[2:]:
    images = [Image.open(f"{sys.argv[1]}/{i}.png") for i in range(3)]
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        logits = {"transformers": model(pixels).logits.tolist()}
        if "timm_model" in dict(model.named_children()):
            own = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            config = timm.data.resolve_data_config(own.pretrained_cfg)
            transform = timm.data.create_transform(**config, is_training=False)
            logits["timm"] = own(torch.stack([transform(i) for i in images])).tolist()
    classify = pipeline("image-classification", model=folder, top_k=3)
    reloaded[folder] = {"logits": logits, "labels": [model.config.id2label[i] for i in range(3)],
                     "pipeline": [{a["label"]: a["score"] for a in answer} for answer in classify(images)]}
print(json.dumps(reloaded))
"""


def write_upstream(name: str, folder: Path) -> None:
    """Writes a tiny checkpoint of the family with its processor, as its own library would publish it."""
    model = make_model(name)
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(folder)
        px = FAMILIES[name].image_px
        processor = transformers.ViTImageProcessor(size={"height": px, "width": px}, resample=3)
        processor.save_pretrained(folder)
    else:
        px = FAMILIES[name].image_px
        timm.models.save_for_hf(model, str(folder), data_config={"input_size": (3, px, px)}, safe_serialization=True)


def results_for(backbone: Backbone) -> dict[str, Any]:
    """Results of a run with the keys that a card needs, and scores on four images of the first class."""
    keys = ("accuracy", "balanced_accuracy", "macro_f1", "nll")
    names = backbone.label_names
    per_class = [{"label": names[0], "recall": 0.75, "precision": 1.0, "f1": 0.86, "support": 4}]
    per_class += [{"label": n, "recall": None, "precision": None, "f1": None, "support": 0} for n in names[1:]]
    matrix = [[0] * len(names) for _ in names]
    matrix[0][:2] = [3, 1]
    scores: dict[str, Any] = {"num_samples": 4, "ece": 0.12, "per_class": per_class, "confusion_matrix": matrix}
    scores |= dict.fromkeys(keys, 0.75) | {f"{key}_interval": [0.25, 1.0] for key in keys} | {"notes": []}
    series = [{"name": "training", "x": [1, 2], "y": [0.9, 0.4]}]
    return {
        "strategy": "linear_probe",
        "plan": [{"description": "a solved head"}],
        "metrics": {"test": scores},
        "curves": [{"title": "Loss", "x_label": "epoch", "y_label": "Loss", "x_log": False, "series": series}],
        "details": {},
        "cost": {},
        "versions": {"python": "3"},
        "data": {
            "name": "insects",
            "revision": None,
            "license": None,
            "num_images": {"train": 4},
            "fingerprint": {"train": "0a1b"},
            "train_images_per_class": dict.fromkeys(names, 4),
            "notes": [],
        },
        "config": {"seed": 0, "checkpoint": "embedded"},
    }


def answers(backbone: Backbone, images: list[Image.Image]) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack([backbone.preprocessing.pixels(i) for i in images]))
    with torch.no_grad():
        return compute_logits(backbone.model.eval(), backbone.preprocessing.normalize(pixels))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, dict[str, Any]]]:
    """For every family (and a truncated, mean-pooled ViT): our logits, and the results of a process without this package."""
    root = tmp_path_factory.mktemp("saved")
    rng = np.random.default_rng(0)
    images = []
    for i, (height, width) in enumerate(SIZES):
        images.append(Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))
        images[-1].save(root / f"{i}.png")
    expected = {}
    for index, name in enumerate(FAMILIES):
        write_upstream(name, root / f"upstream-{index}")
        backbone = load(str(root / f"upstream-{index}"), LABELS)
        folder = root / f"saved-{index}"
        expected[str(folder)] = (name, answers(backbone, images))
        save_model(backbone, results_for(backbone), folder)
        if name == "timm ViT":
            chain = backbone.chain()
            shallow = next(r for r in find_readouts(chain, sweep="all") if "depth" in r.changes and r.pooling == "avg")
            variant = build_variant(chain, shallow.changes, num_classes=len(LABELS))
            changed = Backbone(**{**backbone.__dict__, "model": variant})
            expected[str(root / "readout")] = ("readout", answers(changed, images))
            save_model(changed, results_for(changed), root / "readout")
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADER, str(root), *expected],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    reloaded = json.loads(shown.stdout.splitlines()[-1])
    return {name: (logits, reloaded[folder]) for folder, (name, logits) in expected.items()}


@pytest.mark.parametrize("name", [*FAMILIES, "readout"])
def test_a_saved_model_gives_the_trained_logits_without_this_package(
    saved: dict[str, tuple[torch.Tensor, dict[str, Any]]], name: str
) -> None:
    ours, reloaded = saved[name]
    assert reloaded["labels"] == list(LABELS)
    assert ("timm" in reloaded["logits"]) == (name.startswith("timm") or name == "readout")
    for logits in reloaded["logits"].values():
        # The kernels are the same; only the processor's order of arithmetic differs.
        assert torch.allclose(torch.tensor(logits), ours, rtol=1e-4, atol=1e-5)
    for row, answer in zip(ours.softmax(-1), reloaded["pipeline"], strict=True):
        assert [answer[label] for label in LABELS] == pytest.approx(row.tolist(), abs=1e-4)


def test_the_card_names_the_upstream_and_no_path(tmp_path: Path) -> None:
    write_upstream("timm ResNet", tmp_path / "upstream")
    backbone = load(str(tmp_path / "upstream"), LABELS, base_model="timm/resnet18.a1_in1k")
    save_model(backbone, results_for(backbone), tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "base_model: timm/resnet18.a1_in1k" in card
    assert str(tmp_path) not in card
    again = load(str(tmp_path / "model"))
    assert (again.source.id, again.source.base_model) == (None, "timm/resnet18.a1_in1k")
    assert make_card_data(again, results_for(again)).base_model == "timm/resnet18.a1_in1k"
    save_model(again, results_for(again), tmp_path / "again")
    assert "`timm/resnet18.a1_in1k`, adapted to `" in card
    assert "\nA model based on `timm/resnet18.a1_in1k`, adapted to `" in (tmp_path / "again" / "README.md").read_text()
    assert again.label_names == LABELS
    assert not again.new_head
    # Weights have the same file permissions as the card.
    assert len({file.stat().st_mode for file in (tmp_path / "model").iterdir()}) == 1


def test_saving_writes_nothing_to_standard_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_upstream("ViT", tmp_path / "upstream")
    backbone = load(str(tmp_path / "upstream"), LABELS)
    capfd.readouterr()
    save_model(backbone, results_for(backbone), tmp_path / "model")
    assert capfd.readouterr().err == ""


def test_an_older_model_stays_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_upstream("timm ResNet", tmp_path / "upstream")
    backbone = load(str(tmp_path / "upstream"), LABELS)
    save_model(backbone, results_for(backbone), tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    incomplete = {k: v for k, v in results_for(backbone).items() if k != "metrics"}
    with pytest.raises(KeyError):
        save_model(backbone, incomplete, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
