r"""Partial fine-tuning: train the last layers and the head on stored activations of the frozen layers below.

    accelerate launch recipes/last_layers.py --k 2 \
        --checkpoint timm/mobilenetv2_100.ra_in1k --dataset path/to/images --output_dir runs/last

`--k` counts layers as `hf-transfer inspect` lists them (blocks, not stages). `--from_layer layer4` selects the first trained
layer by name. The first phase solves for the head on frozen features (`--no-probe_first` skips this phase). The second
phase trains the head and the last layers. `--cache_views 8` stores the activations of 8 augmented views of each image. With
`--cache_views 0`, the frozen layers run on freshly augmented images in every epoch.

Measured (2026-11-24, one CPU thread): MobileNetV2 reaches 96.6 % on sign-language digits in 220 s (its probe: 95.6 %).
"""

from hf_transfer.launch import run_recipe

if __name__ == "__main__":
    run_recipe("last_layers", description=__doc__)
