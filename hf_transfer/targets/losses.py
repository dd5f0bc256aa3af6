"""Convex losses as the solver of linear heads needs them: slope and curvature of many problems at the same time.

All tensors of logits are (P, K, N): P problems with K outputs for N images. Every loss is a sum over the outputs of an image.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_TINY = 1e-30


class ConvexLoss(ABC):
    """A convex loss for the labels of N images.

    The solver works with margins, a linear function of the logits. `at` computes a state from margins, from which the other
    methods compute derivatives, so that work is shared between the line search and the next gradient.
    """

    num_outputs: int  # K

    def shift(self, logits: Tensor) -> Tensor:
        """Returns the margins (P, K, N) of logits, possibly in place. The function must be linear."""
        return logits

    @abstractmethod
    def at(self, margins: Tensor) -> Any:
        """Returns the state at these margins, without changing them."""

    @abstractmethod
    def slope(self, state: Any, change: Tensor) -> Tensor:
        """Returns the first derivatives (P, N) of the losses along `change`, a change of the margins."""

    @abstractmethod
    def bend(self, state: Any, change: Tensor) -> Tensor:
        """Returns the second derivatives (P, N) of the losses along `change`."""

    @abstractmethod
    def curvature(self, state: Any, row_weights: Tensor) -> Tensor:
        """Returns the mean second derivative (P, K) for each logit, with weights (P, N) of the images."""

    @abstractmethod
    def differentiate(self, state: Any) -> tuple[Tensor, Tensor]:
        """Returns the derivatives (P, K, N) for each logit, and the losses (P, N). May overwrite the state."""

    def center(self, weights: Tensor) -> Tensor:
        """Returns weights (..., K, D) without a part that changes no loss, possibly in place."""
        return weights


class Softmax(ConvexLoss):
    """The cross-entropy of the softmax of the logits. Margins are differences from the logit of the true class.

    With margins, the gradients of well-separated images stay precise.
    """

    def __init__(self, labels: Tensor, num_outputs: int) -> None:
        self.labels, self.num_outputs = labels, num_outputs  # (N,) int64

    def shift(self, logits: Tensor) -> Tensor:
        """Returns each logit minus the logit of the true class."""
        return logits.sub_(logits.gather(1, self.labels.expand(len(logits), 1, -1)))

    def at(self, margins: Tensor) -> Tensor:
        """Returns the probabilities (P, K, N)."""
        return margins.softmax(1)

    def slope(self, state: Tensor, change: Tensor) -> Tensor:
        """Returns the mean change of the margins, weighted by the probabilities."""
        return (state * change).sum(1)

    def bend(self, state: Tensor, change: Tensor) -> Tensor:
        """Returns the variance of the change of the margins, weighted by the probabilities."""
        weighted = state * change
        mean = weighted.sum(1)
        return weighted.mul_(change).sum(1) - mean.square()

    def curvature(self, state: Tensor, row_weights: Tensor) -> Tensor:
        """Returns the mean of p (1 - p) for each class."""
        return torch.einsum("pkn,pn->pk", (1 - state).mul_(state), row_weights)

    def differentiate(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns probabilities minus one-hot labels, and the negative log-probabilities of the labels."""
        truth = self.labels.expand(len(state), 1, -1)
        of_truth = state.gather(1, truth)[:, 0]
        residuals = state.scatter_(1, truth, 0.0)
        of_others = residuals.sum(1)  # equals 1 - of_truth, without cancellation of digits
        residuals.scatter_(1, truth, -of_others[:, None])
        losses = torch.where(of_others < 0.5, -torch.log1p(-of_others), -of_truth.clamp_min(_TINY).log())
        return residuals, losses

    def center(self, weights: Tensor) -> Tensor:
        """Makes the classes sum to 0: the same vector added to all classes changes no probability."""
        return weights.sub_(weights.mean(-2, keepdim=True))


