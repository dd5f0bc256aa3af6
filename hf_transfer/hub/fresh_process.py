"""The script that `verify` runs. Each library loads a model folder without hf_transfer, and its outputs are compared.

python fresh_process.py MODEL_FOLDER REFERENCE transformers timm   # or peft; prints a line of JSON for each library
"""

import json
import sys
from pathlib import Path
from typing import Any


def compute(folder: Path, images: list[Any], library: str) -> tuple[Any, Any, list[str]]:
    """Returns normalized pixels (B, 3, H, W), logits (B, K) and label names, computed with `library` alone."""
    if library == "timm":
        import timm

        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
        inputs = _timm_inputs(model, images)
        labels = list(model.pretrained_cfg.get("label_names") or [])
    elif library == "transformers":
        from transformers import AutoModelForImageClassification

        has_code = "auto_map" in json.loads((folder / "config.json").read_text())
        model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=has_code)
        inputs = _transformers_inputs(folder, images, has_code)
        labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    else:
        model, inputs, labels = _load_peft(folder, images)
    return inputs, _logits(model, inputs), labels


def _load_peft(folder: Path, images: list[Any]) -> tuple[Any, Any, list[str]]:
    """Returns the base model with a new head and the adapter, the normalized pixels of `images`, and the label names."""
    from peft import PeftModel

    config = json.loads((folder / "adapter_config.json").read_text())
    task = json.loads((folder / "task.json").read_text())
    base_id, revision, num_labels = config["base_model_name_or_path"], config.get("revision"), len(task["label_names"])
    if task["library"] == "timm":
        import timm

        suffix = f"@{revision}" if revision else ""
        base: Any = timm.create_model(f"hf-hub:{base_id}{suffix}", pretrained=True, num_classes=num_labels)
        inputs = _timm_inputs(base, images)
    else:
        from transformers import AutoModelForImageClassification

        base = AutoModelForImageClassification.from_pretrained(
            base_id, revision=revision or "main", num_labels=num_labels, ignore_mismatched_sizes=True
        )
        inputs = _transformers_inputs(folder, images, False)
    return PeftModel.from_pretrained(base, str(folder)), inputs, task["label_names"]


def _timm_inputs(model: Any, images: list[Any]) -> Any:
    import torch
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    transform: Any = create_transform(**resolve_data_config(model=model))
    return torch.stack([transform(image) for image in images])


def _transformers_inputs(folder: Path, images: list[Any], has_code: bool) -> Any:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=has_code)
    return processor(images=images, return_tensors="pt")["pixel_values"]


def _logits(model: Any, inputs: Any) -> Any:
    import torch

    with torch.no_grad():
        output = model.eval()(inputs)
    return getattr(output, "logits", output)


def main() -> None:
    """Compares each library's outputs with the outputs in the reference file, and prints the differences as JSON."""
    sys.modules["hf_transfer"] = None  # type: ignore[assignment]  # published code must not need this package
    folder, reference, *libraries = sys.argv[1:]
    from PIL import Image
    from safetensors import safe_open

    with safe_open(reference, framework="pt") as file:
        labels = json.loads(file.metadata()["labels"])
        names = sorted((n for n in file.keys() if n.startswith("image_")), key=lambda n: int(n[6:]))  # noqa: SIM118
        images = [Image.fromarray(file.get_tensor(name).numpy()) for name in names]
        expected_inputs, expected = file.get_tensor("inputs"), file.get_tensor("logits")
    if expected_inputs.shape[1] == 1:  # a network of gray images
        images = [image.convert("L") for image in images]
    scale = expected.abs().max().clamp(min=1.0)
    for library in libraries:
        inputs, logits, own_labels = compute(Path(folder), images, library)
        same_shape = inputs.shape == expected_inputs.shape and logits.shape == expected.shape
        result = {
            "logits": float((logits - expected).abs().max() / scale) if same_shape else 1e9,
            "pixels": float((inputs - expected_inputs).abs().max()) if same_shape else 1e9,
            # A timm checkpoint may record no label names.
            "labels_agree": own_labels == labels or (library == "timm" and not own_labels),
        }
        print(json.dumps(result), flush=True)  # noqa: T201 - the parent process reads it


if __name__ == "__main__":
    main()
