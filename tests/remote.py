"""Checkpoints whose Python code is not in transformers, in the manner of RADIO and InternViT."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tests.families import randomize

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
