"""A transformers image classifier over any vision backbone of transformers that has no classification class of its own.

    pixels -> backbone -> pooling -> linear head -> logits

`save_pretrained` saves this file beside the weights. Where hf_transfer is not installed, the model loads with
`trust_remote_code=True`, so this file imports only torch and transformers.
"""

import importlib
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

# The backbone's own pooled feature, or the mean over the grid of its last hidden state (B, L, C), (B, C, H, W) or (B, H, W, C).
PooledFeature = Literal["pooler_output", "tokens", "channels_first", "channels_last"]


class BackboneConfig(PreTrainedConfig):
    """The config of a classifier over a backbone.

    `backbone`: the module and the name of the backbone's class, the constructor's `config` and its other `arguments`.
    `pooling`: the pooled feature (see `PooledFeature`). `skipped_tokens`: the number of class and register tokens, which
    precede the grid. `num_features`: the size of the pooled feature.
    """

    model_type = "backbone_classifier"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        pooling: PooledFeature = "pooler_output",
        skipped_tokens: int = 0,
        num_features: int = 0,
        **kwargs: Any,
    ) -> None:
        self.backbone = dict(backbone or {})
        self.pooling = pooling
        self.skipped_tokens = skipped_tokens
        self.num_features = num_features
        super().__init__(**kwargs)


class BackboneForImageClassification(PreTrainedModel):
    """A backbone of transformers, its documented pooling, and a linear head."""

    config_class = BackboneConfig
    main_input_name = "pixel_values"

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        module = config.backbone["module"]
        if not module.startswith("transformers."):
            raise ValueError(f"backbone.module={module!r}: choose a module of transformers")
        kind = getattr(importlib.import_module(module), config.backbone["class"])
        self.backbone = kind(kind.config_class.from_dict(config.backbone["config"]), **config.backbone["arguments"])
        self.head = nn.Linear(config.num_features, int(config.num_labels or 0))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **_: Any
    ) -> ImageClassifierOutput:
        """Returns `logits` (B, K) of normalized images (B, C, H, W), and the cross-entropy `loss` if `labels` are given."""
        logits = self.head(self.pool(self.backbone(pixel_values=pixel_values)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def pool(self, output: Any) -> torch.Tensor:
        """Returns the pooled features (B, num_features) of the backbone's output."""
        if self.config.pooling == "pooler_output":
            return torch.flatten(output.pooler_output, 1)
        hidden: torch.Tensor = output.last_hidden_state
        if self.config.pooling == "tokens":
            return hidden[:, self.config.skipped_tokens :].mean(1)
        return hidden.mean((2, 3) if self.config.pooling == "channels_first" else (1, 2))


# These calls make save_pretrained copy this file beside the weights and name it in config.json.
BackboneConfig.register_for_auto_class()  # type: ignore[no-untyped-call]
BackboneForImageClassification.register_for_auto_class("AutoModelForImageClassification")  # type: ignore[no-untyped-call]
