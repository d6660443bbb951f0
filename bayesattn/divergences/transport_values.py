r"""What entropic transport costs at given duals, with derivatives as if these followed the clouds.

.. math:: \mathrm{OT}_\varepsilon = \sum_i a_i f_i + \sum_j b_j g_j, \qquad
    L = \sum_i a_i \sum_j \pi(j \mid i)\, c_{ij}, \qquad
    \pi(j \mid i) \propto b_j\, e^{(g_j - c_{ij}) / \varepsilon}

At its maximum over the duals the first does not feel that they move: its gradient is that of a
single half-step, :math:`a_i \sum_j \pi(j \mid i) \nabla c_{ij}`. The second does, and takes the
multipliers :math:`v` of the marginals: the gradient of :math:`\sum_i a_i \sum_j \pi(j \mid i)
(c_{ij} - v_j) + \sum_j b_j v_j` at fixed g and v is the whole one. Duals that have not converged
are those of a problem whose second marginal is what their plan has, and so are the gradients.

The dense forms have second derivatives too, by one linear system for how g moves; not third ones.
The fused ones have first derivatives only.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.divergences.point_clouds import log_weights
from bayesattn.divergences.transport_costs import squared_costs
from bayesattn.divergences.transport_iterations import (
    soft_minimum,
    without_negligible,
)
from bayesattn.fused import attention_with_key_bias

__all__ = ["TransportProblem", "dense_dual_value", "dense_mean_cost", "dual_value", "mean_cost"]


class TransportProblem(NamedTuple):
    """Two clouds whose costs are squared distances, with weights that sum to one, and ε."""

    x: Float[Tensor, "*batch query dim"]
    y: Float[Tensor, "*batch key dim"]
    a: Float[Tensor, "*batch query"]
    b: Float[Tensor, "*batch key"]
    epsilon: float


def dual_value(
    problem: TransportProblem, dual_g: Float[Tensor, "*batch key"]
) -> Float[Tensor, "*batch"]:
    """The dual value at g and the f that goes with it, in linear memory."""
    x, y, a, b, epsilon = problem
    dual_f = soft_minimum(x, y, log_weights(b) + dual_g / epsilon, epsilon)
    return (a * dual_f).sum(-1) + (b * dual_g).sum(-1)


def mean_cost(
    problem: TransportProblem,
    dual_g: Float[Tensor, "*batch key"],
    multipliers: Float[Tensor, "*batch key"],
) -> Float[Tensor, "*batch"]:
    """Mean cost under the plan of g, in linear memory, with the gradient that multipliers give."""
    x, y, a, b, epsilon = problem
    queries, keys = (cloud.square().sum(-1) for cloud in (x, y))
    bias = log_weights(b) + (dual_g - keys) / epsilon
    values = torch.cat([y, keys[..., None], multipliers[..., None]], -1)
    mean = attention_with_key_bias(x * (2.0 / epsilon), y, values, bias, scale=1.0)
    means, squares, charged = mean[..., :-2], mean[..., -2], mean[..., -1]
    costs = queries - 2.0 * (x * means).sum(-1) + squares
    return (a * costs).sum(-1) + _silent((b * multipliers).sum(-1) - (a * charged).sum(-1))


def dense_dual_value(
    problem: TransportProblem, dual_g: Float[Tensor, "*batch key"]
) -> Float[Tensor, "*batch"]:
    """The dual value at g and the f that goes with it, with second derivatives."""
    plan = _DensePlan(problem, dual_g)
    value = (problem.a * plan.dual_f).sum(-1) + (problem.b * dual_g).sum(-1)
    if not torch.is_grad_enabled():
        return value
    drift = _silent(plan.image)
    gain = (plan.received * drift * plan.solve(drift)).sum(-1)
    return value + 0.5 / problem.epsilon * gain


def dense_mean_cost(
    problem: TransportProblem, dual_g: Float[Tensor, "*batch key"]
) -> Float[Tensor, "*batch"]:
    """Mean cost under the plan of g, with first and second derivatives."""
    plan = _DensePlan(problem, dual_g)
    value = (problem.a * (plan.rows * plan.costs).sum(-1)).sum(-1)
    if not torch.is_grad_enabled():
        return value
    multipliers = plan.multipliers()
    charged = (plan.rows * multipliers[..., None, :]).sum(-1)
    value = value + _silent((problem.b * multipliers).sum(-1) - (problem.a * charged).sum(-1))
    # By how much g moves; the slope at half the way is the mean slope along it.
    drift = plan.solve(_silent(plan.image))
    rows = _DensePlan(problem, dual_g + 0.5 * drift).rows
    left = plan.costs - multipliers[..., None, :]
    left = left - (rows * left).sum(-1, keepdim=True)
    slope = (problem.a[..., None] * rows * left).sum(-2) / problem.epsilon
    return value + (_silent(slope) * drift).sum(-1)


class _DensePlan:
    """The plan of given g and of the f that goes with it.

    Attributes:
        rows: What goes from each query to each key, for each unit of the query.
        dual_f: f.
        image: g after one more half-step.
        received: What each key gets, without a gradient.
    """

    def __init__(self, problem: TransportProblem, dual_g: Tensor):
        x, y, a, b, epsilon = problem
        self.costs = squared_costs(x, y)
        self.dual_g, self.epsilon = dual_g, epsilon
        logits = (log_weights(b) + dual_g / epsilon)[..., None, :] - self.costs / epsilon
        logits = without_negligible(logits, -1)
        self.rows, self.dual_f = logits.softmax(-1), -epsilon * logits.logsumexp(-1)
        logits = (log_weights(a) + self.dual_f / epsilon)[..., None] - self.costs / epsilon
        logits = without_negligible(logits, -2)
        self.columns, self.image = logits.softmax(-2), -epsilon * logits.logsumexp(-2)
        self.received = (b * ((dual_g - self.image) / epsilon).exp()).detach()

    def solve(self, right: Tensor) -> Tensor:
        """By how much g moves if its image does by so much."""
        rows, columns, received = (
            part.detach() for part in (self.rows, self.columns, self.received)
        )
        size = right.shape[-1]
        identity = torch.eye(size, dtype=right.dtype, device=right.device)
        # A constant leaves all as it is, and so do near-constants on parts that nothing connects.
        shift = 100.0 * torch.finfo(right.dtype).eps
        matrix = (1.0 + shift) * identity - columns.mT @ rows + received[..., None, :]
        return torch.linalg.solve_ex(matrix, right[..., None])[0].squeeze(-1)

    def multipliers(self) -> Tensor:
        """Those of the second marginal; see :mod:`bayesattn.divergences.transport_sensitivity`."""
        left = (self.costs - self.dual_g[..., None, :]).detach()
        left = left - (self.rows.detach() * left).sum(-1, keepdim=True)
        return self.dual_g + self.solve((self.columns.detach() * left).sum(-2))


def _silent(part: Tensor) -> Tensor:
    """A part that counts for derivatives and not for the value."""
    return part - part.detach()
