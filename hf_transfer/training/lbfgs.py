"""Fits many softmax regressions to one feature matrix at the same time, by L-BFGS.

P problems of K classes share the features (N, D). The problems differ only in the penalty and in the weights of the rows, so
one matrix product, (P*K, D) x (D, N), serves all problems. The solver is fast and works in float32 for four reasons:
- Logits are linear in the weights, so the line search needs no matrix product. An iteration takes one product for the logits
  of the direction and one for the gradient. The search is Newton's method on the exact derivative, with a bracket.
- The leading eigenvectors of the feature covariance, from a randomized range finder, precondition every problem. Each iteration
  rescales the eigenvalues by the curvature of each class (Frangella, Tropp, Udell, arXiv 2110.02820).
- The solver stores margins (logits minus the logit of the true class), so gradients of well-separated rows stay precise.
- A converged problem leaves the batch.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

HISTORY = 10  # number of stored pairs (step, change of the gradient)
_RANK = 128  # number of eigenvectors in the preconditioner
_SLOPE_LEFT = 0.1  # a line search ends when the slope has fallen to this share of the initial slope
_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """The settings of the L-BFGS solver: tolerance, iteration limit, memory limit, and spread floor."""

    tol: float = 1e-10  # a problem stops when the estimated remaining gain is below this share of its objective
    max_iterations: int = 2000
    memory_bytes: int | None = None  # working memory; None: 1 GiB on a CPU, a quarter of the free memory on a GPU
    spread_floor: float = 0.0  # see `standardize`


@dataclass(frozen=True, kw_only=True)
class Problems:
    """The data that all softmax regressions share. The last feature is always 1; its weight is the bias, without penalty."""

    features: Tensor  # (N, D + 1) float32, standardized
    targets: Tensor  # (N,) int64
    num_classes: int
    mean: Tensor  # (D,) mean of the raw features
    inverse_std: Tensor  # (D,) 0 for a constant feature
    penalized: Tensor  # (D + 1,) 1 for features, 0 for the bias
    eigenvectors: Tensor  # (D + 1, R) leading eigenvectors of the covariance; 0 for the bias
    eigenvalues: Tensor  # (R,)
    other_eigenvalues: Tensor  # (D + 1,) mean of the remaining eigenvalues; 1 for the bias

    def margins(self, weights: Tensor) -> Tensor:
        """Returns margins (P, K, N): the logit of each class minus the logit of the true class. Weights: (P, K, D + 1)."""
        logits = (weights.flatten(0, 1) @ self.features.T).view(len(weights), self.num_classes, -1)
        return logits - logits.gather(1, self.targets.expand(len(weights), 1, -1))

    def unstandardize(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weight (..., K, D) and bias (..., K) for raw features, from weights for standardized features."""
        weight = weights[..., :-1] * self.inverse_std
        return weight, weights[..., -1] - weight @ self.mean


def standardize(features: Tensor, targets: Tensor, num_classes: int, *, spread_floor: float = 0.0) -> Problems:
    """Standardizes features (N, D) of any float type and computes the preconditioner. The input does not change.

    The variance of each feature is increased by the square of `spread_floor` times the median standard deviation, so that
    features with small variance have less influence. Raises ValueError if a feature is not finite.
    """
    num_rows, num_features = features.shape
    columns = torch.ones(num_rows, num_features + 1, device=features.device)
    columns[:, :-1] = features  # float32 from here on
    raw = columns[:, :-1]
    std, mean = torch.std_mean(raw, dim=0, correction=0)
    if not bool(torch.isfinite(std).all()):
        raise ValueError(
            f"{int((~torch.isfinite(std)).sum())} of {num_features} features contain nan, inf or values beyond float32. "
            "A network in float16 may overflow: use --precision fp32 or --precision bf16"
        )
    typical = std.median()
    if typical == 0 and bool((std > 0).any()):  # most features are constant, such as inactive ReLU outputs
        typical = std[std > 0].median()
    floored = (std.square() + (spread_floor * typical) ** 2).sqrt()
    # The computed standard deviation of a constant column is not 0 but a rounding error.
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
        penalized=torch.cat([torch.ones_like(mean), 0 * one]),
        eigenvectors=torch.cat([vectors, torch.zeros_like(vectors[:1])]),
        eigenvalues=values,
        other_eigenvalues=torch.cat([others.expand(num_features), one]),
    )


