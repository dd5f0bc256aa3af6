r"""Supervised pretraining: train an architecture from random weights, with the training loop of fine-tuning.

    accelerate launch recipes/pretrain.py --architecture resnet18 \
        --dataset path/to/images --epochs 90 --output_dir runs/pretrained

The result is a plain checkpoint, and every other recipe accepts the run's `model/` as `--checkpoint`. `--image_size_px` sets
the size of the architecture's input images.
"""

from hf_transfer.launch import run_recipe

if __name__ == "__main__":
    run_recipe("pretrain", description=__doc__)
