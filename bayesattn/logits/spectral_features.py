r"""Random Fourier features: kernels as inner products of cosines and sines of frequencies.

.. math:: \phi(x) = \frac{1}{2 \sqrt M} \begin{bmatrix} \cos 2 \pi W_1 x + \cos 2 \pi W_2 x \\
    \sin 2 \pi W_1 x + \sin 2 \pi W_2 x \end{bmatrix}, \qquad \hat k(x, y) = \phi(x) \cdot \phi(y)

One set of frequencies (:math:`W_1 = W_2`) gives a stationary kernel, whose mean is the
characteristic function :math:`\kappa(x - y)` of the frequencies' density (Bochner). Two independent
sets of one symmetric density give :math:`\kappa(x - y) / 2 + \kappa(x) \kappa(y) / 2` (Yaglom). The
kernel is positive definite, but not positive: for attention it is squared.

Source:
    Song et al. (2021), arXiv:2006.06147. Rahimi and Recht (2007), Random features for large-scale
    kernel machines. The unbiased square is ours.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["fourier_features", "log_of_square", "square_features", "unbiased_square"]

# A whole number is a number too, which run-time type checks do not take for a float.
Number = float | int


def fourier_features(
    x: Float[Tensor, "*#batch row dim"],
    frequencies: Float[Tensor, "*#batch frequency dim"],
    second: Float[Tensor, "*#batch frequency dim"] | None = None,
) -> Float[Tensor, "*#batch row feature"]:
    """Cosines, then sines, of all frequencies, so scaled that inner products are the kernel.

    Args:
        x: Queries or keys.
        frequencies: In cycles for a unit of x, such as "head frequency dim".
        second: As many, where the kernel is not stationary.
    """
    angles = 2 * math.pi * (x @ frequencies.mT)
    cosines, sines = angles.cos(), angles.sin()
    if second is None:
        return torch.cat([cosines, sines], -1) / angles.shape[-1] ** 0.5
    others = 2 * math.pi * (x @ second.mT)
    both = torch.cat([cosines + others.cos(), sines + others.sin()], -1)
    return both / (2 * angles.shape[-1] ** 0.5)


def square_features(
    features: Float[Tensor, "*batch row feature"],
) -> Float[Tensor, "*batch row square"]:
    r"""Features whose inner products are the sum of the squares of each frequency's own share.

    Of a share :math:`a a' + b b'` the square is the inner product of
    :math:`(a^2, \sqrt 2\, a b, b^2)` and the like.
    """
    cosines, sines = features.chunk(2, -1)
    return torch.cat([cosines.square(), 2**0.5 * cosines * sines, sines.square()], -1)


def unbiased_square(
    similarity: Float[Tensor, "*batch"], squares: Float[Tensor, "*batch"], num_frequencies: int
) -> Float[Tensor, "*batch"]:
    r"""The square of the kernel's mean, without the bias of the square of its estimate.

    .. math:: \frac{M}{M - 1} \Big(\hat k^2 - \sum_m c_m^2\Big), \qquad \hat k = \sum_m c_m

    the mean of products of any two different frequencies' shares. It may be negative.

    Args:
        similarity: :math:`\hat k`.
        squares: The sum of squares of the shares; see :func:`square_features`.
        num_frequencies: M, at least two.

    Raises:
        ValueError: If there is one frequency, which tells nothing of its spread.
    """
    if num_frequencies < 2:
        raise ValueError(
            f"frequencies: expected at least two for an unbiased square, got {num_frequencies}"
        )
    return (similarity.square() - squares) * (num_frequencies / (num_frequencies - 1))


def log_of_square(
    squared: Float[Tensor, "*batch"], floor: Number = 1e-5
) -> Float[Tensor, "*batch"]:
    """Logarithm of a squared similarity above a floor; what is negative counts as zero.

    Of the square of a similarity the slope in that is at most one over the root of the floor.
    """
    return (squared.clamp_min(0.0) + floor).log()
