"""Fits many linear models to one feature matrix at the same time, by L-BFGS: softmax regressions, or another convex loss.

P problems of K outputs share the features (N, D). The problems differ only in the penalty and in the weights of the rows, so
one matrix product, (P*K, D) x (D, N), serves all problems. The solver is fast and works in float32 for six reasons:
- Logits are linear in the weights, so the line search needs no matrix product. An iteration takes one product for the logits
  of the direction and one for the gradient. The search is Newton's method on the exact derivative, with a bracket. Its last
  step has computed the probabilities that the next gradient needs.
- The leading eigenvectors of the feature covariance, from a randomized range finder, precondition every problem. Each iteration
  rescales the eigenvalues by the curvature of each output (Frangella, Tropp, Udell, arXiv 2110.02820).
- The history of steps is a few small matrices, so an iteration takes a few products instead of a loop over the history.
- The solver stores margins (for a softmax: logits minus the logit of the true class), so gradients of well-separated rows stay
  precise (see `targets.losses`).
- A converged problem leaves the batch.
- Many features of few images are rotated into the few directions that the images span.

On a CPU, groups of problems are solved side by side, each with one torch thread (see `workers`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_transfer.solvers.features import RawFeatures, StandardizedFeatures
from hf_transfer.solvers.workers import count_workers, map_on_cores
from hf_transfer.targets.losses import ConvexLoss

HISTORY = 10  # number of stored pairs (step, change of the gradient)
_RANK = 128  # number of eigenvectors in the preconditioner
_SLOPE_LEFT = 0.1  # a line search ends when the slope has fallen to this share of the initial slope
_SPLIT_BYTES = 2**29  # bytes that one product touches, above which the problems are shared out among the cores
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
    """The data that all problems share. The last feature is always 1; its weight is the bias, without penalty."""

    features: StandardizedFeatures  # N rows of D + 1 features
    loss: ConvexLoss  # of N labels
    penalized: Tensor  # (D + 1,) 1 for features, 0 for the bias
    eigenvectors: Tensor  # (D + 1, R) leading eigenvectors of the covariance; 0 for the bias
    eigenvalues: Tensor  # (R,)
    other_eigenvalues: Tensor  # (D + 1,) mean of the remaining eigenvalues; 1 for the bias

    @property
    def num_columns(self) -> int:
        """The number of weights of one output, with the bias."""
        return len(self.penalized)

    def margins(self, weights: Tensor) -> Tensor:
        """Returns margins (P, K, N), which the loss computes from the logits. Weights: (P, K, D + 1)."""
        flat = weights.flatten(0, 1)
        logits = _concatenate([flat @ block.T for block in self.features.blocks()])
        return self.loss.shift(logits.view(len(weights), self.loss.num_outputs, -1))

    def sum_over_rows(self, residuals: Tensor) -> Tensor:
        """Returns sums (P, K, D + 1) of the features of all rows, with the factors `residuals` (P, K, N)."""
        flat, start = residuals.flatten(0, 1), 0
        total: Tensor | None = None
        for block in self.features.blocks():
            product = flat[:, start : start + len(block)] @ block
            total = product if total is None else total.add_(product)
            start += len(block)
        assert total is not None
        return total.view(*residuals.shape[:2], -1)


def standardize(features: RawFeatures, loss: ConvexLoss, *, spread_floor: float = 0.0) -> Problems:
    """Standardizes features and computes the preconditioner. The input does not change.

    The variance of each feature is increased by the square of `spread_floor` times the median standard deviation, so that
    features with small variance have less influence. Raises ValueError if a feature is not finite.
    """
    standardized = StandardizedFeatures.of(features, spread_floor)
    vectors, values, others = _leading_eigenvectors(standardized)
    standardized = standardized.rotate()
    if standardized.rotation is not None:
        vectors = standardized.rotation.T @ vectors
    num_columns, device = standardized.num_columns, features.device
    penalized = torch.ones(num_columns, device=device)
    penalized[-1] = 0
    other_eigenvalues = others.expand(num_columns).clone()
    other_eigenvalues[-1] = 1
    return Problems(
        features=standardized,
        loss=loss,
        penalized=penalized,
        eigenvectors=torch.cat([vectors, torch.zeros_like(vectors[:1])]),
        eigenvalues=values,
        other_eigenvalues=other_eigenvalues,
    )


def minimize(
    problems: Problems, penalties: Tensor, row_weights: Tensor, start: Tensor | None, options: SolverOptions
) -> tuple[Tensor, Tensor]:
    """Returns weights (P, K, D + 1) that minimize penalty / 2 * ||W||^2 + sum_i row_weight_i * loss_i, and iterations (P,).

    Shapes: penalties (P,); row_weights (P, N), where each row sums to 1; start (P, K, D + 1), or None for zeros. A problem
    stops when half of its Newton decrement, which estimates the remaining gain, is below `tol` times its objective. As many
    problems run together as fit into memory, but at least one.
    """
    workers, device = count_workers(penalties.device), penalties.device
    size = _count_fitting(problems, options.memory_bytes, workers)
    if len(penalties) * problems.loss.num_outputs * problems.features.raw.nbytes > _SPLIT_BYTES:
        size = min(size, -(-len(penalties) // workers))

    def solve(first: int) -> tuple[Tensor, Tensor]:
        part = slice(first, first + size)
        group = _Group(problems=problems, penalties=penalties[part], row_weights=row_weights[part])
        return _minimize_group(group, None if start is None else start[part], options)

    solved = map_on_cores(solve, range(0, len(penalties), size), device)
    return torch.cat([weights for weights, _ in solved]), torch.cat([iterations for _, iterations in solved])


def _leading_eigenvectors(features: StandardizedFeatures) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the approximate leading eigenvectors and eigenvalues of the covariance, and the mean of the other eigenvalues.

    The eigenvectors (D, R) and the eigenvalues (R,) are those of features without the column of ones.
    """
    num_rows, num_features = features.raw.num_rows, features.raw.num_features
    rank = min(_RANK, num_rows, num_features)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(num_features, rank, generator=generator).to(features.raw.device)
    for _ in range(2):
        product = torch.zeros_like(basis)
        for x in _without_ones(features):
            product.addmm_(x.T, x @ basis)
        basis = torch.linalg.qr(product)[0]
    covariance, squares = torch.zeros_like(basis[:rank]), torch.zeros_like(basis[0, 0])
    for x in _without_ones(features):
        projected = x @ basis
        covariance.addmm_(projected.T, projected)
        squares += x.square().sum()
    values, rotation = torch.linalg.eigh(covariance / num_rows)
    values = values.clamp_min(0.0)
    remaining = squares / num_rows - values.sum()
    return basis @ rotation, values, remaining.clamp_min(1e-3) / max(1, num_features - rank)


