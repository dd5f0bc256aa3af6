"""Suggests what to try if the data are few and different from the pretraining images, with evidence for each suggestion."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_transfer.choosing.candidates import find_trained_share, make_command, to_flags
from hf_transfer.choosing.expected_accuracy import DepthScore, LearningCurve
from hf_transfer.choosing.rule import DataRegime, expect_log_ratio
from hf_transfer.config import DataConfig
from hf_transfer.session import Session
from hf_transfer.settings import changed_settings, replace_settings
from hf_transfer.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """One suggestion to the user with its evidence. `command` tries the suggestion, and is None if no command can."""

    title: str
    evidence: str
    command: str | None


def suggest(
    session: Session,
    candidates: Mapping[str, Strategy],
    regime: DataRegime,
    depths: Sequence[DepthScore],
    curve: LearningCurve,
) -> tuple[Suggestion, ...]:
    """Returns suggestions if the data are few and different from the pretraining images, and an empty tuple otherwise."""
    if not regime.is_trouble:
        return ()
    suggestions = [_suggest_labels(curve)]
    native = next(d for d in depths if d.is_native)
    earlier = [d for d in depths if not d.is_native]
    if earlier:
        suggestions.append(_suggest_earlier_features(max(earlier, key=lambda d: d.probe), native, session, candidates))
    for title, name, settings in (
        ("training few parameters from a solved head (LoRA)", "lora", {}),
        ("training only biases and the head (BitFit)", "full", {"trains": "biases"}),
        ("stronger augmentation", "probe_then_full", {"auto_augment": "trivialaugment", "random_erasing": 0.25}),
        ("interpolating frozen and fine-tuned weights (WiSE-FT)", "probe_then_full", {"wise_ft": True}),
    ):
        base = "lora" if name == "lora" else "probe_then_full"
        log_ratio = find_trained_share(session, candidates[base], None) * expect_log_ratio(base, regime)
        accuracy = 1 - (1 - native.probe) * math.exp(log_ratio)
        evidence = f"{base} is expected to reach {100 * accuracy:.1f} %"
        evidence += ", and what these settings change was not measured" if settings else ""
        command = make_command(session, replace_settings(candidates[name], settings))
        suggestions.append(Suggestion(title=title, evidence=evidence, command=command))
    data = changed_settings(session.config.data, DataConfig()) | {"dataset": session.config.data.dataset}
    rank = ["hf-transfer", "rank", session.config.model.checkpoint, "OTHER_CHECKPOINT", *to_flags(data)]
    suggestions.append(
        Suggestion(
            title="another checkpoint",
            evidence=f"similarity is {regime.similarity:.2f} of 1; a checkpoint pretrained on similar images may do better",
            command=shlex.join(rank),
        )
    )
    return tuple(suggestions)


def _suggest_labels(curve: LearningCurve) -> Suggestion:
    now, *later = curve.ahead
    forecast = "; ".join(
        f"{100 * p.accuracy:.1f} % ({100 * p.low:.1f} to {100 * p.high:.1f}) with {p.images_per_class:.0f}"
        for p in later
    )
    return Suggestion(
        title="more labels",
        evidence=(
            f"a probe is expected to reach {forecast} images per class; the learning curve gives {100 * now.accuracy:.1f} % "
            f"for the {now.images_per_class:.0f} images per class that you have"
        ),
        command=None,
    )


def _suggest_earlier_features(
    earlier: DepthScore, native: DepthScore, session: Session, candidates: Mapping[str, Strategy]
) -> Suggestion:
    is_better = earlier.probe > native.probe
    names = [layer.name for layer in session.chain.layers]
    first_trained = names[min(names.index(earlier.layer) + 1, len(names) - 2)]
    verdict = "earlier features suit the task better" if is_better else "no earlier layer suits the task better"
    strategy = replace_settings(candidates["last_layers"], {"from_layer": first_trained})
    return Suggestion(
        title="features of earlier layers",
        evidence=f"probe: {100 * earlier.probe:.1f} % after {earlier.layer}, {100 * native.probe:.1f} % at the end; {verdict}",
        command=make_command(session, strategy) if is_better else None,
    )
