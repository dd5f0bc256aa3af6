"""Tiny random checkpoints of transformers without a classifier: backbones, vision towers, whole and pretraining models.

Every layout is made of upstream's own config, model and image processor classes, and is saved as upstream saves it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_transfer.network.backbone import Backbone
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.transformers_models import find_heads
from tests.families import randomize

IMAGE_PX = 32

_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": IMAGE_PX,
    "patch_size": 8,
}
_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "sep_token_id": 3,
}
_DINO = {k: v for k, v in _VIT.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
_MAE = {
    **_VIT,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
_STAGES = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 8, 16, 16]}
_SWIN = {"image_size": 64, "window_size": 2, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
_HIERA = {
    "image_size": [64, 64],
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
_SAM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_dim": 48,
    "image_size": IMAGE_PX,
    "patch_size": 8,
    "output_channels": 16,
    "window_size": 2,
    "global_attn_indexes": [1],
}
_SAM_WHOLE = {
    "vision_config": _SAM,
    "prompt_encoder_config": {"hidden_size": 16, "image_size": IMAGE_PX, "patch_size": 8},
    "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                            "iou_head_hidden_dim": 16},
}  # fmt: skip
_SAM2_VISION = {
    "backbone_config": {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1, "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 2, 2],
        "window_size_per_stage": [4, 4, 2, 2], "window_positional_embedding_background_size": [4, 4],
        "global_attention_blocks": [3],
    },
    "backbone_channel_list": [64, 32, 16, 8], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 16,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How to create one checkpoint, and the class as which it must load."""

    config: str
    model: str
    processor: str = "ViTImageProcessor"
    settings: Mapping[str, Any] = field(default_factory=dict)
    expected: str = "BackboneForImageClassification"
    pooling: str = "pooler_output"  # of the generic class
    image_px: int = IMAGE_PX

    def make(self, seed: int = 0) -> transformers.PreTrainedModel:
        """Returns upstream's model in eval mode, with random weights."""
        torch.manual_seed(seed)
        kind: Callable[..., Any] = getattr(transformers, self.model)
        model = kind(getattr(transformers, self.config)(**self.settings))
        randomize(model, seed)
        return model.eval()  # type: ignore[no-any-return]

    def save(self, folder: Path, *, processor: str | None = None) -> transformers.PreTrainedModel:
        """Saves the checkpoint in `folder`, with its own image processor or the one that is named, and returns the model."""
        model = self.make()
        model.save_pretrained(folder)
        size: dict[str, Any] = {"size": {"height": self.image_px, "width": self.image_px}}
        name = processor or self.processor
        if name in ("CLIPImageProcessor", "ChineseCLIPImageProcessor"):
            size = {
                "size": {"shortest_edge": self.image_px},
                "crop_size": {"height": self.image_px, "width": self.image_px},
            }
        if name == "SamImageProcessor":
            size = {
                "size": {"longest_edge": self.image_px},
                "pad_size": {"height": self.image_px, "width": self.image_px},
            }
        getattr(transformers, name)(**size).save_pretrained(folder)
        return model


def _whole(vision: Mapping[str, Any] = _VIT, text: Mapping[str, Any] = _TEXT) -> dict[str, Any]:
    return {"vision_config": dict(vision), "text_config": dict(text)}


