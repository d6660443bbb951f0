r"""Sinkhorn's iterations for the duals of entropic transport, many problems side by side.

.. math:: f_i \leftarrow f_i + \omega (T_i(g) - f_i), \quad
    T_i(g) = -\varepsilon \log \sum_j b_j\, e^{(g_j - c_{ij}) / \varepsilon}, \quad
    c_{ij} = \lVert x_i - y_j \rVert^2

and likewise for g, with :math:`\varepsilon` falling from the squared diameter to its value during
the first half of the iterations, :math:`\omega = 1.7` until the last few, and one there. How many
there are never depends on values, and no value is read back from the device. The duals of a cloud
and itself are one, :math:`f \leftarrow \tfrac12 (f + T(f))`, whose error halves at least.

They are operators, one node in a recorded or compiled graph, without derivatives: what is built on
the duals takes these by the envelope theorem.

Source:
    Over-relaxation: Thibault et al. (2017), arXiv:1711.01851. Falling ε and the symmetric
    iteration: Feydy et al. (2019), arXiv:1810.08278. Kernels rescaled every few iterations:
    Schmitzer (2016), arXiv:1610.06519.
"""

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.divergences.transport_costs import squared_costs
from bayesattn.fused import attention_logsumexp
from bayesattn.fused_operators import join_batch

__all__ = [
    "self_dual_operator",
    "soft_minimum",
    "transport_duals_operator",
    "without_negligible",
]

# Iterations between two kernels of the dense route, and with one ε.
_STAGE = 5
_RELAXATION = 1.7
# Logarithms of what a kernel is scaled by between two stages stay within these.
_BOUND = 60.0


@torch.library.custom_op("bayesattn::transport_duals", mutates_args=())
def transport_duals_operator(
    x: Tensor,
    y: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    epsilon: float,
    num_iterations: int,
    is_dense: bool,
) -> tuple[Tensor, Tensor]:
    """Duals f and g of clouds "batch point dim" with log weights "batch point"."""
    lengths = [cloud.square().sum(-1).amax(-1, keepdim=True).sqrt() for cloud in (x, y)]
    diameter = (lengths[0] + lengths[1]).square().clamp_min(epsilon)
    f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
    step = _dense_step(x, y, log_a, log_b) if is_dense else _fused_step(x, y, log_a, log_b)
    for count, share, relaxation in _stages(num_iterations):
        f, g = step(f, g, epsilon * (diameter / epsilon) ** share, relaxation, count)
    return f, g


@torch.library.custom_op("bayesattn::self_dual", mutates_args=())
def self_dual_operator(
    x: Tensor, log_a: Tensor, epsilon: float, num_iterations: int, is_dense: bool
) -> Tensor:
    """The dual of a cloud "batch point dim" and itself."""
    f, a, tiny = torch.zeros_like(log_a), log_a.exp(), torch.finfo(x.dtype).tiny
    kernel = without_negligible(-squared_costs(x, x) / epsilon, -1).exp_() if is_dense else None
    for _ in range(num_iterations):
        if kernel is None:
            image = soft_minimum(x, x, log_a + f / epsilon, epsilon)
        else:
            sums = kernel @ (a * (f / epsilon).exp())[..., None]
            image = -epsilon * sums.squeeze(-1).clamp_min(tiny).log()
        f = 0.5 * (f + image)
    return f


def soft_minimum(
    x: Float[Tensor, "*batch query dim"],
    y: Float[Tensor, "*batch key dim"],
    key_bias: Float[Tensor, "*batch key"],
    epsilon: float | Float[Tensor, "*batch 1"],
) -> Float[Tensor, "*batch query"]:
    r"""Half an iteration, :math:`-\varepsilon \log \sum_j e^{\beta_j - c_{ij} / \varepsilon}`."""
    column = epsilon[..., None] if isinstance(epsilon, Tensor) else epsilon
    bias = key_bias - y.square().sum(-1) / epsilon
    total = attention_logsumexp(x * (2.0 / column), y, bias, scale=1.0)
    return x.square().sum(-1) - epsilon * total


def without_negligible(
    logits: Float[Tensor, "*batch query key"], axis: int
) -> Float[Tensor, "*batch query key"]:
    """Leave out what beside the largest along an axis is as good as nothing.

    Its exponential would be a number below the smallest normal one, with which processors are slow.
    """
    least = 0.8 * math.log(torch.finfo(logits.dtype).tiny)
    beside = logits.detach() - logits.detach().amax(axis, keepdim=True)
    return torch.where(beside < least, -torch.inf, logits)


# From f, g, ε "batch 1", relaxation and a number of iterations to f and g.
_Step = Callable[[Tensor, Tensor, Tensor, float, int], tuple[Tensor, Tensor]]


def _stages(num_iterations: int) -> Iterator[tuple[int, float, float]]:
    """Iterations of each stage, how much of the way to the diameter ε lies, and relaxation."""
    sizes = [min(_STAGE, num_iterations - done) for done in range(0, num_iterations, _STAGE)]
    falling = len(sizes) // 2
    for stage, size in enumerate(sizes):
        share = max(0.0, 1.0 - stage / falling) if falling else 0.0
        yield size, share, 1.0 if stage == len(sizes) - 1 else _RELAXATION


def _fused_step(x: Tensor, y: Tensor, log_a: Tensor, log_b: Tensor) -> _Step:
    def step(f, g, epsilon, relaxation, count):
        for _ in range(count):
            f = f + relaxation * (soft_minimum(x, y, log_b + g / epsilon, epsilon) - f)
            g = g + relaxation * (soft_minimum(y, x, log_a + f / epsilon, epsilon) - g)
        return f, g

    return step


def _dense_step(x: Tensor, y: Tensor, log_a: Tensor, log_b: Tensor) -> _Step:
    costs, a, b = squared_costs(x, y), log_a.exp(), log_b.exp()
    tiny = torch.finfo(x.dtype).tiny

    def step(f, g, epsilon, relaxation, count):
        logits = (g[..., None, :] - costs) / epsilon[..., None]
        largest = logits.amax(-1, keepdim=True)
        kernel = without_negligible(logits - largest, -1).exp_()
        largest = largest.squeeze(-1)
        # One exponential for all the iterations of a stage, which scale rows and columns.
        rows, columns = f / epsilon + largest, torch.zeros_like(g)
        for _ in range(count):
            sums = kernel @ (b * columns.exp())[..., None]
            rows = rows - relaxation * (rows + sums.squeeze(-1).clamp_min(tiny).log())
            sums = kernel.mT @ (a * rows.clamp(-_BOUND, _BOUND).exp())[..., None]
            columns = columns - relaxation * (columns + sums.squeeze(-1).clamp_min(tiny).log())
            columns = columns.clamp(-_BOUND, _BOUND)
        return epsilon * (rows - largest), g + epsilon * columns

    return step


@transport_duals_operator.register_fake
def _(
    _x: Tensor,
    _y: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    _epsilon: float,
    _num_iterations: int,
    _is_dense: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(log_a), torch.empty_like(log_b)


@self_dual_operator.register_fake
def _(_x: Tensor, log_a: Tensor, _epsilon: float, _num_iterations: int, _is_dense: bool) -> Tensor:
    return torch.empty_like(log_a)


for _operator in (transport_duals_operator, self_dual_operator):
    join_batch(_operator)