class Sigmoid(ConvexLoss):
    """The binary cross-entropies of K labels, as in K separate logistic regressions. Unknown labels have no loss.

    Margins are logits for present labels, negative logits for absent labels, and 0 for unknown labels.
    """

    def __init__(self, labels: Tensor) -> None:
        self.num_outputs = labels.shape[1]
        # (K, N): 1 for a present label, -1 for an absent label, 0 for an unknown label (NaN)
        self.signs = (2 * labels - 1).nan_to_num(0.0).T.contiguous().float()
        self.known = self.signs.abs()

    def shift(self, logits: Tensor) -> Tensor:
        """Returns the logits with the signs of the labels."""
        return logits.mul_(self.signs)

    def at(self, margins: Tensor) -> Tensor:
        """Returns the probabilities (P, K, N) of the wrong answers."""
        return torch.sigmoid(-margins)

    def slope(self, state: Tensor, change: Tensor) -> Tensor:
        """Returns the derivative of the sum of the labels' losses."""
        return (state * change).sum(1).neg_()

    def bend(self, state: Tensor, change: Tensor) -> Tensor:
        """Returns the second derivative of the sum of the labels' losses."""
        return ((1 - state).mul_(state) * change.square()).sum(1)

    def curvature(self, state: Tensor, row_weights: Tensor) -> Tensor:
        """Returns the mean of p (1 - p) over the known labels."""
        return torch.einsum("pkn,kn,pn->pk", (1 - state).mul_(state), self.known, row_weights)

    def differentiate(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns probabilities minus labels, and the sums of the binary cross-entropies."""
        right = (1 - state).clamp_min(1e-7)
        losses = torch.where(state < 0.5, -torch.log1p(-state), -right.log()).mul_(self.known).sum(1)
        return state.mul_(self.signs).neg_(), losses


class HalfSquare(ConvexLoss):
    """Half the squared difference from K numbers, summed over the numbers. Unknown numbers have no loss."""

    def __init__(self, values: Tensor) -> None:
        self.num_outputs = values.shape[1]
        self.known = values.isfinite().T.contiguous().float()  # (K, N)
        self.values = values.nan_to_num(0.0).T.contiguous().float()

    def at(self, margins: Tensor) -> Tensor:
        """Returns predicted minus true numbers (P, K, N)."""
        return (margins - self.values).mul_(self.known)

    def slope(self, state: Tensor, change: Tensor) -> Tensor:
        """Returns the derivative of the sum of the losses."""
        return (state * change).sum(1)

    def bend(self, state: Tensor, change: Tensor) -> Tensor:
        """Returns the second derivative, which is the same everywhere."""
        return (change.square() * self.known).sum(1)

    def curvature(self, state: Tensor, row_weights: Tensor) -> Tensor:
        """Returns the share of images whose number is known."""
        return torch.einsum("kn,pn->pk", self.known, row_weights)

    def differentiate(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns predicted minus true numbers, and half the squares."""
        return state, 0.5 * state.square().sum(1)


class AnyConvex(ConvexLoss):
    """A convex loss given as a function from logits (B, K) and labels (B, ...) to losses (B,), by automatic differentiation.

    The function must be twice differentiable. It is slower than a loss whose derivatives are written down.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], labels: Tensor, num_outputs: int) -> None:
        self.function, self.labels, self.num_outputs = function, labels, num_outputs

    def at(self, margins: Tensor) -> Tensor:
        """Returns the margins, which are the logits."""
        return margins

    def slope(self, state: Tensor, change: Tensor) -> Tensor:
        """Returns the derivative along `change`."""
        return (self._derive(state)[0] * change).sum(1)

    def bend(self, state: Tensor, change: Tensor) -> Tensor:
        """Returns the second derivative along `change`."""
        return (self._derive_twice(state, change) * change).sum(1)

    def curvature(self, state: Tensor, row_weights: Tensor) -> Tensor:
        """Returns the mean of the diagonal of the Hessian."""
        diagonal = []
        for k in range(self.num_outputs):
            change = torch.zeros_like(state)
            change[:, k] = 1.0
            diagonal.append((self._derive_twice(state, change)[:, k] * row_weights).sum(1))
        return torch.stack(diagonal, 1)

    def differentiate(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradient and the losses."""
        return self._derive(state)

    def _compute(self, margins: Tensor) -> Tensor:
        """Returns the losses (P, N)."""
        num_problems, _, num_rows = margins.shape
        labels = self.labels.repeat(num_problems, *[1] * (self.labels.ndim - 1))
        return self.function(margins.transpose(1, 2).flatten(0, 1), labels).view(num_problems, num_rows)

    def _derive(self, margins: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            given = margins.detach().requires_grad_()
            losses = self._compute(given)
            (gradient,) = torch.autograd.grad(losses.sum(), given)
        return gradient, losses.detach()

    def _derive_twice(self, margins: Tensor, change: Tensor) -> Tensor:
        """Returns the product of the Hessian and `change`."""
        with torch.enable_grad():
            given = margins.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._compute(given).sum(), given, create_graph=True)
            product: Tensor = torch.autograd.grad((gradient * change).sum(), given, materialize_grads=True)[0]
        return product
