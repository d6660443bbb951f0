r"""A positive kernel whose spectral density is a Gaussian with jumps from a mixture.

.. math:: \log \kappa(\delta) = -\tfrac12 \sum_d \lambda_d \delta_d^2
    + \sum_c A_c \big(\kappa_c(\delta) - 1\big), \qquad
    \kappa_c(\delta) = e^{-2 \pi^2 \sum_d \sigma_{cd}^2 \delta_d^2} \cos(2 \pi \mu_c \cdot \delta)

This is the characteristic exponent of a frequency that is the sum of a normal one and of jumps, on
average :math:`A_c` of them from :math:`N(\pm \mu_c, \operatorname{diag} \sigma_c^2)` (Lévy and
Khintchine). So the kernel is positive definite, and never zero or negative, which a spectral
mixture itself is. Where jumps are few, :math:`e^{A(\kappa_c - 1)} \approx 1 - A + A \kappa_c`.

Source:
    Sato (1999), Lévy processes and infinitely divisible distributions, theorem 8.1. The components
    are those of Wilson and Adams (2013), arXiv:1302.4245. Their use for attention is ours.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayesattn.argument_checks import check_count
from bayesattn.kernels.distances import local_distances
from bayesattn.logits.characteristic_functions import component_characteristics
from bayesattn.logits.kernel_logits import KernelLogits, at_least_zero, start_rate
from bayesattn.logits.magnitudes import Magnitude

__all__ = ["SpectralMixture"]


class SpectralMixture(KernelLogits):
    r"""A Gaussian kernel with oscillations, the strengths and frequencies of which heads learn.

    .. math:: \log \kappa(\delta) = -\tfrac12 \sum_d \lambda_d \delta_d^2 + \sum_c A_c
        \big(e^{-2 \pi^2 \sum_d \sigma_{cd}^2 \delta_d^2} \cos(2 \pi \mu_c \cdot \delta) - 1\big)

    Args:
        num_heads: Each head has a kernel of its own.
        dim: Width of queries and keys.
        num_components: Number of components, besides the Gaussian.
        magnitude: As for :class:`bayesattn.logits.KernelLogits`.

    Attributes:
        log_rate: :math:`\log \sqrt d \lambda`, zero at the start, for each head and coordinate.
        raw_strength: A, for each head and component; zero at the start, where the kernel is the
            softmax's, and below zero counted as zero.
        means: :math:`\mu`, in cycles for a unit of the features; at random at the start.
        log_scale: :math:`\log \sigma`.

    Raises:
        ValueError: If a size is not positive.
    """

    def __init__(
        self,
        num_heads: int,
        dim: int,
        num_components: int = 4,
        *,
        magnitude: Magnitude | bool = True,
    ):
        super().__init__(num_heads, dim, magnitude)
        self.num_components = check_count("num_components", num_components)
        shape = (num_heads, num_components, dim)
        self.log_rate = nn.Parameter(torch.empty(num_heads, dim))
        self.raw_strength = nn.Parameter(torch.empty(num_heads, num_components))
        self.means = nn.Parameter(torch.empty(shape))
        self.log_scale = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at the scaled dot product, with components as wide as its density."""
        width = start_rate(self.dim) ** 0.5 / (2 * math.pi)
        nn.init.zeros_(self.log_rate)
        nn.init.zeros_(self.raw_strength)
        nn.init.normal_(self.means, std=width)
        nn.init.constant_(self.log_scale, math.log(width / 2))

    @property
    def rate(self) -> Float[Tensor, "head dim"]:
        r""":math:`\lambda`."""
        return start_rate(self.dim) * self.log_rate.exp()

    @property
    def strength(self) -> Float[Tensor, "head component"]:
        """A."""
        return at_least_zero(self.raw_strength)

    def log_kernel(
        self, query: Float[Tensor, "*_batch query dim"], key: Float[Tensor, "*_batch key dim"]
    ) -> Float[Tensor, "*_batch query key"]:
        """Logarithm of the kernel of all pairs."""
        root = self.rate.to(query.dtype).sqrt()[:, None]
        gaussian = -local_distances(query * root, key * root) / 2
        queries, keys = query[..., None, :, :], key[..., None, :, :]
        scale = self.log_scale.to(query.dtype).exp()[..., None, :]
        spread = local_distances(queries * scale, keys * scale)
        # The cosine of a difference, without the difference of every pair.
        of_query, of_key = (
            2 * math.pi * (part @ self.means.to(part.dtype)[..., None]) for part in (queries, keys)
        )
        turns = of_query.cos() * of_key.cos().mT + of_query.sin() * of_key.sin().mT
        parts = (-2 * math.pi**2 * spread).exp() * turns - 1
        strength = self.strength.to(query.dtype)[..., None, None]
        return gaussian + (strength * parts).sum(-3)

    def log_kernel_of_ends(
        self, query: Float[Tensor, "head edge dim"], key: Float[Tensor, "head edge dim"]
    ) -> Float[Tensor, "head edge"]:
        """Logarithm of the kernel of each edge's query and key."""
        difference = query - key
        rate, means, scale = (
            part.to(query.dtype) for part in (self.rate[:, None], self.means, self.log_scale.exp())
        )
        parts = component_characteristics(difference, means, scale) - 1
        gaussian = -(rate * difference.square()).sum(-1) / 2
        return gaussian + (self.strength.to(query.dtype)[:, None] * parts).sum(-1)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{super().extra_repr()}, num_components={self.num_components}"
