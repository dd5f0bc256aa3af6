"""Temperatures, conformal sets, abstention and distances keep what they promise, on draws whose truth is known."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from hf_transfer.confidence.conformal import find_limits, sort_scores
from hf_transfer.confidence.distance import MIN_HELD_OUT, fit_distance, share_by_chance
from hf_transfer.confidence.record import CONFIDENCE, Confidence, FeatureInput, read_confidence
from hf_transfer.confidence.selective import DELTA, bound_error, choose_threshold, find_lowest_limit
from hf_transfer.confidence.temperature import fit_sigmoid_factors, fit_softmax_factor
from hf_transfer.metrics.calibration import compare_calibration, draw_error_by_chance, measure_calibration
from hf_transfer.metrics.formulas import calibration_error, find_share
from hf_transfer.network.head import HeadInput, scale_outputs, watch_features
from hf_transfer.reporting.confidence import _describe_calibration, describe_confidence
from hf_transfer.targets.multi_label import MultiLabel
from hf_transfer.targets.regression import Regression
from hf_transfer.targets.single_label import SingleLabel

Floats = NDArray[np.float64]


def draw_classes(rng: np.random.Generator, count: int, classes: int = 5) -> tuple[Floats, NDArray[np.int64]]:
    """Logits (N, K) whose softmax is the truth, and labels drawn from it."""
    logits = 2 * rng.normal(size=(count, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    return logits, labels


# --- temperatures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_is_recovered(temperature: float) -> None:
    logits, labels = draw_classes(np.random.default_rng(0), 4000)
    assert 1 / fit_softmax_factor(logits * temperature, labels) == pytest.approx(temperature, rel=0.06)
    flags = (labels[:, None] == np.arange(5)).astype(np.float64)
    truth = np.log(flags.mean(0) / (1 - flags.mean(0))) + np.random.default_rng(1).normal(size=flags.shape)
    drawn = (truth + np.random.default_rng(2).logistic(size=truth.shape) > 0).astype(np.float64)
    np.testing.assert_allclose(1 / fit_sigmoid_factors(truth * temperature, drawn), temperature, rtol=0.2)


def test_a_calibrated_network_mostly_stays_as_it_is() -> None:
    rng = np.random.default_rng(0)
    factors = [fit_softmax_factor(*draw_classes(rng, 50)) for _ in range(200)]
    assert np.mean([factor == 1.0 for factor in factors]) > 0.9
    assert 0.6 < min(factors) <= max(factors) < 1.6


def test_few_images_without_a_mistake_do_not_ask_for_certainty() -> None:
    logits = np.eye(3)[[0, 1, 2] * 3] * 5.0
    assert 1.0 <= fit_softmax_factor(logits, np.array([0, 1, 2] * 3)) < 1.5


def test_a_rare_label_borrows_from_the_others_and_unknown_labels_do_not_count() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(2000, 4)) * 1.5
    labels = (truth + rng.logistic(size=truth.shape) > 0).astype(np.float64)
    labels[20:, 3] = np.nan  # 20 images know the last label
    factors = fit_sigmoid_factors(truth * 3, labels)
    assert factors[3] < 0.6
    unknown = np.where(np.isnan(labels), 1e6, truth * 3)
    np.testing.assert_array_equal(fit_sigmoid_factors(unknown, labels), factors)


def test_scaling_needs_no_bias_and_changes_logits_as_stated() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False))
    inputs = (HeadInput(modules=("1",), shares=(torch.ones(1),)),)
    images, factors = torch.randn(4, 3, 2, 2), torch.tensor([0.5, 2.0, 3.0])
    before = model(images)
    with watch_features(model, inputs) as read:
        model(images)
    torch.testing.assert_close(read(), images.flatten(1))
    scale_outputs(model, inputs, factors)
    torch.testing.assert_close(model(images), before * factors)
    with pytest.raises(ValueError, match="no bias"):
        scale_outputs(model, inputs, factors, torch.ones(3))


def test_the_calibration_error_has_an_interval_around_it_and_pairs_images() -> None:
    rng = np.random.default_rng(0)
    sure, hits = np.full((400, 1), 0.95), (rng.random((400, 1)) < 0.8).astype(float)
    error = measure_calibration(sure, hits)
    assert error.interval[0] < error.value < error.interval[1]
    assert error.value == pytest.approx(0.95 - hits.mean())
    losses = {"before": rng.random(400) + 1, "after": np.zeros(400)}
    losses["after"] = losses["before"] - 0.5
    change = compare_calibration((sure, hits), (sure - 0.15, hits), losses)
    assert change.log_loss_change == pytest.approx((-0.5, -0.5))
    assert change.after.value < change.before.value


def test_a_calibrated_network_is_below_the_error_by_chance_in_95_percent_of_draws() -> None:
    rng, counts = np.random.default_rng(0), []
    for count in (25, 400):
        confidences = rng.uniform(0.4, 1, count)
        limit = draw_error_by_chance(confidences)
        errors = [calibration_error(confidences, rng.random(count) < confidences) for _ in range(1000)]
        counts.append(sum(error <= limit for error in errors))
        assert measure_calibration(confidences[:, None], np.ones((count, 1))).by_chance == limit
    assert all(
        925 <= number <= 975 for number in counts
    )  # of 1,000: 950 with a standard error of 7, and that of the limit
    sure = np.full(400, 0.95)
    assert draw_error_by_chance(sure) < 0.03 < 0.15 - 0.05  # stated 95 %, right in 80 %: no chance


def test_images_of_a_group_share_their_chance() -> None:
    confidences, groups = np.full(200, 0.8), np.arange(200) // 10
    alike, alone = draw_error_by_chance(confidences, groups=groups), draw_error_by_chance(np.full(20, 0.8))
    assert alike == pytest.approx(alone, abs=1e-6)
    assert alike > 2 * draw_error_by_chance(confidences)
    logits = np.log(np.tile([0.8, 0.2], (200, 1)))
    target, labels = SingleLabel(names=("a", "b")), np.zeros(200, np.int64)
    measured = [target.measure(logits, labels, groups=each).ece_by_chance for each in (None, groups)]
    assert measured == pytest.approx([draw_error_by_chance(confidences), alike])


@pytest.mark.parametrize("split", ["test", "held_out"])
def test_both_log_losses_of_the_same_images_are_named(split: str) -> None:
    error = {"value": 0.118, "interval": [0.04, 0.139], "by_chance": 0.129}
    change = {
        "before": error | {"value": 0.2},
        "after": error,
        "log_loss_before": 0.2482,
        "log_loss_after": 0.2196,
        "num_images": 20,
    }
    line = _describe_calibration({split: change})
    assert "20.0 % (95 % interval 4.0 to 13.9) before calibration" in line
    assert "11.8 % (4.0 to 13.9; a calibrated model has up to 12.9 by chance) after it" in line
    assert "Log-loss: 0.2482 before calibration, 0.2196 after it." in line
    if split == "test":
        assert line.endswith("The metrics are those after it.")
    else:
        assert "Here, the temperature of each half of the images is fitted to the other half" in line


# --- conformal sets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95])
def test_sets_have_the_coverage_asked_for_on_average(coverage: float) -> None:
    rng, target, num_held_out = np.random.default_rng(0), SingleLabel(names=tuple("abcde")), 39
    covered, seen = 0, 0
    for _ in range(400):
        logits, labels = draw_classes(rng, num_held_out + 10)
        scores = target.score_labels(
            logits[:num_held_out] * 3, labels[:num_held_out]
        )  # a network that is much too sure
        limits = torch.from_numpy(find_limits(sort_scores(scores), coverage))
        mask = target.find_set(torch.from_numpy(logits[num_held_out:] * 3), limits).numpy()
        covered += mask[np.arange(10), labels[num_held_out:]].sum()
        seen += 10
    exact = math.ceil((num_held_out + 1) * coverage) / (num_held_out + 1)
    assert covered / seen == pytest.approx(exact, abs=0.015)  # 4,000 images in 400 draws: 3 standard errors


def test_too_few_held_out_images_give_all_labels() -> None:
    scores = sort_scores(np.arange(9.0)[:, None])
    assert find_limits(scores, 0.9) == 8.0
    assert find_limits(scores, 0.91) == np.inf
    mixed = sort_scores(np.array([[1.0, np.nan], [0.5, np.nan]]))
    np.testing.assert_array_equal(find_limits(mixed, 0.5), [1.0, np.inf])
    for wrong in (0.0, 1.0, 95.0, math.nan):
        with pytest.raises(ValueError, match="choose a share between 0 and 1"):
            find_limits(scores, wrong)


def test_sets_of_several_labels_have_all_of_them_and_intervals_have_the_numbers() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3)).astype(np.float32) * 2
    labels = (logits + rng.logistic(size=logits.shape) > 0).astype(np.float32)
    labels[::7, 1] = np.nan
    several = MultiLabel(names=tuple("abc"))
    limits = find_limits(sort_scores(several.score_labels(logits[:2000], labels[:2000])), 0.9)
    mask = several.find_set(torch.from_numpy(logits[2000:]), torch.from_numpy(limits)).numpy()
    assert (mask | (labels[2000:] != 1)).all(1).mean() == pytest.approx(0.9, abs=0.03)
    numbers = Regression(names=("a", "b", "c"), center=(5.0, 0.0, -5.0), scale=(1.0, 10.0, 0.1))
    truth = numbers.activate(torch.from_numpy(logits)).numpy() + rng.normal(size=logits.shape) * [1, 10, 0.1]
    scores = numbers.score_labels(logits[:2000], truth[:2000].astype(np.float32))
    limits = find_limits(sort_scores(scores), 0.9)
    low, high = numbers.find_intervals(torch.from_numpy(logits[2000:]), torch.from_numpy(limits)).unbind(2)
    inside = (low.numpy() <= truth[2000:]) & (truth[2000:] <= high.numpy())
    np.testing.assert_allclose(inside.mean(0), 0.9, atol=0.03)


# --- abstention -------------------------------------------------------------------------------------------------------


def test_the_error_of_the_answers_is_rarely_above_the_limit() -> None:
    rng = np.random.default_rng(0)
    broken, answered = 0, []
    for _ in range(300):
        confidences = rng.uniform(0.5, 1, 400)
        found = choose_threshold(confidences, rng.random(400) < confidences, 0.15)
        if found is not None:
            broken += (1 - found.threshold) / 2 > 0.15  # the mean of 1 - c for c uniform above the threshold
            answered.append(found.answered)
    assert broken / 300 <= DELTA
    assert np.mean(answered) > 100


def test_equal_probabilities_are_answered_together_and_a_limit_may_be_out_of_reach() -> None:
    confidences, hits = np.repeat([0.9, 0.6], 500), np.ones(1000, np.bool_)
    hits[500:700] = False
    found = choose_threshold(confidences, hits, 0.05)
    assert found is not None
    assert (found.threshold, found.answered, found.mistakes) == (0.9, 500, 0)
    assert choose_threshold(confidences[:20], hits[:20], 0.02) is None  # 20 right images show at most 14 %
    assert find_lowest_limit(confidences[:20], hits[:20]) == 0.14
    assert choose_threshold(np.zeros(0), np.zeros(0, np.bool_), 0.5) is None
    record = Confidence(confidences=confidences[:20].astype(np.float32), hits=hits[:20])
    with pytest.raises(ValueError, match=r"20 held-out images .* choose --max_error 0.14 or more"):
        record.choose_threshold(0.02)


@pytest.mark.parametrize(("count", "mistakes"), [(12, 0), (60, 5), (400, 30), (37, 0)])
def test_the_suggested_limit_is_the_lowest_that_is_accepted(count: int, mistakes: int) -> None:
    confidences, hits = np.linspace(1, 0.5, count), np.ones(count, np.bool_)
    hits[count - 2 * mistakes :: 2] = False
    lowest = find_lowest_limit(confidences, hits)
    assert lowest is not None
    for limit in (lowest, lowest + 0.01, 0.5, 0.9):
        assert choose_threshold(confidences, hits, limit) is not None
    assert choose_threshold(confidences, hits, 0.9 * lowest) is None, "one step of the second digit is below 10 %"
    record = Confidence(confidences=confidences.astype(np.float32), hits=hits)
    with pytest.raises(ValueError, match=f"choose --max_error {lowest:g} or more"):
        record.choose_threshold(lowest / 2)


def test_all_images_are_answered_if_the_bound_of_all_is_below_the_limit() -> None:
    found = choose_threshold(np.linspace(0.5, 1, 12), np.ones(12, np.bool_), 0.306)  # 1 - (DELTA / 4) ** (1 / 12)
    assert found is not None
    assert found.answered == 12
    assert find_lowest_limit(np.linspace(0.5, 1, 12), np.zeros(12, np.bool_)) is None, "no share below 1 is shown"


def test_every_limit_holds_at_once_so_that_it_may_be_chosen_after_looking() -> None:
    """With the same chance of a mistake everywhere, the suggested limit is below it in at most DELTA of the draws."""
    rng, broken = np.random.default_rng(0), 0
    for _ in range(400):
        lowest = find_lowest_limit(rng.random(60), rng.random(60) < 0.7)
        broken += lowest is not None and lowest < 0.3
    assert broken / 400 <= DELTA
    assert bound_error(18, 60, DELTA) > 0.3


@pytest.mark.parametrize(
    ("most", "count"), [(0, 1), (0, 100), (3, 20), (99, 100), (100, 100), (37, 10_000), (9990, 10_000)]
)
def test_shares_are_the_quantiles_of_the_beta_distribution(most: int, count: int) -> None:
    from scipy.stats import beta

    for probability in (0.975, 0.05, 1e-4):
        expected = beta.ppf(1 - probability, most + 1, count - most) if most < count else 1.0
        assert find_share(most, count, probability) == pytest.approx(expected, rel=1e-9)


# --- distances --------------------------------------------------------------------------------------------------------


def draw_features(rng: np.random.Generator, count: int, width: int = 300, plane: int = 7) -> Floats:
    """Features (N, D) near a plane of 20 axes, which the seed `plane` draws."""
    axes = np.random.default_rng(plane).normal(size=(20, width))
    return rng.normal(size=(count, 20)) @ axes + 0.3 * rng.normal(size=(count, width)) + 3


def test_held_out_images_are_familiar_and_others_are_not() -> None:
    rng = np.random.default_rng(0)
    distance = fit_distance(draw_features(rng, 600), draw_features(rng, 400))
    assert distance is not None
    familiar, strange = distance.measure(draw_features(rng, 1000)), distance.measure(draw_features(rng, 100, plane=8))
    assert (familiar > 1).mean() < 0.03
    assert (strange > 1).all()
    assert np.isinf(distance.measure(np.full((1, 300), np.nan))).all()


def test_the_compact_distance_is_nearly_the_exact_one() -> None:
    rng = np.random.default_rng(0)
    train, held_out, new = draw_features(rng, 500), draw_features(rng, 100), draw_features(rng, 50)
    distance = fit_distance(train, held_out)
    assert distance is not None
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, new)]
    exact = np.sort(np.linalg.norm(unit[1][:, None] - unit[0][None], axis=2), 1)[:, 1]
    np.testing.assert_allclose(distance.measure(new) * distance.limit, exact, rtol=0.05)


def test_too_few_images_have_no_distance() -> None:
    features = draw_features(np.random.default_rng(0), 5)
    assert fit_distance(features[:1], features) is None
    assert fit_distance(features, features[:0]) is None
    assert fit_distance(np.ones((50, 8)), np.ones((50, 8))) is None  # every image is at the distance 0


def test_few_held_out_images_call_as_many_images_unlike_training_as_is_said() -> None:
    rng = np.random.default_rng(0)
    train, new = draw_features(rng, 200), draw_features(rng, 2_000)
    assert fit_distance(train, draw_features(rng, MIN_HELD_OUT - 1)) is None
    assert share_by_chance(MIN_HELD_OUT) == pytest.approx(0.05)
    for count in (MIN_HELD_OUT, 150):
        distances = [fit_distance(train, draw_features(rng, count)) for _ in range(30)]
        marked = [(d.measure(new) > 1).mean() for d in distances if d is not None]
        assert len(marked) == 30
        # The share of one draw has a standard deviation of about its mean, so that of 30 draws has 0.2 of it; twice that.
        assert np.mean(marked) == pytest.approx(share_by_chance(count), rel=0.4)
    assert 0.005 < share_by_chance(150) <= 0.01


def test_features_of_an_untrained_network_need_no_held_out_images() -> None:
    rng = np.random.default_rng(0)
    new, strange = draw_features(rng, 2_000), draw_features(rng, 100, plane=8)
    assert fit_distance(draw_features(rng, MIN_HELD_OUT - 1), None) is None
    # Ten nearly equal images of each object: most images of another object are not unlike those of all other objects.
    objects, others = draw_features(rng, 60), draw_features(rng, 200)
    frames = np.repeat(objects, 10, axis=0) + 1e-3 * rng.normal(size=(600, objects.shape[1]))
    for groups, most, least in ((np.repeat(np.arange(60), 10), 0.1, 0.0), (None, 1.0, 0.9)):
        distance = fit_distance(frames, None, groups)
        assert distance is not None
        assert least <= (distance.measure(others) > 1).mean() <= most
    for count in (60, 150):
        distances = [fit_distance(draw_features(rng, count), None) for _ in range(30)]
        marked = [(d.measure(new) > 1).mean() for d in distances if d is not None]
        assert len(marked) == 30
        assert np.mean(marked) == pytest.approx(share_by_chance(count), rel=0.4)  # as above
        assert np.mean([(d.measure(strange) > 1).mean() for d in distances if d is not None]) > 0.7


def test_the_report_says_how_many_images_are_unlike_training_by_chance() -> None:
    section = {"num_held_out": 9, "held_out_by": "validation", "temperatures": [], "calibration": {}, "coverage": {}}
    results: dict[str, Any] = {"details": {"confidence": {**section, "abstention": None, "familiar_held_out": 24}}}
    assert "all 24 held-out images. By chance, so are 4.0 % of images" in describe_confidence(results)[-1]
    results["details"]["confidence"]["familiar_held_out"] = 400
    assert "99 % of 400 held-out images. By chance, so are 1.0 % of" in describe_confidence(results)[-1]
    results = {"details": {"confidence": {**section, "abstention": None, "familiar_held_out": None}}}
    assert "19 images or more would have to be held out" in describe_confidence(results)[-1]


# --- the file ---------------------------------------------------------------------------------------------------------


def make_record(classes: int = 3, width: int = 300, images: int = 600) -> Confidence:
    rng = np.random.default_rng(0)
    logits, labels = draw_classes(rng, images, classes)
    target = SingleLabel(names=tuple(map(str, range(classes))))
    return Confidence(
        temperatures=(1.25,),
        num_held_out=images,
        held_out_by="validation",
        scores=sort_scores(target.score_labels(logits, labels)),
        confidences=rng.random(images).astype(np.float32),
        hits=rng.random(images) < 0.9,
        distance=fit_distance(draw_features(rng, 700, width), draw_features(rng, 50, width)),
        inputs=(FeatureInput(module="head.fc", shares=np.array([0.5, 0.5], np.float32)),),
    )


def test_a_record_is_read_as_it_was_saved(tmp_path: Path) -> None:
    assert read_confidence(tmp_path) is None
    record = make_record()
    record.save(tmp_path / CONFIDENCE)
    again = read_confidence(tmp_path)
    assert again is not None
    assert (again.temperatures, again.num_held_out, again.held_out_by) == ((1.25,), 600, "validation")
    np.testing.assert_array_equal(again.find_limits(0.9), record.find_limits(0.9))
    assert again.choose_threshold(0.2) == record.choose_threshold(0.2)
    assert again.inputs[0].module == "head.fc"
    assert again.distance is not None
    assert record.distance is not None
    new = draw_features(np.random.default_rng(3), 4)
    np.testing.assert_array_equal(again.distance.measure(new), record.distance.measure(new))
    content = (tmp_path / CONFIDENCE).read_bytes()
    (tmp_path / CONFIDENCE).write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"confidence\.safetensors is damaged .* delete it"):
        read_confidence(tmp_path)


def test_a_record_of_a_wide_network_and_many_images_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(5000, 4096)).astype(np.float32)
    record = Confidence(
        scores=sort_scores(rng.random((50_000, 1))),
        confidences=np.zeros(10_000, np.float32),
        hits=np.zeros(10_000, np.bool_),
        distance=fit_distance(features, features[:100]),
    )
    record.save(tmp_path / CONFIDENCE)
    assert (tmp_path / CONFIDENCE).stat().st_size < 2_000_000
