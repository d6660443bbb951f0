r"""Two weighted point clouds, checked once, and the signature that all divergences share.

.. math:: \mu = \sum_i a_i \delta_{x_i}, \quad \nu = \sum_j b_j \delta_{y_j}, \qquad
    a_i, b_j \ge 0, \quad \sum_i a_i = \sum_j b_j = 1

A point that a mask leaves out has weight zero, and so has its gradient, whatever stands in its
place, NaN included.
"""

import inspect
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bayesattn.divergences.value_checks import looks_at_values

__all__ = [
    "Divergence",
    "PointClouds",
    "Weights",
    "check_divergence",
    "log_weights",
    "takes",
    "weighted_clouds",
]

# One vector a side, "*batch query" and "*batch key", or None for equal weights.
Weights = tuple[Tensor | None, Tensor | None]


@runtime_checkable
class Divergence(Protocol):
    """How far two point clouds are apart, such as :class:`~bayesattn.divergences.MMD`."""

    def __call__(
        self,
        query: Float[Tensor, "*#batch query dim"],
        key: Float[Tensor, "*#batch key dim"],
        query_mask: Bool[Tensor, "*#batch query"] | None = None,
        key_mask: Bool[Tensor, "*#batch key"] | None = None,
        weights: Weights | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Divergence between two clouds, of which there may be many in the batch axes.

        Args:
            query: First cloud.
            key: Second cloud.
            query_mask: True takes part.
            key_mask: True takes part.
            weights: How much each query and each key counts: nonnegative, of any positive sum.
        """
        ...


def check_divergence(divergence: object) -> None:
    """Refuse what is no divergence, such as a class in place of an object.

    Raises:
        ValueError: With what was meant, where that can be told.
    """
    if isinstance(divergence, type):
        raise ValueError(
            f"divergence: expected an object, such as {divergence.__name__}(...), got the class"
        )
    if not takes(divergence, 5):
        raise ValueError(
            "divergence: expected one of bayesattn.divergences, which takes two clouds, their "
            f"masks and weights, got {divergence!r}"
        )


def takes(function: object, count: int) -> bool:
    """Whether something can be called with so many arguments by place."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


class PointClouds(NamedTuple):
    """Two clouds that are ready to be compared, in float32 or wider, of one batch shape.

    Attributes:
        query: Points; one that takes no part stands on the first that does.
        key: Likewise.
        query_weights: Sum to one; exactly zero where a point takes no part.
        key_weights: Likewise.
        query_mask: Which points take part.
        key_mask: Likewise.
    """

    query: Float[Tensor, "*batch query dim"]
    key: Float[Tensor, "*batch key dim"]
    query_weights: Float[Tensor, "*batch query"]
    key_weights: Float[Tensor, "*batch key"]
    query_mask: Bool[Tensor, "*batch query"]
    key_mask: Bool[Tensor, "*batch key"]


def weighted_clouds(
    query: Float[Tensor, "*#batch query dim"],
    key: Float[Tensor, "*#batch key dim"],
    query_mask: Bool[Tensor, "*#batch query"] | None = None,
    key_mask: Bool[Tensor, "*#batch key"] | None = None,
    weights: Weights | None = None,
) -> PointClouds:
    """Check two clouds with their masks and weights, and normalize the weights.

    Arguments are those of :class:`Divergence`. Inside of a transform of ``torch.func`` or a
    compiled function, where values cannot be looked at, a cloud without weight gives NaN instead.

    Raises:
        ValueError: If shapes or types do not fit, no point of a cloud takes part, or weights are
            negative, not finite, or all zero.
    """
    if query.ndim < 2 or key.ndim < 2 or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            "query and key: expected '*batch query dim' and '*batch key dim' of one dim, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    query_weights, key_weights = (None, None) if weights is None else weights
    sides = [("query", query, query_mask, query_weights), ("key", key, key_mask, key_weights)]
    for side in sides:
        _check_side(*side)
    batch = torch.broadcast_shapes(
        *(points.shape[:-2] for _, points, _, _ in sides),
        *(part.shape[:-1] for _, _, *parts in sides for part in parts if part is not None),
    )
    first, second = (_side(name, p.to(dtype), m, w, batch) for name, p, m, w in sides)
    return PointClouds(*(part for pair in zip(first, second, strict=True) for part in pair))


def log_weights(weights: Float[Tensor, "*batch point"]) -> Float[Tensor, "*batch point"]:
    """Logarithms; minus infinity, without a gradient, where a weight is zero."""
    counts = weights > 0
    return torch.where(counts, torch.where(counts, weights, 1.0).log(), -torch.inf)


def _check_side(name: str, points: Tensor, mask: Tensor | None, weights: Tensor | None) -> None:
    if points.shape[-2] == 0:
        raise ValueError(f"{name}: expected at least one point, got shape {tuple(points.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{name}_mask: expected bool, True takes part, got {mask.dtype}")
    if weights is not None and not weights.is_floating_point():
        raise ValueError(f"{name} weights: expected floating-point numbers, got {weights.dtype}")
    for kind, part in (("_mask", mask), (" weights", weights)):
        if part is not None and part.shape[-1:] != points.shape[-2:-1]:
            raise ValueError(
                f"{name}{kind}: expected one entry for each of {points.shape[-2]} points, "
                f"got shape {tuple(part.shape)}"
            )


def _side(
    name: str, points: Tensor, mask: Tensor | None, weights: Tensor | None, batch: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    size = (*batch, points.shape[-2])
    is_told = mask is not None or weights is not None
    points = points.expand(*size, points.shape[-1])
    if weights is None:
        weights = points.new_ones(size)
    weights = weights.to(points.dtype).expand(size)
    if mask is None:
        mask = torch.ones(size, dtype=torch.bool, device=points.device)
    else:
        mask = mask.expand(size)
        # Out before any arithmetic, through which NaN would reach gradients.
        weights = torch.where(mask, weights, 0.0)
        first = mask.to(torch.uint8).argmax(-1)[..., None, None]
        points = torch.where(mask[..., None], points, points.detach().take_along_dim(first, -2))
    total = weights.sum(-1, keepdim=True)
    if is_told and looks_at_values():
        _check_values(name, mask, weights, total)
    return points, weights / total, mask


def _check_values(name: str, mask: Tensor, weights: Tensor, total: Tensor) -> None:
    empty = ~mask.any(-1)
    if empty.any():
        raise ValueError(
            f"{name}_mask: expected a point that takes part in each cloud, got none in "
            f"{int(empty.sum())} of {empty.numel()}"
        )
    if not ((weights >= 0).all() and (total > 0).all() and total.isfinite().all()):
        raise ValueError(
            f"{name} weights: expected finite numbers that are not negative and not all zero, "
            f"got sums from {total.min().item():.4g} to {total.max().item():.4g} and a least "
            f"weight of {weights.min().item():.4g}"
        )
