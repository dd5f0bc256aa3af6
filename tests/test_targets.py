"""Targets: what is read from label columns, the convex problem of a head, the losses, and the metrics."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn import metrics as sklearn_metrics
from sklearn.linear_model import LogisticRegression, Ridge

from hf_transfer.config import GradientConfig, TrainingConfig
from hf_transfer.metrics import multi_label, regression
from hf_transfer.metrics.bootstrap import Bootstrap
from hf_transfer.metrics.records import SHARES, Metrics, Score
from hf_transfer.reporting.sentences import describe_quality
from hf_transfer.solvers.features import RawFeatures
from hf_transfer.solvers.lbfgs import SolverOptions
from hf_transfer.solvers.probe import ProbeOptions, fit_probe, solve_path
from hf_transfer.targets.losses import AnyConvex, ConvexLoss, HalfSquare, Sigmoid, Softmax
from hf_transfer.targets.multi_label import MultiLabel
from hf_transfer.targets.reading import read_column, read_columns
from hf_transfer.targets.regression import Regression
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.targets.target import Target, find_target, read_target


def gradient(**settings: Any) -> GradientConfig:
    return GradientConfig(training=TrainingConfig(**settings))


THREE = MultiLabel(names=("a", "b", "c"))


def make_labels(
    num_rows: int, num_labels: int, *, unknown: float = 0.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, 8), and labels (N, K) that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_rows, 8, generator=generator)
    scores = features @ torch.randn(8, num_labels, generator=generator) + torch.randn(
        num_rows, num_labels, generator=generator
    )
    labels = (scores > 0).float()
    labels[torch.rand(num_rows, num_labels, generator=generator) < unknown] = torch.nan
    return features, labels


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "problem_type", "names", "labels"),
    [
        (["b", "a"], "auto", ("a", "b"), [1, 0]),
        ([["b"], ["a", "b"], None], "auto", ("a", "b"), [[0, 1], [1, 1], [np.nan, np.nan]]),
        ([[2], [], [1, 2]], "auto", ("1", "2"), [[0, 1], [0, 0], [1, 1]]),
        (["b", "a|b", ""], "multi_label_classification", ("a", "b"), [[0, 1], [1, 1], [0, 0]]),
        (["x, y; z", "z"], "multi_label_classification", ("x, y", "z"), [[1, 1], [0, 1]]),
        ([0.5, 2.0, None], "auto", ("value",), [[0.5], [2.0], [np.nan]]),
        (["1.5", "2"], "regression", ("value",), [[1.5], [2.0]]),
        ([[0.5, 1.0], [2.0, 3.0]], "auto", ("value_0", "value_1"), [[0.5, 1.0], [2.0, 3.0]]),
        ([1, 2], "regression", ("value",), [[1.0], [2.0]]),
        ([1, 2], "auto", ("1", "2"), [0, 1]),
        (
            [1.0, None, np.nan, 2.0],
            "multi_label_classification",
            ("1", "2"),
            [[1, 0], [np.nan] * 2, [np.nan] * 2, [0, 1]],
        ),
        ([[0.5, 1.0], None], "auto", ("value_0", "value_1"), [[0.5, 1.0], [np.nan, np.nan]]),
    ],
)
def test_the_target_is_found_from_the_values(
    values: list[Any], problem_type: str, names: tuple[str, ...], labels: list[Any]
) -> None:
    target, read = read_column(values, problem_type=problem_type, where="data")
    assert target.names == names
    np.testing.assert_array_equal(read, labels)


def test_columns_of_zero_and_one_are_labels_and_other_numbers_are_numbers() -> None:
    target, labels = read_columns({"cat": [1, 0, None], "dog": [True, False, 1]}, where="data")
    assert (target.problem_type, target.names) == ("multi_label_classification", ("cat", "dog"))
    np.testing.assert_array_equal(labels, [[1, 1], [0, 0], [np.nan, 1]])
    target, labels = read_columns({"x": [1.0, 2.5], "y": [0, 1]}, where="data")
    assert (target.problem_type, labels.tolist()) == ("regression", [[1.0, 0.0], [2.5, 1.0]])
    assert (
        read_columns({"x": [0, 1], "y": [1, 0]}, problem_type="regression", where="data")[0].problem_type
        == "regression"
    )


@pytest.mark.parametrize(
    ("values", "problem_type", "message"),
    [
        (["a", "b"], "regression", "data: 2 labels such as 'a' are no numbers"),
        ([[1.0], [1.0, 2.0]], "regression", "rows have 1 and 2 numbers"),
        ([1.0, float("inf")], "regression", "1 numbers are infinite"),
        ([["a"], [None]], "multi_label_classification", "labels such as None are of type NoneType"),
        (
            [0.5, 1.0],
            "multi_label_classification",
            r"labels such as 0.5 are of type float; give text, integers, or lists",
        ),
        (
            [["a"], ["b"]],
            "single_label_classification",
            "labels are of type list; labels must be all text or all integers",
        ),
        ([{"a": 1}], "auto", "labels are of type dict"),
        (
            [0, 1],
            "ordinal",
            "problem_type='ordinal': choose one of multi_label_classification, regression, single_label",
        ),
    ],
)
def test_wrong_values_are_named(values: list[Any], problem_type: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_column(values, problem_type=problem_type, where="data")


def test_class_names_that_are_numbers_are_the_numbers() -> None:
    target, labels = read_column([2, 0, -1], problem_type="regression", names=["1", "3", "5"], where="data")
    assert target.names == ("value",)
    np.testing.assert_array_equal(labels, [[5.0], [1.0], [np.nan]])
    with pytest.raises(ValueError, match="labels such as 'good' are no numbers"):
        read_column([0, 1], problem_type="regression", names=["good", "bad"], where="data")


def test_a_number_is_called_like_its_column() -> None:
    for values in ([30, 41], ["30", " "], [None, 0.5]):
        target, _ = read_column(values, problem_type="regression", column="age", where="data")
        assert target.names == ("age",)
    classes, _ = read_column([1, 0], problem_type="regression", names=["30", "41"], column="age", where="data")
    assert classes.names == ("age",)
    assert read_column([0.5], column=" ", where="data")[0].names == ("value",)
    assert read_column([[0.5, 1.0]], column="point", where="data")[0].names == ("value_0", "value_1")
    assert read_column(["a", "b"], column="age", where="data")[0].names == ("a", "b")


def test_a_single_number_may_have_another_name_in_other_data() -> None:
    """A model that was trained on the column `age` is evaluated on the column `years`."""
    age, years = Regression(names=("age",)), Regression(names=("years",))
    labels = np.array([[30.0], [41.0]], np.float32)
    assert age.list_unknown(labels, years) == []
    np.testing.assert_array_equal(age.translate(labels, years), labels)
    two = Regression(names=("age", "height"))
    assert two.list_unknown(labels, years) == ["years (2 images)"]
    assert np.isnan(two.translate(labels, age)[:, 1]).all()


def test_class_indices_in_lists_are_not_one_class() -> None:
    with pytest.raises(ValueError, match=r"labels such as \[0\] are of type list; one class per image"):
        read_column([[0], [1]], problem_type="single_label_classification", names=["a", "b"], where="data")
    with pytest.raises(ValueError, match="1 label such as 7 is no index of the 2 names"):
        read_column([[0], [7]], names=["a", "b"], where="data")


def test_label_columns_of_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="the label columns 'a', 'b' contain list"):
        read_columns({"a": [[1], [2]], "b": [0, 1]}, where="data")


def test_labels_that_cannot_be_learned_are_refused() -> None:
    labels = np.array([[1, 0, 1], [1, 0, 0]], np.float32)
    with pytest.raises(ValueError, match=r"no image has the labels 'b'"):
        THREE.check_train_labels(labels, "data")
    with pytest.raises(ValueError, match=r"every image has the labels 'a'"):
        MultiLabel(names=("a", "c")).check_train_labels(labels[:, [0, 2]], "data")
    with pytest.raises(ValueError, match="'value' is the same number in all images"):
        Regression(names=("value",)).check_train_labels(
            np.full((1000, 1), 0.1, np.float32), "data"
        )  # rounding has a spread
    with pytest.raises(ValueError, match="'y' is the same number"):
        Regression(names=("x", "y")).check_train_labels(np.array([[1, np.nan], [2, np.nan]], np.float32), "data")
    with pytest.raises(ValueError, match="no training image has the numbers 'y'"):
        Regression(names=("x", "y")).fit(np.array([[1, np.nan], [2, np.nan]], np.float32))


def test_labels_are_translated_by_name() -> None:
    source = MultiLabel(names=("c", "a"))
    labels = np.array([[1, 0], [np.nan, 1]], np.float32)
    np.testing.assert_array_equal(THREE.translate(labels, source), [[0, 0, 1], [1, 0, np.nan]])
    assert THREE.list_unknown(np.array([[1.0, 1.0]]), MultiLabel(names=("a", "z"))) == ["z (1 image)"]


# --- strata -----------------------------------------------------------------------------------------------------------


def test_splits_and_folds_divide_rare_labels_evenly() -> None:
    labels = np.zeros((100, 3), np.float32)
    labels[:, 0] = 1
    labels[:10, 1] = 1
    labels[5:9, 2] = 1
    strata = THREE.stratify(labels)
    assert len(set(strata[5:9])) == 1  # the rarest label decides
    assert len(set(strata[[0, 1, 2, 3, 4, 9]])) == 1
    assert np.bincount(strata).min() >= 2


def test_strata_of_numbers_are_ranges() -> None:
    values = np.random.default_rng(0).normal(size=(50, 1)).astype(np.float32)
    strata = Regression(names=("x",)).stratify(values)
    ordered = strata[values[:, 0].argsort()]
    assert (np.diff(ordered) >= 0).all()
    assert np.bincount(strata).tolist() == [5] * 10


# --- the convex problem of a head ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("unknown", [0.0, 0.2])
def test_the_solved_head_is_one_logistic_regression_per_label(unknown: float) -> None:
    features, labels = make_labels(200, 3, unknown=unknown)
    path = solve_path(features, labels, THREE, [0.1], options=SolverOptions(tol=1e-12))
    mean, std = features.mean(0), features.std(0, correction=0)
    for k in range(3):
        known = ~labels[:, k].isnan()
        own = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit((features[known] - mean) / std, labels[known, k])
        torch.testing.assert_close(path.weight[0, k] * std, torch.tensor(own.coef_[0]).float(), atol=2e-3, rtol=2e-3)


def test_the_solved_head_is_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(150, 12, generator=generator) * torch.logspace(-1, 1, 12) + 3
    values = features @ torch.randn(12, 2, generator=generator) + 5 * torch.randn(150, 2, generator=generator)
    target = Regression(names=("x", "y")).fit(values.numpy())
    path = solve_path(features, values, target, [0.05], options=SolverOptions(tol=1e-12))
    mean, std = features.mean(0), features.std(0, correction=0)
    own = Ridge(alpha=1 / 0.05).fit((features - mean) / std, (values - values.mean(0)) / values.std(0, correction=0))
    torch.testing.assert_close(path.weight[0] * std, torch.from_numpy(own.coef_).float(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "half square", "any"])
def test_derivatives_of_losses(name: str) -> None:
    """Against automatic differentiation of each loss in float64."""
    generator = torch.Generator().manual_seed(0)
    num_rows = 6
    classes = torch.arange(num_rows) % 3
    flags = (torch.rand(num_rows, 3, generator=generator) > 0.5).double()
    flags[0, 1] = torch.nan
    losses: dict[str, tuple[ConvexLoss, Any]] = {
        "softmax": (Softmax(classes, 3), lambda z: torch.nn.functional.cross_entropy(z, classes, reduction="none")),
        "sigmoid": (
            Sigmoid(flags),
            lambda z: _sum_known(torch.nn.functional.softplus(z) - flags.nan_to_num(0) * z, flags),
        ),
        "half square": (HalfSquare(flags), lambda z: _sum_known(0.5 * (z - flags.nan_to_num(0)).square(), flags)),
        "any": (
            AnyConvex(lambda z, y: (z - y).pow(4).sum(1), classes[:, None].double(), 3),
            lambda z: (z - classes[:, None]).pow(4).sum(1),
        ),
    }
    loss, function = losses[name]
    logits = torch.randn(1, 3, num_rows, generator=generator, dtype=torch.float64)
    direction = torch.randn(1, 3, num_rows, generator=generator, dtype=torch.float64)
    rows = logits[0].T.clone().requires_grad_()
    expected = function(rows)
    (gradient,) = torch.autograd.grad(expected.sum(), rows, create_graph=True)
    (product,) = torch.autograd.grad((gradient * direction[0].T).sum(), rows)
    margins, change = loss.shift(logits.clone()), loss.shift(direction.clone())
    torch.testing.assert_close(
        loss.slope(loss.at(margins), change)[0], (gradient * direction[0].T).sum(1), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(
        loss.bend(loss.at(margins), change)[0], (product * direction[0].T).sum(1), atol=1e-6, rtol=1e-5
    )
    found, values = loss.differentiate(loss.at(margins))
    torch.testing.assert_close(found[0].T, gradient, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(values[0], expected, atol=1e-5, rtol=1e-5)


def _sum_known(each: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.where(labels.isnan(), 0.0, each).sum(1)


@pytest.mark.parametrize("kind", ["labels", "numbers"])
def test_a_probe_of_any_target_chooses_c_and_scores_unseen_rows(kind: str) -> None:
    features, labels = make_labels(120, 3)
    target: Target = THREE
    if kind == "numbers":
        labels = features[:, :2] * 10 + torch.randn(120, 2, generator=torch.Generator().manual_seed(1))
        target = Regression(names=("x", "y")).fit(labels.numpy())
    probe = fit_probe(features[:100], labels[:100], features[100:], labels[100:], target, ProbeOptions(cv_folds=4))
    assert probe.score.loss == min(point.score.loss for point in probe.path)
    assert probe.score.names == ("mean_average_precision", "log_loss") if kind == "labels" else ("r2", "squared_error")
    assert probe.held_out_logits.shape == (120, target.num_outputs)
    assert probe.score.quality > 0.8


# --- losses of gradient steps -------------------------------------------------------------------------------------------


def test_unknown_labels_have_no_loss_and_no_gradient() -> None:
    labels = torch.tensor([[1.0, torch.nan, 0.0]])
    logits = torch.zeros(1, 3, requires_grad=True)
    loss = THREE.make_training_loss(labels.numpy(), gradient(label_smoothing=0.0), torch.device("cpu"))
    loss(logits, labels).backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([-0.5 / 3, 0.0, 0.5 / 3])
    assert THREE.losses(logits.detach(), labels).item() == pytest.approx(np.log(2))


def test_targets_without_classes_refuse_to_balance_them() -> None:
    for target in (THREE, Regression(names=("x",))):
        with pytest.raises(ValueError, match=r"class_balance='loss': a .* target has no classes to balance"):
            target.check_settings(GradientConfig(class_balance="loss"))


def test_losses_of_one_kind_of_target_are_refused_for_the_others() -> None:
    for target, settings in (
        (SingleLabel(names=("a", "b")), gradient(asymmetric_gamma=1.0)),
        (THREE, gradient(huber_delta=1.0)),
        (Regression(names=("x",)), gradient(asymmetric_gamma=1.0)),
    ):
        with pytest.raises(ValueError, match=r"has no such loss; omit --\w+"):
            target.check_settings(settings)
    THREE.check_settings(gradient(asymmetric_gamma=1.0))
    Regression(names=("x",)).check_settings(gradient(huber_delta=1.0))


def test_the_asymmetric_loss_weighs_absent_labels_by_their_probability() -> None:
    logits, labels = torch.tensor([[2.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    two, device = MultiLabel(names=("a", "b")), torch.device("cpu")
    present, absent = torch.nn.functional.softplus(torch.tensor([-2.0, 2.0])).tolist()
    loss = two.make_training_loss(labels.numpy(), gradient(label_smoothing=0.0, asymmetric_gamma=2.0), device)
    probability = torch.tensor(2.0).sigmoid().item()
    assert loss(logits, labels).item() == pytest.approx((present + absent * probability**2) / 2)


def test_the_huber_loss_is_linear_for_large_errors() -> None:
    target = Regression(names=("x",), center=(0.0,), scale=(2.0,))
    loss = target.make_training_loss(np.zeros((1, 1)), gradient(huber_delta=1.0), torch.device("cpu"))
    assert loss(torch.tensor([[0.5]]), torch.tensor([[0.0]])).item() == 0.25
    assert loss(torch.tensor([[5.0]]), torch.tensor([[0.0]])).item() == 9.0


def test_numbers_are_standardized_until_the_head_takes_over_their_scale() -> None:
    values = np.array([[10.0], [30.0]], np.float32)
    target = Regression(names=("x",)).fit(values)
    outputs = torch.tensor([[-1.0], [1.0]])
    assert target.activate(outputs).tolist() == values.tolist()
    assert target.losses(outputs, torch.from_numpy(values)).tolist() == [0.0, 0.0]
    folding = target.fold()
    assert folding is not None
    folded, factors, offsets = folding
    raw = outputs * factors + offsets
    assert folded.activate(raw).tolist() == values.tolist()
    torch.testing.assert_close(
        folded.losses(raw + 5, torch.from_numpy(values)), target.losses(outputs + 0.5, torch.from_numpy(values))
    )
    assert folded.fold() is None
    assert not target.has_outputs_of(folded)


# --- metrics ------------------------------------------------------------------------------------------------------------


def test_metrics_of_labels_are_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random((80, 4)) < 0.4).astype(np.float64)
    logits = np.round(generator.normal(size=(80, 4)) + labels, 1)  # with ties
    found = multi_label.score(
        multi_label.MultiLabelOutcomes(logits=logits, labels=labels), list("abcd"), [0.5] * 4, Bootstrap(resamples=20)
    )
    assert found.mean_average_precision == pytest.approx(
        sklearn_metrics.average_precision_score(labels, logits, average="macro")
    )
    assert found.f1_micro == pytest.approx(sklearn_metrics.f1_score(labels, logits > 0, average="micro"))
    assert found.f1_macro == pytest.approx(sklearn_metrics.f1_score(labels, logits > 0, average="macro"))
    assert found.exact_match == pytest.approx(sklearn_metrics.accuracy_score(labels, logits > 0))
    assert found.nll == pytest.approx(
        np.mean([sklearn_metrics.log_loss(labels[:, k], 1 / (1 + np.exp(-logits[:, k]))) for k in range(4)])
    )
    low, high = found.mean_average_precision_interval
    assert low < found.mean_average_precision < high


def test_unknown_labels_are_left_out_of_the_metrics() -> None:
    generator = np.random.default_rng(1)
    labels = (generator.random((60, 2)) < 0.5).astype(np.float64)
    logits = generator.normal(size=(60, 2))
    labels[::3, 1] = np.nan
    found = multi_label.score(
        multi_label.MultiLabelOutcomes(logits=logits, labels=labels), ["a", "b"], [0.5, 0.5], Bootstrap(resamples=0)
    )
    known = ~np.isnan(labels[:, 1])
    own = sklearn_metrics.average_precision_score(labels[known, 1], logits[known, 1])
    assert found.per_class[1]["average_precision"] == pytest.approx(own)
    assert found.per_class[1]["support"] == np.nansum(labels[:, 1])


def test_the_quality_of_an_image_is_its_share_of_ordered_pairs() -> None:
    generator = np.random.default_rng(3)
    labels = (generator.random((200, 6)) < 0.5).astype(np.float64)
    labels[generator.random((200, 6)) < 0.2] = np.nan
    logits = np.round(generator.normal(size=(200, 6)), 1)  # with ties
    qualities = multi_label.MultiLabelOutcomes(logits=logits, labels=labels).qualities
    for row, truth, quality in zip(logits, labels, qualities, strict=True):
        known = ~np.isnan(truth)
        has_pairs = len(set(truth[known])) == 2
        assert quality == pytest.approx(sklearn_metrics.roc_auc_score(truth[known], row[known]) if has_pairs else 1.0)


def test_qualities_of_many_labels_need_memory_for_the_logits_alone() -> None:
    """Pairs of the 2,000 labels of 500 images would take 16 GB."""
    labels = (np.random.default_rng(0).random((500, 2000)) < 0.01).astype(np.float64)
    tracemalloc.start()
    qualities = multi_label.MultiLabelOutcomes(logits=labels, labels=labels).qualities
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * labels.nbytes
    assert (qualities == 1.0).all()


def test_large_logits_do_not_overflow() -> None:
    logits, labels = np.array([[-2000.0, 1.0], [3.0, 2000.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    found = multi_label.score(
        multi_label.MultiLabelOutcomes(logits=logits, labels=labels), ["a", "b"], [0.5, 0.5], Bootstrap(resamples=0)
    )
    assert found.per_class[0]["recall"] == 0.0
    assert multi_label.choose_thresholds(logits, labels)[1] == pytest.approx((1 + 1 / (1 + np.exp(-1))) / 2)


def test_thresholds_have_the_best_f1_on_the_images_that_choose_them() -> None:
    generator = np.random.default_rng(2)
    labels = (generator.random((100, 1)) < 0.2).astype(np.float64)
    logits = generator.normal(size=(100, 1)) + 2 * labels - 2
    (threshold,) = multi_label.choose_thresholds(logits, labels)
    probabilities = 1 / (1 + np.exp(-logits[:, 0]))
    best = max(sklearn_metrics.f1_score(labels[:, 0], probabilities > t) for t in [0.0, *probabilities - 1e-9])
    assert sklearn_metrics.f1_score(labels[:, 0], probabilities > threshold) == pytest.approx(best)
    fitted = MultiLabel(names=("a",)).fit_decisions(logits, labels)
    assert fitted.decide(torch.from_numpy(logits))[:, 0].tolist() == (probabilities > threshold).astype(float).tolist()


def test_metrics_of_numbers_are_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    labels = generator.normal(size=(70, 2)) * [1, 20]
    predicted = labels + generator.normal(size=(70, 2)) * [0.5, 5]
    outcomes = regression.RegressionOutcomes(predicted=predicted, labels=labels, scale=np.ones(2))
    found = regression.score(outcomes, ["x", "y"], Bootstrap(resamples=20))
    assert found.r2 == pytest.approx(sklearn_metrics.r2_score(labels, predicted))
    assert found.mae == pytest.approx(sklearn_metrics.mean_absolute_error(labels, predicted))
    assert found.rmse == pytest.approx(np.mean(np.sqrt(((labels - predicted) ** 2).mean(0))))
    assert found.spearman == pytest.approx(np.mean([spearmanr(labels[:, k], predicted[:, k])[0] for k in range(2)]))
    assert found.mae_interval[0] < found.mae < found.mae_interval[1]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_predictions_that_are_not_finite_have_no_metrics(broken: float) -> None:
    """Unknown labels are left out, unknown predictions are not: without an error, R2 would be 1."""
    values, labels = np.full((4, 1), broken), np.arange(4.0)[:, None]
    with pytest.raises(ValueError, match="the logits of 4 of 4 images are nan or infinite"):
        regression.RegressionOutcomes(predicted=values, labels=labels, scale=np.ones(1))
    with pytest.raises(ValueError, match="the logits of 4 of 4 images are nan or infinite"):
        MultiLabel(names=("a",)).read_outcomes(values.astype(np.float32), labels > 1)


def test_r2_is_no_percentage() -> None:
    score = Score(quality=-0.25, loss=1.3, names=regression.NAMES)
    assert score.describe() == "R2 -0.250, squared error 1.3000"
    metrics = Metrics(values={"r2": -0.25}, num_samples=7, score=score, intervals={"r2": (-0.5, 0.1)})
    assert describe_quality(metrics) == "R2 -0.250 (95 % interval -0.500 to 0.100, 7 images)"


def test_a_constant_number_has_no_r2_but_a_note() -> None:
    outcomes = regression.RegressionOutcomes(predicted=np.ones((3, 1)), labels=np.ones((3, 1)), scale=np.ones(1))
    found = regression.score(outcomes, ["x"], Bootstrap(resamples=0))
    assert found.per_number[0]["r2"] is None
    assert "the same in all images" in found.notes[0]


def test_a_number_that_no_image_of_a_split_has_is_left_out() -> None:
    labels = np.array([[1, np.nan], [2, 5.0], [3, np.nan], [5, np.nan]])
    outcomes = regression.RegressionOutcomes(predicted=np.ones((4, 2)), labels=labels, scale=np.ones(2))
    found = regression.score(outcomes, ["x", "y"], Bootstrap(resamples=50))  # most resamples have no second number
    assert found.mae == pytest.approx((7 / 4 + 4) / 2)
    outcomes = regression.RegressionOutcomes(predicted=np.ones((1, 2)), labels=labels[:1], scale=np.ones(2))
    assert regression.score(outcomes, ["x", "y"], Bootstrap(resamples=5)).per_number[1]["mae"] is None


# --- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        SingleLabel(names=("a", "b")),
        MultiLabel(names=("a", "b"), thresholds=(0.25, 0.5)),
        Regression(names=("x",), center=(1.5,), scale=(2.0,), folded=True),
    ],
)
def test_a_target_is_read_back_from_config_json(target: Target) -> None:
    assert read_target(target.to_config(), target.names) == target
    assert find_target(target.problem_type) is type(target)


def test_features_may_be_read_in_blocks() -> None:
    features, labels = make_labels(90, 3)
    whole = fit_probe(features[:70], labels[:70], features[70:], labels[70:], THREE, ProbeOptions(c_grid=(0.1,)))
    raw = RawFeatures(arrays=[features], device=features.device, memory_bytes=1000)
    assert raw.block_rows < 90
    options = ProbeOptions(c_grid=(0.1,), features_bytes=1000)
    blocks = fit_probe(features[:70], labels[:70], features[70:], labels[70:], THREE, options)
    torch.testing.assert_close(whole.weight, blocks.weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("target", [SingleLabel, MultiLabel, Regression])
def test_one_place_says_which_metrics_are_shares(target: type[Target]) -> None:
    for info in target.metrics:
        assert (info.kind == "percent") == (info.key in SHARES), info.key
    assert (target.image_quality in SHARES) == (target is not Regression)


def test_numbers_are_matched_by_name() -> None:
    model = Regression(names=("brightness", "angle", "size"))
    labels = np.array([[1.0, 10.0], [2.0, 20.0]], np.float32)
    translated = model.translate(labels, Regression(names=("angle", "brightness")))
    np.testing.assert_array_equal(translated, np.array([[10, 1, np.nan], [20, 2, np.nan]], np.float32))


def test_sets_of_labels_hold_their_coverage_where_labels_are_unknown() -> None:
    """An image with an unknown label says nothing, since that label may be present and the hardest one to find."""
    target = MultiLabel(names=("a", "b", "c"))
    logits = np.array([[3.0, -1.0, 0.0]] * 3, np.float32)
    labels = np.array([[1, 1, 0], [1, np.nan, 0], [0, 0, 0]], np.float32)
    scores = target.score_labels(logits, labels)[:, 0]
    assert scores[0] == pytest.approx(np.log1p(np.exp(1.0)))
    assert np.isnan(scores[1])
    assert scores[2] == -np.inf
