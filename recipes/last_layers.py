r"""Partial fine-tuning: train the last layers and the head; everything below is frozen, computed once and stored.

    accelerate launch recipes/last_layers.py --k 2 \
        --checkpoint timm/mobilenetv2_100.ra_in1k --dataset path/to/images --output_dir runs/last

`--k` counts layers as `hf-transfer inspect` lists them (blocks, not stages); `--from_layer layer4` names the first one that
trains. First the head is solved for on frozen features (`--no-probe_first` skips that), then all that trains takes gradient
steps on stored activations. `--cache_views 8` stores augmented views; 0 augments in every epoch and runs the prefix each time.

Measured (2026-11-24, one CPU thread): MobileNetV2 on sign-language digits 96.6 % in 220 s (its probe: 95.6 %); see README.
"""

from hf_transfer.launch import run_recipe

if __name__ == "__main__":
    run_recipe("last_layers", description=__doc__)
