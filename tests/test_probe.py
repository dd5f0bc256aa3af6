"""The probe: the solver reaches scikit-learn's optimum for every problem of a batch, whatever the data."""

import logging
import warnings

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from hf_transfer.solvers import features as features_module
from hf_transfer.solvers import lbfgs, workers
from hf_transfer.solvers.features import RawFeatures, StandardizedFeatures
from hf_transfer.solvers.folds import draw_folds
from hf_transfer.solvers.lbfgs import SolverOptions
from hf_transfer.solvers.probe import FINAL_TOL, ProbeOptions, choose_probe, fit_probe, fit_probes, solve_path
from hf_transfer.targets.losses import Softmax
from hf_transfer.targets.single_label import SingleLabel

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]
C_GRID = (1e-4, 1e-2, 1.0)


def classes(number: int) -> SingleLabel:
    return SingleLabel(names=tuple(map(str, range(number))))


def make_data(num_rows: int, num_features: int, num_classes: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated features of unequal scale and offset, as a network's are, and classes that overlap."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(num_rows) % num_classes
    latent = torch.randn(num_rows, num_features, generator=generator) * torch.logspace(0, -2, num_features)
    centers = torch.randn(num_classes, num_features, generator=generator) * torch.logspace(0, -2, num_features)
    mixed = (latent + 2 / num_features**0.5 * centers[targets]) @ torch.linalg.qr(
        torch.randn(num_features, num_features, generator=generator)
    )[0]
    return mixed * torch.logspace(-1, 1, num_features) + 3, targets


def fit_sklearn(
    features: Tensor, targets: Tensor, c: float, row_weights: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.float64], float]:
    """Logits (N, K) and objective of the optimum, in float64."""
    scaled = StandardScaler().fit_transform(features.double().cpu().numpy())
    labels = targets.cpu().numpy()
    binary = len(np.unique(labels)) == 2
    model = LogisticRegression(C=2 * c if binary else c, tol=1e-12, max_iter=100_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "tol cannot be reached": that is the limit of float64
        model.fit(scaled, labels, sample_weight=row_weights)
    weight, bias = model.coef_, model.intercept_
    if binary:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    logits = scaled @ weight.T + bias
    losses = torch.nn.functional.cross_entropy(torch.from_numpy(logits), targets.cpu(), reduction="none").numpy()
    total = losses.sum() if row_weights is None else (losses * row_weights).sum()
    return logits, 0.5 * float((weight**2).sum()) + c * float(total)


def compute_logits(features: Tensor, weight: Tensor, bias: Tensor) -> NDArray[np.float64]:
    return (features.double() @ weight.double().T + bias.double()).cpu().numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("num_rows", "num_features", "num_classes"), [(400, 30, 5), (60, 200, 3), (300, 20, 2), (90, 90, 3)]
)
def test_every_problem_of_a_path_is_solved_as_by_sklearn(
    device: str, num_rows: int, num_features: int, num_classes: int
) -> None:
    features, targets = (t.to(device) for t in make_data(num_rows, num_features, num_classes))
    path = solve_path(features, targets, classes(num_classes), C_GRID)
    for p, c in enumerate(C_GRID):
        logits, objective = fit_sklearn(features, targets, c)
        assert path.objective[p].item() == pytest.approx(objective, rel=1e-6)
        np.testing.assert_allclose(
            compute_logits(features, path.weight[p], path.bias[p]), logits, atol=1e-3 * max(1.0, np.abs(logits).max())
        )


@pytest.mark.parametrize("device", DEVICES)
def test_digits_of_sklearn_are_solved_as_by_sklearn(device: str) -> None:
    """Real images: some pixels are constant, the condition number is large, and classes are almost separable."""
    images, labels = load_digits(return_X_y=True)
    features, targets = torch.from_numpy(images).float().to(device), torch.from_numpy(labels).to(device)
    path = solve_path(features, targets, classes(10), C_GRID)
    for p, c in enumerate(C_GRID):
        logits, objective = fit_sklearn(features, targets, c)
        assert path.objective[p].item() == pytest.approx(objective, rel=1e-6)
        np.testing.assert_allclose(
            compute_logits(features, path.weight[p], path.bias[p]), logits, atol=1e-3 * np.abs(logits).max()
        )
    assert (path.weight[:, :, images.std(0) == 0] == 0).all()


