"""The linear probe is a convex problem, so it is solved, for every regularization strength and every fold at once.

A probe is multinomial logistic regression on frozen features; its only hyperparameter, the strength C, is chosen by validation.
All (C, fold) problems share one feature matrix and go to one batched solver (lbfgs.py). The path runs from small C (a few
iterations) to large C (hundreds) in blocks. Each block starts from the last solution, and the path ends once validation is
clearly worse, so the expensive end is solved only if it is needed.

The objective is that of scikit-learn's `LogisticRegression` on standardized features, with free biases:
||W||^2 / 2 + C * sum_i w_i * CE_i. For two classes scikit-learn has one row of W where this has two: its C is twice this one.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_transfer.config import ClassBalance, SelectBy
from hf_transfer.training.folds import balance, draw_folds, find_scored
from hf_transfer.training.lbfgs import Problems, SolverOptions, minimize, standardize
from hf_transfer.training.records import Score

log = logging.getLogger(__name__)

DEFAULT_C_GRID: tuple[float, ...] = tuple(float(f"{10 ** (i / 3):.3g}") for i in range(-15, 4))
"""1e-5 to 10, three values per decade. The path ends early, so its width costs nothing. Above 10 there is hardly a penalty
left, and a few easy images per class would always choose the largest C on offer."""

SPREAD_FLOOR = 1.0
"""A share of the features' median standard deviation that is added (squared) to each one's before standardizing (see
`lbfgs.standardize`).

A feature that hardly varies among few images varies on others; scaled to unit variance, its weight is too large for them. With
10 images per class, judged on images that were not used for selection, MobileNetV2's probe gains 1.2 points from it on
hymenoptera and 1.3 on sign-language digits, and its log-loss falls by a fifth to two fifths. DeiT-Tiny's features come from a
LayerNorm and are as good without."""

_BLOCK = 2  # values of C that are solved together; the next block starts from the last of them
_PATIENCE = 4.0  # the path ends this factor in C beyond the best value
_PATH_TOL = 1e-5  # of the objective: enough to compare values of C
_FINAL_TOL = 1e-8  # for the chosen C


@dataclass(frozen=True, kw_only=True)
class Path:
    """Solutions of P problems: logits of problem p on raw features are `x @ weight[p].T + bias[p]`."""

    c: tuple[float, ...]
    weight: Tensor  # (P, K, D) float32
    bias: Tensor  # (P, K) float32
    objective: Tensor  # (P,) float64: ||W||^2 / 2 + C * sum_i w_i * CE_i, W on standardized features
    iterations: Tensor  # (P,) int64


@dataclass(frozen=True, kw_only=True)
class PathPoint:
    """One value of C that was solved: its held-out score, and the mean number of iterations."""

    c: float
    score: Score
    iterations: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A fitted linear head: logits on raw features are `x @ weight.T + bias`."""

    weight: Tensor  # (K, D) float32
    bias: Tensor  # (K,) float32
    c: float
    score: Score  # of the chosen C, each row by a fit that has not seen it
    path: tuple[PathPoint, ...]
    validation_logits: Tensor  # (V, K): each validation row by a fit that has not seen it
    held_out_losses: Tensor  # (N,) of train then validation rows, weighted to sum to the log-loss; 0 if not scored
    refitted: bool  # on train + validation together, with the chosen C
    seconds: float


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """How a probe is chosen and fitted.

    folds: 1 chooses C on the given validation rows; k >= 2 by stratified k-fold cross-validation over train + validation, drawn
    by `seed`. select_by "accuracy": ties go to the lower log-loss. class_balance "loss": classes count equally in the fit and
    in the choice. refit False: the head is fitted on train alone.
    """

    c_grid: Sequence[float] = DEFAULT_C_GRID
    select_by: SelectBy = "log_loss"
    class_balance: ClassBalance = "none"
    folds: int = 5
    refit: bool = True
    spread_floor: float = SPREAD_FLOOR
    seed: int = 0
    max_iterations: int = 1000
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        _check_choice("select_by", self.select_by, ("log_loss", "accuracy"))
        _check_choice("class_balance", self.class_balance, ("none", "loss"))
        if self.folds < 1:
            raise ValueError(f"folds={self.folds}: choose 1 (the given validation rows) or k >= 2 (cross-validation)")

    def solver(self, tol: float) -> SolverOptions:
        """The solver's part of it."""
        return SolverOptions(tol=tol, max_iterations=self.max_iterations, memory_bytes=self.memory_bytes)


DEFAULT_SOLVER = SolverOptions()
DEFAULT_OPTIONS = ProbeOptions()


