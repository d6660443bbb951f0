r"""Radial kernels between particles, with the repulsion that they exert.

.. math::
    k_{ij} = \kappa(r_{ij}^2), \qquad
    R_i = \sum_j \nabla_{x_j} k(x_j, x_i) = \sum_j s_{ij} (x_i - x_j), \qquad
    s_{ij} = -2 \kappa'(r_{ij}^2), \qquad r_{ij}^2 = \lVert x_i - x_j \rVert^2

Source:
    Liu and Wang (2016), Stein variational gradient descent, arXiv:1608.04471.
    Gorham and Mackey (2017), Measuring sample quality with kernels, arXiv:1703.01717.
    Liu, Lee and Jordan (2016), A kernelized Stein discrepancy, arXiv:1602.03253.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.kernels.bandwidths import Bandwidth, Number, check_bandwidth, fixed_square
from bayesattn.kernels.distances import (
    floored_median,
    full_precision,
    geometry,
    squared_distances,
    widened,
)
from bayesattn.kernels.protocol import KernelTerms
from bayesattn.kernels.sums import Summable

__all__ = ["IMQ", "RBF", "pairwise_repulsion"]


def pairwise_repulsion(
    slope: Float[Tensor, "*batch particle particle"],
    particles: Float[Tensor, "*batch particle dim"],
) -> Float[Tensor, "*batch particle dim"]:
    r"""Sum of weighted differences :math:`\sum_j s_{ij} (x_i - x_j)` by one matrix product.

    Args:
        slope: :math:`s_{ij}`; its diagonal does not matter.
        particles: Best given about their mean, which drops out of the differences.
    """
    with full_precision(particles):
        # In place, since these are the largest tensors that there are.
        return (slope.sum(-1, keepdim=True) * particles).sub_(slope @ particles)


class _Radial(Summable):
    """What radial kernels share; each adds its bandwidth rule and its profile."""

    bandwidth: Bandwidth

    def __call__(self, particles: Float[Tensor, "*batch particle dim"]) -> KernelTerms:
        """Gram matrix and repulsion of one cloud of particles."""
        centered, distances = geometry(particles)
        squared = self._squared(distances)
        gram, slope = self._profile(distances, squared[..., None, None])
        del distances  # Not kept beside the two while the repulsion is summed.
        repulsion = pairwise_repulsion(slope, centered).to(particles.dtype)
        # Zeros that take no memory, not None, which no transform lets pass.
        flat = repulsion.new_zeros(()).expand_as(repulsion)
        return KernelTerms(gram.to(particles.dtype), repulsion, squared, own_slope=flat)

    def gram(
        self, x: Float[Tensor, "*#batch row dim"], y: Float[Tensor, "*#batch column dim"]
    ) -> Float[Tensor, "*#batch row column"]:
        """Kernel between two clouds, with the bandwidth of ``x``."""
        squared = self.squared_bandwidth(x)[..., None, None]
        return self._profile(squared_distances(x, y), squared)[0].to(x.dtype)

    def squared_bandwidth(
        self, particles: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch"]:
        """Squared bandwidth in force at these particles, detached, in float32 or wider."""
        return self._squared(geometry(particles.detach())[1])

    def at_distances(
        self,
        distances: Float[Tensor, "*batch particle particle"],
        mean_square: Float[Tensor, "*batch"],
    ) -> tuple[Float[Tensor, "*batch particle particle"], Float[Tensor, "*batch"]]:
        """Kernel, and squared bandwidth in force, where distances are all that is known.

        Args:
            distances: Squared, in float32 or wider; zero on the diagonal.
            mean_square: Of the norms that the distances were rounded at.
        """
        squared = self._squared(distances, mean_square)
        return self._profile(distances, squared[..., None, None])[0], squared

    def stein_gram(
        self,
        particles: Float[Tensor, "*batch particle dim"],
        scores: Float[Tensor, "*batch particle dim"],
    ) -> Float[Tensor, "*batch particle particle"]:
        r"""Stein kernel of a target between every two particles, whose mean under it is zero.

        .. math:: u(x, y) = k \, s_x \cdot s_y + s_x \cdot \nabla_y k + s_y \cdot \nabla_x k
            + \operatorname{tr} \nabla_x \nabla_y k

        Args:
            particles: At least one.
            scores: Gradients :math:`s` of the target's log density at the particles.

        Returns:
            Symmetric and positive semidefinite.

        Source:
            Liu, Lee and Jordan (2016), arXiv:1602.03253, theorem 3.6.
        """
        centered, distances = geometry(particles)
        squared = self._squared(distances)[..., None, None]
        gram, slope = self._profile(distances, squared)
        scores = widened(scores)
        with full_precision(particles):
            inner, crossed = scores @ scores.mT, scores @ centered.mT
        # Read off the diagonal of the product itself, as the norms are: it cancels exactly.
        own = crossed.flatten(-2)[..., :: crossed.shape[-1] + 1]
        crossed = own[..., :, None] + own[..., None, :] - crossed - crossed.mT
        trace = particles.shape[-1] - 2 * self._decay(distances, squared)
        return (gram * inner + slope * (crossed + trace)).to(particles.dtype)

    def _squared(self, distances: Tensor, mean_square: Tensor | None = None) -> Tensor:
        if isinstance(self.bandwidth, str):
            return self._rule(floored_median(distances, mean_square), distances.shape[-1])
        return fixed_square(self.bandwidth, distances[..., 0, 0])

    def _rule(self, median: Tensor, num_particles: int) -> Tensor:
        raise NotImplementedError

    def _profile(self, distances: Tensor, squared: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _decay(self, distances: Tensor, squared: Tensor) -> Tensor:
        """How fast the slope falls: minus its elasticity in the squared distance."""
        raise NotImplementedError


@dataclass(frozen=True)
class RBF(_Radial):
    r"""Gaussian kernel :math:`k(x, y) = \exp(-\lVert x - y \rVert^2 / 2 h^2)`.

    Args:
        bandwidth: Either a rule, where med is the median squared distance over pairs of distinct
            particles: "median", :math:`h^2 = \mathrm{med} / 2`, so that the median pair has
            :math:`k = 1 / e`; "paper", :math:`h^2 = \mathrm{med} / (2 \log(M + 1))`, so that among
            M particles it has :math:`k = 1 / (M + 1)`, which is known to narrow the posterior from
            some six dimensions on. Or h itself: a number, or a tensor, one h per batch.

    Source:
        Liu and Wang (2016), arXiv:1608.04471, section 5, which writes h for our :math:`2 h^2`:
        its kernel is :math:`\exp(-r^2 / h)`, its rule :math:`h = \mathrm{med}(r)^2 / \log n`. With
        n + 1 for n, a single particle is no special case.
    """

    bandwidth: Bandwidth = "median"

    def __post_init__(self) -> None:
        check_bandwidth("RBF", self.bandwidth, ("median", "paper"))

    def frozen(self, particles: Float[Tensor, "*batch particle dim"]) -> "RBF":
        """The same kernel with its bandwidth fixed to what it is at these particles."""
        return RBF(self.squared_bandwidth(particles).sqrt())

    def _rule(self, median: Tensor, num_particles: int) -> Tensor:
        return median / (2 if self.bandwidth == "median" else 2 * math.log(num_particles + 1))

    def _profile(self, distances: Tensor, squared: Tensor) -> tuple[Tensor, Tensor]:
        gram = torch.exp(-distances / (2 * squared))
        return gram, gram / squared

    def _decay(self, distances: Tensor, squared: Tensor) -> Tensor:
        return distances / (2 * squared)


@dataclass(frozen=True)
class IMQ(_Radial):
    r"""Inverse multiquadric :math:`k(x, y) = (1 + \lVert x - y \rVert^2 / c^2)^{-\beta}`.

    Args:
        bandwidth: "median", where :math:`c^2` is the median squared distance over pairs of distinct
            particles; or c itself: a number, or a tensor, one c per batch.
        exponent: :math:`\beta`, positive. Below one, the Stein discrepancy of this kernel tells
            whether a sequence of clouds converges, which that of the Gaussian does not.

    Source:
        Gorham and Mackey (2017), arXiv:1703.01717, theorem 8.
    """

    bandwidth: Bandwidth = "median"
    exponent: Number = 0.5

    def __post_init__(self) -> None:
        check_bandwidth("IMQ", self.bandwidth, ("median",))
        if not 0.0 < self.exponent < math.inf:
            raise ValueError(f"IMQ exponent: expected a positive number, got {self.exponent}")

    def frozen(self, particles: Float[Tensor, "*batch particle dim"]) -> "IMQ":
        """The same kernel with its bandwidth fixed to what it is at these particles."""
        return IMQ(self.squared_bandwidth(particles).sqrt(), exponent=self.exponent)

    def _rule(self, median: Tensor, num_particles: int) -> Tensor:
        return median

    def _profile(self, distances: Tensor, squared: Tensor) -> tuple[Tensor, Tensor]:
        base = 1 + distances / squared
        # Half a power is an instruction of its own.
        gram = base.rsqrt() if self.exponent == 0.5 else base**-self.exponent
        return gram, (2 * self.exponent) * gram / (base * squared)

    def _decay(self, distances: Tensor, squared: Tensor) -> Tensor:
        return (self.exponent + 1) * distances / (squared + distances)
