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
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_transfer.hub.fresh_process import compute
from hf_transfer.network.backbone import Backbone, load, with_new_head
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.transformers_models import find_changed_weights, find_heads
from tests.families import make_pixels, randomize

LABELS = ("ant", "bee", "cat")

# The function is spread over two files, and each model returns its features in the manner of its original.
LAYERS = """
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, tokens):
        return tokens + self.mlp(self.norm(tokens)) + tokens.mean(1, keepdim=True)

class Tokens(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.summary = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, pixels):
        tokens = self.patches(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.summary.expand(len(tokens), -1, -1), tokens], 1)
"""
MODELING = """
from typing import NamedTuple
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from .layers import Layer, Tokens

class RadioOutput(NamedTuple):
    summary: torch.Tensor
    features: torch.Tensor

class FakeConfig(PreTrainedConfig):
    def __init__(self, width=16, patch_size=8, **kwargs):
        self.width, self.patch_size = width, patch_size
        super().__init__(**kwargs)

class Fake(PreTrainedModel):
    config_class = FakeConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.tokens = Tokens(config.width)
        self.layers = nn.ModuleList([Layer(config.width) for _ in range(3)])
        self.post_init()

    def run(self, pixels):
        tokens = self.tokens(pixels)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens

class RADIOModel(Fake):
    def forward(self, x):
        tokens = self.run(x)
        return RadioOutput(tokens[:, 0].tanh(), tokens[:, 1:])

class InternVisionModel(Fake):
    def forward(self, pixel_values=None):
        tokens = self.run(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens[:, 0])

class GridModel(Fake):
    def forward(self, pixel_values):
        return (self.run(pixel_values),)
"""
KINDS = ("RADIOModel", "InternVisionModel", "GridModel")


@pytest.fixture(autouse=True)
def _modules_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that transformers copies goes to a folder of the test, and no test finds another test's modules."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def write_checkpoint(folder: Path, kind: str, *, more: str = "", auto_map: dict[str, str] | None = None) -> Any:
    """Writes a checkpoint in the manner of RADIO (no model_type) or InternViT (an unknown one), and returns its model."""
    folder.mkdir()
    (folder / "layers.py").write_text(LAYERS)
    (folder / "modeling_fake.py").write_text(more + MODELING)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    names = auto_map or {"AutoConfig": "modeling_fake.FakeConfig", "AutoModel": f"modeling_fake.{kind}"}
    config: dict[str, Any] = {"architectures": [kind], "auto_map": names, "width": 16}
    if kind == "InternVisionModel":
        config["model_type"] = "intern_vit_6b"
    (folder / "config.json").write_text(json.dumps(config))
    save_file({}, folder / "model.safetensors")
    if more or auto_map:
        return None
    made: Any = get_class_from_dynamic_module(f"modeling_fake.{kind}", str(folder))
    torch.manual_seed(0)
    model = randomize(made(made.config_class(width=16))).eval()
    made._auto_class = None
    model.save_pretrained(folder / "weights")  # type: ignore[operator]
    shutil.move(folder / "weights" / "model.safetensors", folder / "model.safetensors")
    shutil.rmtree(folder / "weights")
    return model


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
