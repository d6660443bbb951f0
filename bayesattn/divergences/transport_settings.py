r"""Choices that entropic losses share, and the steps from clouds to duals to a value.

.. math:: \sum_{ij} \pi_{ij} \lVert x_i - y_j \rVert^2 = \lVert \bar x - \bar y \rVert^2
    + \sum_{ij} \pi_{ij} \lVert (x_i - \bar x) - (y_j - \bar y) \rVert^2

for every plan between the same marginals, so that duals are sought between clouds whose means are
zero: the squared distance of the means is exact, and no digits are lost to it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.divergences.point_clouds import PointClouds, log_weights
from bayesattn.divergences.transport_costs import TransportCost, check_cost, cost_features
from bayesattn.divergences.transport_iterations import (
    self_dual_operator,
    transport_duals_operator,
)
from bayesattn.divergences.transport_sensitivity import key_multipliers_operator
from bayesattn.divergences.transport_values import (
    TransportProblem,
    dense_dual_value,
    dense_mean_cost,
    dual_value,
    mean_cost,
)
from bayesattn.fused_route import check_route

__all__ = ["TransportSettings"]

Number = float | int
# With fewer a side, a matrix of all pairs is held, which is faster.
_FEWEST_FUSED_POINTS = 512
# The error of the dual of a cloud and itself halves at least in each.
_SELF_ITERATIONS = 50
# Of conjugate gradients on the multipliers.
_MULTIPLIER_ITERATIONS = 50


@dataclass(frozen=True)
class TransportSettings:
    """Choices of entropic losses.

    Args:
        cost: "cosine", or "squared" for squared distances.
        epsilon: ε, in the costs' unit.
        num_iterations: Of Sinkhorn's, each over all queries and keys.
        route: "fused" holds no matrix of pairs, and has no second derivatives; "dense" does; "auto"
            chooses by size.

    Raises:
        ValueError: For an unknown cost or route, an ε that is not positive, or no iteration.
    """

    cost: TransportCost = "cosine"
    epsilon: Number = 0.01
    num_iterations: int = 100
    route: str = "auto"

    def __post_init__(self) -> None:
        check_cost(self.cost)
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon: expected a positive number, got {self.epsilon}")
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations: expected at least one, got {self.num_iterations}")
        check_route(self.route)

    def problem(
        self, clouds: PointClouds
    ) -> tuple[TransportProblem, Float[Tensor, "*batch 1 dim"]]:
        """Clouds with zero means whose squared distances are the costs, and what lies between."""
        a, b = clouds.query_weights, clouds.key_weights
        points = cost_features(clouds, self.cost)
        # A sum of products, not a product, which keeps its digits.
        means = [
            (weight[..., None] * x).sum(-2, keepdim=True)
            for weight, x in zip((a, b), points, strict=True)
        ]
        x, y = (x - mean for x, mean in zip(points, means, strict=True))
        return TransportProblem(x, y, a, b, float(self.epsilon)), means[0] - means[1]

    def dual_g(self, problem: TransportProblem) -> Float[Tensor, "*batch key"]:
        """The dual of the keys, without a gradient."""
        x, y, a, b, epsilon = problem
        parts = _folded(x, y, log_weights(a), log_weights(b))
        settings = (epsilon, self.num_iterations, self._is_dense(problem))
        return transport_duals_operator(*parts, *settings)[1].reshape(b.shape)

    def self_dual(self, problem: TransportProblem) -> Float[Tensor, "*batch key"]:
        """The dual of a cloud and itself, without a gradient."""
        x, _, a, _, epsilon = problem
        num_iterations = min(self.num_iterations, _SELF_ITERATIONS)
        parts = _folded(x, log_weights(a))
        settings = (epsilon, num_iterations, self._is_dense(problem))
        return self_dual_operator(*parts, *settings).reshape(a.shape)

    def dual_value(
        self, problem: TransportProblem, dual_g: Float[Tensor, "*batch key"]
    ) -> Float[Tensor, "*batch"]:
        """What the minimum is, by its duals."""
        value = dense_dual_value if self._is_dense(problem) else dual_value
        return value(problem, dual_g)

    def mean_cost(
        self, problem: TransportProblem, dual_g: Float[Tensor, "*batch key"]
    ) -> Float[Tensor, "*batch"]:
        """Mean cost under the plan that is given by its duals."""
        if self._is_dense(problem):
            return dense_mean_cost(problem, dual_g)
        multipliers = torch.zeros_like(dual_g)
        if torch.is_grad_enabled():
            x, y, a, b, epsilon = problem
            parts = _folded(x, y, log_weights(a), log_weights(b), dual_g)
            found = key_multipliers_operator(*parts, epsilon, _MULTIPLIER_ITERATIONS)
            multipliers = found.reshape(dual_g.shape)
        return mean_cost(problem, dual_g, multipliers)

    def _is_dense(self, problem: TransportProblem) -> bool:
        largest = max(problem.x.shape[-2], problem.y.shape[-2])
        return self.route == "dense" or (self.route == "auto" and largest < _FEWEST_FUSED_POINTS)


def _folded(*parts: Tensor) -> Sequence[Tensor]:
    """Parts without gradients and with one leading axis; the first has two of its own."""
    batch = parts[0].shape[:-2]
    size = math.prod(batch)
    return [part.detach().reshape(size, *part.shape[len(batch) :]) for part in parts]
