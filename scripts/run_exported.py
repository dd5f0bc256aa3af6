"""Runs an exported model with the preprocessing inside, with NumPy, Pillow and onnxruntime only.

python scripts/run_exported.py runs/x/model/onnx/model_with_preprocessing.onnx photos/*.jpg
python scripts/run_exported.py MODEL --expected expected.npz FILES...   # also compares pixels and labels (benchmarks/export.py)

expected.npz has `pixel_values` (N, C, H, W), `places` (N,) of the largest output, and `level` (C,): one of 255 levels.
"""

import argparse
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read(file: str) -> np.ndarray:
    """Returns the upright RGB pixels (H, W, 3) of an image file."""
    with Image.open(file) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def main() -> None:
    """Prints the label of each image or, with --expected, one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", help="image files; -: file names on standard input")
    parser.add_argument("--expected")
    given = parser.parse_args()
    files = sys.stdin.read().splitlines() if given.files == ["-"] else given.files
    session = onnxruntime.InferenceSession(given.model, providers=["CPUExecutionProvider"])
    labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
    expected = None if given.expected is None else dict(np.load(given.expected))  # each access reads the file again
    levels, agreeing = [], 0
    for i, file in enumerate(files):
        outputs, pixels = session.run(None, {"image": read(file)})
        place = int(outputs[0].argmax())
        if expected is None:
            print(f"{file}  {labels[place]}  {outputs[0, place]:.4f}")
            continue
        difference = np.abs(pixels[0] - expected["pixel_values"][i]) / expected["level"][:, None, None]
        levels.append(float(difference.max()))
        agreeing += place == int(expected["places"][i])
    if expected is not None:
        modules = [
            name for name in ("torch", "torchvision", "timm", "transformers", "hf_transfer") if name in sys.modules
        ]
        print(
            json.dumps({"images": len(files), "largest_levels": max(levels), "agreeing": agreeing, "modules": modules})
        )


if __name__ == "__main__":
    main()
