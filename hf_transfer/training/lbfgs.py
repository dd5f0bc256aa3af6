"""Many softmax regressions over one feature matrix, minimised together by L-BFGS.

P problems of K classes share features (N, D) and differ in one number a problem (the penalty) and one number a row (its
weight), so their matrix products are one product, (P*K, D) x (D, N). What makes it fast and safe in float32:
- logits are linear in the weights, so the line search costs no matrix product: an iteration is one product for the
  direction's logits and one for the gradient. The search is Newton's on the exact derivative, between brackets;
- the leading eigenvectors of the feature covariance, by a randomised range finder, precondition every problem, rescaled
  at every iteration by each class's curvature (Frangella, Tropp, Udell, "Randomized Nystrom preconditioning", arXiv
  2110.02820);
- logits are kept as margins against the true class, so that a well-separated row's gradient keeps its digits;
- a problem that has converged leaves the batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

HISTORY = 10  # pairs of steps and gradient changes that are remembered
_RANK = 128  # eigenvectors in the preconditioner
_SLOPE_LEFT = 0.1  # a line search ends when this share of the slope is left
_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class Problems:
    """What all problems share. The last column of the features is ones: its weight is the bias, which is not penalised."""

    features: Tensor  # (N, D + 1) float32, standardised
    targets: Tensor  # (N,) int64
    num_classes: int
    mean: Tensor  # (D,) of the raw features
    inverse_std: Tensor  # (D,), 0 where a feature is constant
    penalised: Tensor  # (D + 1,) 1, and 0 for the bias
    eigenvectors: Tensor  # (D + 1, R), 0 for the bias
    eigenvalues: Tensor  # (R,)
    other_eigenvalues: Tensor  # (D + 1,) the mean of those that are left, and 1 for the bias

    def margins(self, weights: Tensor) -> Tensor:
        """(P, K, N): logit of each class less that of the true class, for weights (P, K, D + 1)."""
        logits = (weights.flatten(0, 1) @ self.features.T).view(len(weights), self.num_classes, -1)
        return logits - logits.gather(1, self.targets.expand(len(weights), 1, -1))

    def unstandardise(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (..., K, D) and bias (..., K) that act on raw features."""
        weight = weights[..., :-1] * self.inverse_std
        return weight, weights[..., -1] - weight @ self.mean


def pose(features: Tensor, targets: Tensor, num_classes: int, *, spread_floor: float = 0.0) -> Problems:
    """Standardises features (N, D) of any float type, and finds the preconditioner. The input is not changed.

    `spread_floor`, a share of the median spread, is added (squared) to each feature's: those that hardly vary are then not
    blown up to count as much as the others.
    """
    num_rows, num_features = features.shape
    columns = torch.ones(num_rows, num_features + 1, device=features.device)
    columns[:, :-1] = features  # float32 from here on
    raw = columns[:, :-1]
    std, mean = torch.std_mean(raw, dim=0, correction=0)
    if not bool(torch.isfinite(std).all()):
        raise ValueError(
            f"{int((~torch.isfinite(std)).sum())} of {num_features} features hold nan, inf or values beyond float32; "
            "a network run in float16 may overflow: extract in float32 or bfloat16"
        )
    # A constant column's std is rounding, not spread.
    typical = std.median()
    if typical == 0 and bool((std > 0).any()):  # most features are constant, as after a ReLU that few images pass
        typical = std[std > 0].median()
    floored = (std.square() + (spread_floor * typical) ** 2).sqrt()
    inverse_std = torch.where(std > 1e-6 * mean.abs(), 1 / floored.clamp_min(_TINY), 0.0)
    raw.sub_(mean).mul_(inverse_std)
    vectors, values, others = _leading_eigenvectors(raw)
    one = torch.ones(1, device=features.device)
    return Problems(
        features=columns,
        targets=targets,
        num_classes=num_classes,
        mean=mean,
        inverse_std=inverse_std,
        penalised=torch.cat([torch.ones_like(mean), 0 * one]),
        eigenvectors=torch.cat([vectors, torch.zeros_like(vectors[:1])]),
        eigenvalues=values,
        other_eigenvalues=torch.cat([others.expand(num_features), one]),
    )


