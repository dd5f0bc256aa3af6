"""A transformers image classifier over any vision backbone that has no classification class of its own in transformers.

    pixels -> backbone -> pooling -> linear head -> logits

`save_pretrained` saves this file beside the weights. Where hf_transfer is not installed, the model loads with
`trust_remote_code=True`, so this file imports only torch and transformers.
"""

import importlib
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

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

    config_class: type[BackboneConfig] = BackboneConfig
    main_input_name = "pixel_values"

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        kind = self.find_class()
        self.backbone = kind(kind.config_class.from_dict(config.backbone["config"]), **config.backbone["arguments"])
        self.head = nn.Linear(config.num_features, int(config.num_labels or 0))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **_: Any
    ) -> ImageClassifierOutput:
        """Returns `logits` (B, K) of normalized images (B, C, H, W), and `loss` if `labels` are given.

        The loss follows `config.problem_type`, as in all image classifiers of transformers.
        """
        logits = self.head(self.pool(self.backbone(pixel_values)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def find_class(self) -> Any:
        """Returns the class of the backbone. Raises ValueError if the class is not in transformers."""
        module = self.config.backbone["module"]
        if not module.startswith("transformers."):
            raise ValueError(f"backbone.module={module!r}: choose a module of transformers")
        return getattr(importlib.import_module(module), self.config.backbone["class"])

    def pool(self, output: Any) -> torch.Tensor:
        """Returns the pooled features (B, num_features) of the backbone's output."""
        if self.config.pooling == "pooler_output":
            return torch.flatten(output.pooler_output, 1)
        hidden: torch.Tensor = output.last_hidden_state
        if self.config.pooling == "tokens":
            return hidden[:, self.config.skipped_tokens :].mean(1)
        return hidden.mean((2, 3) if self.config.pooling == "channels_first" else (1, 2))


class RemoteBackboneConfig(BackboneConfig):
    """The config of a classifier over a backbone with code of its own.

    `backbone`: the name of the backbone's class (`file.Class`), the constructor's `config` and its other `arguments`. The file
    is in the folder or Hub repository `name_or_path`.
    """

    model_type = "remote_backbone_classifier"


class RemoteBackboneForImageClassification(BackboneForImageClassification):
    """A backbone whose code is saved beside the weights, a pooling, and a linear head.

    This class is never registered with transformers, so that loading a saved model always needs `trust_remote_code=True`.
    """

    config_class: type[BackboneConfig] = RemoteBackboneConfig

    def find_class(self) -> Any:
        """Returns the class of the backbone, from the code beside the weights."""
        name, origin = self.config.backbone["class"], str(self.config.name_or_path)
        return get_class_from_dynamic_module(name, origin, revision=getattr(self.config, "_commit_hash", None))

    def pool(self, output: Any) -> torch.Tensor:
        """Returns the pooled features (B, num_features) of the backbone's output."""
        return super().pool(name_outputs(output))

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the model, with its own code and the code of its backbone."""
        super().save_pretrained(save_directory, *args, **kwargs)
        custom_object_save(self.backbone, save_directory)


def name_outputs(output: Any) -> Any:
    """Returns a backbone's output with the names `last_hidden_state` and `pooler_output`.

    In a tuple or mapping without these names, the first tensor (B, F) is the pooled feature, and the first tensor with more
    dimensions is the last hidden state.
    """
    if getattr(output, "last_hidden_state", None) is not None:
        return output
    values = (
        [output] if isinstance(output, torch.Tensor) else output.values() if isinstance(output, Mapping) else output
    )
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    pooled = next((tensor for tensor in tensors if tensor.ndim == 2), None)
    hidden = next((tensor for tensor in tensors if tensor.ndim > 2), pooled)
    return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


# These calls make save_pretrained copy this file beside the weights and name it in config.json.
BackboneConfig.register_for_auto_class()  # type: ignore[no-untyped-call]
BackboneForImageClassification.register_for_auto_class("AutoModelForImageClassification")  # type: ignore[no-untyped-call]
RemoteBackboneConfig.register_for_auto_class()  # type: ignore[no-untyped-call]
RemoteBackboneForImageClassification.register_for_auto_class("AutoModelForImageClassification")  # type: ignore[no-untyped-call]