def _without_ones(features: StandardizedFeatures) -> Iterator[Tensor]:
    return (block[:, :-1] for block in features.blocks())


def _count_fitting(problems: Problems, memory_bytes: int | None, workers: int) -> int:
    """Returns how many problems one of `workers` groups, which are solved at the same time, may have."""
    if memory_bytes is None:
        device = problems.penalized.device
        memory_bytes = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 2**30
    num_rows, num_columns = problems.features.raw.num_rows, problems.num_columns
    bytes_each = 4 * problems.loss.num_outputs * (7 * num_rows + (2 * HISTORY + 8) * num_columns)
    return max(1, memory_bytes // workers // bytes_each)


@dataclass(frozen=True, kw_only=True)
class _History:
    """The last steps and changes of the gradient of P problems: pairs from the oldest to the newest, M at most.

    A pair that rounding has spoiled is a pair of zeros, whose product on the diagonal is 1.
    """

    steps: Tensor  # (P, M, K * (D + 1))
    bends: Tensor  # (P, M, K * (D + 1))
    products: Tensor  # (P, M, M): step i times bend j, 0 below the diagonal

    @classmethod
    def empty(cls, weights: Tensor) -> "_History":
        """Returns a history without pairs for problems with the weights (P, K, D + 1)."""
        pairs = weights.flatten(1)[:, None][:, :0]
        return cls(steps=pairs, bends=pairs, products=weights.new_empty(len(weights), 0, 0))

    def __len__(self) -> int:
        return self.steps.shape[1]

    def select(self, kept: Tensor) -> "_History":
        return _History(steps=self.steps[kept], bends=self.bends[kept], products=self.products[kept])

    def add(self, step: Tensor, bend: Tensor) -> "_History":
        """Returns the history with one more pair for each problem, and without its oldest pair if the history is full."""
        step, bend = step.flatten(1), bend.flatten(1)
        # In exact arithmetic s.y > 0. Near the optimum, rounding can violate this; such a pair is ignored.
        product = _dot(step, bend)
        is_sound = product > 1e-7 * (_dot(step, step) * _dot(bend, bend)).sqrt()
        if not bool(is_sound.all()):
            step, bend = (torch.where(is_sound[:, None], t, 0.0) for t in (step, bend))
            product = torch.where(is_sound, product, 1.0)
        first = max(0, len(self) + 1 - HISTORY)
        steps = torch.cat([self.steps[:, first:], step[:, None]], 1)
        bends = torch.cat([self.bends[:, first:], bend[:, None]], 1)
        products = torch.nn.functional.pad(self.products[:, first:, first:], (0, 1, 0, 1))
        products[:, :, -1] = _times(steps, bend)
        products[:, -1, -1] = product
        return _History(steps=steps, bends=bends, products=products)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """The problems that are solved together, with the formulas of gradient, objective, preconditioner and line search."""

    problems: Problems
    penalties: Tensor  # (P,)
    row_weights: Tensor  # (P, N)

    def select(self, kept: Tensor) -> "_Group":
        return replace(self, penalties=self.penalties[kept], row_weights=self.row_weights[kept])

    def gradient(self, weights: Tensor, state: Any) -> "_Gradient":
        """Returns the gradient at `weights`. Overwrites `state`, the state of the loss at `weights`."""
        problems = self.problems
        curvature = problems.loss.curvature(state, self.row_weights)
        residuals, losses = problems.loss.differentiate(state)
        residuals.mul_(self.row_weights[:, None])
        gradient = problems.sum_over_rows(residuals)
        penalty = self.penalties[:, None, None] * problems.penalized
        objective = (losses * self.row_weights).sum(1) + 0.5 * _dot(weights, weights * penalty)
        return _Gradient(
            value=gradient.addcmul_(penalty, weights), curvature=curvature.clamp_min(1e-7), objective=objective
        )

    def apply_inverse_hessian(self, gradient: "_Gradient", history: _History) -> Tensor:
        """Multiplies the gradient by the inverse Hessian that L-BFGS estimates.

        This is the two-loop recursion of Nocedal and Wright, algorithm 7.4. Each loop is the solution of a triangular system,
        as in the compact representation of Byrd, Nocedal and Schnabel (1994).
        """
        value = gradient.value
        if not len(history):
            return self._precondition(gradient.curvature, value)
        products = history.products
        alphas = torch.linalg.solve_triangular(
            products, _times(history.steps, value.flatten(1))[:, :, None], upper=True
        )
        vector = value - _combine(alphas[:, :, 0], history.bends).view_as(value)
        bend = history.bends[:, -1]
        both = self._precondition(gradient.curvature, torch.stack([vector, bend.view_as(value)]))
        diagonal = products.diagonal(dim1=1, dim2=2)
        # A pair of zeros has no scale.
        scale = torch.where(bend.any(1), diagonal[:, -1] / _dot(bend, both[1]).clamp_min(_TINY), 1.0)
        vector = both[0] * scale[:, None, None]
        rest = diagonal * alphas[:, :, 0] - _times(history.bends, vector.flatten(1))
        factors = torch.linalg.solve_triangular(products.transpose(1, 2), rest[:, :, None], upper=False)
        return vector.add_(_combine(factors[:, :, 0], history.steps).view_as(value))

    def _precondition(self, curvature: Tensor, vector: Tensor) -> Tensor:
        """Multiplies vectors (..., P, K, D + 1) by an approximate inverse Hessian.

        The Hessian is approximated with a covariance that is a low-rank plus a diagonal matrix.
        """
        problems, penalties = self.problems, self.penalties[:, None, None]
        along = curvature[:, :, None] * problems.eigenvalues + penalties  # (P, K, R)
        rest = curvature[:, :, None] * problems.other_eigenvalues + penalties * problems.penalized
        inside = vector @ problems.eigenvectors
        # `rest` is the same number for all features. It differs for the bias, whose eigenvector entries are 0.
        inside.mul_(1 / along - 1 / rest[:, :, :1])
        applied = (vector / rest).add_(inside @ problems.eigenvectors.T)
        return problems.loss.center(applied)

    def search(self, weights: Tensor, margins: Tensor, direction: Tensor, change: Tensor, slope: Tensor) -> "_Line":
        """Finds step lengths (P,) at which the absolute slope is at most `_SLOPE_LEFT` times the initial slope.

        The objective along a line is convex, so the search is Newton's method on the derivative, and bisection or doubling if
        a Newton step leaves the bracket. `change`: how much the margins change along `direction`, per unit of step length.
        """
        penalized = direction * (self.penalties[:, None, None] * self.problems.penalized)
        inner, square = _dot(weights, penalized), _dot(direction, penalized)
        length = torch.ones_like(slope)
        low, high = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
        loss = self.problems.loss
        for _ in range(30):
            line = _Line.at(loss, length, margins, change)
            first = (loss.slope(line.state, change) * self.row_weights).sum(1) + inner + length * square
            is_done = first.abs() <= -_SLOPE_LEFT * slope
            if bool(is_done.all()):
                return line
            second = (loss.bend(line.state, change) * self.row_weights).sum(1) + square
            low, high = torch.where(first < 0, length, low), torch.where(first > 0, length, high)
            newton = length - first / second.clamp_min(_TINY)
            fallback = torch.where(high.isinf(), 2 * length, 0.5 * (low + high))
            newton = torch.where((newton > low) & (newton < high), newton.minimum(4 * length), fallback)
            length = torch.where(is_done, length, newton)
        return _Line.at(loss, length, margins, change)


@dataclass(frozen=True, kw_only=True)
class _Gradient:
    """The gradient and the objective of P problems at some weights."""

    value: Tensor  # (P, K, D + 1)
    curvature: Tensor  # (P, K) mean second derivative of the loss for each output
    objective: Tensor  # (P,)

    def select(self, kept: Tensor) -> "_Gradient":
        return _Gradient(value=self.value[kept], curvature=self.curvature[kept], objective=self.objective[kept])


@dataclass(frozen=True, kw_only=True)
class _Line:
    """P problems after a step of some length (P,) along a direction: margins (P, K, N), and the state of the loss there."""

    length: Tensor
    margins: Tensor
    state: Any

    @classmethod
    def at(cls, loss: ConvexLoss, length: Tensor, margins: Tensor, change: Tensor) -> "_Line":
        after = torch.addcmul(margins, length[:, None, None], change)
        return cls(length=length, margins=after, state=loss.at(after))


def _minimize_group(group: _Group, start: Tensor | None, options: SolverOptions) -> tuple[Tensor, Tensor]:
    problems, device = group.problems, group.penalties.device
    shape = (len(group.penalties), problems.loss.num_outputs, problems.num_columns)
    weights = torch.zeros(shape, device=device) if start is None else start.clone()
    solutions = torch.empty_like(weights)
    iterations = torch.zeros(shape[0], dtype=torch.int64, device=device)
    index = torch.arange(shape[0], device=device)
    margins = problems.margins(weights)
    gradient, history = group.gradient(weights, problems.loss.at(margins)), _History.empty(weights)
    for iteration in range(options.max_iterations + 1):
        direction = group.apply_inverse_hessian(gradient, history).neg_()
        slope = _dot(gradient.value, direction)
        is_done = -0.5 * slope <= options.tol * gradient.objective
        if iteration == options.max_iterations:
            is_done[:] = True
        if num_done := int(is_done.sum()):
            solutions[index[is_done]] = weights[is_done]
            iterations[index[is_done]] = iteration
            if num_done == len(index):
                break
            kept = ~is_done
            group, gradient, history = group.select(kept), gradient.select(kept), history.select(kept)
            index, weights, margins, direction, slope = (t[kept] for t in (index, weights, margins, direction, slope))
        line = group.search(weights, margins, direction, problems.margins(direction), slope)
        step = line.length[:, None, None] * direction
        weights, margins, before = weights + step, line.margins, gradient.value
        gradient = group.gradient(weights, line.state)
        history = history.add(step, gradient.value - before)
    return solutions, iterations


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return product


def _times(rows: Tensor, vector: Tensor) -> Tensor:
    """Returns the products (P, M) of the rows (P, M, n) and the vectors (P, n)."""
    return torch.bmm(vector[:, None], rows.transpose(1, 2))[:, 0]  # several times as fast as rows @ vector


def _combine(factors: Tensor, rows: Tensor) -> Tensor:
    """Returns sums (P, n) of the rows (P, M, n), with the factors (P, M)."""
    return torch.bmm(factors[:, None], rows)[:, 0]


def _concatenate(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
