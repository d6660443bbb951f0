r"""Kernels of a weighted distance with heavier tails than the Gaussian's, positive by construction.

.. math:: r^2 = \sum_d \lambda_d \delta_d^2, \qquad
    \kappa_{\mathrm{RQ}} = (1 + a r^2 / 2)^{-1 / a}, \qquad
    \kappa_{\mathrm{Mat}} = e^{-(1 - w) r^2 / 2}\, \kappa_\nu(r)^w

At :math:`a = 0` and :math:`w = 0` both are Gaussian. They are positive definite: the rational
quadratic is a mixture of Gaussians, and a Matérn kernel the characteristic function of Student's
distribution, which is infinitely divisible, so that powers of it are kernels too; in several
dimensions because it is a normal distribution of a variance that is.

Source:
    Rasmussen and Williams (2006), Gaussian processes for machine learning, eq. 4.17 and 4.19.
    Grosswald (1976), The Student t-distribution of any degree of freedom is infinitely divisible.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayesattn.argument_checks import check_choice, check_not_negative
from bayesattn.kernels.distances import local_distances
from bayesattn.logits.kernel_logits import KernelLogits, at_least_zero, start_rate
from bayesattn.logits.magnitudes import Magnitude

__all__ = ["Matern", "RationalQuadratic"]

# A whole number is a number too, which run-time type checks do not take for a float.
Number = float | int
_SMOOTHNESS = {"1/2": 1.0, "3/2": 3.0, "5/2": 5.0}


class _Radial(KernelLogits):
    """A kernel of the weighted distance; each subclass adds its profile."""

    def __init__(self, num_heads: int, dim: int, *, magnitude: Magnitude | bool = True):
        super().__init__(num_heads, dim, magnitude)
        self.log_rate = nn.Parameter(torch.empty(num_heads, dim))

    def reset_parameters(self) -> None:
        """Start at the scaled dot product."""
        nn.init.zeros_(self.log_rate)

    def log_kernel(
        self, query: Float[Tensor, "*_batch query dim"], key: Float[Tensor, "*_batch key dim"]
    ) -> Float[Tensor, "*_batch query key"]:
        """Logarithm of the kernel of all pairs."""
        root = self._root_rate(query)
        return self._profile(local_distances(query * root, key * root))

    def log_kernel_of_ends(
        self, query: Float[Tensor, "head edge dim"], key: Float[Tensor, "head edge dim"]
    ) -> Float[Tensor, "head edge"]:
        """Logarithm of the kernel of each edge's query and key."""
        distances = ((query - key) * self._root_rate(query)).square().sum(-1)
        return self._profile(distances[..., None])[..., 0]

    def _root_rate(self, like: Tensor) -> Tensor:
        return start_rate(self.dim) ** 0.5 * (self.log_rate.to(like.dtype) / 2).exp()[:, None, :]

    def _profile(
        self, distances: Float[Tensor, "*_batch row column"]
    ) -> Float[Tensor, "*_batch row column"]:
        raise NotImplementedError


