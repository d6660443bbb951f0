r"""What a Stein direction and its noise need of a positive-definite kernel between particles.

.. math:: \sum_j K(x_i, x_j)\, s_j, \qquad R_i = \sum_j \nabla_{x_j} \cdot K(x_j, x_i), \qquad
    \xi \sim N(0, K / M + \epsilon I)

A kernel is a number k for any two particles, or a matrix K: a number stands for k times the
identity.

Source:
    Liu and Wang (2016), Stein variational gradient descent, arXiv:1608.04471.
    Wang et al. (2019), SVGD with matrix-valued kernels, arXiv:1910.12794.
    Gallego and Rios Insua (2018), Stochastic gradient MCMC with repulsive forces,
    arXiv:1812.00071, for the noise.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.autocasting import full_precision
from bayesattn.kernels.bandwidths import Number
from bayesattn.kernels.distances import widened

__all__ = ["Kernel", "KernelTerms", "ScalarKernel", "SiteKernel", "Terms"]


@runtime_checkable
class Terms(Protocol):
    """A kernel at one cloud of particles."""

    @property
    def repulsion(self) -> Float[Tensor, "*batch particle dim"]:
        """Sum over j of the divergence of K(x_j, x_i) by x_j: away from the other particles."""
        ...

    @property
    def squared_bandwidth(self) -> Float[Tensor, "*batch"] | None:
        """That was in force; None where there is no such figure."""
        ...

    @property
    def own_slope(self) -> Float[Tensor, "*batch particle dim"] | None:
        """Divergence of K(x_i, y) by y at y = x_i, zero of radial kernels; None means zero.

        Repulsion and this make M times the divergence of the matrix K / M between particles.
        """
        ...

    def smooth(
        self, score: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch particle dim"]:
        """Sum over j of K(x_i, x_j) times the score at x_j."""
        ...

    def fluctuate(
        self, normal: Float[Tensor, "*batch particle dim"], floor: Number
    ) -> Float[Tensor, "*batch particle dim"]:
        """Make noise of covariance K / M + floor I, M particles, of standard normal numbers.

        Args:
            normal: Independent standard normal numbers.
            floor: At least zero.
        """
        ...


@runtime_checkable
class Kernel(Protocol):
    """A positive-definite function, number- or matrix-valued, such as :class:`RBF`."""

    def __call__(self, particles: Float[Tensor, "*batch particle dim"]) -> Terms:
        """What there is to know of the kernel at one cloud of particles."""
        ...

    def frozen(self, particles: Float[Tensor, "*batch particle dim"]) -> "Kernel":
        """The same kernel with bandwidths and locations fixed to what they are at particles."""
        ...


@runtime_checkable
class ScalarKernel(Kernel, Protocol):
    """A number-valued positive-definite function with a bandwidth, such as :class:`IMQ`."""

    def __call__(self, particles: Float[Tensor, "*batch particle dim"]) -> "KernelTerms":
        """Gram matrix and repulsion of one cloud of particles."""
        ...

    def frozen(self, particles: Float[Tensor, "*batch particle dim"]) -> "ScalarKernel":
        """The same kernel with bandwidths and locations fixed to what they are at particles."""
        ...

    def gram(
        self, x: Float[Tensor, "*#batch row dim"], y: Float[Tensor, "*#batch column dim"]
    ) -> Float[Tensor, "*#batch row column"]:
        """Kernel between two clouds; what depends on particles is that of ``x``."""
        ...

    def squared_bandwidth(
        self, particles: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch"]:
        """Squared bandwidth in force at these particles, a constant to differentiation."""
        ...


@runtime_checkable
class SiteKernel(Protocol):
    """What becomes a kernel once the sites that a particle is made of are known."""

    def over(self, widths: Mapping[str, int]) -> Kernel:
        """The kernel of particles made of these sites, one after the other.

        Args:
            widths: Name of each site to the number of its coordinates.

        Returns:
            One object for equal widths, so that what is kept under it is found again.
        """
        ...


class KernelTerms(NamedTuple):
    """A number-valued kernel at one cloud of particles.

    Attributes:
        gram: Kernel between every two particles, symmetric; one on the diagonal if radial.
        repulsion: Sum over j of the gradient of k(x_j, x_i) by x_j: away from the other particles.
        squared_bandwidth: That was in force; None where there is no such figure.
        own_slope: Gradient of k(x_i, y) by y at y = x_i; None means zero.
    """

    gram: Float[Tensor, "*batch particle particle"]
    repulsion: Float[Tensor, "*batch particle dim"]
    squared_bandwidth: Float[Tensor, "*batch"] | None = None
    own_slope: Float[Tensor, "*batch particle dim"] | None = None

    def smooth(
        self, score: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch particle dim"]:
        """Sum over j of k(x_i, x_j) times the score at x_j."""
        with full_precision(score):
            return self.gram @ score

    def fluctuate(
        self, normal: Float[Tensor, "*batch particle dim"], floor: Number
    ) -> Float[Tensor, "*batch particle dim"]:
        """Make noise of covariance k / M + floor I; see :meth:`Terms.fluctuate`."""
        covariance = widened(self.gram) / self.gram.shape[-1]
        # Duplicates make the Gram matrix singular; what rounding took from it is given back.
        ridge = _lost_to_rounding(self.gram) * covariance.diagonal(dim1=-2, dim2=-1)
        ridge = ridge + max(floor, torch.finfo(covariance.dtype).tiny)
        with full_precision(normal):
            # The kind of factorization that raises nothing: what is no number is for the watch.
            factor, _ = torch.linalg.cholesky_ex(covariance + torch.diag_embed(ridge))
            return (factor @ widened(normal)).to(normal.dtype)


def _lost_to_rounding(gram: Tensor) -> float:
    """Bound, relative to the diagonal, on how far below zero an eigenvalue may be rounded."""
    wide = torch.promote_types(gram.dtype, torch.float32)
    return torch.finfo(gram.dtype).eps * gram.shape[-1] ** 0.5 + 16 * torch.finfo(wide).eps