LAYOUTS: dict[str, Layout] = {
    "MAE": Layout(config="ViTMAEConfig", model="ViTMAEForPreTraining", settings=_MAE, expected="ViTForImageClassification"),
    "ViT": Layout(config="ViTConfig", model="ViTModel", settings=_VIT, expected="ViTForImageClassification"),
    "ViT, masked images": Layout(
        config="ViTConfig", model="ViTForMaskedImageModeling", settings={**_VIT, "encoder_stride": 8},
        expected="ViTForImageClassification",
    ),
    "BEiT, masked images": Layout(
        config="BeitConfig", model="BeitForMaskedImageModeling", processor="BeitImageProcessor",
        settings={**_VIT, "use_mean_pooling": True, "vocab_size": 40}, expected="BeitForImageClassification",
    ),
    "Data2Vec": Layout(
        config="Data2VecVisionConfig", model="Data2VecVisionModel", processor="BeitImageProcessor",
        settings={**_VIT, "use_mean_pooling": True}, expected="Data2VecVisionForImageClassification",
    ),
    "Swin, masked images": Layout(
        config="SwinConfig", model="SwinForMaskedImageModeling", settings=_SWIN, image_px=64,
        expected="SwinForImageClassification",
    ),
    "Swin, backbone": Layout(
        config="SwinConfig", model="SwinBackbone", settings=_SWIN, image_px=64, expected="SwinForImageClassification"
    ),
    "ConvNeXt": Layout(
        config="ConvNextConfig", model="ConvNextModel", settings=_STAGES, expected="ConvNextForImageClassification"
    ),
    "ResNet, backbone": Layout(
        config="ResNetConfig", model="ResNetBackbone", settings={"embedding_size": 8, "layer_type": "basic", **_STAGES},
        expected="ResNetForImageClassification",
    ),
    "Hiera, pretraining": Layout(
        config="HieraConfig", model="HieraForPreTraining", settings=_HIERA, image_px=64,
        expected="HieraForImageClassification",
    ),
    "SwiftFormer": Layout(
        config="SwiftFormerConfig", model="SwiftFormerModel", settings={"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
        image_px=64, pooling="channels_first",
    ),
    "LeViT": Layout(
        config="LevitConfig", model="LevitModel", image_px=64, expected="LevitForImageClassification",
        settings={"image_size": 64, "hidden_sizes": [16, 16, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
                  "key_dim": [8, 8, 8]},
    ),
    "RADIO": Layout(config="RadioConfig", model="RadioModel", settings=_VIT, pooling="tokens"),
    "Segformer": Layout(
        config="SegformerConfig", model="SegformerForSemanticSegmentation", image_px=64,
        expected="SegformerForImageClassification",
        settings={"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
                  "decoder_hidden_size": 8},
    ),
    "I-JEPA": Layout(config="IJepaConfig", model="IJepaModel", settings=_VIT, expected="IJepaForImageClassification"),
    "MSN": Layout(config="ViTMSNConfig", model="ViTMSNModel", settings=_VIT, expected="ViTMSNForImageClassification"),
    "DINOv2": Layout(
        config="Dinov2Config", model="Dinov2Model", processor="BitImageProcessor", settings=_DINO,
        expected="Dinov2ForImageClassification",
    ),
    "DINOv2 with registers": Layout(
        config="Dinov2WithRegistersConfig", model="Dinov2WithRegistersModel", processor="BitImageProcessor", settings=_DINO,
        expected="Dinov2WithRegistersForImageClassification",
    ),
    "DINOv2, backbone": Layout(
        config="Dinov2Config", model="Dinov2Backbone", processor="BitImageProcessor", settings=_DINO,
        expected="Dinov2ForImageClassification",
    ),
    "DINOv3": Layout(
        config="DINOv3ViTConfig", model="DINOv3ViTModel", processor="DINOv3ViTImageProcessor",
        settings={**_VIT, "num_register_tokens": 2},
    ),
    "DINOv3 ConvNeXt": Layout(
        config="DINOv3ConvNextConfig", model="DINOv3ConvNextModel", processor="DINOv3ViTImageProcessor", settings=_STAGES
    ),
    "CLIP": Layout(config="CLIPConfig", model="CLIPModel", processor="CLIPImageProcessor", settings=_whole()),
    "CLIP tower": Layout(
        config="CLIPVisionConfig", model="CLIPVisionModel", processor="CLIPImageProcessor",
        settings={**_VIT, "hidden_act": "gelu"},
    ),
    "CLIP tower with projection": Layout(
        config="CLIPVisionConfig", model="CLIPVisionModelWithProjection", processor="CLIPImageProcessor",
        settings={**_VIT, "projection_dim": 12},
    ),
    "SigLIP": Layout(config="SiglipConfig", model="SiglipModel", processor="SiglipImageProcessor", settings=_whole()),
    "SigLIP tower": Layout(
        config="SiglipVisionConfig", model="SiglipVisionModel", processor="SiglipImageProcessor", settings=_VIT
    ),
    "ChineseCLIP": Layout(
        config="ChineseCLIPConfig", model="ChineseCLIPModel", processor="ChineseCLIPImageProcessor", settings=_whole()
    ),
    "ChineseCLIP tower": Layout(
        config="ChineseCLIPVisionConfig", model="ChineseCLIPVisionModel", processor="ChineseCLIPImageProcessor", settings=_VIT
    ),
    "BLIP": Layout(
        config="BlipConfig", model="BlipForConditionalGeneration", processor="BlipImageProcessor", settings=_whole()
    ),
    "BLIP tower": Layout(config="BlipVisionConfig", model="BlipVisionModel", processor="BlipImageProcessor", settings=_VIT),
    "AIMv2": Layout(config="Aimv2Config", model="Aimv2Model", processor="CLIPImageProcessor", settings=_whole()),
    "AIMv2 tower": Layout(
        config="Aimv2VisionConfig", model="Aimv2VisionModel", processor="CLIPImageProcessor",
        settings={**_VIT, "use_head": False, "is_native": True}, pooling="tokens",
    ),
    "SAM": Layout(
        config="SamConfig", model="SamModel", processor="SamImageProcessor", settings=_SAM_WHOLE, pooling="channels_first"
    ),
    "SAM tower": Layout(
        config="SamVisionConfig", model="SamVisionModel", processor="SamImageProcessor", settings=_SAM,
        pooling="channels_first",
    ),
    "SAM 2": Layout(
        config="Sam2Config", model="Sam2Model", processor="Sam2ImageProcessor", settings={"vision_config": _SAM2_VISION},
        pooling="channels_last", image_px=64,
    ),
    "MLCD": Layout(config="MLCDVisionConfig", model="MLCDVisionModel", processor="CLIPImageProcessor", settings=_VIT),
}  # fmt: skip

# Layouts that only the slow tests and benchmarks/coverage.py load.
MORE_LAYOUTS: dict[str, Layout] = {
    "DeiT, masked images": Layout(
        config="DeiTConfig", model="DeiTForMaskedImageModeling", settings={**_VIT, "encoder_stride": 8},
        expected="DeiTForImageClassification",
    ),
    "Swin 2, masked images": Layout(
        config="Swinv2Config", model="Swinv2ForMaskedImageModeling", settings={**_SWIN, "num_heads": [2, 2, 2, 2]}, image_px=64,
        expected="Swinv2ForImageClassification",
    ),
    "FocalNet, masked images": Layout(
        config="FocalNetConfig", model="FocalNetForMaskedImageModeling",
        settings={"image_size": 64, "embed_dim": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}, image_px=64,
        expected="FocalNetForImageClassification",
    ),
    "ConvNeXt, backbone": Layout(
        config="ConvNextConfig", model="ConvNextBackbone", settings=_STAGES, expected="ConvNextForImageClassification"
    ),
    "ConvNeXt 2, backbone": Layout(
        config="ConvNextV2Config", model="ConvNextV2Backbone", settings=_STAGES, expected="ConvNextV2ForImageClassification"
    ),
    "Hiera, backbone": Layout(
        config="HieraConfig", model="HieraBackbone", settings=_HIERA, image_px=64, expected="HieraForImageClassification"
    ),
    "DINOv2 with registers, backbone": Layout(
        config="Dinov2WithRegistersConfig", model="Dinov2WithRegistersBackbone", processor="BitImageProcessor", settings=_DINO,
        expected="Dinov2WithRegistersForImageClassification",
    ),
    "PVT 2, backbone": Layout(
        config="PvtV2Config", model="PvtV2Backbone", image_px=64, expected="PvtV2ForImageClassification",
        settings={"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]},
    ),
    "BEiT, backbone": Layout(
        config="BeitConfig", model="BeitBackbone", processor="BeitImageProcessor",
        settings={**_VIT, "use_mean_pooling": True}, expected="BeitForImageClassification",
    ),
    "ViT of gray images": Layout(
        config="ViTConfig", model="ViTModel", settings={**_VIT, "num_channels": 1}, expected="ViTForImageClassification"
    ),
    "EfficientNet": Layout(
        config="EfficientNetConfig", model="EfficientNetModel", processor="EfficientNetImageProcessor", image_px=64,
        settings={"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "image_size": 64},
        expected="EfficientNetForImageClassification",
    ),
    "MobileNetV2": Layout(
        config="MobileNetV2Config", model="MobileNetV2Model", processor="MobileNetV2ImageProcessor", image_px=64,
        settings={"depth_multiplier": 0.25, "image_size": 64}, expected="MobileNetV2ForImageClassification",
    ),
    "SigLIP tower without pooling": Layout(
        config="SiglipVisionConfig", model="SiglipVisionModel", processor="SiglipImageProcessor",
        settings={**_VIT, "vision_use_head": False}, expected="SiglipForImageClassification",
    ),
}  # fmt: skip


def tower_of(name: str, model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The part of upstream's model that sees the image, with masking off."""
    module: Any
    for module in model.modules():
        if hasattr(module, "is_mae"):
            module.is_mae = False
    if hasattr(model.config, "mask_ratio"):
        model.config.mask_ratio = 0.0
    towers = (
        "vision_model",
        "vision_encoder",
        "vit",
        "beit",
        "swin",
        "hiera",
        "segformer",
        "deit",
        "swinv2",
        "focalnet",
        "",
    )
    for child in towers:
        if isinstance(getattr(model, child, None), transformers.PreTrainedModel):
            return getattr(model, child)  # type: ignore[no-any-return]
    if not name.endswith("backbone"):
        return model
    # A Backbone has the weights of the model of the same config, which has a last hidden state.
    whole: transformers.PreTrainedModel = transformers.AutoModel.from_config(model.config)
    missing, _ = whole.load_state_dict(model.state_dict(), strict=False)
    assert all("layernorm" in key for key in missing)
    return whole.eval()  # type: ignore[no-any-return]


def upstream_features(
    name: str, model: transformers.PreTrainedModel, pixels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Upstream's own last hidden state and, where its class documents one, the pooled feature."""
    tower = tower_of(name, model)
    patches = (pixels.shape[-1] // 8) ** 2
    arguments = {"noise": torch.arange(float(patches)).expand(len(pixels), -1)} if name == "MAE" else {}
    with torch.no_grad():
        output = tower(pixel_values=pixels, **arguments)
    pooled = getattr(output, "pooler_output", None)
    return output.last_hidden_state, None if pooled is None else pooled.flatten(1)


def our_features(found: Backbone, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What our backbone gives, and what our head receives."""
    seen: dict[str, torch.Tensor] = {}
    model: Any = found.model
    (backbone,) = (m for m in model.children() if isinstance(m, transformers.PreTrainedModel))
    handles = [
        backbone.register_forward_hook(
            lambda _, __, output: seen.update(hidden=getattr(output, "last_hidden_state", output[0]))
        )
    ]
    head = model.get_submodule(find_heads(model).linear[0])
    handles.append(head.register_forward_pre_hook(lambda _, args: seen.update(pooled=args[0])))
    with torch.no_grad():
        compute_logits(model, pixels)
    for handle in handles:
        handle.remove()
    return seen["hidden"], seen["pooled"]
