r"""Adapters: solve for the head on frozen features, then train LoRA or similar adapters beside the weights (arXiv 2106.09685).

    accelerate launch recipes/lora.py \
        --checkpoint timm/deit_tiny_patch16_224.fb_in1k --dataset path/to/images --output_dir runs/lora

New adapters do not change the network's output, so the solved head fits from the first step. At the end, the adapters are
merged, and the result is a plain checkpoint. With `--no-merge`, the result is a PEFT adapter folder, which records the Hub id
of the base and is much smaller. With `--adapter_layers last:4 --cache_views 8`, the output of the lower layers is stored.

Measured (seed 0): DeiT-Tiny reaches 98.8 % on sign-language digits with 4 % of the weights trained, in 24 min on a busy core.
"""

from hf_transfer.launch import run_recipe

if __name__ == "__main__":
    run_recipe("lora", description=__doc__)
