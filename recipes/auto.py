r"""Choose the strategy: advise, run the probe and then the advised strategy, and keep the better one.

    accelerate launch recipes/auto.py \
        --checkpoint timm/mobilenetv2_100.ra_in1k --dataset path/to/images --output_dir runs/auto --budget_s 1800

One pass of the frozen network shows how far a probe goes, how the images compare with upstream's, and what fine-tuning is
expected to add (`hf-transfer advise` prints it). `--measure` first spends a third of the budget on short runs of the leading
strategies. The probe and the most promising strategy within the budget run, and validation images decide between them. The
advice, what ran and why are in results.json and the card.
"""

from hf_transfer.launch import run_recipe

if __name__ == "__main__":
    run_recipe("auto", description=__doc__)
