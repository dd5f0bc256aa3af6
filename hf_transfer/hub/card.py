"""The model card, filled from the run: what it is, how to load it, what it scored and what it was made from."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_transfer.network.adapters import Adapted
from hf_transfer.network.backbone import Backbone

SCORES = {"accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy", "macro_f1": "Macro F1"}


def make_card(backbone: Backbone, results: Mapping[str, Any]) -> ModelCard:
    """README.md of the saved model: metadata that the Hub reads, then the same in words."""
    split = "test" if "test" in results["metrics"] else "validation"
    scores = results["metrics"][split]
    data_name = results["data"]["name"]
    base = backbone.source.id
    name = f"{PurePath(backbone.source.name).name}-{PurePath(data_name).name}"
    on_hub = results["data"]["revision"] is not None
    is_adapter = isinstance(backbone, Adapted)
    data = ModelCardData(
        model_name=name,
        library_name="peft" if is_adapter else backbone.library,
        pipeline_tag="image-classification",
        license=backbone.source.license,
        base_model=base,
        base_model_relation="adapter" if is_adapter else None,
        datasets=[data_name] if on_hub else None,
        tags=["image-classification", "transfer-learning", "hf_transfer", results["strategy"]],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=data_name,
                dataset_name=data_name,
                dataset_split=split,
                metric_type=key,
                metric_name=title,
                metric_value=round(scores[key], 4),
            )
            for key, title in SCORES.items()
        ],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(name, backbone, results, split)}")


def _text(name: str, backbone: Backbone, results: Mapping[str, Any], split: str) -> str:
    scores = results["metrics"][split]
    data_name = results["data"]["name"]
    rows = []
    for key, title in SCORES.items():
        low, high = scores[f"{key}_interval"]
        rows.append(f"| {title} | {100 * scores[key]:.1f} % | {100 * low:.1f} to {100 * high:.1f} |")
    caution = "" if split == "test" else " There was no test split: what is kept was chosen by these same images."
    revision = f" (revision `{backbone.source.revision}`)" if backbone.source.revision else ""
    steps = "; ".join(str(phase["description"]) for phase in results["plan"])
    sizes = ", ".join(f"{count} {part}" for part, count in results["data"]["num_images"].items())
    table = "\n".join(rows)
    return f"""# {name}

`{backbone.source.name}`{revision}, adapted to `{data_name}` ({sizes} images) by **{results["strategy"]}**: {steps}.

{_adapter_usage(backbone) if isinstance(backbone, Adapted) else _usage(backbone)}
## Results

On the {scores["num_samples"]} images of the {split} split, with 95 % bootstrap intervals.{caution}

| metric | value | 95 % interval |
| --- | --- | --- |
{table}

Labels: {", ".join(backbone.label_names)}.
"""


def _usage(backbone: Backbone) -> str:
    """How to load a plain checkpoint."""
    timm_lines = (
        '\nor, in timm, `timm.create_model("local-dir:FOLDER", pretrained=True)`.\n'
        if backbone.library == "timm"
        else ""
    )
    return f"""```python
from transformers import pipeline

classify = pipeline("image-classification", model="FOLDER")  # this folder, or its id once it is on the Hub
classify("image.jpg")
```
{timm_lines}"""


def _adapter_usage(adapted: Adapted) -> str:
    """How to load the base with a head of the right size, and the adapter into it."""
    base, revision, names = adapted.source.id, adapted.source.revision, list(adapted.label_names)
    if adapted.library == "timm":
        at = f"@{revision}" if revision else ""
        return f"""```python
import timm, torch
from peft import PeftModel
from PIL import Image

labels = {names}
base = timm.create_model("hf-hub:{base}{at}", pretrained=True, num_classes={len(names)})
model = PeftModel.from_pretrained(base, "FOLDER").eval()  # this folder, or its id once it is on the Hub
transform = timm.data.create_transform(**timm.data.resolve_data_config(base.pretrained_cfg))
with torch.no_grad():
    print(labels[int(model(transform(Image.open("image.jpg").convert("RGB"))[None]).argmax())])
```
"""
    at = f', revision="{revision}"' if revision else ""
    return f"""```python
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

labels = {names}
base = AutoModelForImageClassification.from_pretrained(
    "{base}"{at}, num_labels={len(names)}, id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True
)
model = PeftModel.from_pretrained(base, "FOLDER").eval()  # this folder, or its id once it is on the Hub
pixels = AutoImageProcessor.from_pretrained("FOLDER")(Image.open("image.jpg").convert("RGB"), return_tensors="pt")
with torch.no_grad():
    print(labels[int(model(**pixels).logits.argmax())])
```
"""
