"""Fits the linear probe, a convex problem, for many regularization strengths and all folds at the same time.

A probe is a linear model of frozen features: multinomial logistic regression for classes, one logistic regression per label, or
ridge regression for numbers (see `Target.make_convex_loss`). Its only hyperparameter, C, is chosen on validation images: a
larger C means weaker regularization. One batched solver (lbfgs.py) solves all (C, fold) problems over one feature matrix, in
blocks of rising C. Small C takes a few iterations, large C hundreds. Each block starts from the solution of the previous
block, and the path ends when the held-out score gets clearly worse, so the expensive values of C are solved only if necessary.

Of many readouts (see `readouts`), one wins. So `fit_probes` first solves a coarse path for every readout, loosely, and then the
whole problem only for readouts that may still win.

The objective is ||W||^2 / 2 + C * sum_i w_i * loss_i with unpenalized biases, as in scikit-learn's `LogisticRegression` on
standardized features. With two classes, C here is half of scikit-learn's C, because W here has two rows instead of one.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_transfer.capability import accumulation_dtype
from hf_transfer.config import ClassBalance, SelectBy
from hf_transfer.metrics.records import Score
from hf_transfer.solvers.features import RawFeatures
from hf_transfer.solvers.folds import Folds, draw_folds, take_folds
from hf_transfer.solvers.lbfgs import Problems, SolverOptions, minimize, standardize
from hf_transfer.solvers.workers import map_on_cores
from hf_transfer.targets.target import Target

log = logging.getLogger(__name__)

DEFAULT_C_GRID: tuple[float, ...] = tuple(float(f"{10 ** (i / 3):.3g}") for i in range(-15, 4))
"""The values of C from 1e-5 to 10, three per decade. A wide grid costs nothing, because the path ends early. Above 10 there is
almost no penalty, and few easy images per class would always choose the largest C."""

SPREAD_FLOOR = 1.0
"""The default `spread_floor` of `lbfgs.standardize`, which reduces the influence of features that hardly vary.

A feature that hardly varies among few training images may vary among other images, where its weight is then too large. With 10
images per class, on images that were not used for selection, the floor improves the accuracy of MobileNetV2's probe by 1.2
points (hymenoptera) and 1.3 points (sign-language digits), and reduces the log-loss by 20 to 40 %. The floor changes little for
DeiT-Tiny, whose features come from a LayerNorm."""

FINAL_TOL = 1e-8  # tolerance for the chosen C, relative to the objective
_PATIENCE = 4.0  # the path ends when C is this factor above the best C
COARSE_MARGIN = 0.05
"""After a coarse path, a readout may win if its held-out log-loss is at most this share above the lowest one, or less than a
standard error of the paired difference.

