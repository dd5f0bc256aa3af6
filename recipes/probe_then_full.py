r"""LP-FT: solve for the head on frozen features, then fine-tune every layer from there (arXiv 2202.10054).

    accelerate launch recipes/probe_then_full.py \
        --checkpoint timm/mobilenetv2_100.ra_in1k --dataset path/to/images --output_dir runs/lpft

A head that fits the frozen features keeps the first steps from distorting them. Lower layers move less than higher ones
(`--layer_decay`). The last epoch that validates as well as the best one, up to chance, is kept, as a moving average of the
weights; or the probe itself if no epoch is better.

Measured (2026-11-24, one CPU thread): sign-language digits, MobileNetV2 100.0 % in 20 minutes (its probe: 95.6 %), DeiT-Tiny
99.0 % (91.7 %). On hymenoptera, which has too few images to gain from it, the probe was kept; see README.
"""

from hf_transfer.launch import run_recipe

if __name__ == "__main__":
    run_recipe("probe_then_full", description=__doc__)
