r"""A prior of attention's kernels by densities of frequencies: mixtures by breaking a stick.

.. math:: v_{hc} \sim \mathrm{Beta}(1, \alpha), \quad
    \pi_{hc} = v_{hc} \prod_{b < c} (1 - v_{hb}), \quad v_{hC} = 1, \qquad
    w_h \sim \sum_c \pi_{hc} \, N(\pm \mu_{hc}, \operatorname{diag} \sigma_{hc}^2)

The kernel is the density's characteristic function, in closed form: no frequency is drawn, so that
it has no spread but that of what is not known of the density.

Source:
    Sethuraman (1994), A constructive definition of Dirichlet priors, Statistica Sinica 4, cut as in
    Ishwaran and James (2001), Gibbs sampling methods for stick-breaking priors, JASA 96. Wilson and
    Adams (2013), Gaussian process kernels for pattern discovery, arXiv:1302.4245, for the kernel.
"""

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.logits.characteristic_functions import mixture_characteristic
from bayesattn.models.checks import check_settings
from bayesattn.models.sentences import normal_prior
from bayesattn.models.spectral_priors import Kernel, KernelPrior

__all__ = ["FrequencyMixture", "effective_number", "stick_shares"]


@dataclass(frozen=True)
class FrequencyMixture(KernelPrior):
    r"""Kernels of a mixture of normal laws of frequencies around :math:`\pm \mu`, one a head.

    Sites, all in plate ``head``: ``stick``, ``component_mean`` and ``component_scale``.
    Deterministic: ``shares``, and ``effective_components``, the exponential of their entropy.

    Attributes:
        num_components: Most components, at least two.
        concentration: The smaller, the fewer components have most of the stick.
        mean_scale: Prior standard deviation of the means' entries, in cycles for a unit of the
            inputs.
        scale: Median of the components' standard deviations, in the same unit.
        scale_spread: Standard deviation of their logarithms.

    Raises:
        ValueError: If there is one component, which has no share to learn.
    """

    num_components: int
    concentration: int | float = 1.0
    mean_scale: int | float = 1.0
    scale: int | float = 0.3
    scale_spread: int | float = 1.0

    def __post_init__(self) -> None:
        check_settings(self)
        if self.num_components < 2:
            raise ValueError(f"num_components must be at least two, got {self.num_components}")

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the axes of its sites, for ArviZ."""
        return {
            "stick": ["head", "break"],
            "component_mean": ["head", "component", "feature"],
            "component_scale": ["head", "component", "feature"],
            "shares": ["head", "component"],
            "effective_components": ["head"],
        }

    def sample(self, heads: pyro.plate, inputs: Float[Tensor, "*batch point dim"]) -> Kernel:
        """Sample densities; the kernel is :func:`mixture_characteristic` of differences."""
        shape = (self.num_components, inputs.shape[-1])
        stick_prior = dist.Beta(inputs.new_ones(shape[0] - 1), float(self.concentration))
        medians = inputs.new_full(shape, math.log(self.scale))
        scale_prior = dist.LogNormal(medians, float(self.scale_spread)).to_event(2)
        with heads:
            shares = stick_shares(pyro.sample("stick", stick_prior.to_event(1)))
            mean = pyro.sample(
                "component_mean", normal_prior(inputs, *shape, scale=self.mean_scale)
            )
            scale = pyro.sample("component_scale", scale_prior)
            pyro.deterministic("shares", shares, event_dim=1)
            pyro.deterministic("effective_components", effective_number(shares))
        return lambda x, y: _of_pairs(x, y, shares, mean, scale)


def stick_shares(sticks: Float[Tensor, "*batch break"]) -> Float[Tensor, "*batch component"]:
    """Shares of a stick of which parts are broken off in turn; the last gets what is left.

    Args:
        sticks: Part of what is left that each component but the last takes.
    """
    whole = torch.ones_like(sticks[..., :1])
    left = torch.cat([whole, (1 - sticks).cumprod(-1)], -1)
    return torch.cat([sticks, whole], -1) * left


def effective_number(shares: Float[Tensor, "*batch component"]) -> Float[Tensor, "*batch"]:
    """Exponential of the entropy: how many equal shares would be as uneven."""
    return torch.special.entr(shares).sum(-1).exp()


def _of_pairs(
    x: Float[Tensor, "*batch point dim"],
    y: Float[Tensor, "*batch context dim"],
    shares: Float[Tensor, "head component"],
    mean: Float[Tensor, "head component dim"],
    scale: Float[Tensor, "head component dim"],
) -> Float[Tensor, "*batch head point context"]:
    differences = (x[..., :, None, :] - y[..., None, :, :]).flatten(-3, -2)
    values = mixture_characteristic(differences[..., None, :, :], shares, mean, scale)
    return values.unflatten(-1, (x.shape[-2], y.shape[-2]))
