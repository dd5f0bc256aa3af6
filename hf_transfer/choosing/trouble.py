"""Little data, unlike upstream's, the cell marked "you're in trouble": what helps there, and what the evidence says of each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_transfer.choosing.estimates import LearningCurve
from hf_transfer.choosing.rule import Place, expect_log_ratio
from hf_transfer.choosing.strategies import make_command
from hf_transfer.config import RecipeConfig
from hf_transfer.network.chain import Chain


@dataclass(frozen=True, kw_only=True)
class Way:
    """One thing to try: what, what the evidence says of it, and the command where there is one."""

    title: str
    evidence: str
    command: str | None


def find_ways(
    place: Place,
    depths: Sequence[tuple[str, float, bool]],
    curve: LearningCurve,
    config: RecipeConfig,
    chain: Chain,
) -> tuple[Way, ...]:
    """Ways out, where the place is the trouble cell; else none. `depths`: (layer, probe's accuracy, whether it is the end)."""
    if not place.is_trouble:
        return ()
    own = next(accuracy for _, accuracy, is_native in depths if is_native)
    earlier = [(layer, accuracy) for layer, accuracy, is_native in depths if not is_native]
    ways = [_labels(curve)]
    if earlier:
        layer, accuracy = max(earlier, key=lambda d: d[1])
        better = "earlier features suit the task better" if accuracy > own else "no earlier layer suits the task better"
        names = [x.name for x in chain.layers]
        after = names[min(names.index(layer) + 1, len(names) - 2)]
        ways.append(
            Way(
                title="features of earlier layers",
                evidence=f"{100 * accuracy:.1f} % after {layer} against {100 * own:.1f} % at the end: {better}",
                command=make_command("last_layers", config, "--from_layer", after) if accuracy > own else None,
            )
        )
    for title, recipe, extra in (
        ("few parameters from a solved head (LoRA)", "lora", ()),
        ("biases alone (BitFit), from upstream's features", "full", ("--trains", "biases")),
        ("stronger augmentation", "probe_then_full", ("--auto_augment", "trivialaugment", "--erase", "0.25")),
        ("weights between frozen and fine-tuned (WiSE-FT)", "probe_then_full", ("--wise_ft",)),
    ):
        r = expect_log_ratio("lora" if recipe == "lora" else "probe_then_full", place)
        told = f"fine-tuning from a probe is expected to leave {100 * math.exp(r):.0f} % of the probe's error"
        ways.append(Way(title=title, evidence=told, command=make_command(recipe, config, *extra)))
    rank = f"hf-transfer rank --dataset {config.dataset} {config.checkpoint} OTHER_CHECKPOINT ..."
    ways.append(
        Way(
            title="another checkpoint",
            evidence=f"similarity is {place.similarity:.2f} of 1: one that was pretrained on images like these may do better",
            command=rank,
        )
    )
    return tuple(ways)


def _labels(curve: LearningCurve) -> Way:
    now, *later = curve.ahead
    told = "; ".join(
        f"{row['images_per_class']:.0f} a class: {100 * row['accuracy']:.1f} % "
        f"({100 * row['low']:.1f} to {100 * row['high']:.1f})"
        for row in later
    )
    return Way(
        title="more labels",
        evidence=(
            f"the probe's error falls as images to the power -{curve.exponent:.2f}; from {100 * now['accuracy']:.1f} % at "
            f"{now['images_per_class']:.0f} a class, {told}"
        ),
        command=None,
    )
