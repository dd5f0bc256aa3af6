"""The linear probe from images to a scored model: one pass, one convex problem for each readout, the best one installed.

outcome = solve_head(chain, backbone, data, config=config, accelerator=accelerator, costs=costs)
"""

from typing import Literal

from accelerate import Accelerator

from hf_transfer.config import RecipeConfig
from hf_transfer.data.dataset import Data
from hf_transfer.data.options import ExtractOptions
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import Chain
from hf_transfer.network.freezing import Audit
from hf_transfer.training import readouts
from hf_transfer.training.costs import Costs
from hf_transfer.training.evaluate import compute_stored_logits
from hf_transfer.training.metrics import score
from hf_transfer.training.outcome import Outcome


def solve_head(
    chain: Chain,
    backbone: Backbone,
    data: Data,
    *,
    config: RecipeConfig,
    accelerator: Accelerator,
    costs: Costs,
    sweep: Literal["none", "pooling", "layer", "all"] = "all",
    folds: int = 5,
    select_by: Literal["log_loss", "accuracy"] = "log_loss",
) -> Outcome:
    """The head for the readout that held-out images choose, refitted on train and validation, in the plain model.

    Validation images are scored by the fits that have not seen them, test images once. Raises RuntimeError where the whole
    network differs from the probe on stored features.
    """
    audit = Audit(chain, chain.features, chain.classifier_parameters)
    with costs.part("features"):
        candidates, computed = readouts.extract_readouts(
            chain, backbone, data, sweep=sweep, accelerator=accelerator, options=ExtractOptions.from_config(config)
        )
    costs.count_images("features", sum(computed.values()))
    with costs.part("probe"):
        best, probed = readouts.choose_readout(
            candidates, data, select_by=select_by, class_balance=config.class_balance, folds=folds, seed=config.seed,
            accelerator=accelerator,
        )  # fmt: skip
        trained = readouts.install_probe(backbone, chain, best)
    audit.check()  # all but the head is upstream's to the bit
    with costs.part("evaluate"):
        difference = readouts.verify_probe(
            trained, best, data.validation, device=accelerator.device, dtype=config.dtype
        )
        held_out = best.probe.validation_logits
        metrics = {"validation": score(held_out, data.validation.labels, data.label_names, seed=config.seed)}
        if data.test is not None:
            logits, labels = compute_stored_logits(
                best.compute_logits, best.features.stores["test"], data.test.labels, accelerator=accelerator
            )
            metrics["test"] = score(logits, labels, data.label_names, seed=config.seed)
    return Outcome(
        backbone=trained,
        plan=list(readouts.describe_plan(best)),
        metrics=metrics,
        curves=list(readouts.regularisation_curves(probed)),
        details=readouts.describe_choice(best, probed) | {"whole_network_differs_by": difference},
    )