def solve_path(
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    c_grid: Sequence[float],
    row_weights: Tensor | None = None,
    options: SolverOptions = DEFAULT_SOLVER,
) -> Path:
    """One solution for each C, on the features' device.

    features (N, D) of any float type; targets (N,) int64; row_weights (N,), or (P, N) with a row for each C. With the default
    `tol` of 1e-10, logits are within about 1e-3 of the exact ones.

    Raises ValueError: features that are not finite, targets out of range, C not positive, shapes that do not fit.
    """
    _check(features, targets, num_classes, c_grid)
    num_rows, device = len(features), features.device
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
    with _full_precision(device):
        problems = standardize(features, targets.to(device), num_classes, spread_floor=options.spread_floor)
        cs = torch.tensor(list(c_grid), dtype=torch.float32, device=device)
        solutions, iterations = _solve(problems, cs, row_weights, None, options)
        # One problem at a time: float64 margins of all would not fit where the solver had to work in groups.
        losses = [
            (problems.margins(w[None])[0].double().logsumexp(0) * r).sum()
            for w, r in zip(solutions, row_weights, strict=True)
        ]
        weight, bias = problems.unstandardize(solutions)
    objective = 0.5 * solutions[:, :, :-1].double().square().sum((1, 2)) + cs * torch.stack(losses)
    return Path(c=tuple(c_grid), weight=weight, bias=bias, objective=objective, iterations=iterations)


def fit_probe(
    train_x: Tensor,
    train_y: Tensor,
    val_x: Tensor,
    val_y: Tensor,
    num_classes: int,
    options: ProbeOptions = DEFAULT_OPTIONS,
) -> Probe:
    """A head for features (N, D): C is chosen on rows outside the fit, then the head is fitted with that C.

    Features are standardized by the mean and spread of train + validation in all fits. Raises ValueError as `solve_path` does,
    and if no class has a row to fit on and another to choose by.
    """
    started = time.perf_counter()
    _check(train_x, train_y, num_classes, options.c_grid)
    _check(val_x, val_y, num_classes, options.c_grid)
    if train_x.shape[1] != val_x.shape[1]:
        raise ValueError(f"train has {train_x.shape[1]} features and validation {val_x.shape[1]}: give the same ones")
    device, folds = train_x.device, options.folds
    targets = torch.cat([train_y.to(device), val_y.to(device)])
    in_train = torch.arange(len(targets), device=device) < len(train_y)
    fold_of = torch.where(in_train, -1, 0) if folds == 1 else draw_folds(targets, folds, options.seed)

    def weigh(rows: Tensor) -> Tensor:
        return balance(targets, rows, num_classes) if options.class_balance == "loss" else rows.float()

    with _full_precision(device):
        features = torch.cat([train_x, val_x.to(device)])
        problems = standardize(features, targets, num_classes, spread_floor=options.spread_floor)
        fit_weights = torch.stack([weigh(fold_of != fold) for fold in range(folds)])
        score_weights = weigh(find_scored(targets, fold_of, folds))
        held_out = _HeldOut(problems=problems, fold_of=fold_of, weights=score_weights)
        path, best, fits = _follow_path(held_out, fit_weights, options)
        # The chosen C again, to full accuracy, and with it the head: the fit to all rows.
        head_weights = weigh(torch.ones_like(in_train) if options.refit else in_train)
        solutions, _ = _solve(
            problems,
            torch.full((folds + 1,), best.c, device=device),
            torch.cat([fit_weights, head_weights[None]]),
            torch.cat([fits, fits.mean(0, keepdim=True)]),
            options.solver(_FINAL_TOL),
        )
        fits = solutions[:-1]
        weight, bias = problems.unstandardize(solutions[-1])
        score = held_out.score(fits)
    return Probe(
        weight=weight,
        bias=bias,
        c=best.c,
        score=score,
        path=tuple(replace(point, score=score) if point is best else point for point in path),
        validation_logits=held_out.logits(fits)[~in_train],
        held_out_losses=held_out.losses(fits),
        refitted=options.refit,
        seconds=time.perf_counter() - started,
    )


def choose_probe(probes: Sequence[Probe]) -> int:
    """The index of the probe with the lowest held-out log-loss, or 0 if its gain over the first may be chance.

    For probes of several readouts of one network, its own first, solved on the same rows with the same seed. Losses are
    compared row by row; a gain counts if it is more than two standard errors.
    """
    best = min(range(len(probes)), key=lambda i: probes[i].score.log_loss)
    gains = probes[0].held_out_losses - probes[best].held_out_losses
    return best if gains.sum() > 2 * gains.std() * len(gains) ** 0.5 else 0


