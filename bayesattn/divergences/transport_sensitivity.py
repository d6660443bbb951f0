r"""How a plan's cost answers to a change of costs, when its marginals must stay as they are.

.. math:: \frac{d}{dc_{ij}} \sum_{kl} \pi_{kl} c_{kl}
    = \pi_{ij} \Bigl(1 - \frac{c_{ij} - u_i - v_j}{\varepsilon}\Bigr), \qquad
    (u, v) = \operatorname*{argmin}_{u, v} \sum_{ij} \pi_{ij} (c_{ij} - u_i - v_j)^2

The multipliers are means, :math:`u_i = \mathbb E[c - v \mid i]` and :math:`v_j = \mathbb E[c - u
\mid j]`, so that a step of conjugate gradients on them is two calls of fused attention.

Source:
    Derived here: the adjoint method on Sinkhorn's fixed point, in whose system the plan stands.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bayesattn.divergences.transport_iterations import soft_minimum
from bayesattn.fused import attention_with_key_bias
from bayesattn.fused_operators import join_batch

__all__ = ["key_multipliers_operator"]


@torch.library.custom_op("bayesattn::key_multipliers", mutates_args=())
def key_multipliers_operator(
    x: Tensor,
    y: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    dual_g: Tensor,
    epsilon: float,
    num_iterations: int,
) -> Tensor:
    """Multipliers v, up to a constant, for the plan of given g and the f that goes with it."""
    bias = log_b + dual_g / epsilon
    dual_f = soft_minimum(x, y, bias, epsilon)
    other_bias = log_a + dual_f / epsilon
    # What the plan gives to each key, which is b where it has converged.
    received = (bias - soft_minimum(y, x, other_bias, epsilon) / epsilon).exp()
    queries, keys = (cloud.square().sum(-1, keepdim=True) for cloud in (x, y))

    def over_keys(values: Tensor) -> Tensor:
        key_bias = bias - keys.squeeze(-1) / epsilon
        return attention_with_key_bias(x * (2.0 / epsilon), y, values, key_bias, scale=1.0)

    def over_queries(values: Tensor) -> Tensor:
        key_bias = other_bias - queries.squeeze(-1) / epsilon
        return attention_with_key_bias(y * (2.0 / epsilon), x, values, key_bias, scale=1.0)

    def excess(values: Tensor) -> Tensor:
        return values - over_queries(over_keys(values[..., None])).squeeze(-1)

    # Costs are near f + g where the plan has its mass, so that g is a good start.
    keys_left = keys - dual_g[..., None]
    mean = over_keys(torch.cat([y, keys_left], -1))
    left = queries - 2.0 * (x * mean[..., :-1]).sum(-1, keepdim=True) + mean[..., -1:]
    mean = over_queries(torch.cat([x, queries - left], -1))
    right = keys_left - 2.0 * (y * mean[..., :-1]).sum(-1, keepdim=True) + mean[..., -1:]
    # How large the numbers were of which the right side is what is left.
    size = queries.amax((-2, -1))[..., None] + keys.squeeze(-1) + dual_g.abs()
    return dual_g + _conjugate_gradients(excess, right.squeeze(-1), size, received, num_iterations)


def _conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    right: Tensor,
    size: Tensor,
    weights: Tensor,
    num_iterations: int,
) -> Tensor:
    """Solve for an operator that is symmetric and not negative under weights.

    The right side is rounded among numbers of some size; what is below that is let be.
    """

    def product(one: Tensor, other: Tensor) -> Tensor:
        return (weights * one * other).sum(-1, keepdim=True)

    solution, left_over = torch.zeros_like(right), right
    direction, squared = right, product(right, right)
    # Steps among rounding errors alone would lead astray.
    least = product(size, size) * torch.finfo(right.dtype).eps ** 2
    for _ in range(num_iterations):
        image = operator(direction)
        curvature = product(direction, image)
        goes_on = (squared > least) & (curvature > 0)
        length = torch.where(goes_on, squared / torch.where(goes_on, curvature, 1.0), 0.0)
        solution = solution + length * direction
        left_over = left_over - length * image
        before, squared = squared, product(left_over, left_over)
        direction = left_over + squared / torch.where(goes_on, before, 1.0) * direction
    return solution


@key_multipliers_operator.register_fake
def _(
    _x: Tensor,
    _y: Tensor,
    _log_a: Tensor,
    _log_b: Tensor,
    dual_g: Tensor,
    _epsilon: float,
    _num_iterations: int,
) -> Tensor:
    return torch.empty_like(dual_g)


join_batch(key_multipliers_operator)
