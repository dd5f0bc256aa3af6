"""Does the embedded checkpoint transfer? The linear probe on it, against the same network trained from scratch, few labels.

    python benchmarks/vs_scratch.py --images_per_class 10 --seeds 5

Both see the same images of scikit-learn's digits (train and validation together, since the probe is refitted on both) and are
scored on the same 539 test images. From scratch: AdamW 3e-3, one-cycle, weight decay 0.05, label smoothing 0.1, small
rotations, scalings and shifts, --steps steps of 64 images.
"""

import argparse
import statistics
from typing import Any

import numpy as np
import timm
import torch
from torch.nn import functional as F

import hf_transfer as ht
from hf_transfer.data.splits import Split
from hf_transfer.network.backbone import load


def read_split(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized pixels (N, 3, H, W), labels (N,)."""
    preprocessing = load("embedded").preprocessing
    pixels = np.stack([preprocessing.pixels(split.image(i)) for i in range(len(split))])
    return preprocessing.normalize(torch.from_numpy(pixels)).contiguous(), torch.from_numpy(split.labels)


def train_from_scratch(pixels: torch.Tensor, labels: torch.Tensor, *, steps: int, seed: int) -> torch.nn.Module:
    """The embedded architecture, with random weights, trained on (N, 3, H, W) and (N,)."""
    torch.manual_seed(seed)
    pretrained: Any = load("embedded").model
    config = dict(pretrained.pretrained_cfg)
    arguments = {k: v for k, v in pretrained._model_args.items() if k != "num_classes"}
    network = timm.create_model(config["architecture"], num_classes=int(labels.max()) + 1, **arguments)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    network.train()
    for _ in range(steps):
        rows = torch.randint(len(labels), (64,))
        angle, scale = torch.empty(64).uniform_(-0.17, 0.17), torch.empty(64).uniform_(0.85, 1.15)
        shift = torch.empty(64, 2).uniform_(-0.1, 0.1)
        theta = torch.stack(
            [
                torch.stack([scale * angle.cos(), -scale * angle.sin(), shift[:, 0]], 1),
                torch.stack([scale * angle.sin(), scale * angle.cos(), shift[:, 1]], 1),
            ],
            1,
        )
        grid = F.affine_grid(theta, [64, *pixels.shape[1:]], align_corners=False)
        moved = F.grid_sample(pixels[rows], grid, padding_mode="border", align_corners=False)
        loss = F.cross_entropy(network(moved), labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def main() -> None:
    """Prints a line for each seed, then mean and spread of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images_per_class", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    ours, scratch = [], []
    for seed in range(given.seeds):
        task = ht.Task("sklearn/digits", images_per_class=given.images_per_class, seed=seed, cache="memory")
        ours.append(task.fit(ht.linear_probe()).test.accuracy)
        data = task.data
        assert data.test is not None
        parts = [read_split(data.train), read_split(data.validation)]
        pixels, labels = (torch.cat(both) for both in zip(*parts, strict=True))
        network = train_from_scratch(pixels, labels, steps=given.steps, seed=seed)
        test_pixels, test_labels = read_split(data.test)
        with torch.no_grad():
            scratch.append(float((network(test_pixels).argmax(1) == test_labels).float().mean()))
        print(
            f"seed {seed}: {len(labels)} images, probe {100 * ours[-1]:.1f} %, from scratch {100 * scratch[-1]:.1f} %"
        )
    for name, accuracies in (("probe on the embedded checkpoint", ours), ("the same network from scratch", scratch)):
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        print(f"{name}: {100 * statistics.mean(accuracies):.1f} % +- {100 * spread:.1f} over {len(accuracies)} seeds")


if __name__ == "__main__":
    main()