def minimize(
    problems: Problems, penalties: Tensor, row_weights: Tensor, start: Tensor | None, options: SolverOptions
) -> tuple[Tensor, Tensor]:
    """Returns weights (P, K, D + 1) that minimize penalty / 2 * ||W||^2 + sum_i row_weight_i * CE_i, and iterations (P,).

    Shapes: penalties (P,); row_weights (P, N), where each row sums to 1; start (P, K, D + 1), or None for zeros. A problem
    stops when half of its Newton decrement, which estimates the remaining gain, is below `tol` times its objective. As many
    problems run together as fit into memory, but at least one.
    """
    size = _count_fitting(problems, options.memory_bytes)
    solutions, iterations = [], []
    for first in range(0, len(penalties), size):
        part = slice(first, first + size)
        group = _Group(problems=problems, penalties=penalties[part], row_weights=row_weights[part])
        weights, spent = _minimize_group(group, None if start is None else start[part], options)
        solutions.append(weights)
        iterations.append(spent)
    return torch.cat(solutions), torch.cat(iterations)


def _leading_eigenvectors(standardized: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the approximate leading eigenvectors and eigenvalues of the covariance, and the mean of the other eigenvalues."""
    num_rows, num_features = standardized.shape
    rank = min(_RANK, num_rows, num_features)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(num_features, rank, generator=generator).to(standardized.device)
    for _ in range(2):
        basis = torch.linalg.qr(standardized.T @ (standardized @ basis))[0]
    projected = standardized @ basis
    values, rotation = torch.linalg.eigh(projected.T @ projected / num_rows)
    values = values.clamp_min(0.0)
    remaining = standardized.square().sum() / num_rows - values.sum()
    return basis @ rotation, values, remaining.clamp_min(1e-3) / max(1, num_features - rank)


def _count_fitting(problems: Problems, memory_bytes: int | None) -> int:
    if memory_bytes is None:
        device = problems.features.device
        memory_bytes = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 2**30
    num_rows, num_columns = problems.features.shape
    bytes_each = 4 * problems.num_classes * (6 * num_rows + (2 * HISTORY + 8) * num_columns)
    return max(1, memory_bytes // bytes_each)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """The problems that are solved together, with the formulas of gradient, objective, preconditioner and line search."""

    problems: Problems
    penalties: Tensor  # (P,)
    row_weights: Tensor  # (P, N)

    def select(self, kept: Tensor) -> "_Group":
        return replace(self, penalties=self.penalties[kept], row_weights=self.row_weights[kept])

    def gradient(self, weights: Tensor, margins: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradient (P, K, D + 1) and, for each class, the mean curvature p (1 - p) at the class probability p."""
        problems = self.problems
        probabilities = margins.softmax(1)
        curvature = torch.einsum("pkn,pn->pk", probabilities * (1 - probabilities), self.row_weights)
        truth = problems.targets.expand(len(weights), 1, -1)
        residuals = probabilities.scatter_(1, truth, 0.0)
        residuals.scatter_(1, truth, -residuals.sum(1, keepdim=True))  # equals p - 1, without cancellation of digits
        residuals.mul_(self.row_weights[:, None])
        gradient = (residuals.flatten(0, 1) @ problems.features).view_as(weights)
        penalty = self.penalties[:, None, None] * problems.penalized
        return gradient.addcmul_(penalty, weights), curvature.clamp_min(1e-7)

    def objective(self, weights: Tensor, margins: Tensor) -> Tensor:
        loss = (margins.logsumexp(1) * self.row_weights).sum(1)
        return loss + 0.5 * self.penalties * _dot(weights, weights * self.problems.penalized)

    def apply_inverse_hessian(
        self, curvature: Tensor, gradient: Tensor, history: list[tuple[Tensor, Tensor, Tensor]]
    ) -> Tensor:
        """Multiplies the gradient by the inverse Hessian that L-BFGS estimates (Nocedal and Wright, algorithm 7.4)."""
        vector = gradient.clone()
        alphas = []
        for step, bend, rho in reversed(history):
            alphas.append(rho * _dot(step, vector))
            vector.addcmul_(bend, alphas[-1][:, None, None], value=-1)
        vector = self._precondition(curvature, vector)
        if history:
            _, bend, rho = history[-1]
            scale = 1 / (rho * _dot(bend, self._precondition(curvature, bend))).clamp_min(_TINY)
            vector.mul_(torch.where(rho > 0, scale, 1.0)[:, None, None])
        for (step, bend, rho), alpha in zip(history, reversed(alphas), strict=True):
            vector.addcmul_(step, (alpha - rho * _dot(bend, vector))[:, None, None])
        return vector

    def _precondition(self, curvature: Tensor, vector: Tensor) -> Tensor:
        """Multiplies a vector by an approximate inverse Hessian, whose covariance is a low-rank plus a diagonal matrix."""
        problems, penalties = self.problems, self.penalties[:, None, None]
        along = curvature[:, :, None] * problems.eigenvalues + penalties  # (P, K, R)
        rest = curvature[:, :, None] * problems.other_eigenvalues + penalties * problems.penalized
        inside = vector @ problems.eigenvectors
        # `rest` is the same number for all features. It differs for the bias, whose eigenvector entries are 0.
        applied = vector / rest + (inside * (1 / along - 1 / rest[:, :, :1])) @ problems.eigenvectors.T
        # Adding the same vector to all classes changes no probability: choose the solution whose classes sum to 0.
        return applied - applied.mean(1, keepdim=True)

    def search(self, weights: Tensor, margins: Tensor, direction: Tensor, change: Tensor, slope: Tensor) -> Tensor:
        """Returns step lengths (P,) at which the absolute slope is at most `_SLOPE_LEFT` times the initial slope.

        The objective along a line is convex, so the search is Newton's method on the derivative, and bisection or doubling if
        a Newton step leaves the bracket. `change`: how much the margins change along `direction`, per unit of step length.
        """
        inner = self.penalties * _dot(weights, direction * self.problems.penalized)
        square = self.penalties * _dot(direction, direction * self.problems.penalized)
        length = torch.ones_like(slope)
        low, high = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
        for _ in range(30):
            probabilities = torch.addcmul(margins, length[:, None, None], change).softmax(1)
            weighted = probabilities.mul_(change)
            mean = weighted.sum(1)
            first = (mean * self.row_weights).sum(1) + inner + length * square
            is_done = first.abs() <= -_SLOPE_LEFT * slope
            if bool(is_done.all()):
                break
            second = ((weighted.mul_(change).sum(1) - mean.square()) * self.row_weights).sum(1) + square
            low, high = torch.where(first < 0, length, low), torch.where(first > 0, length, high)
            newton = length - first / second.clamp_min(_TINY)
            fallback = torch.where(high.isinf(), 2 * length, 0.5 * (low + high))
            newton = torch.where((newton > low) & (newton < high), newton.minimum(4 * length), fallback)
            length = torch.where(is_done, length, newton)
        return length


def _minimize_group(group: _Group, start: Tensor | None, options: SolverOptions) -> tuple[Tensor, Tensor]:
    problems, device = group.problems, group.problems.features.device
    shape = (len(group.penalties), problems.num_classes, problems.features.shape[1])
    weights = torch.zeros(shape, device=device) if start is None else start.clone()
    solutions = torch.empty_like(weights)
    iterations = torch.zeros(shape[0], dtype=torch.int64, device=device)
    index = torch.arange(shape[0], device=device)
    margins = problems.margins(weights)
    gradient, curvature = group.gradient(weights, margins)
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    for iteration in range(options.max_iterations + 1):
        direction = -group.apply_inverse_hessian(curvature, gradient, history)
        slope = _dot(gradient, direction)
        is_done = -0.5 * slope <= options.tol * group.objective(weights, margins)
        is_done |= iteration == options.max_iterations
        if bool(is_done.any()):
            solutions[index[is_done]] = weights[is_done]
            iterations[index[is_done]] = iteration
            kept = ~is_done
            if not bool(kept.any()):
                break
            group = group.select(kept)
            index, weights, margins, gradient, direction, slope = (
                t[kept] for t in (index, weights, margins, gradient, direction, slope)
            )
            history = [(s[kept], y[kept], rho[kept]) for s, y, rho in history]
        change = problems.margins(direction)
        length = group.search(weights, margins, direction, change, slope)[:, None, None]
        margins.addcmul_(length, change)
        step = length * direction
        weights = weights + step
        before = gradient
        gradient, curvature = group.gradient(weights, margins)
        bend = gradient - before
        # In exact arithmetic s.y > 0. Near the optimum, rounding can violate this; such a pair is ignored (rho = 0).
        product = _dot(step, bend)
        is_sound = product > 1e-7 * (_dot(step, step) * _dot(bend, bend)).sqrt()
        history.append((step, bend, torch.where(is_sound, 1 / product.clamp_min(_TINY), 0.0)))
        del history[:-HISTORY]
    return solutions, iterations


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return product
