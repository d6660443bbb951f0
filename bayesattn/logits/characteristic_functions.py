r"""Characteristic functions of symmetric densities of frequencies: kernels in closed form.

.. math:: \kappa(\delta) = \sum_c \pi_c\, e^{-2 \pi^2 \sum_d \sigma_{cd}^2 \delta_d^2}
    \cos(2 \pi \mu_c \cdot \delta)

is the mean of :math:`\cos(2 \pi w \cdot \delta)` where w is drawn from the mixture of
:math:`N(\pm \mu_c, \operatorname{diag} \sigma_c^2)` with shares :math:`\pi_c`.

Source:
    Wilson and Adams (2013), Gaussian process kernels for pattern discovery, arXiv:1302.4245, eq.
    12, for a density that is symmetric in all of w rather than in each coordinate.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["component_characteristics", "mixture_characteristic"]


def mixture_characteristic(
    difference: Float[Tensor, "*#batch pair dim"],
    shares: Float[Tensor, "*#batch component"],
    means: Float[Tensor, "*#batch component dim"],
    scales: Float[Tensor, "*#batch component dim"],
) -> Float[Tensor, "*#batch pair"]:
    """Characteristic function of a mixture, one at zero where shares sum to one.

    Args:
        difference: Between a query and a key, in the units of their features.
        shares: Of the components.
        means: Of the frequencies, in cycles for a unit; either sign is as probable.
        scales: Standard deviations of the frequencies.
    """
    parts = component_characteristics(difference, means, scales)
    return (parts * shares[..., None, :]).sum(-1)


def component_characteristics(
    difference: Float[Tensor, "*#batch pair dim"],
    means: Float[Tensor, "*#batch component dim"],
    scales: Float[Tensor, "*#batch component dim"],
) -> Float[Tensor, "*#batch pair component"]:
    """Characteristic function of each component."""
    turns = torch.einsum("...pd,...cd->...pc", difference, means)
    spread = torch.einsum("...pd,...cd->...pc", difference.square(), scales.square())
    return torch.exp(-2 * math.pi**2 * spread) * torch.cos(2 * math.pi * turns)
