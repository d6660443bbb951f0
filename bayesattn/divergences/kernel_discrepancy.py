r"""Maximum mean discrepancy: how far apart a kernel's mean embeddings of two clouds are, squared.

.. math:: \mathrm{MMD}^2 = \mathbb E k(x, x') + \mathbb E k(y, y') - 2 \, \mathbb E k(x, y)

Source:
    Gretton et al. (2012), A kernel two-sample test, JMLR 13, lemma 6.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bayesattn.divergences.pair_means import contrast
from bayesattn.divergences.point_clouds import PointClouds, Weights, weighted_clouds
from bayesattn.kernels import RBF, Linear, ScalarKernel, Sum, squared_distances

__all__ = ["MMD", "squared_mmd", "with_pooled_median"]


def squared_mmd(
    query: Float[Tensor, "*#batch query dim"],
    key: Float[Tensor, "*#batch key dim"],
    query_mask: Bool[Tensor, "*#batch query"] | None = None,
    key_mask: Bool[Tensor, "*#batch key"] | None = None,
    weights: Weights | None = None,
    *,
    kernel: ScalarKernel | None = None,
    unbiased: bool = False,
) -> Float[Tensor, "*batch"]:
    r"""Squared maximum mean discrepancy between two clouds.

    Args:
        query: First cloud.
        key: Second cloud.
        query_mask: True takes part.
        key_mask: True takes part.
        weights: How much each query and each key counts: nonnegative, of any positive sum.
        kernel: :class:`~bayesattn.kernels.RBF` by default. Its bandwidth "median" is measured over
            all pairs of distinct points that take part, queries and keys pooled, whatever their
            weights, and is a constant to differentiation; so it is for each kernel of a sum. Any
            other kernel is used as it is.
        unbiased: Take the U-statistic, whose mean is that of the laws that the points were drawn
            from, so that it may fall below zero; the V-statistic otherwise.

    Returns:
        In float32 or wider; never negative unless unbiased.

    Raises:
        ValueError: As :func:`~bayesattn.divergences.weighted_clouds` does; if a cloud has a single
            point and the estimate is to be unbiased; or for a kernel that is made for one cloud:
            the bandwidth "paper", and :class:`~bayesattn.kernels.Linear` unless it is frozen.
    """
    clouds = weighted_clouds(query, key, query_mask, key_mask, weights)
    kernel = with_pooled_median(RBF() if kernel is None else kernel, clouds)
    pairs = ((clouds.query, clouds.query), (clouds.key, clouds.key), (clouds.query, clouds.key))
    squared = contrast(clouds, *(kernel.gram(x, y) for x, y in pairs), unbiased=unbiased)
    return squared if unbiased else squared.clamp_min(0.0)


@dataclass(frozen=True)
class MMD:
    """Squared maximum mean discrepancy; see :func:`squared_mmd`.

    Args:
        kernel: Between points.
        unbiased: Take the U-statistic.
    """

    kernel: ScalarKernel = field(default_factory=RBF)
    unbiased: bool = False

    def __post_init__(self) -> None:
        _refuse_one_cloud(self.kernel)

    def __call__(
        self,
        query: Float[Tensor, "*#batch query dim"],
        key: Float[Tensor, "*#batch key dim"],
        query_mask: Bool[Tensor, "*#batch query"] | None = None,
        key_mask: Bool[Tensor, "*#batch key"] | None = None,
        weights: Weights | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Squared MMD between two clouds; see :class:`~bayesattn.divergences.Divergence`."""
        return squared_mmd(
            query, key, query_mask, key_mask, weights, kernel=self.kernel, unbiased=self.unbiased
        )


def with_pooled_median(kernel: ScalarKernel, clouds: PointClouds) -> ScalarKernel:
    """Freeze a kernel whose bandwidth is the median at that of two clouds, pooled.

    Raises:
        ValueError: For a kernel that is made for one cloud.
    """
    _refuse_one_cloud(kernel)
    if isinstance(kernel, Sum):
        return Sum([with_pooled_median(part, clouds) for part in kernel.kernels], kernel.weights)
    if not _has_rule(kernel, "median"):
        return kernel
    median = _pooled_median(clouds)
    # Two points as far apart as the median pair: the kernel's own rule makes its bandwidth of them.
    return kernel.frozen(torch.stack([torch.zeros_like(median), median.sqrt()], -1)[..., None])


def _pooled_median(clouds: PointClouds) -> Tensor:
    points = torch.cat([clouds.query, clouds.key], -2).detach()
    mask = torch.cat([clouds.query_mask, clouds.key_mask], -1)
    rows, columns = torch.triu_indices(*2 * points.shape[-2:-1], offset=1, device=points.device)
    counted = mask[..., rows] & mask[..., columns]
    distances = squared_distances(points)
    pairs = torch.where(counted, distances[..., rows, columns], torch.nan)
    median = pairs.nanmedian(-1).values
    # What the distances of such clouds can resolve, so that a bandwidth is positive.
    info, largest = torch.finfo(points.dtype), distances.flatten(-2).amax(-1)
    return torch.maximum(median, 16 * info.eps * largest + info.tiny / info.eps)


def _has_rule(kernel: ScalarKernel, rule: str) -> bool:
    bandwidth = getattr(kernel, "bandwidth", None)
    return isinstance(bandwidth, str) and bandwidth == rule


def _refuse_one_cloud(kernel: ScalarKernel) -> None:
    for part in kernel.kernels if isinstance(kernel, Sum) else ():
        _refuse_one_cloud(part)
    if _has_rule(kernel, "paper"):
        raise ValueError(
            "kernel: the bandwidth 'paper' counts the particles of one cloud; use 'median' or a "
            f"number, got {kernel!r}"
        )
    if isinstance(kernel, Linear) and (_has_rule(kernel, "mean") or kernel.location is None):
        raise ValueError(
            "kernel: a linear kernel has location and bandwidth of one cloud; give both, as "
            f"kernel.frozen(points) does, got {kernel!r}"
        )
