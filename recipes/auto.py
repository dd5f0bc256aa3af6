r"""Choose a strategy: compare others with a linear probe on held-out images, and train the best on all images.

    accelerate launch recipes/auto.py \
        --checkpoint timm/mobilenetv2_100.ra_in1k --dataset path/to/images --output_dir runs/auto --budget_s 1800

The frozen network runs once over the images. The features show how accurate a probe is and how similar the images are to the
pretraining images (`hf-transfer advise` prints both). From these follows how much each candidate is expected to add; of plain
`probe_then_full`, `advise` expects something else, by a table of its own. Then each candidate is trained without a part of the
images, and compared with the probe on that part: folds of few images, the validation split of many. The expected and the
measured gain together decide. The best candidate is trained again on train and validation images.
The candidates and the reason for the choice are in results.json and the model card. docs/auto.md explains them.
"""

from hf_transfer.launch import run_recipe

if __name__ == "__main__":
    run_recipe("auto", description=__doc__)