def test_row_weights_of_each_problem_are_those_of_sklearn() -> None:
    features, targets = make_data(200, 20, 4)
    generator = torch.Generator().manual_seed(1)
    row_weights = torch.rand(2, 200, generator=generator)
    path = solve_path(features, targets, classes(4), (0.01, 0.1), row_weights=row_weights)
    for p, c in enumerate(path.c):
        logits, objective = fit_sklearn(features, targets, c, row_weights[p].double().numpy())
        assert path.objective[p].item() == pytest.approx(objective, rel=1e-6)
        np.testing.assert_allclose(compute_logits(features, path.weight[p], path.bias[p]), logits, atol=2e-3)


def test_row_of_weight_two_is_the_row_twice() -> None:
    """Doubling all rows changes neither mean nor spread, so both are standardized in the same way."""
    features, targets = make_data(100, 10, 3)
    twice = solve_path(features.repeat(2, 1), targets.repeat(2), classes(3), [0.1])
    weighted = solve_path(features, targets, classes(3), [0.1], row_weights=torch.full((100,), 2.0))
    torch.testing.assert_close(twice.weight, weighted.weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("memory_bytes", [1, 300_000])
def test_groups_that_fit_into_memory_change_nothing(memory_bytes: int) -> None:
    features, targets = make_data(200, 30, 4)
    whole, grouped = (
        solve_path(features, targets, classes(4), C_GRID, options=SolverOptions(memory_bytes=m))
        for m in (None, memory_bytes)
    )
    torch.testing.assert_close(whole.weight, grouped.weight, atol=1e-4, rtol=1e-3)


def test_a_floor_limits_features_that_hardly_vary() -> None:
    """The floor is the median spread; if most features are constant, the median of those that vary."""
    generator = torch.Generator().manual_seed(0)
    spreads = torch.tensor([0.01, 1.0, 2.0])
    varying = spreads * torch.randn(200, 3, generator=generator)
    targets = torch.arange(200) % 2
    std = varying.std(0, correction=0)
    for dead in (0, 5):
        features = torch.cat([varying, torch.ones(200, dead)], 1)
        raw = RawFeatures(arrays=[features], device=features.device)
        plain = lbfgs.standardize(raw, Softmax(targets, 2)).features.inverse_std[:3]
        torch.testing.assert_close(plain, 1 / std)
        floored = lbfgs.standardize(raw, Softmax(targets, 2), spread_floor=1.0).features.inverse_std[:3]
        torch.testing.assert_close(floored, (std.square() + std[1].square()).rsqrt())


def test_constant_features_get_no_weight() -> None:
    features, targets = make_data(100, 8, 3)
    features[:, 2], features[:, 5] = 0.0, 1e4 / 3
    path = solve_path(features, targets, classes(3), [1.0])
    assert (path.weight[0][:, [2, 5]] == 0).all()
    assert torch.isfinite(path.weight).all()
    without = solve_path(features[:, [0, 1, 3, 4, 6, 7]], targets, classes(3), [1.0])
    torch.testing.assert_close(path.weight[0][:, [0, 1, 3, 4, 6, 7]], without.weight[0], atol=1e-3, rtol=1e-3)


def test_all_features_constant_leaves_class_frequencies() -> None:
    targets = torch.tensor([0, 0, 0, 1])
    path = solve_path(torch.ones(4, 3), targets, classes(2), [1.0])
    np.testing.assert_allclose(path.bias[0].softmax(0), [0.75, 0.25], atol=1e-4)


def test_separable_data_with_hardly_any_penalty_stays_finite() -> None:
    targets = torch.arange(60) % 6
    features = torch.nn.functional.one_hot(targets, 6).float()
    path = solve_path(features, targets, classes(6), (1.0, 1e3, 1e6))
    _, objective = fit_sklearn(features, targets, 1e3)
    assert path.objective[1].item() == pytest.approx(objective, rel=1e-5)
    for weight, bias in zip(path.weight, path.bias, strict=True):
        assert (compute_logits(features, weight, bias).argmax(1) == targets.numpy()).all()
    assert (path.iterations < 2000).all()


def test_half_precision_features_are_solved_in_float32() -> None:
    features, targets = make_data(200, 20, 3)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = features.to(dtype)
        half, full = (solve_path(f, targets, classes(3), [0.1]) for f in (rounded, rounded.float()))
        assert half.weight.dtype == torch.float32
        torch.testing.assert_close(half.weight, full.weight)


def test_large_offsets_do_not_spoil_the_solution() -> None:
    features, targets = make_data(200, 20, 3)
    moved = features + 1000  # spreads are 0.1 to 10: float32 keeps 3 digits of the smallest
    plain, shifted = (solve_path(f, targets, classes(3), [0.1]).objective.item() for f in (features, moved))
    assert shifted == pytest.approx(plain, rel=1e-3)


def test_a_thousand_classes() -> None:
    """With memory for two problems at a time. The gradient at the solution, in float64, is next to zero."""
    features, targets = make_data(2000, 40, 1000)
    path = solve_path(features, targets, classes(1000), (1e-3, 1e-1), options=SolverOptions(memory_bytes=2**26))
    scaled = torch.from_numpy(StandardScaler().fit_transform(features.double().numpy()))
    std = torch.from_numpy(features.double().numpy().std(0))
    for p, c in enumerate(path.c):
        logits = torch.from_numpy(compute_logits(features, path.weight[p], path.bias[p]))
        residuals = logits.softmax(1) - torch.nn.functional.one_hot(targets, 1000)
        pull, push = c * residuals.T @ scaled, path.weight[p].double() * std
        assert (pull + push).norm() < 2e-4 * push.norm()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_users_matmul_precision_is_restored_and_not_used(precision: str) -> None:
    features, targets = make_data(200, 64, 3)
    expected = solve_path(features, targets, classes(3), [1.0])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            path = solve_path(features, targets, classes(3), [1.0])
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(path.weight, expected.weight)


def test_input_is_left_as_it_was() -> None:
    features, targets = make_data(50, 5, 2)
    copy = features.clone()
    solve_path(features, targets, classes(2), [1.0])
    assert torch.equal(features, copy)
    assert not features.requires_grad


def test_a_problem_that_is_cut_short_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    features, targets = make_data(200, 30, 4)
    with caplog.at_level(logging.WARNING):
        solve_path(features, targets, classes(4), [100.0], options=SolverOptions(max_iterations=3))
    assert "1 of 1 problems stopped after 3 iterations" in caplog.text


def split_four_to_one(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    held_out = torch.arange(len(targets)) % 5 == 0
    return features[~held_out], targets[~held_out], features[held_out], targets[held_out]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("folds", [1, 4])
def test_probe_is_the_refit_of_the_c_that_does_best_on_unseen_rows(device: str, folds: int) -> None:
    features, targets = (t.to(device) for t in make_data(300, 20, 3))
    parts = split_four_to_one(features, targets)
    probe = fit_probe(
        *parts,
        classes(3),
        ProbeOptions(cv_folds=folds, spread_floor=0.0, c_grid=(1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)),
    )
    assert probe.score.loss == min(point.score.loss for point in probe.path)
    assert probe.c == min(probe.path, key=lambda point: point.score.loss).c
    both, labels = torch.cat([parts[0], parts[2]]), torch.cat([parts[1], parts[3]])
    refit = solve_path(both, labels, classes(3), [probe.c])
    largest = refit.weight[0].abs().max().item()
    torch.testing.assert_close(probe.weight, refit.weight[0], atol=1e-3 * largest, rtol=1e-2)


def test_held_out_numbers_are_those_of_a_fit_without_the_rows() -> None:
    """Against scikit-learn, fold by fold."""
    features, targets = make_data(120, 10, 3)
    parts = split_four_to_one(features, targets)
    both, labels = torch.cat([parts[0], parts[2]]), torch.cat([parts[1], parts[3]])
    probe = fit_probe(*parts, classes(3), ProbeOptions(cv_folds=3, c_grid=[0.05], seed=7, spread_floor=0.0))
    fold_of = draw_folds(labels, 3, 7)
    scaled = StandardScaler().fit_transform(both.double().numpy())
    expected = np.zeros((120, 3))
    for fold in range(3):
        seen = (fold_of != fold).numpy()
        model = LogisticRegression(C=0.05, tol=1e-10, max_iter=10_000).fit(scaled[seen], labels.numpy()[seen])
        expected[~seen] = model.predict_proba(scaled[~seen])
    np.testing.assert_allclose(probe.held_out_logits.softmax(1), expected, atol=2e-3)
    truth = expected[np.arange(120), labels.numpy()]
    assert probe.score.loss == pytest.approx(-np.log(truth).mean(), rel=1e-3)
    hits = (expected.argmax(1) == labels.numpy()).sum()
    assert abs(probe.score.quality * 120 - hits) < 1.5, "a row on the border may go either way"


def test_single_split_scores_the_given_validation_rows_only() -> None:
    parts = split_four_to_one(*make_data(200, 10, 3))
    probe = fit_probe(*parts, classes(3), ProbeOptions(cv_folds=1, refit=False))
    logits = torch.from_numpy(compute_logits(parts[2], probe.weight, probe.bias)).float()
    assert probe.held_out_logits[: len(parts[0])].isnan().all(), "no fit holds out a training row"
    held_out = probe.held_out_logits[len(parts[0]) :]
    torch.testing.assert_close(held_out, logits, atol=1e-2, rtol=1e-2)
    assert probe.score.loss == pytest.approx(torch.nn.functional.cross_entropy(held_out, parts[3]).item(), rel=1e-4)
    assert probe.score.quality == pytest.approx((held_out.argmax(1) == parts[3]).float().mean().item())


def test_path_ends_where_validation_has_become_worse() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, targets = torch.randn(200, 50, generator=generator), torch.arange(200) % 4
    probe = fit_probe(*split_four_to_one(noise, targets), classes(4))
    assert probe.c < 1e-2, "noise wants strong regularization"
    assert len(probe.path) < 15


def test_selection_by_accuracy_breaks_ties_by_log_loss() -> None:
    features, targets = make_data(300, 20, 3)
    probe = fit_probe(*split_four_to_one(features, targets), classes(3), ProbeOptions(select_by="accuracy"))
    best = max(point.score.quality for point in probe.path)
    assert probe.score.quality == best
    assert probe.score.loss == min(p.score.loss for p in probe.path if p.score.quality == best)


def test_balanced_loss_weighs_classes_equally() -> None:
    features, targets = make_data(400, 10, 4)
    kept = (targets > 0) | (torch.arange(400) < 40)  # class 0: a tenth of the others
    parts = split_four_to_one(features[kept], targets[kept])
    both, labels = torch.cat([parts[0], parts[2]]), torch.cat([parts[1], parts[3]])
    probe = fit_probe(*parts, classes(4), ProbeOptions(class_balance="loss", c_grid=[0.1], spread_floor=0.0))
    scaled = StandardScaler().fit_transform(both.double().numpy())
    model = LogisticRegression(C=0.1, class_weight="balanced", tol=1e-10, max_iter=10_000).fit(scaled, labels.numpy())
    expected = model.predict_proba(scaled)
    np.testing.assert_allclose(
        torch.from_numpy(compute_logits(both, probe.weight, probe.bias)).softmax(1), expected, atol=2e-3
    )
    plain = fit_probe(*parts, classes(4), ProbeOptions(c_grid=[0.1]))
    recalls = [
        (compute_logits(both, p.weight, p.bias).argmax(1) == labels.numpy())[labels.numpy() == 0].mean()
        for p in (plain, probe)
    ]
    assert recalls[1] > recalls[0]


def test_the_seed_decides_the_folds_and_so_the_probe() -> None:
    parts = split_four_to_one(*make_data(150, 10, 3))
    first, again, other = (fit_probe(*parts, classes(3), ProbeOptions(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first.weight, again.weight)
    assert first.path == again.path
    assert first.score.loss != other.score.loss


def test_another_readout_is_chosen_only_if_its_gain_is_beyond_chance() -> None:
    features, targets = make_data(300, 20, 3)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(300, 1, generator=generator)
    better = torch.cat(
        [features, 2 * torch.nn.functional.one_hot(targets, 3) + torch.randn(300, 3, generator=generator)], 1
    )
    own, same, noisy, good = (
        fit_probe(*split_four_to_one(f, targets), classes(3))
        for f in (features, features, torch.cat([features, noise], 1), better)
    )
    assert own.held_out_losses.sum().item() == pytest.approx(own.score.loss, rel=1e-5)
    assert choose_probe([own]) == 0
    assert choose_probe([own, same]) == 0
    assert choose_probe([own, noisy]) == 0
    assert choose_probe([own, noisy, good]) == 2


def test_folds_spread_every_class_evenly() -> None:
    targets = torch.tensor([0] * 50 + [1] * 7 + [2] * 13)
    fold_of = draw_folds(targets, 5, seed=3)
    counts = torch.stack([torch.bincount(fold_of[targets == k], minlength=5) for k in range(3)])
    assert (counts.max(1).values - counts.min(1).values <= 1).all()
    assert torch.bincount(fold_of, minlength=5).tolist() == [14] * 5


def test_a_class_with_one_row_is_fitted_but_not_scored() -> None:
    features, targets = make_data(60, 10, 3)
    kept = (targets < 2) | (torch.arange(60) < 3)  # one row of class 2
    parts = split_four_to_one(features[kept], targets[kept])
    probe = fit_probe(*parts, classes(3))
    assert torch.isfinite(probe.weight).all()
    assert torch.isfinite(probe.held_out_logits).all()
    assert probe.score.loss < 3


def test_two_rows_of_each_of_two_classes_are_enough() -> None:
    features, targets = make_data(4, 10, 2)
    probe = fit_probe(features[:2], targets[:2], features[2:], targets[2:], classes(2))
    assert torch.isfinite(probe.weight).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": classes(1)}, "a classifier needs two or more classes, and there are 1"),
        ({"target": classes(2)}, "labels go from 0 to 2: with 2 classes they must be 0 to 1"),
        ({"c_grid": []}, "give values of C above 0"),
        ({"c_grid": [0.0]}, "give values of C above 0"),
        ({"features": torch.full((9, 4), torch.nan)}, "4 of 4 features contain nan, inf"),
        ({"features": torch.full((9, 4), 6e4, dtype=torch.float16) * 2}, "4 of 4 features contain nan, inf"),
        ({"features": torch.zeros(9, 4, 1)}, r"features \(9, 4, 1\) and labels \(9,\)"),
        ({"features": torch.zeros(8, 4)}, r"features \(8, 4\) and labels \(9,\)"),
        ({"features": torch.zeros(9, 4, dtype=torch.int64)}, "give a float tensor"),
        ({"row_weights": torch.ones(4)}, r"row_weights has shape \(4,\); give \(9,\) or \(1, 9\)"),
        ({"row_weights": torch.zeros(9)}, "not all 0"),
        ({"row_weights": -torch.ones(9)}, "finite, 0 or more"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    given = {
        "features": make_data(9, 4, 3)[0],
        "labels": torch.arange(9) % 3,
        "target": classes(3),
        "c_grid": [1.0],
    } | change
    with pytest.raises(ValueError, match=message):
        solve_path(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cv_folds": 0}, "cv_folds=0: choose 1"),
        ({"select_by": "auc"}, "select_by='auc': choose one of log_loss, accuracy"),
        ({"class_balance": "sampling"}, "class_balance='sampling': choose one of none, loss"),
    ],
)
def test_mistakes_in_choosing_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeOptions(**change)  # type: ignore[arg-type]


def test_other_features_in_validation_are_refused() -> None:
    features, targets = make_data(12, 4, 3)
    with pytest.raises(ValueError, match="train has 4 features and validation 3"):
        fit_probe(features[:6], targets[:6], torch.zeros(6, 3), targets[6:], classes(3))


def test_one_row_a_class_cannot_choose_c() -> None:
    features, targets = make_data(4, 4, 4)
    with pytest.raises(ValueError, match="give at least two images of one class"):
        fit_probe(features[:2], targets[:2], features[2:], targets[2:], classes(4))


def test_preconditioner_saves_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    """On features that share a few strong directions, as a network's do."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(500, 10, generator=generator) * torch.logspace(0.5, -0.5, 10)
    features = shared @ torch.randn(10, 100, generator=generator) + 0.1 * torch.randn(500, 100, generator=generator)
    targets = shared[:, -4:].argmax(1)
    iterations = []
    for rank in (1, 128):
        monkeypatch.setattr(lbfgs, "_RANK", rank)
        iterations.append(solve_path(features, targets, classes(4), [1e-2]).iterations.item())
    assert iterations[1] < 0.7 * iterations[0]


def test_only_readouts_that_may_win_are_solved_to_the_end_and_the_choice_is_the_same() -> None:
    features, targets = make_data(300, 20, 3)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(300, 20, generator=generator)
    better = torch.cat(
        [features, 2 * torch.nn.functional.one_hot(targets, 3) + torch.randn(300, 3, generator=generator)], 1
    )
    parts = [split_four_to_one(f, targets) for f in (features, noise, better, better + 1e-3 * noise[:, :1])]
    readouts = [RawFeatures(arrays=[p[0], p[2]], device=p[0].device) for p in parts]
    probes, summaries = fit_probes(readouts, parts[0][1], parts[0][3], classes(3))
    alone = [fit_probe(*p, classes(3)) for p in parts]
    assert list(probes) == [0, 2, 3], "the first readout, and those that may win"
    assert list(probes)[choose_probe(list(probes.values()))] == choose_probe(alone) != 0
    for i, probe in probes.items():
        assert torch.equal(probe.weight, alone[i].weight)
        assert summaries[i].tolerance == FINAL_TOL
    assert summaries[1].tolerance > FINAL_TOL
    assert len(summaries[1].path) < len(alone[1].path)


def test_accuracy_selects_among_readouts_that_are_all_solved_to_the_end() -> None:
    """The log-loss at the most accurate C says nothing about the lowest log-loss of another readout."""
    features, targets = make_data(100, 8, 3)
    features = features + 20 * torch.nn.functional.one_hot(targets, 8)
    parts = split_four_to_one(features, targets)
    noise = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    readouts = [RawFeatures(arrays=[f[:80], f[80:]], device=f.device) for f in (torch.cat([parts[0], parts[2]]), noise)]
    for options, expected in (
        (ProbeOptions(select_by="accuracy", c_grid=(1e-2, 1e-1, 1.0)), [0, 1]),
        (ProbeOptions(select_by="log_loss", c_grid=(1e-2, 1e-1, 1.0)), [0]),
    ):
        assert list(fit_probes(readouts, parts[1], parts[3], classes(3), options)[0]) == expected


class RowsOnDisk:
    """An array that counts the rows that are read together."""

    def __init__(self, array: NDArray[np.float32]) -> None:
        self.array, self.most = array, 0

    def __len__(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        self.most = max(self.most, rows.stop - rows.start)
        return self.array[rows].copy()


def test_features_beyond_the_memory_limit_are_read_in_blocks_with_the_same_solution() -> None:
    """Sums over blocks round differently, by about 1e-7; the solver stops at 1e-8 of the objective, so errors hardly grow."""
    parts = split_four_to_one(*make_data(300, 20, 3))
    stored = [RowsOnDisk(parts[i].numpy()) for i in (0, 2)]
    whole, blocks = (
        fit_probes(
            [RawFeatures(arrays=stored, device=parts[0].device, memory_bytes=limit)], parts[1], parts[3], classes(3)
        )[0][0]
        for limit in (10**9, 4 * 21 * 64)
    )
    largest = float(whole.weight.abs().max())
    assert blocks.c == whole.c
    torch.testing.assert_close(blocks.weight, whole.weight, atol=1e-5 * largest, rtol=0)
    torch.testing.assert_close(blocks.held_out_logits, whole.held_out_logits, atol=1e-4, rtol=1e-4)
    assert max(rows.most for rows in stored) == 240, "all training rows at once"
    streamed = [RowsOnDisk(parts[i].numpy()) for i in (0, 2)]
    raw = RawFeatures(arrays=streamed, device=parts[0].device, memory_bytes=4 * 21 * 64)
    fit_probes([raw], parts[1], parts[3], classes(3))
    assert max(rows.most for rows in streamed) == 64
    assert StandardizedFeatures.of(raw, 1.0).kept is None


def test_few_images_are_solved_in_the_directions_that_they_span(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotation changes rounding only."""
    parts = split_four_to_one(*make_data(40, 200, 3))
    rotated = fit_probe(*parts, classes(3))
    raw = RawFeatures(arrays=[parts[0], parts[2]], device=parts[0].device)
    assert lbfgs.standardize(raw, Softmax(parts[1], 3)).num_columns == 41
    monkeypatch.setattr(features_module, "ROTATED_RATIO", 1e9)
    plain = fit_probe(*parts, classes(3))
    assert rotated.c == plain.c
    assert rotated.weight.shape == plain.weight.shape == (3, 200)
    torch.testing.assert_close(rotated.weight, plain.weight, atol=1e-5 * float(plain.weight.abs().max()), rtol=0)


def test_each_calculation_has_one_torch_thread_and_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "count_cores", lambda: 4)
    cpu, before = torch.device("cpu"), torch.get_num_threads()
    torch.set_num_threads(2)  # also where the tests run with one thread

    def describe(_: int) -> tuple[int, int, bool]:
        return torch.get_num_threads(), workers.count_workers(cpu), torch.is_grad_enabled()

    try:
        assert workers.map_on_cores(describe, range(2), cpu) == [(1, 2, False)] * 2
        assert workers.map_on_cores(describe, range(9), cpu) == [(1, 1, False)] * 9
        nested = workers.map_on_cores(lambda i: workers.map_on_cores(describe, range(2), cpu), [0], cpu)
        assert nested == [[(1, 2, False)] * 2], "one calculation has all cores for its own parts"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ZeroDivisionError):
        workers.map_on_cores(lambda i: 1 // i, range(3), cpu)


def test_large_problems_are_shared_out_among_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = make_data(200, 30, 4)
    whole = solve_path(features, targets, classes(4), C_GRID)
    monkeypatch.setattr(workers, "count_cores", lambda: 2)
    monkeypatch.setattr(lbfgs, "_SPLIT_BYTES", 0)
    groups = []
    minimize_group = lbfgs._minimize_group
    monkeypatch.setattr(lbfgs, "_minimize_group", lambda *a: groups.append(len(a[0].penalties)) or minimize_group(*a))
    shared = solve_path(features, targets, classes(4), C_GRID)
    assert sorted(groups) == [1, 2]
    torch.testing.assert_close(whole.weight, shared.weight, atol=1e-4, rtol=1e-3)
