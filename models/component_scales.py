r"""Priors of the scales of components: each shrinks what is not needed towards none.

.. math:: a_r \sim N(0, s_r^2 I), \quad b_r \sim N(0, s_r^2 I), \quad m_r \sim N(0, s_r^2 I)

One scale serves all three sides of a component: with a scale for each side, a large one could hide
behind a small one.
"""

import abc
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.models.checks import check_settings

__all__ = [
    "AutomaticRelevance",
    "ComponentScales",
    "GammaProcess",
    "Horseshoe",
    "MultiplicativeGamma",
]


class ComponentScales(abc.ABC):
    """A prior of scales."""

    @abc.abstractmethod
    def sample(self, plate: pyro.plate) -> Float[Tensor, " component"]:
        """Sample scales within a Pyro program.

        Args:
            plate: Of the components; what all share is sampled outside of it.
        """


@dataclass(frozen=True)
class AutomaticRelevance(ComponentScales):
    """Gamma priors of precisions; sites ``precision``.

    A component that nothing needs ends at a precision of ``shape / rate``.

    Attributes:
        shape: Of the gamma law.
        rate: Of the gamma law.

    Source:
        MacKay (1994) and Neal (1996), for networks; Bishop (1999), for principal components.
    """

    shape: int | float = 1.0
    rate: int | float = 1e-4

    def __post_init__(self) -> None:
        check_settings(self)

    def sample(self, plate: pyro.plate) -> Float[Tensor, " component"]:
        """One over the roots of the precisions."""
        with plate:
            precision = pyro.sample("precision", dist.Gamma(float(self.shape), float(self.rate)))
        return precision.rsqrt()


@dataclass(frozen=True)
class Horseshoe(ComponentScales):
    r"""Regularized horseshoe; sites ``global_scale`` and ``local_scale``.

    .. math:: s_r^2 = \frac{c^2 \tau^2 \lambda_r^2}{c^2 + \tau^2 \lambda_r^2}

    Attributes:
        global_scale: Of the half-Cauchy law of :math:`\tau`.
        slab: c, the largest scale.

    Source:
        Piironen and Vehtari (2017), Sparsity information and regularization in the horseshoe,
        Electron. J. Statist. 11.
    """

    global_scale: int | float = 0.1
    slab: int | float = 2.0

    def __post_init__(self) -> None:
        check_settings(self)

    def sample(self, plate: pyro.plate) -> Float[Tensor, " component"]:
        """Local scales times the global one, which the slab bounds."""
        tau = pyro.sample("global_scale", dist.HalfCauchy(float(self.global_scale)))
        with plate:
            local = pyro.sample("local_scale", dist.HalfCauchy(torch.ones_like(tau)))
        free = (tau * local).square()
        return (self.slab**2 * free / (self.slab**2 + free)).sqrt()


@dataclass(frozen=True)
class GammaProcess(ComponentScales):
    r"""Variances as the weights of a gamma process, cut to the components; sites ``share``.

    .. math:: s_r^2 \sim \mathrm{Gamma}(\alpha / R, 1)

    Attributes:
        concentration: :math:`\alpha`; the fewer components, the smaller.

    Source:
        Griffiths and Ghahramani (2011), The Indian buffet process, JMLR 12, for finite limits.
    """

    concentration: int | float = 2.0

    def __post_init__(self) -> None:
        check_settings(self)

    def sample(self, plate: pyro.plate) -> Float[Tensor, " component"]:
        """Roots of the weights."""
        law = dist.Gamma(self.concentration / plate.size, 1.0)
        with plate:
            share = pyro.sample("share", law)
        return share.clamp(min=torch.finfo(share.dtype).tiny).sqrt()


@dataclass(frozen=True)
class MultiplicativeGamma(ComponentScales):
    """Precisions that grow from component to component; sites ``growth``.

    Attributes:
        shape: Of the gamma law of each growth.

    Source:
        Bhattacharya and Dunson (2011), Sparse Bayesian infinite factor models, Biometrika 98.
    """

    shape: int | float = 2.0

    def __post_init__(self) -> None:
        check_settings(self)

    def sample(self, plate: pyro.plate) -> Float[Tensor, " component"]:
        """One over the roots of the running products."""
        with plate:
            growth = pyro.sample("growth", dist.Gamma(float(self.shape), 1.0))
        return growth.log().cumsum(-1).div(-2).exp()