def _leading_eigenvectors(standardised: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors (D, R) and values (R,) of the covariance, nearly, and the mean of the values that are left."""
    num_rows, num_features = standardised.shape
    rank = min(_RANK, num_rows, num_features)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(num_features, rank, generator=generator).to(standardised.device)
    for _ in range(2):
        basis = torch.linalg.qr(standardised.T @ (standardised @ basis))[0]
    seen = standardised @ basis
    values, rotation = torch.linalg.eigh(seen.T @ seen / num_rows)
    values = values.clamp_min(0.0)
    left = standardised.square().sum() / num_rows - values.sum()
    return basis @ rotation, values, left.clamp_min(1e-3) / max(1, num_features - rank)


def minimise(
    problems: Problems,
    penalties: Tensor,
    row_weights: Tensor,
    start: Tensor | None = None,
    *,
    tol: float,
    max_iterations: int,
    memory_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights (P, K, D + 1) that minimise penalty / 2 * ||W||^2 + sum_i row_weight_i * CE_i, and iterations (P,).

    penalties (P,); row_weights (P, N), each row of which sums to 1; start (P, K, D + 1), or None for zeros. A problem stops
    when half its Newton decrement, an estimate of what is left to gain, is below `tol` times its objective. As many problems
    run together as fit into memory_bytes (default: 1 GiB on a CPU, a quarter of what is free on a GPU), one at least.
    """
    group = _count_fitting(problems, memory_bytes)
    found, iterations = [], []
    for at in range(0, len(penalties), group):
        part = slice(at, at + group)
        weights = None if start is None else start[part]
        weights, spent = _minimise_group(problems, penalties[part], row_weights[part], weights, tol, max_iterations)
        found.append(weights)
        iterations.append(spent)
    return torch.cat(found), torch.cat(iterations)


def _count_fitting(problems: Problems, memory_bytes: int | None) -> int:
    if memory_bytes is None:
        device = problems.features.device
        memory_bytes = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 2**30
    num_rows, num_columns = problems.features.shape
    of_one = 4 * problems.num_classes * (6 * num_rows + (2 * HISTORY + 8) * num_columns)
    return max(1, memory_bytes // of_one)


def _minimise_group(
    problems: Problems, penalties: Tensor, row_weights: Tensor, start: Tensor | None, tol: float, max_iterations: int
) -> tuple[Tensor, Tensor]:
    features = problems.features
    shape = (len(penalties), problems.num_classes, features.shape[1])
    weights = torch.zeros(shape, device=features.device) if start is None else start.clone()
    found = torch.empty_like(weights)
    iterations = torch.zeros(shape[0], dtype=torch.int64, device=features.device)
    index = torch.arange(shape[0], device=features.device)
    margins = problems.margins(weights)
    gradient, curvature = _gradient(problems, penalties, row_weights, weights, margins)
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    for iteration in range(max_iterations + 1):
        direction = -_apply_inverse_hessian(problems, penalties, curvature, gradient, history)
        slope = _dot(gradient, direction)
        loss = (margins.logsumexp(1) * row_weights).sum(1)
        objective = loss + 0.5 * penalties * _dot(weights, weights * problems.penalised)
        done = (-0.5 * slope <= tol * objective) | (iteration == max_iterations)
        if bool(done.any()):
            found[index[done]] = weights[done]
            iterations[index[done]] = iteration
            keep = ~done
            if not bool(keep.any()):
                break
            index, penalties, row_weights, weights, margins, gradient, direction, slope = (
                t[keep] for t in (index, penalties, row_weights, weights, margins, gradient, direction, slope)
            )
            history = [(s[keep], y[keep], rho[keep]) for s, y, rho in history]
        change = problems.margins(direction)
        length = _search(problems, penalties, row_weights, weights, margins, direction, change, slope)[:, None, None]
        margins.addcmul_(length, change)
        step = length * direction
        weights = weights + step
        before = gradient
        gradient, curvature = _gradient(problems, penalties, row_weights, weights, margins)
        bend = gradient - before
        # In exact arithmetic s.y > 0; rounding near the optimum can break that, and such a pair is left out (rho = 0).
        product = _dot(step, bend)
        sound = product > 1e-7 * (_dot(step, step) * _dot(bend, bend)).sqrt()
        history.append((step, bend, torch.where(sound, 1 / product.clamp_min(_TINY), 0.0)))
        del history[:-HISTORY]
    return found, iterations


def _gradient(
    problems: Problems, penalties: Tensor, row_weights: Tensor, weights: Tensor, margins: Tensor
) -> tuple[Tensor, Tensor]:
    """(P, K, D + 1), and the mean curvature p (1 - p) of each class (P, K)."""
    probabilities = margins.softmax(1)
    curvature = torch.einsum("pkn,pn->pk", probabilities * (1 - probabilities), row_weights)
    truth = problems.targets.expand(len(weights), 1, -1)
    residuals = probabilities.scatter_(1, truth, 0.0)
    residuals.scatter_(1, truth, -residuals.sum(1, keepdim=True))  # p - 1 without its cancellation
    residuals.mul_(row_weights[:, None])
    gradient = (residuals.flatten(0, 1) @ problems.features).view_as(weights)
    return gradient.addcmul_(penalties[:, None, None] * problems.penalised, weights), curvature.clamp_min(1e-7)


def _apply_inverse_hessian(
    problems: Problems,
    penalties: Tensor,
    curvature: Tensor,
    gradient: Tensor,
    history: list[tuple[Tensor, Tensor, Tensor]],
) -> Tensor:
    """The two-loop recursion (Nocedal and Wright, algorithm 7.4) around the preconditioner."""
    vector = gradient.clone()
    alphas = []
    for step, bend, rho in reversed(history):
        alphas.append(rho * _dot(step, vector))
        vector.addcmul_(bend, alphas[-1][:, None, None], value=-1)
    vector = _precondition(problems, penalties, curvature, vector)
    if history:
        _, bend, rho = history[-1]
        scale = 1 / (rho * _dot(bend, _precondition(problems, penalties, curvature, bend))).clamp_min(_TINY)
        vector.mul_(torch.where(rho > 0, scale, 1.0)[:, None, None])
    for (step, bend, rho), alpha in zip(history, reversed(alphas), strict=True):
        vector.addcmul_(step, (alpha - rho * _dot(bend, vector))[:, None, None])
    return vector


def _precondition(problems: Problems, penalties: Tensor, curvature: Tensor, vector: Tensor) -> Tensor:
    """The inverse of curvature * covariance + penalty, a class at a time: eigenvectors, and a diagonal for the rest."""
    along = curvature[:, :, None] * problems.eigenvalues + penalties[:, None, None]  # (P, K, R)
    rest = curvature[:, :, None] * problems.other_eigenvalues + penalties[:, None, None] * problems.penalised
    inside = vector @ problems.eigenvectors
    # rest is one number but for the bias, whose eigenvector entries are 0
    applied = vector / rest + (inside * (1 / along - 1 / rest[:, :, :1])) @ problems.eigenvectors.T
    # A constant added to all classes changes no probability; the solution without one is the one sought.
    return applied - applied.mean(1, keepdim=True)


def _search(
    problems: Problems,
    penalties: Tensor,
    row_weights: Tensor,
    weights: Tensor,
    margins: Tensor,
    direction: Tensor,
    change: Tensor,
    slope: Tensor,
) -> Tensor:
    """Step lengths (P,) at which at most `_SLOPE_LEFT` of the slope is left, of either sign.

    The objective along a line is convex: Newton's method on its derivative, bisected or doubled where it leaves the
    bracket.
    """
    inner = penalties * _dot(weights, direction * problems.penalised)
    square = penalties * _dot(direction, direction * problems.penalised)
    length = torch.ones_like(slope)
    low, high = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
    for _ in range(30):
        probabilities = torch.addcmul(margins, length[:, None, None], change).softmax(1)
        weighted = probabilities.mul_(change)
        mean = weighted.sum(1)
        first = (mean * row_weights).sum(1) + inner + length * square
        settled = first.abs() <= -_SLOPE_LEFT * slope
        if bool(settled.all()):
            break
        second = ((weighted.mul_(change).sum(1) - mean.square()) * row_weights).sum(1) + square
        low, high = torch.where(first < 0, length, low), torch.where(first > 0, length, high)
        newton = length - first / second.clamp_min(_TINY)
        fallback = torch.where(high.isinf(), 2 * length, 0.5 * (low + high))
        newton = torch.where((newton > low) & (newton < high), newton.minimum(4 * length), fallback)
        length = torch.where(settled, length, newton)
    return length


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return product
