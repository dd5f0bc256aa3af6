r"""Choose a strategy: train a linear probe and the strategy that `advise` recommends, and keep the better result.

    accelerate launch recipes/auto.py \
        --checkpoint timm/mobilenetv2_100.ra_in1k --dataset path/to/images --output_dir runs/auto --budget_s 1800

The frozen network runs once over the images. The features show how accurate a probe is, how similar the images are to the
pretraining images, and how much fine-tuning is expected to add (`hf-transfer advise` prints these figures). With `--measure`,
short runs of the best candidates take the first third of the budget. Then the probe and the advised strategy are trained, and
validation images decide which result is kept. The advice and the reason for the choice are in results.json
and the model card.
"""

from hf_transfer.launch import run_recipe

if __name__ == "__main__":
    run_recipe("auto", description=__doc__)