On DeiT-Tiny's 24 readouts of 1,000 images, the log-loss on the coarse path was 0.4 to 3 % above the log-loss of the whole
problem, so two readouts that differ by 5 % keep their order. On 100 images, the two differed by up to 9 %, which is less than a
standard error."""

ROUGH_FOLDS = 2
"""The number of folds on which rough fits find readouts that are worse than the best by twice the margin."""

NEAR_MARGIN = 0.01
"""After a fine path near the best C, a readout may win if its held-out log-loss is at most this share above the lowest one."""


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """How finely a path is solved."""

    tol: float  # relative to the objective
    block: (
        int  # number of values of C that are solved together; the next block starts from the solution of the last value
    )


_FINE = _Steps(tol=1e-5, block=2)  # enough to compare values of C
_ROUGH = _Steps(tol=1e-2, block=1)  # enough to find readouts that are far from the best
_COARSE = _Steps(tol=1e-3, block=1)  # enough to compare readouts of different quality
_NEAR = _Steps(tol=1e-4, block=3)  # for the values of C between those of a coarse path


@dataclass(frozen=True, kw_only=True)
class Path:
    """The solutions of P problems. Problem p has the logits `x @ weight[p].T + bias[p]` for raw features x."""

    c: tuple[float, ...]
    weight: Tensor  # (P, K, D) float32
    bias: Tensor  # (P, K) float32
    objective: Tensor  # (P,) accumulation_dtype: ||W||^2 / 2 + C * sum_i w_i * loss_i, W on standardized features
    iterations: Tensor  # (P,) int64


@dataclass(frozen=True, kw_only=True)
class PathPoint:
    """One solved value of C, with its held-out score and the mean number of iterations."""

    c: float
    score: Score
    iterations: float


@dataclass(frozen=True, kw_only=True)
class ProbeSummary:
    """The chosen C of a probe, its held-out score, and how they were found."""

    c: float
    score: Score  # score of the chosen C; each row is scored by a fit that has not seen the row
    path: tuple[PathPoint, ...]
    tolerance: float  # of the scored fits, relative to the objective
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A fitted linear head. The logits are `x @ weight.T + bias` for raw features x."""

    weight: Tensor  # (K, D) float32
    bias: Tensor  # (K,) float32
    summary: ProbeSummary
    held_out_logits: (
        Tensor  # (N, K) of training, then validation rows, by fits that have not seen the row; nan: no such fit
    )
    held_out_losses: Tensor  # (N,) weighted losses of training, then validation rows, whose sum is the log-loss
    refitted: bool  # whether the head is fitted on training and validation rows together, with the chosen C

    @property
    def c(self) -> float:
        """The chosen C."""
        return self.summary.c

    @property
    def score(self) -> Score:
        """The held-out score of the chosen C."""
        return self.summary.score

    @property
    def path(self) -> tuple[PathPoint, ...]:
        """All solved values of C."""
        return self.summary.path


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """The settings for choosing C and fitting a probe.

    `cv_folds`: with 1, the validation rows choose C; with k >= 2, stratified k-fold cross-validation over training and
    validation rows chooses C. `seed` draws the folds. With `select_by` "accuracy", the lowest log-loss wins among equal
    accuracies. With `class_balance` "loss" or "sampler", all classes have equal weight, both in the fit and in the choice of
    C. Without `refit`, the head is fitted on the training rows only. With `holds_out`, no fit of a fold sees validation rows
    either, and they choose nothing unless `cv_folds` is 1. `memory_bytes`: working memory of the solver. `features_bytes`:
    larger features are read in blocks (see `features`).
    """

    c_grid: Sequence[float] = DEFAULT_C_GRID
    select_by: SelectBy = "log_loss"
    class_balance: ClassBalance = "none"
    cv_folds: int = 5
    refit: bool = True
    holds_out: bool = False
    spread_floor: float = SPREAD_FLOOR
    seed: int = 0
    max_iterations: int = 1000
    memory_bytes: int | None = None
    features_bytes: int | None = None

    def __post_init__(self) -> None:
        _check_choice("select_by", self.select_by, ("log_loss", "accuracy"))
        _check_choice("class_balance", self.class_balance, ("none", "loss", "sampler"))
        if self.cv_folds < 1:
            raise ValueError(
                f"cv_folds={self.cv_folds}: choose 1 (validation rows choose C) or more (cross-validation)"
            )

    def solver(self, tol: float) -> SolverOptions:
        """Returns options for the solver, with the tolerance `tol`."""
        return SolverOptions(tol=tol, max_iterations=self.max_iterations, memory_bytes=self.memory_bytes)


DEFAULT_SOLVER = SolverOptions()
DEFAULT_OPTIONS = ProbeOptions()


