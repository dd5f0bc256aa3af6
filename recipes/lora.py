r"""Adapters: solve for the head on frozen features, then train LoRA or a relative beside the frozen weights (arXiv 2106.09685).

    accelerate launch recipes/lora.py \
        --checkpoint timm/deit_tiny_patch16_224.fb_in1k --dataset path/to/images --output_dir runs/lora

Adapters start as the identity, so the solved head fits from the first step. By default they are merged at the end, and the
result is a plain checkpoint; `--no-merge` saves a PEFT adapter folder instead, a few percent of the size, which names its base
by id. With `--adapter_layers last:4 --cache_views 8` everything below those layers runs once and is stored.

Measured (seed 0): DeiT-Tiny, sign-language digits, 98.8 % with 4 % of the weights trained, 24 min on a busy core; see README.
"""

from hf_transfer.launch import run_recipe

if __name__ == "__main__":
    run_recipe("lora", description=__doc__)
