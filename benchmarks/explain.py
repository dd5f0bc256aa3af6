"""Measures how far Grad-CAM and occlusion agree on where a network looks: the rank correlation of their maps on photos.

python benchmarks/explain.py --checkpoint CHECKPOINT --images FOLDER [--at LAYER ...]
"""

import argparse

import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch.nn import functional as F

from hf_transfer.inference.explain import choose_map_cut, explain, occlude
from hf_transfer.inference.predict import find_images, load_saved

CELL_PX = 16  # the maps are averaged over cells of this side


def main() -> None:
    """Prints the mean and the range of the correlation for each cut."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--count", type=int, default=10, help="number of images, evenly spaced in the folder")
    parser.add_argument("--at", nargs="*", default=[], help="further cuts, beside the default one")
    given = parser.parse_args()
    backbone = load_saved(given.checkpoint)
    files = find_images([given.images])
    files = files[:: len(files) // given.count + 1]
    pixels = np.stack([backbone.preprocessing.pixels(Image.open(file).convert("RGB")) for file in files])
    images, chain = backbone.preprocessing.normalize(torch.from_numpy(pixels)), backbone.chain()
    checks = F.avg_pool2d(occlude(chain, images), CELL_PX)
    for at in (None, *given.at):
        map_cut = choose_map_cut(chain, at)
        maps = F.avg_pool2d(explain(chain, images, at=map_cut), CELL_PX)
        found = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(maps, checks, strict=True)]
        print(
            f"{map_cut.cut.name}: {np.mean(found):.2f} ({min(found):.2f} to {max(found):.2f}), {len(found)} images",
            flush=True,
        )


if __name__ == "__main__":
    main()
