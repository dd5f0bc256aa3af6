"""The linear probe is a convex problem, so it is solved: every regularisation strength and every fold together.

A probe is multinomial logistic regression on frozen features; its one free number, the strength C, is chosen by validation.
All (C, fold) problems share one feature matrix and go to one batched solver (lbfgs.py). The path runs from small C (a few
iterations) to large C (hundreds), a block at a time, each block starting from the last solution, and ends where validation
has become clearly worse: the costly end is never solved unless it is needed.

The objective is that of scikit-learn's `LogisticRegression` on features standardised with a floor (0: as its StandardScaler
does; `solve_path`'s default), with free biases:
||W||^2 / 2 + C * sum_i w_i * CE_i. For two classes scikit-learn has one row of W where this has two: its C is twice this one.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_transfer.training.folds import balance, draw_folds, find_judged
from hf_transfer.training.lbfgs import Problems, minimise, pose
from hf_transfer.training.metrics import rank_score

log = logging.getLogger(__name__)

DEFAULT_C_GRID: tuple[float, ...] = tuple(float(f"{10 ** (i / 3):.3g}") for i in range(-15, 4))
"""1e-5 to 10, three values a decade. The path ends early, so its width costs nothing. Above 10 there is hardly a penalty
left, and a few images a class, all of them easy, would always choose the largest C that there is."""

SPREAD_FLOOR = 1.0
"""A share of the features' median spread that is added (squared) to each one's before standardising (see `lbfgs.pose`).

A feature that hardly varies among few images varies elsewhere; scaled to the others' spread it gets weights that are large
for them. On images that were not selected, 10 a class, MobileNetV2's probe gains 1.2 points by it on hymenoptera and 1.3 on
sign-language digits, and a fifth to two fifths of the log-loss; DeiT-Tiny's features, from a LayerNorm, are as good without."""

_BLOCK = 2  # values of C solved together, before the path goes on from the last of them
_PATIENCE = 4.0  # the path ends when it has gone this factor in C beyond the best value
_PATH_TOL = 1e-5  # of the objective: enough to compare values of C
_FINAL_TOL = 1e-8  # for the chosen C


@dataclass(frozen=True, kw_only=True)
class Path:
    """Solutions of P problems: logits of problem p on raw features are `x @ weight[p].T + bias[p]`."""

    c: tuple[float, ...]
    weight: Tensor  # (P, K, D) float32
    bias: Tensor  # (P, K) float32
    objective: Tensor  # (P,) float64: ||W||^2 / 2 + C * sum_i w_i * CE_i, W on standardised features
    iterations: Tensor  # (P,) int64


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A fitted linear head: logits on raw features are `x @ weight.T + bias`."""

    weight: Tensor  # (K, D) float32
    bias: Tensor  # (K,) float32
    c: float
    log_loss: float  # of the chosen C on rows that its fits have not seen
    accuracy: float  # likewise
    table: list[dict[str, float]]  # a row for each C that was solved: c, log_loss, accuracy, iterations
    validation_logits: Tensor  # (V, K): each validation row by a fit that has not seen it
    held_out_losses: Tensor  # (N,) of train then validation rows, weighted to sum to log_loss; 0 where not judged
    refitted: bool  # on train + validation together, with the chosen C
    seconds: float


def solve_path(
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    c_grid: Sequence[float],
    *,
    row_weights: Tensor | None = None,
    spread_floor: float = 0.0,
    tol: float = 1e-10,
    max_iterations: int = 2000,
    memory_bytes: int | None = None,
) -> Path:
    """One solution for each C, on the features' device.

    features (N, D) of any float type; targets (N,) int64; row_weights (N,), or (P, N) with a row for each C. A problem
    stops when what is left to gain, as estimated, is below `tol` of its objective: at 1e-10 logits are within about 1e-3
    of the exact ones. Problems run in groups whose working memory stays below memory_bytes (see `lbfgs.minimise`).

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
        problems = pose(features, targets.to(device), num_classes, spread_floor=spread_floor)
        cs = torch.tensor(list(c_grid), dtype=torch.float32, device=device)
        found, iterations = _solve(
            problems, cs, row_weights, tol=tol, max_iterations=max_iterations, memory_bytes=memory_bytes
        )
        # A problem at a time: float64 margins of all would not fit where the solver had to work in groups.
        losses = [
            (problems.margins(w[None])[0].double().logsumexp(0) * r).sum()
            for w, r in zip(found, row_weights, strict=True)
        ]
        weight, bias = problems.unstandardise(found)
    objective = 0.5 * found[:, :, :-1].double().square().sum((1, 2)) + cs * torch.stack(losses)
    return Path(c=tuple(c_grid), weight=weight, bias=bias, objective=objective, iterations=iterations)


