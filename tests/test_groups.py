"""Groups stay together in validation, in folds and in the folds that choose a probe's C; without groups, nothing changes."""

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image

from hf_transfer.auditing.held_out import predict_held_out
from hf_transfer.choosing.advise import advise
from hf_transfer.choosing.expected_accuracy import ProbeAccuracy, _rank_in_class, measure_probe
from hf_transfer.choosing.rank import rank
from hf_transfer.choosing.scores import knn_hits
from hf_transfer.choosing.similarity import compute_label_information
from hf_transfer.data.notes import notes_on_groups
from hf_transfer.data.splits import Role, Split, draw
from hf_transfer.metrics.bootstrap import Bootstrap, mean_interval
from hf_transfer.metrics.formulas import binomial_interval
from hf_transfer.solvers.cross_validation import FoldedProblem, check_can_hold_out
from hf_transfer.solvers.features import RawFeatures
from hf_transfer.solvers.folds import draw_folds
from hf_transfer.solvers.groups import draw_groups, number_groups, spread_groups
from hf_transfer.solvers.probe import ProbeOptions, fit_probes
from hf_transfer.targets.regression import Regression
from hf_transfer.targets.single_label import SingleLabel
from tests.distinct_images import make_distinct_images
from tests.sessions import make_config, make_session


