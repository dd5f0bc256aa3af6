"""Summarizes the findings of an audit in a few sentences, for the terminal and the page."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hf_transfer.auditing.records import AuditResult
from hf_transfer.choosing.candidates import make_command
from hf_transfer.errors import count_noun
from hf_transfer.session import Session
from hf_transfer.settings import replace_settings
from hf_transfer.strategy import make_strategy

_STRONG_IMBALANCE = 5.0  # the ratio of images in the largest class to images in the smallest class


def format_summary(result: AuditResult, folder: Path, session: Session) -> str:
    """Returns the lines that the command prints, of which the last is the command that trains on the images of `session`."""
    images = ", ".join(f"{count:,} {split}" for split, count in result.num_images.items())
    lines = [f"{result.dataset}: {images} images, audited with {result.checkpoint}", *summarize(result)]
    lines.append(
        f"wrote {folder} (audit.html shows the images; audit.json; suspected_labels.csv, duplicates.csv, outliers.csv)"
    )
    if result.suspected_labels:
        suspects, excluded = str(folder / "suspected_labels.csv"), session.config.data.exclude
        others = "" if excluded is None else f", add its other lines to {excluded}"
        config = replace_settings(session.config, {"exclude": excluded or suspects})
        command = make_command(replace(session, config=config), make_strategy("linear_probe"))
        lines.append(
            f"next: look at audit.html, delete the lines of {suspects} whose label is right{others}, and then {command}"
        )
    return "\n".join(lines)


def summarize(result: AuditResult) -> list[str]:
    """Returns one sentence for each kind of finding. Labels, copies and outliers have one even if nothing is found."""
    return [
        _describe_labels(result),
        *_describe_groups(result),
        *_describe_copies(result),
        _describe_outliers(result),
        *_describe_classes(result),
        *_describe_sizes(result),
    ]


def suggest_next_steps(result: AuditResult, folder: str) -> list[str]:
    """Returns sentences that say what to do about the findings, the most important first; at least one.

    `folder`: where the CSV files of the audit are.
    """
    steps = []
    if result.suspected_labels:
        steps.append(
            "Look at the suspected labels below. Many may be hard images with the right label, so delete from"
            f" {folder}/suspected_labels.csv each line whose label is right. `hf-transfer train` takes what is left by"
            " --relabel, to use the suggested labels, or by --exclude. Leaving out hard images with the right label makes"
            " the metrics look better, and the model worse."
        )
    crossing = sum(pair.crosses_splits for pair in result.duplicates)
    if crossing:
        steps.append(
            f"Leave out the copies across splits ({count_noun(crossing, 'pair')}): --exclude {folder}/duplicates.csv. Test"
            " metrics are optimistic if test images were trained on."
        )
    contradicting = sum(pair.contradicts for pair in result.duplicates)
    if contradicting:
        steps.append(
            f"Decide which label of copies with different labels is right ({count_noun(contradicting, 'pair')})."
        )
    if result.outliers:
        steps.append(
            "Look at the images unlike all others, some of which may not belong here:"
            f" --exclude {folder}/outliers.csv leaves them out."
        )
    if result.confused_classes:
        pair = result.confused_classes[0]
        steps.append(
            f"{pair.mistaken:,} of {pair.num_images:,} images of {pair.a} and {pair.b} are taken for the other class. Is it"
            " clear by which rule they are labeled? If you do not need the difference, merge the classes."
        )
    return steps or ["Nothing to mend was found. Go on with `hf-transfer advise` or `hf-transfer train auto`."]


def _describe_labels(result: AuditResult) -> str:
    count = len(result.suspected_labels)
    if not result.judges_labels:
        return "suspected labels: not judged, since the labels are no classes"
    if not count:
        return "suspected labels: none"
    splits = Counter(row.split for row in result.suspected_labels)
    first = result.suspected_labels[0]
    return (
        f"suspected labels: {count:,} ({_list_counts(splits)}); first {first.path!r}, labeled"
        f" {first.label!r}, may be {first.suggested!r}"
    )


def _describe_groups(result: AuditResult) -> list[str]:
    if not result.divides_groups:
        return []
    return [
        "groups: not respected, since no class is in two groups (groups with a copy of the same image count as one); a wrong"
        " label that a whole group shares is not found"
    ]


def _describe_copies(result: AuditResult) -> list[str]:
    pairs = result.duplicates
    if not pairs:
        return ["duplicates: none"]
    kinds = Counter(pair.kind for pair in pairs)
    crossing = sum(pair.crosses_splits for pair in pairs)
    lines = [
        f"duplicates: {count_noun(len(pairs), 'pair')} ({kinds['exact']:,} exact, {kinds['near']:,} near), {crossing:,} of them"
        " across splits"
    ]
    contradicting = [pair for pair in pairs if pair.contradicts]
    if contradicting:
        first = contradicting[0]
        lines.append(
            f"copies with different labels: {count_noun(len(contradicting), 'pair')}; first {first.a!r} ({first.label_a}) and"
            f" {first.b!r} ({first.label_b})"
        )
    tested = result.test_copies
    if tested is not None and tested.num_copies:
        without = "no image" if tested.accuracy_without is None else f"{100 * tested.accuracy_without:.1f} %"
        lines.append(
            f"test images with a copy in train or validation: {tested.num_copies:,}; a probe's test accuracy is"
            f" {100 * tested.accuracy:.1f} %, and {without} without them"
        )
    return lines


def _describe_outliers(result: AuditResult) -> str:
    if not result.outliers:
        return "images unlike all others: none"
    blank = sum(row.is_blank for row in result.outliers)
    return f"images unlike all others: {len(result.outliers):,}, of which {blank:,} blank; first {result.outliers[0].path!r}"


def _describe_classes(result: AuditResult) -> list[str]:
    lines = [
        f"classes that look alike: {pair.a!r} and {pair.b!r}; {pair.mistaken:,} of {pair.num_images:,} images are taken for the"
        f" other class ({100 * pair.share:.0f} %)"
        for pair in result.confused_classes[:3]
    ]
    counts = [row.counts["train"] for row in result.class_counts]
    if result.judges_labels and max(counts) > _STRONG_IMBALANCE * min(counts):
        largest, smallest = (result.class_counts[counts.index(pick(counts))].label for pick in (max, min))
        lines.append(
            f"imbalanced classes: train has {max(counts):,} images of {largest!r} and {min(counts):,} of {smallest!r}"
        )
    return lines


def _describe_sizes(result: AuditResult) -> list[str]:
    width, height = result.input_px
    found: Sequence[tuple[str, int]] = (
        (f"images smaller than half of the network's input ({width}x{height})", len(result.small_images)),
        ("images with one side more than 3 times the other", len(result.odd_shapes)),
        ("images that their EXIF orientation turns", len(result.rotated_images)),
    )
    return [f"{title}: {count:,}" for title, count in found if count]


def _list_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[split]:,} {split}" for split in ("train", "validation", "test") if counts[split])
