"""Tiny networks of every family that the tests speak of: upstream's own classes, few and narrow blocks, random weights.

Layer scales, zero-initialised branches and fresh BatchNorm statistics are drawn at random too: otherwise a block would be
next to the identity, and a wrong cut behind it would pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
import transformers
from torch import nn

from hf_transfer.network.chain import Chain, build_chain

NUM_CLASSES = 5


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to build one tiny network, and the square image it takes."""

    build: Callable[[], nn.Module]
    image_px: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.image_px, self.image_px


def _timm(architecture: str, image_px: int, **options: Any) -> Family:
    return Family(build=lambda: timm.create_model(architecture, num_classes=NUM_CLASSES, **options), image_px=image_px)


def _transformers(family: str, image_px: int, **options: Any) -> Family:
    def build() -> nn.Module:
        config = getattr(transformers, f"{family}Config")(num_labels=NUM_CLASSES, **options)
        model: nn.Module = getattr(transformers, f"{family}ForImageClassification")(config)
        return model

    return Family(build=build, image_px=image_px)


_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}
_HF_VIT = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_HF_VIT_MLP = {**_HF_VIT, "intermediate_size": 32}
_STAGES = {"depths": (1, 2, 1, 1), "dims": (8, 8, 16, 16)}
_HF_STAGES = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 8, 16, 16]}

FAMILIES: dict[str, Family] = {
    "timm ViT": _timm("vit_tiny_patch16_224", 32, img_size=32, **_VIT),
    "timm DINOv2": _timm("vit_small_patch14_reg4_dinov2", 28, img_size=28, **_VIT),
    "timm DINOv3": _timm("vit_small_patch16_dinov3", 32, img_size=32, **_VIT),
    "timm Swin": _timm(
        "swin_tiny_patch4_window7_224",
        32,
        img_size=32,
        window_size=2,
        embed_dim=8,
        depths=(1, 2, 1, 1),
        num_heads=(1, 1, 2, 2),
    ),
    "timm ConvNeXt": _timm("convnext_atto", 32, **_STAGES),
    "timm ConvNeXtV2": _timm("convnextv2_atto", 32, **_STAGES),
    "timm ResNet": _timm("resnet18", 32, layers=(1, 2, 1, 1), channels=(8, 8, 16, 16), stem_width=8),
    "timm RegNet": _timm("regnety_002", 32),
    "timm EfficientNet": _timm("test_efficientnet", 32),
    "timm MobileNetV2": _timm("mobilenetv2_035", 32),
    "timm MobileNetV3": _timm("mobilenetv3_small_050", 32),
    "timm MobileNetV4": _timm("mobilenetv4_conv_small_035", 32),
    "timm MobileViT": _timm("mobilevit_xxs", 64),
    "ViT": _transformers("ViT", 16, **_HF_VIT_MLP),
    "DeiT": _transformers("DeiT", 16, **_HF_VIT_MLP),
    "Swin": _transformers(
        "Swin", 64, image_size=64, window_size=2, embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 1, 2, 2]
    ),
    "ConvNeXt": _transformers("ConvNext", 32, **_HF_STAGES),
    "ConvNeXtV2": _transformers("ConvNextV2", 32, **_HF_STAGES),
    "ResNet": _transformers("ResNet", 32, embedding_size=8, layer_type="basic", **_HF_STAGES),
    "DINOv2": _transformers("Dinov2", 16, mlp_ratio=2, **_HF_VIT),
    "SigLIP": _transformers("Siglip", 16, vision_config=_HF_VIT_MLP),
}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` with every parameter and running statistic moved, in place, so that nothing is an identity or a constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim < 2 or parameter.numel() == 1 else 0.1 * float(parameter.std()) + 0.02
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.1 * torch.randn(buffer.shape, generator=generator)
            elif name.endswith("running_var"):
                buffer *= 0.5 + torch.rand(buffer.shape, generator=generator)
    return model


def make_model(name: str, seed: int = 0) -> nn.Module:
    """The family's network in eval mode; the same weights for the same seed."""
    torch.manual_seed(seed)
    return randomize(FAMILIES[name].build(), seed).eval()


def make_pixels(shape: tuple[int, int, int], batch: int, seed: int = 1) -> torch.Tensor:
    """(B, *shape) normalised pixels."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


@cache
def built(name: str) -> tuple[nn.Module, Chain]:
    """The family's network and its chain, made once a session: leave them as they were."""
    model = make_model(name)
    return model, build_chain(model, FAMILIES[name].image_shape)


def state_of(model: nn.Module) -> dict[str, object]:
    """All that tracing, cutting and verifying must not change: weights, buffers, modes, flags, hooks, forwards, gradients."""
    found: dict[str, object] = {name: value.clone() for name, value in model.state_dict().items()}
    for name, buffer in model.named_buffers():  # those outside the state_dict, too
        found[f"buffer {name}"] = buffer.clone()
    for name, parameter in model.named_parameters():
        found[f"flag {name}"] = (parameter.requires_grad, parameter.grad is None)
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        found[f"module {name}"] = (module.training, hooks, module.__dict__.get("forward"))
    return found


def assert_same_state(before: dict[str, object], after: dict[str, object]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        other = after[key]
        if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
            assert torch.equal(value, other), key
        else:
            assert value == other, key