class RationalQuadratic(_Radial):
    r"""A kernel with a power law's tail: each head learns how heavy, and how fast it falls.

    .. math:: \log \kappa = -\log(1 + a r^2 / 2) / a, \qquad r^2 = \sum_d \lambda_d \delta_d^2

    Args:
        num_heads: Each head has a kernel of its own.
        dim: Width of queries and keys.
        tail: a at the start, from zero on; zero is the Gaussian, and so softmax.
        magnitude: As for :class:`bayesattn.logits.KernelLogits`.

    Attributes:
        log_rate: :math:`\log \sqrt d \lambda`, zero at the start, for each head and coordinate.
        raw_tail: a, for each head; below zero it counts as zero.

    Raises:
        ValueError: If a size is not positive, or the tail is negative.

    Source:
        Rasmussen and Williams (2006), Gaussian processes for machine learning, eq. 4.19, at
        :math:`\alpha = 1 / a`.
    """

    def __init__(
        self, num_heads: int, dim: int, *, tail: Number = 0.0, magnitude: Magnitude | bool = True
    ):
        super().__init__(num_heads, dim, magnitude=magnitude)
        check_not_negative("tail", tail)
        self._start = float(tail)
        self.raw_tail = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at the scaled dot product, or at the tail that was given."""
        super().reset_parameters()
        nn.init.constant_(self.raw_tail, self._start)

    @property
    def tail(self) -> Float[Tensor, " head"]:
        """How heavy, of each head."""
        return at_least_zero(self.raw_tail)

    def _profile(
        self, distances: Float[Tensor, "*_batch row column"]
    ) -> Float[Tensor, "*_batch row column"]:
        half = distances / 2
        tail = self.tail.to(half.dtype)[:, None, None]
        return -half * _log1p_over(tail * half)


class Matern(_Radial):
    r"""Powers of a Gaussian and of a Matérn kernel, in shares that each head learns.

    .. math:: \log \kappa = -(1 - w) r^2 / 2 + w \log \kappa_\nu(r), \qquad
        \kappa_{1/2} = e^{-r}, \quad \kappa_{3/2} = (1 + \sqrt 3 r) e^{-\sqrt 3 r}, \quad
        \kappa_{5/2} = (1 + \sqrt 5 r + 5 r^2 / 3) e^{-\sqrt 5 r}

    with :math:`r^2 = \sum_d \lambda_d \delta_d^2`.

    Args:
        num_heads: Each head has a kernel of its own.
        dim: Width of queries and keys.
        smoothness: :math:`\nu`, "1/2", "3/2" or "5/2".
        share: w at the start, from zero to one; zero is the Gaussian, and so softmax.
        magnitude: As for :class:`bayesattn.logits.KernelLogits`.

    Attributes:
        log_rate: :math:`\log \sqrt d \lambda`, zero at the start, for each head and coordinate.
        raw_share: w, for each head; below zero it counts as zero, above one as one.

    Raises:
        ValueError: If a size is not positive, the smoothness another, or the share no share.

    Source:
        Rasmussen and Williams (2006), Gaussian processes for machine learning, eq. 4.17. Powers in
        shares are ours.
    """

    def __init__(
        self,
        num_heads: int,
        dim: int,
        *,
        smoothness: str = "5/2",
        share: Number = 0.0,
        magnitude: Magnitude | bool = True,
    ):
        super().__init__(num_heads, dim, magnitude=magnitude)
        check_choice("smoothness", smoothness, tuple(_SMOOTHNESS))
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share must be a number from zero to one, got {share!r}")
        self.smoothness, self._start = smoothness, float(share)
        self.raw_share = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at the scaled dot product, or at the share that was given."""
        super().reset_parameters()
        nn.init.constant_(self.raw_share, self._start)

    @property
    def share(self) -> Float[Tensor, " head"]:
        """Of the Matérn kernel, of each head."""
        return 1 - at_least_zero(1 - at_least_zero(self.raw_share))

    def extra_repr(self) -> str:
        """The sizes and the smoothness."""
        return f"{super().extra_repr()}, smoothness={self.smoothness!r}"

    def _profile(
        self, distances: Float[Tensor, "*_batch row column"]
    ) -> Float[Tensor, "*_batch row column"]:
        share = self.share.to(distances.dtype)[:, None, None]
        return -(1 - share) * distances / 2 + share * self._log_matern(distances)

    def _log_matern(self, distances: Tensor) -> Tensor:
        degrees = _SMOOTHNESS[self.smoothness]
        # The root has no slope at zero; there the clamp has none either.
        root = (degrees * distances).clamp_min(torch.finfo(distances.dtype).tiny).sqrt()
        if self.smoothness == "1/2":
            return -root
        if self.smoothness == "3/2":
            return torch.log1p(root) - root
        return torch.log1p(root + root.square() / 3) - root


def _log1p_over(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 + x) / x, one at zero, with its slope there."""
    # Beyond, the quotient's slope keeps two thirds of the digits; below, three terms keep them all.
    is_small = x < torch.finfo(x.dtype).eps ** (1 / 3)
    large = torch.where(is_small, 1.0, x)
    return torch.where(is_small, 1 - x * (1 / 2 - x / 3), torch.log1p(large) / large)
