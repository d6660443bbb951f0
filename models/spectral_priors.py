r"""Priors of attention's kernels by frequencies that all inputs share.

.. math:: s_h \sim \mathrm{LogNormal}, \quad R \sim \mathrm{LKJ}, \; R = L L^\top, \quad
    w_{hm} = s_h \sum_g L_{hg}\, \epsilon_{gm}, \; \epsilon_{gm} \sim N(0, I), \qquad
    k_h(x, y) = \phi_h(x) \cdot \phi_h(y)

:math:`\phi` being random Fourier features. Given scales, frequencies of two heads correlate as R
says, and those of one head are independent normal vectors: over its frequencies a kernel has the
mean :math:`e^{-2 \pi^2 s_h^2 \lVert x - y \rVert^2}` and a spread of order :math:`M^{-1/2}`.

Source:
    Song et al. (2021), Implicit kernel attention, arXiv:2006.06147, whose frequencies are learned
    or drawn by a network; priors are ours. Lewandowski, Kurowicka and Joe (2009), Generating random
    correlation matrices based on vines and extended onion method, J. Multivar. Anal. 100.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.logits.spectral_features import fourier_features
from bayesattn.models.checks import check_settings
from bayesattn.models.sentences import normal_prior

__all__ = ["FrequencyPairs", "KernelPrior", "RandomFrequencies"]

# From "*batch point dim" and "*batch context dim" to "*batch head point context".
Kernel = Callable[[Tensor, Tensor], Tensor]


class KernelPrior(ABC):
    """A prior of the kernels of several heads."""

    @property
    @abstractmethod
    def dims(self) -> dict[str, list[str]]:
        """Names of the axes of its sites, for ArviZ."""

    @abstractmethod
    def sample(self, heads: pyro.plate, inputs: Float[Tensor, "*batch point dim"]) -> Kernel:
        """Sample one kernel a head within a Pyro program, for all inputs alike.

        Args:
            heads: Plate of the heads; what all share is sampled outside of it.
            inputs: Of the width, type and device that the kernels take.

        Returns:
            A function of queries and keys.
        """


@dataclass(frozen=True)
class RandomFrequencies(KernelPrior):
    """Kernels of one set of frequencies a head; they hang on differences alone.

    Sites: ``frequency_scale`` and ``normal_frequency`` in plate ``head``, and ``head_factor``, the
    Cholesky factor of the heads' correlations, where there are several heads. Deterministic:
    ``scaled_frequency``, in cycles for a unit of the inputs, and ``head_correlation``. The order of
    a head's frequencies and their signs mean nothing, so look at kernels.

    Attributes:
        num_frequencies: Of each head.
        scale: Median of the frequencies' scale, in cycles for a unit of the inputs.
        scale_spread: Standard deviation of its logarithm.
        correlation_shape: Of the LKJ prior: one is uniform over correlations of the heads, more
            draws heads apart; None makes them independent.
    """

    num_frequencies: int
    scale: int | float = 1.0
    scale_spread: int | float = 1.0
    correlation_shape: int | float | None = 1.0

    # Axes of a head's frequencies before those of one set.
    _lead: ClassVar[tuple[int, ...]] = ()
    _lead_names: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the axes of its sites, for ArviZ."""
        frequencies = ["head", *self._lead_names, "frequency", "feature"]
        return {
            "frequency_scale": ["head"],
            "normal_frequency": frequencies,
            "scaled_frequency": frequencies,
            "head_factor": ["head", "other_head"],
            "head_correlation": ["head", "other_head"],
        }

    def sample(self, heads: pyro.plate, inputs: Float[Tensor, "*batch point dim"]) -> Kernel:
        """Sample frequencies; the kernel is that of :func:`feature_kernel`."""
        shape = (*self._lead, self.num_frequencies, inputs.shape[-1])
        median = inputs.new_full((), math.log(self.scale))
        with heads:
            scale = pyro.sample("frequency_scale", dist.LogNormal(median, float(self.scale_spread)))
            normal = pyro.sample("normal_frequency", normal_prior(inputs, *shape, scale=1.0))
        scaled = torch.einsum("h,h...->h...", scale, self._coupled(normal))
        pyro.deterministic("scaled_frequency", scaled)
        sets = scaled.unbind(1) if self._lead else (scaled,)
        return lambda x, y: feature_kernel(x, y, *sets)

    def _coupled(self, normal: Float[Tensor, "head *rest"]) -> Float[Tensor, "head *rest"]:
        """Normal numbers that correlate between heads."""
        if self.correlation_shape is None or len(normal) == 1:
            return normal
        shape = normal.new_full((), float(self.correlation_shape))
        factor = pyro.sample("head_factor", dist.LKJCholesky(len(normal), shape))
        pyro.deterministic("head_correlation", factor @ factor.mT)
        return torch.einsum("hg,g...->h...", factor, normal)


@dataclass(frozen=True)
class FrequencyPairs(RandomFrequencies):
    r"""Kernels of pairs of frequencies, which hang on more than differences.

    Both members of a pair have the same law, so that the kernel's mean is
    :math:`\kappa(x - y) / 2 + \kappa(x) \kappa(y) / 2`, :math:`\kappa` being that of one set. Sites
    and attributes are those of :class:`RandomFrequencies`, with an axis ``member`` after the head.
    """

    _lead: ClassVar[tuple[int, ...]] = (2,)
    _lead_names: ClassVar[tuple[str, ...]] = ("member",)


def feature_kernel(
    x: Float[Tensor, "*batch point dim"],
    y: Float[Tensor, "*batch context dim"],
    frequencies: Float[Tensor, "head frequency dim"],
    second: Float[Tensor, "head frequency dim"] | None = None,
) -> Float[Tensor, "*batch head point context"]:
    """Inner products of Fourier features, by one set of frequencies a head or by pairs.

    Args:
        x: Queries, the same for all heads.
        y: Keys.
        frequencies: In cycles for a unit of x.
        second: The pairs' other members.
    """
    left, right = (fourier_features(part[..., None, :, :], frequencies, second) for part in (x, y))
    return left @ right.mT
