r"""Full fine-tuning: train all parameters of the network, or only those that `--trains` or `--pattern` selects.

    accelerate launch recipes/full.py \
        --checkpoint timm/mobilenetv2_100.ra_in1k --dataset path/to/images --output_dir runs/full

Images are decoded once into memory-mapped pixels, and batches are augmented on the device. The head starts at random. If the
images are few and similar to the pretraining images, `probe_then_full.py` is more accurate. `--trains norms` trains only the
normalization layers and the head, and `--trains biases` only the biases and the head (BitFit, arXiv 2106.10199).

Measured (2026-11-24, one CPU thread, bf16): MobileNetV2 reaches 90.3 % on trashnet (its probe: 85.0 %) and 99.5 % on
sign-language digits. See docs/results.md.
"""

from hf_transfer.launch import run_recipe

if __name__ == "__main__":
    run_recipe("full", description=__doc__)
