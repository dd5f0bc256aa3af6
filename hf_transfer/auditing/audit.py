"""Audits a data set: one pass of the frozen network, which the linear probe shares, and one decoding of every image.

Copies come first, since a copy in another fold would confirm a wrong label. Then probes on several readouts, none of which has
seen the image it judges, find suspected labels and classes that look alike. Features and pixels give the rest.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_transfer.auditing.duplicates import BLANK_CONTRAST, Copies, find_copies, group_copies
from hf_transfer.auditing.facts import ImageFacts, read_facts
from hf_transfer.auditing.held_out import LabeledFeatures, confuse, predict_held_out, score_without_copies
from hf_transfer.auditing.outliers import find_outliers
from hf_transfer.auditing.records import (
    AuditResult,
    ClassCounts,
    ConfusedClasses,
    Duplicate,
    ImageSize,
    Outlier,
    RotatedImage,
    SuspectedLabel,
    TestCopies,
)
from hf_transfer.data.splits import Split
from hf_transfer.prefix.resources import count_threads
from hf_transfer.session import Session
from hf_transfer.solvers.cross_validation import CrossValidated
from hf_transfer.solvers.groups import is_class_in_two, join_codes, number_named_groups
from hf_transfer.targets.target import Labels
from hf_transfer.training.label_errors import find_label_errors
from hf_transfer.training.readouts import ReadoutFeatures, extract_readouts

MAX_READOUTS = 3
LOOKALIKE_SHARE = 0.1  # of the images of two classes, taken for the other class
SMALL_SHARE = 0.5  # of the network's input, on the shorter side
ODD_RATIO = 3.0  # longer side / shorter side


@dataclass(frozen=True, kw_only=True)
class _Images:
    """All images of a data set, numbered through the splits in their order."""

    splits: Sequence[Split]
    facts: ImageFacts
    labels: Labels  # (N, ...)

    def locate(self, number: int) -> tuple[Split, int]:
        """Returns the split of an image and its position there."""
        for split in self.splits:
            if number < len(split):
                return split, number
            number -= len(split)
        raise IndexError(number)

    def name(self, number: int) -> tuple[str, str]:
        """Returns the path of an image, as the data set names it, and its split."""
        split, i = self.locate(number)
        return split.image_name(i), split.name


def audit(session: Session) -> AuditResult:
    """Audits all splits of the session's data. The features stay in the cache, where a linear probe finds them.

    Labels are judged only if every image has one class.

    Raises BadImageError for an unreadable image, and ValueError if the data has no two different images of one class.
    """
    seconds: dict[str, float] = {}
    data = session.data
    with _timing(seconds, "pass"):
        readouts, computed = extract_readouts(session, sweep="all")
    chosen = choose_readouts(readouts)
    features = [np.concatenate([r.stores[split.name][:] for split in data.splits]) for r in chosen]
    num_threads = count_threads(session.config.compute.num_workers)
    with _timing(seconds, "pixels"):
        facts = read_facts(data.splits, num_threads)
    images = _Images(splits=data.splits, facts=facts, labels=np.concatenate([split.labels for split in data.splits]))
    with _timing(seconds, "duplicates"):
        digests = np.concatenate([split.digests() for split in data.splits])
        copies = find_copies(digests, features[0], facts, num_threads)
    held_out, tested, divides_groups = [], None, False
    if data.target.has_classes:
        with _timing(seconds, "labels"):
            seed = session.config.seed
            groups, divides_groups = _keep_together(images.labels, copies, number_named_groups(data.splits))
            held_out = [predict_held_out(x, images.labels, groups, data.target, seed=seed) for x in features]
            tested = _test_without_copies(images, copies, features[0], held_out[0].c)
    with _timing(seconds, "outliers"):
        outliers = find_outliers(features[0], facts.contrast < BLANK_CONTRAST)
    input_px = session.backbone.preprocessing.image_shape[1:]
    return AuditResult(
        dataset=data.name,
        checkpoint=session.backbone.source.name,
        readouts=tuple(r.readout.name for r in chosen),
        num_images={split.name: len(split) for split in data.splits},
        images_computed=computed,
        seconds=seconds,
        judges_labels=bool(held_out),
        divides_groups=divides_groups,
        suspected_labels=tuple(_suspect(images, held_out)) if held_out else (),
        duplicates=tuple(_describe_copies(images, copies)),
        outliers=tuple(
            Outlier(*images.name(int(i)), score=float(score), is_blank=bool(facts.contrast[i] < BLANK_CONTRAST))
            for i, score in zip(outliers.rows, outliers.scores, strict=True)
        ),
        test_copies=tested,
        confused_classes=tuple(_pair_classes(images, held_out)) if held_out else (),
        class_counts=tuple(
            ClassCounts(label=name, counts={split.name: int(split.counts()[k]) for split in data.splits})
            for k, name in enumerate(data.label_names if data.target.counts_labels else ())
        ),
        small_images=tuple(_list_sizes(images, facts.sizes.min(1) < SMALL_SHARE * min(input_px))),
        odd_shapes=tuple(_list_sizes(images, facts.sizes.max(1) > ODD_RATIO * facts.sizes.min(1))),
        rotated_images=tuple(
            RotatedImage(*images.name(int(i)), orientation=int(facts.orientations[i]))
            for i in np.flatnonzero(facts.orientations != 1)
        ),
        input_px=(int(input_px[1]), int(input_px[0])),
    )


def choose_readouts(readouts: Sequence[ReadoutFeatures]) -> list[ReadoutFeatures]:
    """Returns the network's own readout and at most two others, which make other mistakes.

    These are another pooling of the last layer, and the layer at three quarters of the depth.
    """
    own = readouts[0].readout
    poolings = [r for r in readouts[1:] if r.readout.layer == own.layer]
    earlier = [r for r in readouts[1:] if r.readout.layer != own.layer and r.readout.pooling == own.pooling]
    return [readouts[0], *poolings[:1], *earlier[(len(earlier) + 1) // 4 :][:1]][:MAX_READOUTS]


def _keep_together(
    labels: NDArray[np.int64], copies: Sequence[Copies], codes: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], bool]:
    """Returns the groups (N,) of images that are in one fold, and whether images of one of the `codes` (N,) may be in two.

    Copies are together, and images with the same code, unless no class would be in two groups.
    """
    of_copies = group_copies(copies, len(labels))
    groups = of_copies if codes is None else join_codes(codes, of_copies)
    divides_groups = codes is not None and not is_class_in_two(labels, groups)
    return of_copies if divides_groups else groups, divides_groups


def _suspect(images: _Images, held_out: Sequence[CrossValidated]) -> Iterator[SuspectedLabel]:
    errors = find_label_errors(np.stack([each.log_probabilities for each in held_out]), images.labels)
    names = images.splits[0].label_names
    for i, suggested, score in zip(errors.rows, errors.suggested, errors.scores, strict=True):
        label = names[images.labels[i]]
        yield SuspectedLabel(*images.name(int(i)), label=label, suggested=names[suggested], score=float(score))


def _describe_copies(images: _Images, copies: Sequence[Copies]) -> Iterator[Duplicate]:
    describe = images.splits[0].target.describe_label
    for pair in copies:
        (a, split_a), (b, split_b) = images.name(pair.first), images.name(pair.second)
        yield Duplicate(
            a=a, b=b, split_a=split_a, split_b=split_b, kind=pair.kind, score=pair.score,
            label_a=describe(images.labels[pair.first]), label_b=describe(images.labels[pair.second]),
        )  # fmt: skip


def _test_without_copies(
    images: _Images, copies: Sequence[Copies], features: NDArray[np.float32], c: float
) -> TestCopies | None:
    """Returns how many test images have a copy in train or validation, and the accuracy without them; None without a test."""
    is_test = np.repeat([split.name == "test" for split in images.splits], [len(split) for split in images.splits])
    if not is_test.any():
        return None
    groups = group_copies(copies, len(is_test))
    has_copy = is_test & np.isin(groups, groups[~is_test])
    labeled = LabeledFeatures(features=features, labels=images.labels, is_test=is_test)
    accuracy, without = score_without_copies(labeled, images.splits[0].target, c, has_copy)
    return TestCopies(num_copies=int(has_copy.sum()), accuracy=accuracy, accuracy_without=without)


def _pair_classes(images: _Images, held_out: Sequence[CrossValidated]) -> list[ConfusedClasses]:
    """Returns the pairs of classes that are often taken for each other, by falling share of their images."""
    matrix, names = confuse(held_out, images.labels), images.splits[0].label_names
    counts, pairs = matrix.sum(1), []
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            mistaken, total = int(matrix[i, j] + matrix[j, i]), int(counts[i] + counts[j])
            if total and mistaken >= LOOKALIKE_SHARE * total:
                pairs.append(ConfusedClasses(a=names[i], b=names[j], mistaken=mistaken, num_images=total))
    return sorted(pairs, key=lambda pair: -pair.share)


def _list_sizes(images: _Images, is_listed: NDArray[np.bool_]) -> Iterator[ImageSize]:
    for i in np.flatnonzero(is_listed):
        width, height = images.facts.sizes[i].tolist()
        yield ImageSize(*images.name(int(i)), width_px=width, height_px=height)


@contextmanager
def _timing(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
