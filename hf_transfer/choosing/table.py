"""Formats the output of `hf-transfer advise` and `hf-transfer rank` as text for the terminal."""

from collections.abc import Sequence

from hf_transfer.choosing.advise import Advice
from hf_transfer.choosing.rank import Ranking
from hf_transfer.errors import count_noun

PREDICTOR_TITLES = {
    "knn": "kNN accuracy",
    "num_parameters": "number of parameters (static baseline: predicts better than LogME in arXiv 2510.06448)",
}


def format_advice(advice: Advice) -> str:
    """Returns the text that `hf-transfer advise` prints."""
    per_class = advice.images_per_class
    spread = (
        ""
        if advice.imbalance < 1.05
        else f" (smallest class {per_class['smallest']:.0f}, largest {per_class['largest']:.0f})"
    )
    lines = [
        f"{advice.data_name} with {advice.checkpoint}: {sum(advice.num_images.values()):,} train and validation images, "
        f"{per_class['median']:.0f} per class{spread}",
        advice.regime.describe(),
        "",
        "similarity to the pretraining images:",
    ]
    lines += [f"  {m.name}: {m.value:.3g} ({m.words}); score {m.score:.2f} of 1" for m in advice.similarity.measures]
    depths: list[Sequence[str]] = [("features after", "size", "probe, %", "95 % interval", "kNN, %")]
    depths += [
        (
            f"{d.layer}{', as the checkpoint reads them' if d.is_native else ', mean'}",
            f"{d.num_features:,}",
            _percent(d.probe),
            _interval(*d.probe_interval),
            _percent(d.knn),
        )
        for d in advice.depths
    ]
    lines += ["", *align(depths), ""]
    rows: list[Sequence[str]] = [
        ("strategy", "accuracy, %", "95 % interval", "source", "time (estimated)", "memory (estimated)")
    ]
    rows += [
        (
            e.strategy + (" <-" if e.strategy == advice.recommended else ""),
            _percent(e.accuracy),
            _interval(e.low, e.high),
            e.source,
            _seconds(e.seconds),
            f"{e.memory_bytes / 1e9:.1f} GB",
        )
        for e in advice.estimates
    ]
    lines += align(rows)
    if advice.pilots:
        lines += ["", "short trial runs (validation accuracy of the weights that a run would keep):"]
        lines += [
            f"  {p.strategy}, {count_noun(p.epochs, 'epoch')}: {_percent(p.score.quality)} %, {_seconds(p.seconds)}"
            for p in advice.pilots
        ]
    if advice.suggestions:
        lines += [
            "",
            "The data are few and different from the pretraining images, which is the hardest case. Suggestions:",
        ]
        for suggestion in advice.suggestions:
            lines.append(f"  {suggestion.title}: {suggestion.evidence}")
            if suggestion.command is not None:
                lines.append(f"      {suggestion.command}")
    lines += ["", f"recommended: {advice.recommended}: {advice.reason}", "", f"    {advice.command}"]
    return "\n".join(lines)


def format_ranking(ranking: Ranking) -> str:
    """Returns the text that `hf-transfer rank` prints: a table of checkpoints, rank correlations and skipped checkpoints."""
    lines = [f"{ranking.data_name}: {ranking.num_images:,} train and validation images, {ranking.num_classes} classes"]
    rows: list[Sequence[str]] = [("checkpoint", "probe, %", "95 % interval", "kNN, %", "parameters", "images/s")]
    rows += [
        (
            row.name,
            _percent(row.probe),
            _interval(*row.probe_interval),
            _percent(row.knn),
            f"{row.num_parameters / 1e6:.1f} M",
            f"{row.images_per_second:.0f}",
        )
        for row in ranking.rows
    ]
    lines += ["", *align(rows)] if ranking.rows else []
    if ranking.agreement:
        lines += [
            "",
            f"rank correlation with the probe, {len(ranking.rows)} checkpoints (Kendall's tau, Spearman's rho):",
        ]
        lines += [
            f"  {PREDICTOR_TITLES[name]}: {c.kendall:+.2f}, {c.spearman:+.2f}" for name, c in ranking.agreement.items()
        ]
    lines += [f"skipped: {name}: {error}" for name, error in ranking.failures.items()]
    return "\n".join(lines)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns one line of text per row, with the first column left-aligned and all other columns right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
