r"""Energy distance: distances between two clouds beside those within them.

.. math:: D = 2 \, \mathbb E \lVert x - y \rVert - \mathbb E \lVert x - x' \rVert
    - \mathbb E \lVert y - y' \rVert

It needs no bandwidth, scales as the points do, and is zero for equal laws only. In one dimension it
is :math:`2 \int (F - G)^2`.

Source:
    Székely and Rizzo (2013), Energy statistics, J. Statist. Plann. Inference 143, eq. 2.1. It is
    the square of what :func:`scipy.stats.energy_distance` gives.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bayesattn.divergences.pair_means import contrast
from bayesattn.divergences.point_clouds import Weights, weighted_clouds

__all__ = ["Energy", "energy_distance"]


def energy_distance(
    query: Float[Tensor, "*#batch query dim"],
    key: Float[Tensor, "*#batch key dim"],
    query_mask: Bool[Tensor, "*#batch query"] | None = None,
    key_mask: Bool[Tensor, "*#batch key"] | None = None,
    weights: Weights | None = None,
    *,
    unbiased: bool = False,
) -> Float[Tensor, "*batch"]:
    """Energy distance between two clouds.

    Points that coincide pull no way, so that gradients are finite everywhere. There are no second
    derivatives.

    Args:
        query: First cloud.
        key: Second cloud.
        query_mask: True takes part.
        key_mask: True takes part.
        weights: How much each query and each key counts: nonnegative, of any positive sum.
        unbiased: Take the U-statistic, whose mean is that of the laws that the points were drawn
            from, so that it may fall below zero; the V-statistic otherwise.

    Returns:
        In float32 or wider; never negative unless unbiased.

    Raises:
        ValueError: As :func:`~bayesattn.divergences.weighted_clouds` does, or if a cloud has a
            single point and the estimate is to be unbiased.
    """
    clouds = weighted_clouds(query, key, query_mask, key_mask, weights)
    pairs = ((clouds.query, clouds.query), (clouds.key, clouds.key), (clouds.query, clouds.key))
    energy = -contrast(clouds, *(_distances(x, y) for x, y in pairs), unbiased=unbiased)
    return energy if unbiased else energy.clamp_min(0.0)


@dataclass(frozen=True)
class Energy:
    """Energy distance; see :func:`energy_distance`.

    Args:
        unbiased: Take the U-statistic.
    """

    unbiased: bool = False

    def __call__(
        self,
        query: Float[Tensor, "*#batch query dim"],
        key: Float[Tensor, "*#batch key dim"],
        query_mask: Bool[Tensor, "*#batch query"] | None = None,
        key_mask: Bool[Tensor, "*#batch key"] | None = None,
        weights: Weights | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Energy distance of two clouds; see :class:`~bayesattn.divergences.Divergence`."""
        return energy_distance(query, key, query_mask, key_mask, weights, unbiased=self.unbiased)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # From differences: the root of a Gram form's rounding would be a distance of its own.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