def solve_path(
    features: Tensor,
    labels: Tensor,
    target: Target,
    c_grid: Sequence[float],
    row_weights: Tensor | None = None,
    options: SolverOptions = DEFAULT_SOLVER,
) -> Path:
    """Solves one problem for each C, on the device of the features.

    Inputs: features (N, D) of any float type; labels (N, ...) of `target`; row_weights (N,), or (P, N) with one row for each
    C. With the default `tol` of 1e-10, logits differ from the exact logits by about 1e-3 at most.

    Raises ValueError if a feature is not finite, a label is not of the target, a C is not positive, or shapes do not fit.
    """
    _check(features, labels, target, c_grid)
    num_rows, device = len(features), features.device
    dtype = accumulation_dtype(device)
    if row_weights is None:
        row_weights = torch.ones(num_rows)
    if tuple(row_weights.shape) not in {(num_rows,), (len(c_grid), num_rows)}:
        raise ValueError(
            f"row_weights has shape {tuple(row_weights.shape)}; give {(num_rows,)} or {(len(c_grid), num_rows)}"
        )
    row_weights = row_weights.to(device, torch.float32).expand(len(c_grid), num_rows)
    totals = row_weights.sum(1)
    if not bool((row_weights >= 0).all() and ((totals > 0) & totals.isfinite()).all()):
        raise ValueError("row_weights must be finite, 0 or more, and not all 0")
    loss = target.make_convex_loss(labels.to(device))
    raw = RawFeatures(arrays=[features], device=device)

    def solve(cs: Tensor) -> Path:
        problems = standardize(raw, loss, spread_floor=options.spread_floor)
        solutions, iterations = _solve(problems, cs, row_weights, None, options)
        # Compute one problem at a time, because the margins of all problems may not fit into memory.
        losses = [
            (loss.differentiate(loss.at(problems.margins(w[None]).to(dtype)))[1][0] * r).sum()
            for w, r in zip(solutions, row_weights, strict=True)
        ]
        weight, bias = problems.features.unstandardize(solutions)
        objective = 0.5 * solutions[:, :, :-1].to(dtype).square().sum((1, 2)) + cs * torch.stack(losses)
        return Path(c=tuple(c_grid), weight=weight, bias=bias, objective=objective, iterations=iterations)

    with _full_precision():
        return map_on_cores(solve, [torch.tensor(list(c_grid), dtype=torch.float32, device=device)], device)[0]


def fit_probe(
    train_x: Tensor,
    train_y: Tensor,
    val_x: Tensor,
    val_y: Tensor,
    target: Target,
    options: ProbeOptions = DEFAULT_OPTIONS,
) -> Probe:
    """Fits a head on features (N, D). C is chosen on rows outside the fit, and then the head is fitted with the chosen C.

    All fits standardize features with mean and spread of the training and validation rows together. Raises ValueError as
    `solve_path` does, and if no class has both a row to fit on and a row to choose C by.
    """
    _check(train_x, train_y, target, options.c_grid)
    _check(val_x, val_y, target, options.c_grid)
    if train_x.shape[1] != val_x.shape[1]:
        raise ValueError(f"train has {train_x.shape[1]} features and validation {val_x.shape[1]}: give equal numbers")
    features = RawFeatures(arrays=[train_x, val_x], device=train_x.device, memory_bytes=options.features_bytes)
    probes, _ = fit_probes([features], train_y, val_y, target, options)
    return probes[0]


def fit_probes(
    readouts: Sequence[RawFeatures],
    train_y: Tensor,
    val_y: Tensor,
    target: Target,
    options: ProbeOptions = DEFAULT_OPTIONS,
    groups: Tensor | None = None,
) -> tuple[dict[int, Probe], list[ProbeSummary]]:
    """Fits a head on each readout that may have the lowest held-out log-loss, and on the first readout, as `fit_probe` does.

    Returns the probes by the number of the readout, and a summary for every readout. The rows of all readouts are training
    rows, then validation rows. `groups` (N,): the number of each row's group, which no fold divides. If log-loss chooses C,
    coarse paths tell which readouts may win; otherwise, all are fitted.
    """
    device = readouts[0].device
    labels = torch.cat([train_y.to(device), val_y.to(device)])
    fold_of = _draw_fold_of(target.stratify(labels.cpu().numpy()), len(train_y), options, groups).to(device)
    folds = _weigh_folds(labels, fold_of, len(train_y), target, options, groups)
    summaries: dict[int, ProbeSummary] = {}
    with _full_precision():
        if len(readouts) > 1 and options.select_by == "log_loss":
            summaries = _scout_all(readouts, folds, options)
        rest = [i for i in range(len(readouts)) if i not in summaries]
        fitted = map_on_cores(lambda i: _fit(readouts[i], folds, options), rest, device)
    probes = dict(zip(rest, fitted, strict=True))
    summaries |= {i: probe.summary for i, probe in probes.items()}
    return probes, [summaries[i] for i in range(len(readouts))]


def check_choosable(
    labels: Tensor, target: Target, options: ProbeOptions = DEFAULT_OPTIONS, groups: Tensor | None = None
) -> None:
    """Raises ValueError if cross-validation of rows with these labels (N, ...) has no row that can choose C."""
    fold_of = _draw_fold_of(target.stratify(labels.numpy()), len(labels), options, groups)
    _find_scored(labels, fold_of, target, groups)


