"""Run as a script by `verify`: loads a folder with one library and compares it with a reference. Imports nothing of ours.

python fresh_process.py MODEL_FOLDER REFERENCE transformers|timm   # prints one line of JSON
"""

import json
import sys
from typing import Any


def compute(folder: str, images: list[Any], library: str) -> tuple[Any, Any, list[str]]:
    """Normalised pixels, logits and label names by plain `library`."""
    import torch

    if library == "timm":
        import timm
        from timm.data.config import resolve_data_config
        from timm.data.transforms_factory import create_transform

        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        transform: Any = create_transform(**resolve_data_config(model=model))
        inputs = torch.stack([transform(image) for image in images])
        with torch.no_grad():
            return inputs, model(inputs), list(model.pretrained_cfg.get("label_names") or [])
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    inputs = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(pixel_values=inputs).logits
    return inputs, logits, [model.config.id2label[i] for i in range(logits.shape[1])]


def main() -> None:
    """Compares, and prints the differences."""
    folder, reference, library = sys.argv[1:]
    from PIL import Image
    from safetensors import safe_open

    with safe_open(reference, framework="pt") as file:
        labels = json.loads(file.metadata()["labels"])
        names = sorted((n for n in file.keys() if n.startswith("image_")), key=lambda n: int(n[6:]))  # noqa: SIM118
        images = [Image.fromarray(file.get_tensor(name).numpy()) for name in names]
        expected_inputs, expected = file.get_tensor("inputs"), file.get_tensor("logits")
    inputs, logits, found_labels = compute(folder, images, library)
    same_shape = inputs.shape == expected_inputs.shape and logits.shape == expected.shape
    scale = expected.abs().max().clamp(min=1.0)
    result = {
        "logits": float((logits - expected).abs().max() / scale) if same_shape else 1e9,
        "pixels": float((inputs - expected_inputs).abs().max()) if same_shape else 1e9,
        # timm keeps no names in the model where the checkpoint records none.
        "labels_agree": found_labels == labels or (library == "timm" and not found_labels),
    }
    print(json.dumps(result))  # noqa: T201 - its parent reads this


if __name__ == "__main__":
    main()
