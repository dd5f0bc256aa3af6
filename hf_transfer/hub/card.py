"""The model card, filled from the run: what it is, how to load it, what it scored and what it was made from."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

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
    data = ModelCardData(
        model_name=name,
        library_name=backbone.library,
        pipeline_tag="image-classification",
        license=backbone.source.license,
        base_model=base,
        datasets=[data_name] if on_hub else None,
        tags=["image-classification", "transfer-learning", results["strategy"]],
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
    timm_lines = (
        '\nor, in timm, `timm.create_model("local-dir:FOLDER", pretrained=True)`.\n'
        if backbone.library == "timm"
        else ""
    )
    table = "\n".join(rows)
    return f"""# {name}

`{backbone.source.name}`{revision}, adapted to `{data_name}` ({sizes} images) by **{results["strategy"]}**: {steps}.

```python
from transformers import pipeline

classify = pipeline("image-classification", model="FOLDER")  # this folder, or its id once it is on the Hub
classify("image.jpg")
```
{timm_lines}
## Results

On the {scores["num_samples"]} images of the {split} split, with 95 % bootstrap intervals.{caution}

| metric | value | 95 % interval |
| --- | --- | --- |
{table}

Labels: {", ".join(backbone.label_names)}.
"""