@dataclass(frozen=True, kw_only=True)
class _HeldOut:
    """Scores of fits (F, K, D + 1), each row by the fit that has not seen it."""

    problems: Problems
    fold_of: Tensor  # (N,) the fold in which each row is held out; -1: never
    weights: Tensor  # (N,) of each row in the score

    def logits(self, fits: Tensor) -> Tensor:
        """(N, K); nan for rows that are never held out."""
        logits = torch.full((len(self.fold_of), self.problems.num_classes), torch.nan, device=self.fold_of.device)
        for fold, fit in enumerate(fits):
            rows = (self.fold_of == fold).nonzero()[:, 0]
            logits[rows] = self.problems.features[rows] @ fit.T
        return logits

    def losses(self, fits: Tensor) -> Tensor:
        """(N,), weighted so that they sum to the log-loss."""
        losses = F.cross_entropy(self.logits(fits), self.problems.targets, reduction="none")
        # where: rows that are never held out have nan
        return torch.where(self.weights > 0, losses, 0.0) * self.weights / self.weights.sum()

    def score(self, fits: Tensor) -> Score:
        """Accuracy and log-loss."""
        hits = (self.logits(fits).argmax(1) == self.problems.targets).float()
        accuracy = (hits * self.weights).sum() / self.weights.sum()
        return Score(accuracy=accuracy.item(), log_loss=self.losses(fits).sum().item())


def _follow_path(
    held_out: _HeldOut, fit_weights: Tensor, options: ProbeOptions
) -> tuple[list[PathPoint], PathPoint, Tensor]:
    """The points of the path, the best one, and its fits (F, K, D + 1). fit_weights (F, N)."""
    c_grid, num_folds = sorted(options.c_grid), len(fit_weights)
    path: list[PathPoint] = []
    best: PathPoint | None = None
    fits = last = None
    for first in range(0, len(c_grid), _BLOCK):
        block = torch.tensor(c_grid[first : first + _BLOCK], dtype=torch.float32, device=fit_weights.device)
        solutions, iterations = _solve(
            held_out.problems,
            block.repeat_interleave(num_folds),
            fit_weights.repeat(len(block), 1),
            None if last is None else last.repeat(len(block), 1, 1),
            options.solver(_PATH_TOL),
        )
        by_c = solutions.unflatten(0, (len(block), num_folds))
        for c, fold_fits, spent in zip(c_grid[first:], by_c, iterations.view(len(block), -1), strict=False):
            point = PathPoint(c=c, score=held_out.score(fold_fits), iterations=spent.float().mean().item())
            path.append(point)
            if best is None or point.score.rank(options.select_by) < best.score.rank(options.select_by):
                best, fits = point, fold_fits
        last = by_c[-1]
        assert best is not None
        if path[-1].c >= _PATIENCE * best.c:
            break
    assert best is not None
    assert fits is not None
    if len(c_grid) > 1 and best.c in (c_grid[0], c_grid[-1]):
        log.info("the best C is an end of the grid, %g: a wider grid may do better", best.c)
    return path, best, fits


def _solve(
    problems: Problems, cs: Tensor, row_weights: Tensor, start: Tensor | None, options: SolverOptions
) -> tuple[Tensor, Tensor]:
    """`minimize` in terms of C (P,) and weights of rows (P, N) that need not sum to 1: the same minimum, rescaled."""
    totals = row_weights.sum(1)
    solutions, iterations = minimize(problems, 1 / (cs * totals), row_weights / totals[:, None], start, options)
    if stopped := int((iterations == options.max_iterations).sum()):
        log.warning(
            "%d of %d problems stopped after %d iterations, before they converged",
            stopped, len(cs), options.max_iterations,
        )  # fmt: skip
    return solutions, iterations


def _check(features: Tensor, targets: Tensor, num_classes: int, c_grid: Sequence[float]) -> None:
    if features.ndim != 2 or tuple(targets.shape) != (len(features),) or not features.numel():
        raise ValueError(
            f"features {tuple(features.shape)} and targets {tuple(targets.shape)}: give (N, D) and (N,), N and D above 0"
        )
    if not features.is_floating_point() or targets.is_floating_point():
        raise ValueError(f"features are {features.dtype} and targets {targets.dtype}: give floats and integers")
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: a probe needs 2 or more")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"targets go from {low} to {high}: with num_classes={num_classes} they must be 0 to {num_classes - 1}"
        )
    if not c_grid or not all(0 < c < float("inf") for c in c_grid):
        raise ValueError(f"c_grid={list(c_grid)}: give values of C above 0")


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Inside: no gradients, autocast, TF32 or bfloat16 products, whatever is set for training: they spoil convergence."""
    setting = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(setting)
