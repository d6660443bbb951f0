r"""Sliced Wasserstein distance of order one: the mean over directions of that on a line.

.. math:: \mathrm{SW}_1 = \frac{1}{L} \sum_l W_1(\theta_l^\top \mu, \theta_l^\top \nu), \qquad
    W_1(\mu, \nu) = \int \lvert F(t) - G(t) \rvert \, dt

The integral is exact: both distribution functions are constant between neighbors of the merged
points.

Source:
    Bonneel et al. (2015), Sliced and Radon Wasserstein barycenters of measures, J. Math. Imaging
    Vis. 51; order one and both weighted here.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from bayesattn.autocasting import full_precision
from bayesattn.divergences.point_clouds import Weights, weighted_clouds
from bayesattn.divergences.value_checks import has_values

__all__ = ["SlicedWasserstein", "random_directions", "sliced_wasserstein", "wasserstein_on_a_line"]


def wasserstein_on_a_line(
    query: Float[Tensor, "*#batch query"],
    key: Float[Tensor, "*#batch key"],
    query_weights: Float[Tensor, "*#batch query"],
    key_weights: Float[Tensor, "*#batch key"],
) -> Float[Tensor, "*batch"]:
    """Order-one Wasserstein distance between two laws on the real line.

    Args:
        query: Where the first law's atoms lie.
        key: Where the second law's atoms lie.
        query_weights: Sum to one.
        key_weights: Sum to one.
    """
    batch = torch.broadcast_shapes(
        *(x.shape[:-1] for x in (query, key, query_weights, key_weights))
    )

    def merged(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([x.expand(*batch, x.shape[-1]) for x in (first, second)], -1)

    points, order = merged(query, key).sort(-1)
    gaps = merged(query_weights, -key_weights).take_along_dim(order, -1).cumsum(-1)
    return (gaps[..., :-1].abs() * points.diff(dim=-1)).sum(-1)


def sliced_wasserstein(
    query: Float[Tensor, "*#batch query dim"],
    key: Float[Tensor, "*#batch key dim"],
    query_mask: Bool[Tensor, "*#batch query"] | None = None,
    key_mask: Bool[Tensor, "*#batch key"] | None = None,
    weights: Weights | None = None,
    *,
    directions: Float[Tensor, "projection dim"],
) -> Float[Tensor, "*batch"]:
    """Sliced Wasserstein distance between two clouds along given directions.

    Args:
        query: First cloud.
        key: Second cloud.
        query_mask: True takes part.
        key_mask: True takes part.
        weights: How much each query and each key counts: nonnegative, of any positive sum.
        directions: Of any length but zero; see :func:`random_directions`.

    Returns:
        In float32 or wider, never negative. In one dimension it is the Wasserstein distance.

    Raises:
        ValueError: As :func:`~bayesattn.divergences.weighted_clouds` does, or if the directions are
            none or of another dimension.
    """
    clouds = weighted_clouds(query, key, query_mask, key_mask, weights)
    if directions.ndim != 2 or directions.shape[-1] != query.shape[-1] or len(directions) == 0:
        raise ValueError(
            f"directions: expected 'projection {query.shape[-1]}', at least one, "
            f"got shape {tuple(directions.shape)}"
        )
    directions = normalize(directions.to(clouds.query), dim=-1)
    # About a point of theirs, so that clouds far from the origin lose no digits.
    origin = clouds.query[..., :1, :].detach()
    with full_precision(directions):
        queries, keys = (directions @ (x - origin).mT for x in (clouds.query, clouds.key))
    query_weights, key_weights = (
        x.unsqueeze(-2) for x in (clouds.query_weights, clouds.key_weights)
    )
    return wasserstein_on_a_line(queries, keys, query_weights, key_weights).mean(-1)


def random_directions(
    num_projections: int, dim: int, seed: int | torch.Generator = 0
) -> Float[Tensor, "projection dim"]:
    """Unit vectors, uniformly distributed on the sphere.

    Args:
        num_projections: How many.
        dim: Of the space.
        seed: A whole number for the same ones at every call; a generator for new ones.

    Returns:
        In float64, on the generator's device.
    """
    shape = (num_projections, dim)
    if isinstance(seed, torch.Generator):
        normal = torch.randn(shape, generator=seed, dtype=torch.float64, device=seed.device)
    else:
        # Not torch's, which vmap takes for a random operation of the function that it maps.
        normal = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))
    return normalize(normal, dim=-1)


@dataclass(frozen=True)
class SlicedWasserstein:
    """Sliced Wasserstein distance along random directions; see :func:`sliced_wasserstein`.

    Args:
        num_projections: Number of directions, drawn uniformly.
        seed: A whole number for the same directions at every call, so that this is a function of
            the clouds; a generator for new ones at every call, which training wants.
        directions: Given ones, in place of random ones.

    Raises:
        ValueError: If there are no directions.
    """

    num_projections: int = 64
    seed: int | torch.Generator = 0
    directions: Float[Tensor, "projection dim"] | None = None

    def __post_init__(self) -> None:
        if self.num_projections < 1:
            raise ValueError(f"num_projections: expected at least one, got {self.num_projections}")

    def __call__(
        self,
        query: Float[Tensor, "*#batch query dim"],
        key: Float[Tensor, "*#batch key dim"],
        query_mask: Bool[Tensor, "*#batch query"] | None = None,
        key_mask: Bool[Tensor, "*#batch key"] | None = None,
        weights: Weights | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Sliced distance of two clouds; see :class:`~bayesattn.divergences.Divergence`."""
        directions = self.directions
        if directions is None:
            directions = random_directions(self.num_projections, query.shape[-1], self.seed)
        if query.device.type == "cuda" and directions.device.type == "cpu" and has_values():
            # From pinned memory, so that nothing waits.
            wide = directions.to(torch.promote_types(query.dtype, torch.float32))
            directions = wide.pin_memory().to(query.device, non_blocking=True)
        return sliced_wasserstein(query, key, query_mask, key_mask, weights, directions=directions)
