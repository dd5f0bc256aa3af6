r"""Supervised pretraining: train an architecture from random weights, with the loop that fine-tuning uses.

    accelerate launch recipes/pretrain.py --architecture resnet18 \
        --dataset path/to/images --epochs 90 --output_dir runs/pretrained

The result is a plain checkpoint: every other recipe takes its `model/` folder as `--checkpoint`. `--image_size_px` builds the
architecture for smaller or larger images than its own default.
"""

from hf_transfer.launch import run_recipe

if __name__ == "__main__":
    run_recipe("pretrain", description=__doc__)
