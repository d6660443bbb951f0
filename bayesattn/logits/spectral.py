r"""Logits of a kernel whose frequencies heads learn: random Fourier features, squared.

.. math:: s_{ij} = \log(\hat k_{ij}^2 + \epsilon) + m(q_i) + m(k_j)

Source:
    Song et al. (2021), Implicit kernel attention, arXiv:2006.06147.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bayesattn.argument_checks import check_choice, check_count, check_positive
from bayesattn.autocasting import full_precision
from bayesattn.kernels.distances import widened
from bayesattn.logits.frequencies import FREQUENCY_DRAWS, normal_frequencies
from bayesattn.logits.kernel_logits import KernelLogits
from bayesattn.logits.magnitudes import Magnitude
from bayesattn.logits.spectral_kernel import (
    SQUARES,
    Frequencies,
    SpectralKernel,
    softmax_frequency_scale,
)

__all__ = ["SpectralLogits"]

# A whole number is a number too, which run-time type checks do not take for a float.
Number = float | int


class SpectralLogits(KernelLogits):
    r"""Squared random Fourier features of frequencies that each head learns.

    Frequencies start as draws of the density whose squared kernel is the softmax's. The square is
    one of three:

    * "anchored": exactly the softmax at the start, however few the features, so that layers of a
      trained model can take these logits. The log of the kernel differs from the softmax's by
      log(4 / epsilon) or so at most. It need not stay positive definite.
    * "plain": as published. Features err by one over the root of M, so the start is not the
      softmax, and the square's mean is above that of the kernel's mean by the variance.
    * "unbiased": the mean of products of two different frequencies' shares, whose mean, over
      independent frequencies, is the square of the kernel's. It may be negative, and counts as zero
      then.

    :meth:`negative_share` tells how often signs are lost by squaring.

    Args:
        num_heads: Each head has frequencies of its own.
        dim: Width of queries and keys.
        num_frequencies: M.
        square: "anchored", "plain" or "unbiased".
        is_stationary: Whether the kernel depends on differences alone; else each feature has two
            frequencies.
        draw: As for :func:`bayesattn.logits.frequencies.normal_frequencies`; "independent" of
            unbiased squares and "orthogonal" of others if None.
        floor: Epsilon, positive.
        magnitude: As for :class:`bayesattn.logits.KernelLogits`.

    Attributes:
        first: Frequencies of each head over :func:`softmax_frequency_scale`, so of unit variance at
            the start.
        second: Likewise, or None if stationary.

    Raises:
        ValueError: If a size or the floor is not positive, a choice none of these, or the draw of
            an unbiased square not independent.

    Source:
        Song et al. (2021), arXiv:2006.06147.
    """

    first: nn.Parameter
    first_anchor: Tensor

    def __init__(
        self,
        num_heads: int,
        dim: int,
        num_frequencies: int = 64,
        *,
        square: str = "anchored",
        is_stationary: bool = True,
        draw: str | None = None,
        floor: Number = 1e-5,
        magnitude: Magnitude | bool = True,
    ):
        super().__init__(num_heads, dim, magnitude)
        check_choice("square", square, SQUARES)
        if draw is None:
            draw = "independent" if square == "unbiased" else "orthogonal"
        check_choice("draw", draw, FREQUENCY_DRAWS)
        if square == "unbiased" and draw != "independent":
            raise ValueError(f"draw must be 'independent' for an unbiased square, got {draw!r}")
        check_positive("floor", floor)
        least = 2 if square == "unbiased" else 1
        self.num_frequencies = check_count("num_frequencies", num_frequencies, least)
        self.square, self.draw, self.floor = square, draw, float(floor)
        shape = (num_heads, num_frequencies, dim)
        names = ("first",) if is_stationary else ("first", "second")
        self.second: nn.Parameter | None = None
        for name in names:
            setattr(self, name, nn.Parameter(torch.empty(shape)))
            if square == "anchored":
                self.register_buffer(f"{name}_anchor", torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the frequencies anew."""
        sizes = (self.num_heads, self.num_frequencies, self.dim)
        for name in ("first", "second"):
            parameter = getattr(self, name)
            if parameter is None:
                continue
            drawn = normal_frequencies(*sizes, draw=self.draw)
            with torch.no_grad():
                parameter.copy_(drawn)
                if self.square == "anchored":
                    getattr(self, f"{name}_anchor").copy_(drawn)

    @property
    def kernel(self) -> SpectralKernel:
        """The kernel of the present frequencies."""
        anchor = None
        if self.square == "anchored":
            anchor = self._frequencies(self.first_anchor, getattr(self, "second_anchor", None))
        frequencies = self._frequencies(self.first, self.second)
        return SpectralKernel(frequencies, anchor, self.square, self.floor)

    def log_kernel(
        self, query: Float[Tensor, "*_batch query dim"], key: Float[Tensor, "*_batch key dim"]
    ) -> Float[Tensor, "*_batch query key"]:
        """Logarithm of the squared kernel of all pairs."""
        return self.kernel.log_kernel(query, key)

    def log_kernel_of_edges(
        self,
        query: Float[Tensor, "head query dim"],
        key: Float[Tensor, "head key dim"],
        edges: Int[Tensor, "2 edge"],
    ) -> Float[Tensor, "head edge"]:
        """Logarithm of the squared kernel of the pairs that edges join."""
        return self.kernel.log_kernel_of_edges(query, key, edges)

    def similarity(
        self, query: Float[Tensor, "*_batch query dim"], key: Float[Tensor, "*_batch key dim"]
    ) -> Float[Tensor, "*_batch query key"]:
        """The kernel of all pairs before it is squared, with its sign."""
        with full_precision(query):
            return self.kernel.similarity(widened(query), widened(key))

    def negative_share(
        self, query: Float[Tensor, "*_batch query dim"], key: Float[Tensor, "*_batch key dim"]
    ) -> Float[Tensor, "*_batch"]:
        """The part of the pairs whose kernel is negative, so that squaring loses its sign."""
        return (self.similarity(query, key) < 0).double().mean((-2, -1)).to(query.dtype)

    def extra_repr(self) -> str:
        """The sizes and choices."""
        return (
            f"{super().extra_repr()}, num_frequencies={self.num_frequencies}, "
            f"square={self.square!r}, is_stationary={self.second is None}"
        )

    def _frequencies(self, first: Tensor, second: Tensor | None) -> Frequencies:
        scale = softmax_frequency_scale(self.dim)
        return Frequencies(scale * first, None if second is None else scale * second)