def _scout_all(readouts: Sequence[RawFeatures], folds: Folds, options: ProbeOptions) -> dict[int, ProbeSummary]:
    """Returns summaries of the readouts that cannot win, by number. The first readout is not among them.

    Each stage of fits is finer than the stage before, and looks only near the best C that was found there.
    """
    lost, rest, grid = dict[int, ProbeSummary](), list(range(len(readouts))), sorted(options.c_grid)
    grids = dict.fromkeys(rest, grid[::2])
    for steps, some, caution in ((_ROUGH, take_folds(folds, ROUGH_FOLDS), 2.0), (_COARSE, folds, 1.0)):
        found = _scout_some(readouts, grids, some, options, steps)
        lost |= {i: found[i][0] for i, is_lost in _find_losers(found, caution).items() if is_lost and i > 0}
        rest = [i for i in rest if i not in lost]
        if len(rest) <= 2:
            return lost
        best = {i: grid.index(found[i][0].c) for i in rest}
        # Rough fits prefer too small values of C, never too large ones.
        grids = {i: grid[max(0, k - 2) :: 2] for i, k in best.items()}
    grids = {i: grid[max(0, k - 1) : k + 2] for i, k in best.items()}
    found = _scout_some(readouts, grids, folds, options, _NEAR)
    highest = (1 + NEAR_MARGIN) * min(summary.score.loss for summary, _ in found.values())
    return lost | {i: summary for i, (summary, _) in found.items() if i > 0 and summary.score.loss > highest}


_Scouted = tuple[ProbeSummary, Tensor]  # a path, and the weighted held-out losses (N,) for its best C


def _scout_some(
    readouts: Sequence[RawFeatures],
    grids: Mapping[int, Sequence[float]],
    folds: Folds,
    options: ProbeOptions,
    steps: _Steps,
) -> dict[int, _Scouted]:
    """Returns the path of each readout that has a grid of C, by number."""

    def scout(i: int) -> _Scouted:
        return _scout(readouts[i], folds, replace(options, c_grid=grids[i]), steps)

    return dict(zip(grids, map_on_cores(scout, list(grids), readouts[0].device), strict=True))


def _find_losers(found: Mapping[int, _Scouted], caution: float) -> dict[int, bool]:
    """Returns whether each readout is worse than the best by `caution` times the margin."""
    lowest = min((losses for _, losses in found.values()), key=lambda losses: float(losses.sum()))
    excess = torch.stack([losses - lowest for _, losses in found.values()])
    margin = torch.maximum(COARSE_MARGIN * lowest.sum(), excess.std(1) * excess.shape[1] ** 0.5)
    return dict(zip(found, (excess.sum(1) > caution * margin).tolist(), strict=True))


def _draw_fold_of(strata: NDArray[np.int64], num_train: int, options: ProbeOptions, groups: Tensor | None) -> Tensor:
    """Returns the fold (N,) that holds out each row, on the CPU; -1: no fold."""
    if options.cv_folds == 1:
        return torch.where(torch.arange(len(strata)) < num_train, -1, 0)
    count = num_train if options.holds_out else len(strata)
    of_rows = None if groups is None else groups[:count]
    fold_of = draw_folds(torch.from_numpy(strata[:count]), options.cv_folds, options.seed, of_rows)
    return torch.cat([fold_of, fold_of.new_full((len(strata) - count,), -1)])


def _weigh_folds(
    labels: Tensor, fold_of: Tensor, num_train: int, target: Target, options: ProbeOptions, groups: Tensor | None
) -> Folds:
    count = int(fold_of.max()) + 1
    is_train = torch.arange(len(labels), device=labels.device) < num_train
    is_fitted = is_train if options.holds_out else torch.ones_like(is_train)

    def weigh(rows: Tensor) -> Tensor:
        return target.balance(labels, rows) if options.class_balance != "none" else rows.float()

    rows = is_fitted | (fold_of >= 0)
    scored = torch.zeros_like(is_train)
    scored[rows] = _find_scored(
        labels[rows], fold_of[rows], target, None if groups is None else groups.to(rows.device)[rows]
    )
    return Folds(
        target=target,
        labels=labels,
        fold_of=fold_of,
        fit_weights=torch.stack([weigh((fold_of != fold) & is_fitted) for fold in range(count)]),
        head_weights=weigh(torch.ones_like(is_train) if options.refit else is_train),
        score_weights=weigh(scored),
    )