def fit_probe(
    train_x: Tensor,
    train_y: Tensor,
    val_x: Tensor,
    val_y: Tensor,
    num_classes: int,
    *,
    c_grid: Sequence[float] = DEFAULT_C_GRID,
    select_by: Literal["log_loss", "accuracy"] = "log_loss",
    class_balance: Literal["none", "loss"] = "none",
    folds: int = 5,
    refit: bool = True,
    spread_floor: float = SPREAD_FLOOR,
    seed: int = 0,
    max_iterations: int = 1000,
    memory_bytes: int | None = None,
) -> Probe:
    """A head for features (N, D): C chosen on rows not fitted on, then refitted on train + validation with that C.

    folds: 1 chooses on the given validation rows; k >= 2 by stratified k-fold cross-validation over train + validation,
    drawn by `seed`. select_by "accuracy": ties go to the lower log-loss. class_balance "loss": classes count alike, whatever
    their number of rows, in the fit and in the choice. refit False: the head is fitted on train alone. Features are
    standardised by the mean and spread of train + validation in all fits; spread_floor: see SPREAD_FLOOR.

    Raises ValueError as `solve_path` does, and where no class has a row to fit and another to choose by.
    """
    started = time.perf_counter()
    _check_choice("select_by", select_by, ("log_loss", "accuracy"))
    _check_choice("class_balance", class_balance, ("none", "loss"))
    if folds < 1:
        raise ValueError(f"folds={folds}: choose 1 (the given validation rows) or k >= 2 (cross-validation)")
    _check(train_x, train_y, num_classes, c_grid)
    _check(val_x, val_y, num_classes, c_grid)
    if train_x.shape[1] != val_x.shape[1]:
        raise ValueError(f"train has {train_x.shape[1]} features and validation {val_x.shape[1]}: give the same ones")
    device = train_x.device
    targets = torch.cat([train_y.to(device), val_y.to(device)])
    in_train = torch.arange(len(targets), device=device) < len(train_y)
    fold_of = torch.where(in_train, -1, 0) if folds == 1 else draw_folds(targets, folds, seed)

    def weigh(rows: Tensor) -> Tensor:
        return balance(targets, rows, num_classes) if class_balance == "loss" else rows.float()

    with _full_precision(device):
        problems = pose(torch.cat([train_x, val_x.to(device)]), targets, num_classes, spread_floor=spread_floor)
        fit_weights = torch.stack([weigh(fold_of != fold) for fold in range(folds)])
        score_weights = weigh(find_judged(targets, fold_of, folds))
        table, best, fits = _follow_path(
            problems, fold_of, fit_weights, score_weights, sorted(c_grid), select_by, max_iterations, memory_bytes
        )
        # The chosen C again, to full accuracy, and with it the head: the fit to all rows.
        head_weights = weigh(torch.ones_like(in_train) if refit else in_train)
        found, _ = _solve(
            problems,
            torch.full((folds + 1,), best["c"], device=device),
            torch.cat([fit_weights, head_weights[None]]),
            torch.cat([fits, fits.mean(0, keepdim=True)]),
            tol=_FINAL_TOL,
            max_iterations=max_iterations,
            memory_bytes=memory_bytes,
        )
        fits = found[:-1]
        best |= _score(problems, fold_of, score_weights, fits)
        held_out_losses = _compute_held_out_losses(problems, fold_of, score_weights, fits)
        weight, bias = problems.unstandardise(found[-1])
        validation_logits = _compute_held_out_logits(problems, fold_of, fits)[~in_train]
    return Probe(
        weight=weight,
        bias=bias,
        c=best["c"],
        log_loss=best["log_loss"],
        accuracy=best["accuracy"],
        table=table,
        validation_logits=validation_logits,
        held_out_losses=held_out_losses,
        refitted=refit,
        seconds=time.perf_counter() - started,
    )


