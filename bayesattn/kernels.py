r"""Positive-definite kernels between particles in Gram form, with the repulsion that they exert.

.. math::
    k_{ij} = \kappa(r_{ij}^2), \qquad
    R_i = \sum_j \nabla_{x_j} k(x_j, x_i) = \sum_j s_{ij} (x_i - x_j), \qquad
    s_{ij} = -2 \kappa'(r_{ij}^2), \qquad r_{ij}^2 = \lVert x_i - x_j \rVert^2

Nothing larger than "particle particle" or "particle dim" is held: sums over pairs are products.

Source:
    Liu and Wang (2016), Stein variational gradient descent, arXiv:1608.04471.
    Gorham and Mackey (2017), Measuring sample quality with kernels, arXiv:1703.01717.
    Liu, Lee and Jordan (2016), A kernelized Stein discrepancy, arXiv:1602.03253.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.order_statistics import lower_median

__all__ = [
    "IMQ",
    "RBF",
    "Kernel",
    "KernelTerms",
    "median_squared_distance",
    "pairwise_repulsion",
    "squared_distances",
]

# A whole number is a bandwidth too, which run-time type checks do not take for a float.
Bandwidth = str | float | int | Tensor
Exponent = float | int


class KernelTerms(NamedTuple):
    """What a Stein direction needs of a kernel.

    Attributes:
        gram: Kernel between every two particles, symmetric, one on the diagonal.
        repulsion: Sum over j of the gradient of k(x_j, x_i) by x_j: away from the other particles.
        squared_bandwidth: That was in force; None where there is no such figure.
    """

    gram: Float[Tensor, "*batch particle particle"]
    repulsion: Float[Tensor, "*batch particle dim"]
    squared_bandwidth: Float[Tensor, "*batch"] | None = None

    def smooth(
        self, score: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch particle dim"]:
        """Sum over j of k(x_i, x_j) times the score at x_j."""
        return self.gram @ score


@runtime_checkable
class Kernel(Protocol):
    """A positive-definite function with a bandwidth, such as :class:`RBF` and :class:`IMQ`."""

    def __call__(self, particles: Float[Tensor, "*batch particle dim"]) -> KernelTerms:
        """Gram matrix and repulsion of one cloud of particles."""
        ...

    def gram(
        self, x: Float[Tensor, "*#batch row dim"], y: Float[Tensor, "*#batch column dim"]
    ) -> Float[Tensor, "*#batch row column"]:
        """Kernel between two clouds; a bandwidth that depends on particles is that of ``x``."""
        ...

    def squared_bandwidth(
        self, particles: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch"]:
        """Squared bandwidth in force at these particles, a constant to differentiation."""
        ...

    def frozen(self, particles: Float[Tensor, "*batch particle dim"]) -> "Kernel":
        """The same kernel with its bandwidth fixed to what it is at these particles."""
        ...


def squared_distances(
    x: Float[Tensor, "*#batch row dim"], y: Float[Tensor, "*#batch column dim"] | None = None
) -> Float[Tensor, "*#batch row column"]:
    """Squared Euclidean distances between the rows of two clouds, or of one cloud and itself.

    Norms less twice the inner products, about the mean of ``x``, so that a cloud far from the
    origin loses no digits; never negative.

    Args:
        x: First cloud, at least one row.
        y: Second cloud; ``x`` itself if None, and then the diagonal is exactly zero.

    Returns:
        Squared distances, in float32 or the wider type of ``x``.

    Raises:
        ValueError: If ``x`` has no row.
    """
    if y is None:
        return _geometry(x)[1]
    rows, shift = _centered(x)
    columns = _wide(y) - shift[0] - shift[1]
    with _full_precision(x):
        products = rows @ columns.mT
    return _from_products(rows.square().sum(-1), columns.square().sum(-1), products)


def median_squared_distance(
    particles: Float[Tensor, "*batch particle dim"],
) -> Float[Tensor, "*batch"]:
    """Median squared distance over pairs of distinct particles (the lower of two middle ones).

    Floored at what the distances of such a cloud can resolve, so that a bandwidth made of it is
    positive also when particles coincide. A single particle has no pair and gets one.

    Returns:
        Positive, detached, in float32 or the wider type of ``particles``.

    Raises:
        ValueError: Without particles.
    """
    return _floored_median(*_geometry(particles.detach()))


def pairwise_repulsion(
    slope: Float[Tensor, "*batch particle particle"],
    particles: Float[Tensor, "*batch particle dim"],
) -> Float[Tensor, "*batch particle dim"]:
    r"""Sum of weighted differences :math:`\sum_j s_{ij} (x_i - x_j)` by one matrix product.

    Args:
        slope: :math:`s_{ij}`; its diagonal does not matter.
        particles: Best given about their mean, which drops out of the differences.
    """
    with _full_precision(particles):
        return slope.sum(-1, keepdim=True) * particles - slope @ particles


class _Radial:
    """What radial kernels share; each adds its bandwidth rule and its profile."""

    bandwidth: Bandwidth

    def __call__(self, particles: Float[Tensor, "*batch particle dim"]) -> KernelTerms:
        """Gram matrix and repulsion of one cloud of particles."""
        centered, distances = _geometry(particles)
        squared = self._squared(centered, distances)
        gram, slope = self._profile(distances, squared[..., None, None])
        repulsion = pairwise_repulsion(slope, centered)
        return KernelTerms(gram.to(particles.dtype), repulsion.to(particles.dtype), squared)

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
        return self._squared(*_geometry(particles.detach()))

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
        centered, distances = _geometry(particles)
        squared = self._squared(centered, distances)[..., None, None]
        gram, slope = self._profile(distances, squared)
        scores = _wide(scores)
        with _full_precision(particles):
            inner, crossed = scores @ scores.mT, scores @ centered.mT
        # Read off the diagonal of the product itself, as the norms are: it cancels exactly.
        own = crossed.flatten(-2)[..., :: crossed.shape[-1] + 1]
        crossed = own[..., :, None] + own[..., None, :] - crossed - crossed.mT
        trace = particles.shape[-1] - 2 * self._decay(distances, squared)
        return (gram * inner + slope * (crossed + trace)).to(particles.dtype)

    def _squared(self, centered: Tensor, distances: Tensor) -> Tensor:
        bandwidth, batch = self.bandwidth, distances[..., 0, 0].detach()
        if isinstance(bandwidth, str):
            return self._rule(_floored_median(centered, distances), centered.shape[-2])
        if isinstance(bandwidth, Tensor):
            return bandwidth.detach().to(batch).square().expand_as(batch)
        return torch.full_like(batch, bandwidth**2)

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
        _check_bandwidth("RBF", self.bandwidth, ("median", "paper"))

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
    exponent: Exponent = 0.5

    def __post_init__(self) -> None:
        _check_bandwidth("IMQ", self.bandwidth, ("median",))
        if not 0.0 < self.exponent < math.inf:
            raise ValueError(f"IMQ exponent: expected a positive number, got {self.exponent}")

    def frozen(self, particles: Float[Tensor, "*batch particle dim"]) -> "IMQ":
        """The same kernel with its bandwidth fixed to what it is at these particles."""
        return IMQ(self.squared_bandwidth(particles).sqrt(), exponent=self.exponent)

    def _rule(self, median: Tensor, num_particles: int) -> Tensor:
        return median

    def _profile(self, distances: Tensor, squared: Tensor) -> tuple[Tensor, Tensor]:
        base = 1 + distances / squared
        gram = base**-self.exponent
        return gram, (2 * self.exponent) * gram / (base * squared)

    def _decay(self, distances: Tensor, squared: Tensor) -> Tensor:
        return (self.exponent + 1) * distances / (squared + distances)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _full_precision(tensor: Tensor) -> AbstractContextManager:
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _centered(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    if x.shape[-2] == 0:
        raise ValueError(f"a kernel needs at least one particle, got none: shape {tuple(x.shape)}")
    x = _wide(x)
    # About the first row before the mean: rows that coincide then become zero exactly.
    first = x[..., :1, :]
    mean = (x - first).mean(-2, keepdim=True)
    return x - first - mean, (first, mean)


def _geometry(particles: Tensor) -> tuple[Tensor, Tensor]:
    centered, _ = _centered(particles)
    with _full_precision(particles):
        products = centered @ centered.mT
    # Norms read off the diagonal of the product itself cancel exactly there.
    norms = products.flatten(-2)[..., :: products.shape[-1] + 1]
    return centered, _from_products(norms, norms, products)


def _from_products(row_norms: Tensor, column_norms: Tensor, products: Tensor) -> Tensor:
    return (row_norms[..., :, None] + column_norms[..., None, :] - 2 * products).clamp_min(0.0)


def _floored_median(centered: Tensor, distances: Tensor) -> Tensor:
    centered, distances = centered.detach(), distances.detach()
    count, info = centered.shape[-2], torch.finfo(centered.dtype)
    if count == 1:
        return torch.ones_like(distances[..., 0, 0])
    rows, columns = torch.triu_indices(count, count, offset=1, device=distances.device)
    median = lower_median(distances.flatten(-2).index_select(-1, rows * count + columns))
    resolution = 64 * info.eps * centered.square().sum(-1).mean(-1)
    return torch.maximum(median, resolution + info.tiny / info.eps)


def _check_bandwidth(kernel: str, bandwidth: Bandwidth, rules: tuple[str, ...]) -> None:
    if isinstance(bandwidth, str):
        valid = bandwidth in rules
    elif isinstance(bandwidth, Tensor):
        valid = bandwidth.is_floating_point()
    else:
        valid = 0.0 < bandwidth < math.inf
    if not valid:
        rule = " or ".join(map(repr, rules))
        raise ValueError(
            f"{kernel} bandwidth: expected {rule} or a positive number, got {bandwidth!r}"
        )