def frames(objects: int, per_object: int = 10, classes: int = 3) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labels and group numbers of `per_object` frames of each object, in a mixed order; each object has one class."""
    codes = np.random.default_rng(5).permutation(np.repeat(np.arange(objects), per_object))
    return codes % classes, codes


def make_split(
    labels: NDArray[np.int64], groups: NDArray[Any] | None, name: Role = "train", first_image: int = 0
) -> Split:
    """A split with labels, groups and images of one pixel, all different."""
    names = tuple(f"class {k}" for k in range(int(labels.max()) + 1))
    rows = np.arange(len(labels))
    named = None if groups is None else groups.astype(str)
    source = make_distinct_images(len(labels), first_image)
    return Split(name=name, source=source, rows=rows, labels=labels, target=SingleLabel(names=names), groups=named)


def count_divided(codes: NDArray[np.int64], part_of: NDArray[Any]) -> int:
    """The number of groups that are in more than one part."""
    return sum(len(np.unique(part_of[codes == code])) > 1 for code in np.unique(codes))


@pytest.mark.parametrize("images_per_class", [None, 60])
def test_no_group_is_in_train_and_in_validation(images_per_class: int | None) -> None:
    labels, codes = frames(60)
    everything = make_split(labels, codes)
    train, validation = draw(everything, images_per_class=images_per_class, validation_fraction=0.2, seed=1)
    assert validation is not None
    assert train.groups is not None
    assert validation.groups is not None
    assert set(train.groups).isdisjoint(validation.groups)
    total = 3 * (images_per_class or 200)
    assert len(train) + len(validation) == total
    assert np.abs(validation.counts() - 0.2 * total / 3).max() <= 10, "off by at most one group of each class"


def test_few_shot_subsets_with_groups_are_those_without() -> None:
    labels, codes = frames(60)
    drawn = [
        draw(make_split(labels, groups), images_per_class=30, validation_fraction=None, seed=3)[0].rows
        for groups in (codes, None)
    ]
    assert np.array_equal(*drawn)


def test_groups_of_one_image_divide_as_evenly_as_no_groups() -> None:
    labels = np.repeat([0, 1], [50, 70])
    train, validation = draw(make_split(labels, np.arange(120)), images_per_class=None, validation_fraction=0.2, seed=0)
    assert validation is not None
    assert validation.counts().tolist() == [10, 14]
    assert len(train) == 96


def test_a_class_of_one_group_stays_in_train_and_another_is_validated() -> None:
    labels = np.repeat([0, 1], [20, 20])
    codes = np.concatenate([np.zeros(20, np.int64), np.repeat([1, 2], [19, 1])])
    is_drawn = draw_groups(labels, codes, 0.2, seed=0)
    assert not is_drawn[labels == 0].any()
    assert is_drawn[codes == 2].all()
    assert not is_drawn[codes == 1].any()


def test_one_group_in_each_class_cannot_be_divided() -> None:
    labels = np.repeat([0, 1], [5, 5])
    with pytest.raises(ValueError, match=r"groups \(2\) of the 10 train images cannot be divided.*--validation_split"):
        draw(make_split(labels, labels), images_per_class=None, validation_fraction=0.2, seed=0)


@pytest.mark.parametrize("patients", [5, 10, 20])
def test_numbers_that_are_the_same_in_a_group_can_be_divided(patients: int) -> None:
    """Such as the ages of patients, whose images may fill a whole range of ages."""
    codes = np.repeat(np.arange(patients), 20)
    split = Split(
        name="train",
        source=make_distinct_images(len(codes)),
        rows=np.arange(len(codes)),
        labels=codes[:, None].astype(np.float32),
        target=Regression(names=("age",)),
        groups=codes.astype(np.str_),
    )
    train, validation = draw(split, images_per_class=None, validation_fraction=0.2, seed=0)
    assert validation is not None
    assert len(validation) == len(codes) // 5
    assert set(train.groups).isdisjoint(validation.groups)  # type: ignore[arg-type]


@pytest.mark.parametrize("folds", [2, 5])
def test_folds_keep_groups_and_balance_classes(folds: int) -> None:
    labels, codes = frames(60)
    fold_of = spread_groups(labels, codes, folds, seed=0)
    assert count_divided(codes, fold_of) == 0
    table = np.array([[((fold_of == fold) & (labels == k)).sum() for k in range(3)] for fold in range(folds)])
    assert table.max() - table.min() <= 10, "groups of ten: at most one group more"
    assert not np.array_equal(fold_of, spread_groups(labels, codes, folds, seed=1))
    assert np.array_equal(fold_of, spread_groups(labels, codes, folds, seed=0))


def test_more_folds_than_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="5 folds need 5 groups or more, and the images have 2"):
        spread_groups(np.array([0, 1, 0]), np.array([0, 1, 0]), 5, seed=0)


def test_blank_groups_are_groups_of_one() -> None:
    split = make_split(np.zeros(4, np.int64), np.array(["", "a", "", "a"]))
    codes = number_groups([split, make_split(np.zeros(2, np.int64), None, first_image=4)])
    assert codes is not None
    assert codes[1] == codes[3]
    assert len(np.unique(codes)) == 5


def test_the_probes_folds_keep_groups() -> None:
    labels, codes = frames(30)
    targets, groups = torch.from_numpy(labels), torch.from_numpy(codes)
    fold_of = draw_folds(targets, 5, 0, groups)
    assert count_divided(codes, fold_of.numpy()) == 0
    assert count_divided(codes, draw_folds(targets, 5, 0).numpy()) > 0
    assert int(draw_folds(targets[:4], 5, 0, torch.tensor([0, 0, 1, 1])).max()) == 1, "no more folds than groups"
    assert int(draw_folds(targets[:10], 5, 0, torch.zeros(10)).max()) == 4, "a single group is divided"


def test_a_fold_of_one_group_solves_its_head_on_the_other_group() -> None:
    """And a class with a single training image, which no fit of a fold knows, does not choose C."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 8, generator=generator)
    labels = torch.arange(40) % 2
    features[:, 0] += 3 * labels
    groups = torch.arange(40) // 20
    lonely = labels[:20].clone()
    lonely[0] = 2
    for own, names in ((labels[:20], ("a", "b")), (lonely, ("a", "b", "c"))):
        target = SingleLabel(names=names)
        options = ProbeOptions(holds_out=True, refit=False)
        held_out = torch.cat([labels[20:], torch.tensor([len(names) - 1])])
        rows = [features[:20].numpy(), torch.cat([features[20:], features[:1]]).numpy()]
        readouts = [RawFeatures(arrays=rows, device=torch.device("cpu"))]
        probes, _ = fit_probes(readouts, own, held_out, target, options, torch.cat([groups, groups[:1]]))
        (probe,) = probes.values()
        assert probe.weight.isfinite().all()
        assert np.isfinite(probe.score.loss)
        assert probe.score.loss < 0.5