def _find_scored(labels: Tensor, fold_of: Tensor, target: Target, groups: Tensor | None) -> Tensor:
    """Returns a mask (N,) of the rows by which C is chosen. Raises ValueError if there is no such row."""
    scored = target.find_scored(labels, fold_of, int(fold_of.max()) + 1)
    if not bool(scored.any()):
        of_groups = "" if groups is None else f" of {len(groups.unique())} groups, which no fold divides"
        remedy = "at least two images of one class" if groups is None else "images of at least two groups of one class"
        raise ValueError(
            f"no class has both a row to fit on and a row to choose C by, among {len(labels)} rows (images){of_groups}: give "
            f"{remedy}"
        )
    return scored


def _scout(features: RawFeatures, folds: Folds, options: ProbeOptions, steps: _Steps) -> tuple[ProbeSummary, Tensor]:
    """Returns a summary of a path, and the weighted held-out losses (N,) for the best C of this path."""
    started = time.perf_counter()
    loss = folds.target.make_convex_loss(folds.labels)
    problems = standardize(features, loss, spread_floor=options.spread_floor)
    held_out = _FoldFits(problems=problems, folds=folds)
    path, best, fits = _follow_path(held_out, options, steps)
    losses = held_out.losses(held_out.logits(fits))
    seconds = time.perf_counter() - started
    return ProbeSummary(c=best.c, score=best.score, path=tuple(path), tolerance=steps.tol, seconds=seconds), losses


def _fit(features: RawFeatures, folds: Folds, options: ProbeOptions) -> Probe:
    started, count = time.perf_counter(), len(folds.fit_weights)
    loss = folds.target.make_convex_loss(folds.labels)
    problems = standardize(features, loss, spread_floor=options.spread_floor)
    held_out = _FoldFits(problems=problems, folds=folds)
    path, best, fits = _follow_path(held_out, options, _FINE)
    if len(options.c_grid) > 1 and best.c in (min(options.c_grid), max(options.c_grid)):
        end = "strongest" if best.c == min(options.c_grid) else "weakest"
        log.debug("C = %g is the %s regularization of the probe that is tried", best.c, end)
    # Solve the folds of the chosen C again to full accuracy, together with the head, which is one more problem.
    solutions, _ = _solve(
        problems,
        torch.full((count + 1,), best.c, device=features.device),
        torch.cat([folds.fit_weights, folds.head_weights[None]]),
        torch.cat([fits, fits.mean(0, keepdim=True)]),
        options.solver(FINAL_TOL),
    )
    weight, bias = problems.features.unstandardize(solutions[-1])
    logits = held_out.logits(solutions[:-1])
    score = held_out.score(logits)
    path = [replace(point, score=score) if point is best else point for point in path]
    seconds = time.perf_counter() - started
    return Probe(
        weight=weight,
        bias=bias,
        summary=ProbeSummary(c=best.c, score=score, path=tuple(path), tolerance=FINAL_TOL, seconds=seconds),
        held_out_logits=logits,
        held_out_losses=held_out.losses(logits),
        refitted=options.refit,
    )


def choose_probe(probes: Sequence[Probe]) -> int:
    """Returns the index of the probe with the lowest held-out log-loss, or 0 if the gain over the first probe may be chance.

    The probes belong to readouts of one network, and the first probe belongs to the network's own readout. All probes must be
    solved on the same rows with the same seed. The paired gain is beyond chance if it exceeds two standard errors.
    """
    best = min(range(len(probes)), key=lambda i: probes[i].score.loss)
    gains = probes[0].held_out_losses - probes[best].held_out_losses
    return best if gains.sum() > 2 * gains.std() * len(gains) ** 0.5 else 0


