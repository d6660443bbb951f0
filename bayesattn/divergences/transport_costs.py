r"""Costs of moving one point to another, as squared distances between features of the points.

.. math:: c(x, y) = \lVert x - y \rVert^2 \quad \text{or} \quad
    1 - \cos(x, y) = \tfrac12 \Bigl\lVert \tfrac{x}{\lVert x \rVert}
    - \tfrac{y}{\lVert y \rVert} \Bigr\rVert^2

So a mean of costs under weights comes of a mean of features, and no matrix of costs is needed. The
features have a common center taken off, which costs do not see and rounding does: without it, of
clouds far from the origin, or of directions all alike, only digits that cancel would be left.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.divergences.point_clouds import PointClouds

__all__ = ["TransportCost", "check_cost", "cost_features", "squared_costs", "unit_vectors"]

TransportCost = Literal["cosine", "squared"]


def check_cost(cost: str) -> None:
    """Refuse what is no cost.

    Raises:
        ValueError: If it is unknown.
    """
    if cost not in ("cosine", "squared"):
        raise ValueError(f"cost: expected 'cosine' or 'squared', got {cost!r}")


def cost_features(
    clouds: PointClouds, cost: TransportCost
) -> tuple[Float[Tensor, "*batch query dim"], Float[Tensor, "*batch key dim"]]:
    """Give features whose squared distances are the costs.

    Args:
        clouds: Points; a zero vector, which has no direction, costs one half to or from any other.
        cost: Which.

    Raises:
        ValueError: If the cost is unknown.
    """
    check_cost(cost)
    query, key = clouds.query, clouds.key
    if cost == "cosine":
        query, key = (unit_vectors(x) * 0.5**0.5 for x in (query, key))
    with torch.no_grad():
        center = clouds.query_weights[..., None, :] @ query + clouds.key_weights[..., None, :] @ key
        center = 0.5 * center
    return query - center, key - center


def squared_costs(
    x: Float[Tensor, "*batch query dim"], y: Float[Tensor, "*batch key dim"]
) -> Float[Tensor, "*batch query key"]:
    """Squared distances of all pairs; their rounding is that of the squared lengths."""
    lengths = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
    return lengths - 2.0 * x @ y.mT


def unit_vectors(points: Float[Tensor, "*batch point dim"]) -> Float[Tensor, "*batch point dim"]:
    """Directions of points; zero, without a gradient, where a point is zero."""
    length = torch.linalg.vector_norm(points, dim=-1, keepdim=True)
    return points / torch.where(length == 0, torch.inf, length)