def test_a_probe_whose_folds_divide_groups_believes_copies() -> None:
    """Copies of random features: with groups, the held-out accuracy is that of guessing; without, that of memory."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(60).repeat_interleave(10)
    labels = torch.randint(0, 2, (60,), generator=generator)[codes]
    features = torch.randn(60, 40, generator=generator)[codes] + 0.01 * torch.randn(600, 40, generator=generator)
    raw = RawFeatures(arrays=[features[:500], features[500:]], device=features.device)
    options = ProbeOptions(c_grid=(1.0,))
    leaked, honest = (
        fit_probes([raw], labels[:500], labels[500:], SingleLabel(names=("a", "b")), options, groups)[0][
            0
        ].score.quality
        for groups in (None, codes)
    )
    assert leaked > 0.85
    assert honest < 0.7


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Eight near-copies of each of 40 random pictures with random labels: who has seen no copy can only guess."""
    folder, generator = tmp_path_factory.mktemp("copies"), np.random.default_rng(0)
    rows = ["image,label,picture"]
    for picture, label in enumerate(generator.permutation(np.arange(40) % 2)):
        coarse = generator.integers(0, 256, (7, 7)).repeat(4, 0).repeat(4, 1)
        for copy in range(8):
            pixels = np.clip(coarse + generator.normal(0, 3, coarse.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).convert("RGB").save(folder / f"{picture}_{copy}.png")
            rows.append(f"{picture}_{copy}.png,{'ab'[label]},{picture}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return {"dataset": str(folder / "labels.csv"), "label_column": "label", "images_per_class": None}


@pytest.mark.parametrize("is_grouped", [True, False])
def test_advice_keeps_copies_together(copies: dict[str, Any], is_grouped: bool) -> None:
    """The probe, its interval, the learning curve and kNN, on random labels."""
    advice = advise(make_session(**copies, **({"group_column": "picture"} if is_grouped else {})))
    for depth in advice.depths:
        low, high = depth.probe_interval
        assert (depth.probe < 0.7) == (depth.knn < 0.7) == is_grouped
        assert (
            high - low > 0.2
        ) == is_grouped  # of 0.5 on 40 images, the exact interval is 0.32 wide, on 320 it is 0.11
    assert (advice.curve.accuracy[-1] < 0.7) == is_grouped
    now = advice.curve.ahead[0]
    assert (now.high - now.low > 0.2) == is_grouped
    assert advice.validation_groups == (8 if is_grouped else None)


@pytest.mark.parametrize("is_grouped", [True, False])
def test_a_ranking_keeps_copies_together(copies: dict[str, Any], is_grouped: bool) -> None:
    config = make_config(**copies, **({"group_column": "picture"} if is_grouped else {}))
    (row,) = rank(["embedded"], config, accelerator=Accelerator(cpu=True)).rows
    assert (row.probe < 0.7) == is_grouped
    assert (row.knn < 0.7) == is_grouped
    assert (row.probe_interval[1] - row.probe_interval[0] > 0.2) == is_grouped


def test_the_probe_of_advice_is_the_audits() -> None:
    """60 groups of 10 near-copies with random labels: without groups, the probe seems to be right in 9 of 10 cases."""
    generator = np.random.default_rng(0)
    codes = np.repeat(np.arange(60), 10)
    labels = generator.permutation(np.arange(60) % 2)[codes]
    features = (generator.normal(size=(60, 40))[codes] + 0.3 * generator.normal(size=(600, 40))).astype(np.float32)
    together = measure_probe(features, labels, groups=codes)
    audited = predict_held_out(features, labels, codes, SingleLabel(names=("a", "b")), seed=0)
    assert together.hits.tolist() == (audited.log_probabilities.argmax(1) == labels).tolist()
    assert together.accuracy < 0.65
    assert knn_hits(features, labels, groups=codes).mean() < 0.65
    assert measure_probe(features, labels).accuracy > 0.8
    assert knn_hits(features, labels).mean() > 0.8
    # The pretrained classes are pictures, so they say all about copies and nothing about other pictures.
    classes = np.eye(60)[codes]
    assert compute_label_information(classes, labels) > 0.8
    assert compute_label_information(classes, labels, codes) < 0.05


def test_the_interval_of_a_probe_draws_groups() -> None:
    """Alike images count as one; if all are right, each group counts as one image of the exact interval."""
    codes, right = np.repeat(np.arange(60), 10), np.repeat(np.arange(60) < 45, 10)
    assert ProbeAccuracy(hits=right, c=1.0, groups=codes).interval == mean_interval(right.astype(float), groups=codes)
    assert ProbeAccuracy(hits=right, c=1.0, groups=np.arange(600)).interval == ProbeAccuracy(hits=right, c=1.0).interval
    perfect = ProbeAccuracy(hits=np.ones(600, np.bool_), c=1.0, groups=codes)
    assert perfect.interval == binomial_interval(60, 60)


def test_shares_of_a_learning_curve_are_shares_of_groups() -> None:
    labels, codes = frames(30)
    features = np.random.default_rng(0).normal(size=(300, 4))
    problem = FoldedProblem.of(features, labels, SingleLabel(names=("a", "b", "c")), seed=0, groups=codes)
    for fold, rank_of in enumerate(_rank_in_class(problem, codes)):
        for label in range(3):
            fitted = np.flatnonzero((problem.fold_of.numpy() != fold) & (labels == label))
            in_order = codes[fitted[rank_of[fitted].argsort().numpy()]]
            assert np.count_nonzero(np.diff(in_order)) + 1 == len(np.unique(in_order)), "one group after the other"


def test_classes_of_one_group_cannot_be_advised_on() -> None:
    labels = np.arange(20) % 2
    with pytest.raises(ValueError, match=r"no class has images of two groups.*--group_column"):
        check_can_hold_out(labels, labels)
    with pytest.raises(ValueError, match=r"no class has images of two groups.*--group_column"):
        measure_probe(np.eye(20), labels, groups=labels)
    with pytest.raises(ValueError, match="no class has two images"):
        check_can_hold_out(np.arange(3), None)
    check_can_hold_out(labels, np.zeros(20, np.int64))  # a single group is divided


def test_stored_splits_that_share_groups_are_noted() -> None:
    labels = np.array([0, 1, 0, 1, 0])
    train = make_split(labels, np.array(["p1", "p2", "p3", "", "p4"]))
    test = make_split(labels, np.array(["p1", "p1", "p9", "", "p4"]), "test")
    (note,) = notes_on_groups([train, test])
    assert note.startswith("The test split shares 2 groups with train (3 of its 5 images): 'p1', 'p4'.")
    assert notes_on_groups([train, make_split(labels, np.array(["q"] * 5), "test")]) == []


@pytest.mark.parametrize("is_grouped", [True, False])
def test_intervals_of_grouped_images_contain_the_truth(is_grouped: bool) -> None:
    """Of 60 objects with ten frames each, whose errors are alike. In 200 draws; without groups, they are too narrow."""
    generator, covered = np.random.default_rng(0), 0
    groups = np.repeat(np.arange(60), 10)
    for _ in range(200):
        hits = (np.repeat(generator.random(60), 10) + 0.3 * generator.normal(size=600) < 0.7).astype(float)
        truth = float((generator.random(100_000) + 0.3 * generator.normal(size=100_000) < 0.7).mean())
        low, high = mean_interval(hits, resamples=200, groups=groups if is_grouped else None)
        covered += low <= truth <= high
    assert (covered >= 180) == is_grouped


def test_metrics_of_grouped_images_draw_groups_unless_each_image_is_one() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(generator.integers(0, 2, 30), 20)
    logits = np.repeat(generator.normal(size=(30, 2)), 20, axis=0)
    target = SingleLabel(names=("a", "b"))
    alone, together = (
        target.measure(logits, labels, groups=groups) for groups in (np.arange(600), np.repeat(np.arange(30), 20))
    )
    assert alone == target.compute_metrics(logits, labels, Bootstrap())
    limit = "ece_by_chance"  # which is larger for images that share their chance
    assert {**alone.values, limit: 0} == {**together.values, limit: 0}
    assert together.values[limit] > 2 * alone.values[limit]
    for name, (low, high) in alone.intervals.items():
        wide = together.intervals[name]
        assert wide[1] - wide[0] > 3 * (high - low)
