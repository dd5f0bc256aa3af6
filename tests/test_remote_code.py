"""Backbones whose Python code comes with the checkpoint: loaded if trusted, and saved with their code."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from hf_transfer.hub.fresh_process import compute
from hf_transfer.network.backbone import Backbone, load, with_new_head
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.transformers_models import find_heads
from hf_transfer.network.weights import find_changed_weights
from tests.families import make_pixels
from tests.remote import KINDS, write_checkpoint

LABELS = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def _modules_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that transformers copies goes to a folder of the test, and no test finds another test's modules."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def pool(kind: str, output: Any) -> torch.Tensor:
    """The pooled feature that each fake documents: a summary, a pooler output, or else the mean over the grid."""
    if kind == "GridModel":
        return output[0][:, 1:].mean(1)  # type: ignore[no-any-return]
    return output[0] if kind == "RADIOModel" else output.pooler_output  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_a_trusted_backbone_computes_upstreams_features_and_is_saved_with_its_code(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    upstream = write_checkpoint(tmp_path / "upstream", kind)
    loaded = load(str(tmp_path / "upstream"), LABELS, trust_remote_code=True)
    assert "running Python code that comes with upstream (a local folder)" in caplog.text
    assert "layers.py, modeling_fake.py" in caplog.text
    model: Any = loaded.model
    assert type(model).__name__ == "RemoteBackboneForImageClassification"
    assert not loaded.is_auto_class
    pixels = make_pixels(loaded.preprocessing.image_shape, 2)
    with torch.no_grad():
        torch.testing.assert_close(model.pool(model.backbone(pixels)), pool(kind, upstream(pixels)))
    assert not find_changed_weights(model, tmp_path / "upstream", find_heads(model).parameters)
    chain = loaded.chain()
    assert [layer.name for layer in chain.layers[1:-1]] == [f"backbone.layers.{i}" for i in range(3)]
    assert compute_logits(with_new_head(loaded, LABELS[:2]).model, pixels).shape == (2, 2)
    check_saved(loaded, tmp_path)


def check_saved(loaded: Backbone, tmp_path: Path) -> None:
    """The saved folder loads with transformers and with this package, with its own code only, if it is trusted."""
    folder = tmp_path / "saved"
    saved: Any = loaded.model
    saved.save_pretrained(folder)
    loaded.preprocessing.processor.save_pretrained(folder)
    assert {path.name for path in folder.glob("*.py")} == {"layers.py", "modeling_backbone.py", "modeling_fake.py"}
    assert str(tmp_path) not in (folder / "config.json").read_text()
    for other in ("upstream", "modules"):
        shutil.rmtree(tmp_path / other)
    with pytest.raises(ValueError, match="--trust_remote_code to run"):
        load(str(folder))
    again = load(str(folder), trust_remote_code=True)
    assert again.label_names == LABELS
    assert type(again.model).__module__.startswith("transformers_modules.saved.")
    image = Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 50).convert("RGB")
    pixels, logits, labels = compute(folder, [image], "transformers")
    torch.testing.assert_close(logits, compute_logits(loaded.model, pixels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, compute_logits(again.model, pixels), rtol=1e-5, atol=1e-5)
    assert labels == list(LABELS)
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == saved.state_dict().keys()


@pytest.mark.parametrize(
    ("more", "auto_map", "trust", "expected"),
    [
        (
            "",
            None,
            False,
            r"\(layers.py, modeling_fake.py\), which can do anything .* give --trust_remote_code to run it",
        ),
        ("import einops_of_nowhere\n", None, True, r"cannot be imported: .*packages.*: einops_of_nowhere\."),
        ("from transformers import OfAnotherVersion\n", None, True, "cannot be imported: .*OfAnotherVersion"),
        ("{}['a key']\n", None, True, r"Python code fails \(KeyError: 'a key'\)"),
        (
            "",
            {"AutoConfig": "modeling_fake.FakeConfig", "AutoModelForCausalLM": "modeling_fake.RADIOModel"},
            True,
            "has classes for AutoConfig, AutoModelForCausalLM only; choose a checkpoint",
        ),
        ("", {"AutoConfig": "modeling_fake.FakeConfig", "AutoModel": "layers.Layer"}, True, "is no PreTrainedModel"),
    ],
)
def test_code_that_cannot_run_is_refused_in_one_line(
    more: str, auto_map: dict[str, str] | None, trust: bool, expected: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "upstream", "RADIOModel", more=more or "# no weights\n", auto_map=auto_map)
    with pytest.raises(ValueError, match=expected) as caught:
        load(str(tmp_path / "upstream"), LABELS, trust_remote_code=trust)
    assert "\n" not in str(caught.value)
    assert trust or not (tmp_path / "modules").exists()


def test_the_saved_config_alone_runs_no_code(tmp_path: Path) -> None:
    """Even without auto_map, the package's own class never imports code that the user does not trust."""
    write_checkpoint(tmp_path / "upstream", "RADIOModel")
    config = {"model_type": "remote_backbone_classifier", "backbone": {"class": "modeling_fake.RADIOModel"}}
    (tmp_path / "upstream" / "config.json").write_text(json.dumps(config))
    shutil.rmtree(tmp_path / "modules")
    with pytest.raises(ValueError, match="remote_backbone_classifier"):
        load(str(tmp_path / "upstream"), LABELS)
    assert not (tmp_path / "modules").exists()
