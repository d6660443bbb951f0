r"""Kernel Stein discrepancy: how far particles are from a target known by its score alone.

.. math:: \mathrm{KSD}^2 = \mathbb E_{x, x'} \, u(x, x'), \qquad
    u(x, y) = (s_x + \nabla_x) \cdot (s_y + \nabla_y) \, k(x, y)

No draws of the target are needed, and no normalizing constant.

Source:
    Liu, Lee and Jordan (2016), A kernelized Stein discrepancy, arXiv:1602.03253, eq. 14.
    Gorham and Mackey (2017), Measuring sample quality with kernels, arXiv:1703.01717.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.kernels import IMQ

__all__ = [
    "SteinKernel",
    "mean_of_distinct_pairs",
    "squared_stein_discrepancy",
    "stein_discrepancy",
]


@runtime_checkable
class SteinKernel(Protocol):
    """A kernel with derivatives, such as :class:`~bayesattn.kernels.IMQ`."""

    def stein_gram(
        self,
        particles: Float[Tensor, "*batch particle dim"],
        scores: Float[Tensor, "*batch particle dim"],
    ) -> Float[Tensor, "*batch particle particle"]:
        """Stein kernel between every two particles."""
        ...


def stein_discrepancy(
    particles: Float[Tensor, "*batch particle dim"],
    scores: Float[Tensor, "*batch particle dim"],
    kernel: SteinKernel | None = None,
) -> Float[Tensor, "*batch"]:
    """Kernel Stein discrepancy of the particles' empirical law, the root of the V-statistic.

    Args:
        particles: At least one.
        scores: Gradient of the target's log density at each particle.
        kernel: :class:`~bayesattn.kernels.IMQ` by default, whose bandwidth is that of the
            particles; fix it to compare clouds.
    """
    gram = (IMQ() if kernel is None else kernel).stein_gram(particles, scores)
    return gram.mean((-2, -1)).clamp_min(0.0).sqrt()


def squared_stein_discrepancy(
    particles: Float[Tensor, "*batch particle dim"],
    scores: Float[Tensor, "*batch particle dim"],
    kernel: SteinKernel | None = None,
) -> Float[Tensor, "*batch"]:
    """Unbiased estimate of the squared discrepancy from independent draws, the U-statistic.

    Args:
        particles: At least two.
        scores: Gradient of the target's log density at each particle.
        kernel: :class:`~bayesattn.kernels.IMQ` by default.

    Raises:
        ValueError: If there are fewer than two particles.
    """
    if particles.shape[-2] < 2:
        raise ValueError(
            f"an unbiased estimate needs two particles, got shape {tuple(particles.shape)}"
        )
    return mean_of_distinct_pairs(
        (IMQ() if kernel is None else kernel).stein_gram(particles, scores)
    )


def mean_of_distinct_pairs(
    gram: Float[Tensor, "*batch particle particle"],
) -> Float[Tensor, "*batch"]:
    """Mean of a function of two particles over pairs of different ones, NaN of a single one."""
    count, diagonal = gram.shape[-1], gram.diagonal(dim1=-2, dim2=-1)
    if count == 1:
        return torch.full_like(gram[..., 0, 0], torch.nan)
    return (gram - diagonal.diag_embed()).sum((-2, -1)) / (count * (count - 1))
