r"""The linear kernel, which sees means and covariances alone.

.. math::
    k(x, y) = b + \frac{(x - m) \cdot (y - m)}{c^2}, \qquad
    R_i = \sum_j \nabla_{x_j} k(x_j, x_i) = \frac{M}{c^2} (x_i - m)

Source:
    Liu and Wang (2018), Stein variational gradient descent as moment matching, arXiv:1810.11693.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.autocasting import full_precision
from bayesattn.kernels.bandwidths import Bandwidth, Number, check_bandwidth, fixed_square
from bayesattn.kernels.distances import about_mean, widened
from bayesattn.kernels.protocol import KernelTerms
from bayesattn.kernels.sums import Summable

__all__ = ["Linear"]


@dataclass(frozen=True)
class Linear(Summable):
    r"""Linear kernel :math:`k(x, y) = b + (x - m) \cdot (y - m) / c^2`.

    SVGD with it alone gives particles, more of them than dimensions, the mean and the covariance
    of a Gaussian exactly, and knows of nothing else. ``RBF() + Linear()`` adds that to a kernel
    that sees the shape; but its push does not fall off with distance, so that on skewed or
    heavy-tailed posteriors particles far out can run away.

    Args:
        bandwidth: "mean", where :math:`c^2` is the particles' mean squared distance from their
            mean; or c itself: a number, or a tensor, one c per batch.
        offset: b, at least zero; without it the mean is not moved.
        location: m; the particles' mean by default.

    Source:
        Liu and Wang (2018), arXiv:1810.11693. A sum with a radial kernel is ours.
    """

    bandwidth: Bandwidth = "mean"
    offset: Number = 1.0
    location: Tensor | None = None

    def __post_init__(self) -> None:
        check_bandwidth("Linear", self.bandwidth, ("mean",))
        if not 0.0 <= self.offset < math.inf:
            raise ValueError(f"Linear offset: expected a number from zero on, got {self.offset}")

    def __call__(self, particles: Float[Tensor, "*batch particle dim"]) -> KernelTerms:
        """Gram matrix and repulsion of one cloud of particles."""
        centered, _ = self._about_location(particles)
        squared = self._squared(centered)
        scaled = centered / squared[..., None, None]
        with full_precision(particles):
            gram = self.offset + scaled @ centered.mT
        # Rounding must not tell a pair from its mirror image.
        gram = (gram + gram.mT) / 2
        slope = scaled.to(particles.dtype)
        return KernelTerms(
            gram.to(particles.dtype), particles.shape[-2] * slope, squared, own_slope=slope
        )

    def gram(
        self, x: Float[Tensor, "*#batch row dim"], y: Float[Tensor, "*#batch column dim"]
    ) -> Float[Tensor, "*#batch row column"]:
        """Kernel between two clouds, with the location and bandwidth of ``x``."""
        rows, (first, rest) = self._about_location(x)
        columns = widened(y) - first - rest
        squared = self._squared(rows)[..., None, None]
        with full_precision(x):
            return (self.offset + (rows / squared) @ columns.mT).to(x.dtype)

    def squared_bandwidth(
        self, particles: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch"]:
        """Squared bandwidth in force at these particles, detached, in float32 or wider."""
        return self._squared(self._about_location(particles)[0])

    def frozen(self, particles: Float[Tensor, "*batch particle dim"]) -> "Linear":
        """The same kernel with bandwidth and location fixed to what they are at particles."""
        centered, (first, rest) = self._about_location(particles)
        return Linear(self._squared(centered).sqrt(), self.offset, (first + rest)[..., 0, :])

    def _about_location(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A cloud less the location, and that as a sum of two; see :func:`about_mean`."""
        if self.location is None:
            return about_mean(x)
        x = widened(x)
        location = self.location.detach().to(x)[..., None, :]
        return x - location, (location, torch.zeros_like(location))

    def _squared(self, centered: Tensor) -> Tensor:
        squared = centered.detach().square().sum(-1)
        if not isinstance(self.bandwidth, str):
            return fixed_square(self.bandwidth, squared[..., 0])
        mean = squared.mean(-1)
        # Particles at one place have no distance, and get one.
        return torch.where(mean > torch.finfo(mean.dtype).tiny, mean, torch.ones_like(mean))