@dataclass(frozen=True, kw_only=True)
class _FoldFits:
    """The features and folds of all images. The fit of a fold scores the images that the fold holds out."""

    problems: Problems
    folds: Folds

    def logits(self, fits: Tensor) -> Tensor:
        """Returns the logits (N, K) of all images, which are nan for images that no fold holds out."""
        fold_of = self.folds.fold_of
        logits = torch.full((len(fold_of), self.folds.target.num_outputs), torch.nan, device=fold_of.device)
        start = 0
        for block in self.problems.features.blocks():
            for fold, fit in enumerate(fits):
                rows = (fold_of[start : start + len(block)] == fold).nonzero()[:, 0]
                logits[start + rows] = block[rows] @ fit.T
            start += len(block)
        return logits

    def losses(self, logits: Tensor) -> Tensor:
        """Returns the weighted loss of each image. The sum of the losses is the held-out log-loss."""
        losses, weights = self.folds.target.losses(logits, self.folds.labels), self.folds.score_weights
        # `where` is needed because the loss is nan for rows that no fold holds out.
        return torch.where(weights > 0, losses, 0.0) * weights / weights.sum()

    def score(self, logits: Tensor) -> Score:
        return self.folds.target.score(logits, self.folds.labels, self.folds.score_weights)


def _follow_path(
    held_out: _FoldFits, options: ProbeOptions, steps: _Steps
) -> tuple[list[PathPoint], PathPoint, Tensor]:
    """Solves for growing values of C. Returns a point for each C, the best point, and the fits of all folds for the best C."""
    c_grid, fit_weights = sorted(options.c_grid), held_out.folds.fit_weights
    num_folds = len(fit_weights)
    path: list[PathPoint] = []
    best: PathPoint | None = None
    fits = last = None
    for first in range(0, len(c_grid), steps.block):
        block = torch.tensor(c_grid[first : first + steps.block], dtype=torch.float32, device=fit_weights.device)
        solutions, iterations = _solve(
            held_out.problems,
            block.repeat_interleave(num_folds),
            fit_weights.repeat(len(block), 1),
            None if last is None else last.repeat(len(block), 1, 1),
            options.solver(steps.tol),
        )
        by_c = solutions.unflatten(0, (len(block), num_folds))
        for c, fold_fits, spent in zip(c_grid[first:], by_c, iterations.view(len(block), -1), strict=False):
            score = held_out.score(held_out.logits(fold_fits))
            point = PathPoint(c=c, score=score, iterations=spent.float().mean().item())
            path.append(point)
            if best is None or point.score.rank(options.select_by) < best.score.rank(options.select_by):
                best, fits = point, fold_fits
        last = by_c[-1]
        assert best is not None
        if path[-1].c >= _PATIENCE * best.c:
            break
    assert best is not None
    assert fits is not None
    return path, best, fits


def _solve(
    problems: Problems, cs: Tensor, row_weights: Tensor, start: Tensor | None, options: SolverOptions
) -> tuple[Tensor, Tensor]:
    """Solves one problem for each C in `cs` and row of `row_weights`. Returns the solutions and the numbers of iterations."""
    totals = row_weights.sum(1)
    solutions, iterations = minimize(problems, 1 / (cs * totals), row_weights / totals[:, None], start, options)
    if stopped := int((iterations == options.max_iterations).sum()):
        log.warning(
            "linear probe: %d of %d problems stopped after %d iterations, before the solver converged",
            stopped, len(cs), options.max_iterations,
        )  # fmt: skip
    return solutions, iterations


def _check(features: Tensor, labels: Tensor, target: Target, c_grid: Sequence[float]) -> None:
    if features.ndim != 2 or len(labels) != len(features) or not features.numel():
        raise ValueError(
            f"features {tuple(features.shape)} and labels {tuple(labels.shape)}: give shapes (N, D) and (N, ...), not empty"
        )
    if not features.is_floating_point():
        raise ValueError(f"features are {features.dtype}: give a float tensor")
    target.check()
    target.check_labels(labels)
    if not c_grid or not all(0 < c < float("inf") for c in c_grid):
        raise ValueError(f"c_grid={list(c_grid)}: give values of C above 0")


@contextmanager
def _full_precision() -> Iterator[None]:
    """Turns off TF32 and bfloat16 in matrix products inside the context, because low precision impairs convergence."""
    setting = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(setting)