def choose_probe(probes: Sequence[Probe]) -> int:
    """The index of the probe with the least held-out log-loss, or 0 where that gain over the first may be chance.

    For probes of several readouts of one network, its own first, solved on the same rows with the same seed. Losses are
    compared row by row; a gain counts where it is more than two standard errors.
    """
    best = min(range(len(probes)), key=lambda i: probes[i].log_loss)
    gains = probes[0].held_out_losses - probes[best].held_out_losses
    return best if gains.sum() > 2 * gains.std() * len(gains) ** 0.5 else 0


def _follow_path(
    problems: Problems,
    fold_of: Tensor,
    fit_weights: Tensor,
    score_weights: Tensor,
    c_grid: Sequence[float],
    select_by: str,
    max_iterations: int,
    memory_bytes: int | None,
) -> tuple[list[dict[str, float]], dict[str, float], Tensor]:
    """The table, its best row, and the fits (F, K, D + 1) of that row. fit_weights (F, N), score_weights (N,)."""
    num_folds = len(fit_weights)
    table: list[dict[str, float]] = []
    best: dict[str, float] = {}
    fits = last = None
    for at in range(0, len(c_grid), _BLOCK):
        block = torch.tensor(c_grid[at : at + _BLOCK], dtype=torch.float32, device=fold_of.device)
        found, iterations = _solve(
            problems,
            block.repeat_interleave(num_folds),
            fit_weights.repeat(len(block), 1),
            None if last is None else last.repeat(len(block), 1, 1),
            tol=_PATH_TOL,
            max_iterations=max_iterations,
            memory_bytes=memory_bytes,
        )
        by_c = found.unflatten(0, (len(block), num_folds))
        for c, of_folds, spent in zip(c_grid[at:], by_c, iterations.view(len(block), -1), strict=False):
            row = {
                "c": c,
                **_score(problems, fold_of, score_weights, of_folds),
                "iterations": spent.float().mean().item(),
            }
            table.append(row)
            if fits is None or rank_score(row, select_by) < rank_score(best, select_by):
                best, fits = row, of_folds
        last = by_c[-1]
        if table[-1]["c"] >= _PATIENCE * best["c"]:
            break
    assert fits is not None
    if len(c_grid) > 1 and best["c"] in (c_grid[0], c_grid[-1]):
        log.info("the best C is an end of the grid, %g: a wider grid may do better", best["c"])
    return table, best, fits


def _solve(
    problems: Problems,
    cs: Tensor,
    row_weights: Tensor,
    start: Tensor | None = None,
    *,
    tol: float,
    max_iterations: int,
    memory_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    """`minimise` in terms of C (P,) and weights of rows (P, N) that need not sum to 1: the same minimum, rescaled."""
    totals = row_weights.sum(1)
    found, iterations = minimise(
        problems,
        1 / (cs * totals),
        row_weights / totals[:, None],
        start,
        tol=tol,
        max_iterations=max_iterations,
        memory_bytes=memory_bytes,
    )
    if stopped := int((iterations == max_iterations).sum()):
        log.warning(
            "%d of %d problems stopped at %d iterations, before they converged", stopped, len(cs), max_iterations
        )
    return found, iterations


def _score(problems: Problems, fold_of: Tensor, weights: Tensor, fits: Tensor) -> dict[str, float]:
    hits = (_compute_held_out_logits(problems, fold_of, fits).argmax(1) == problems.targets).float()
    losses = _compute_held_out_losses(problems, fold_of, weights, fits)
    return {"log_loss": losses.sum().item(), "accuracy": ((hits * weights).sum() / weights.sum()).item()}


def _compute_held_out_losses(problems: Problems, fold_of: Tensor, weights: Tensor, fits: Tensor) -> Tensor:
    losses = F.cross_entropy(_compute_held_out_logits(problems, fold_of, fits), problems.targets, reduction="none")
    return torch.where(weights > 0, losses, 0.0) * weights / weights.sum()  # where: rows never held out have nan


def _compute_held_out_logits(problems: Problems, fold_of: Tensor, fits: Tensor) -> Tensor:
    """(N, K), each row by the fit (F, K, D + 1) that has not seen it; nan for rows that are never held out."""
    logits = torch.full((len(fold_of), problems.num_classes), torch.nan, device=fold_of.device)
    for fold, fit in enumerate(fits):
        rows = (fold_of == fold).nonzero()[:, 0]
        logits[rows] = problems.features[rows] @ fit.T
    return logits


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


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(allowed)}")


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, no TF32 or bfloat16 products: a user's settings for training would spoil convergence."""
    setting = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(setting)
