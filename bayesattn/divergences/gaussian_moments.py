r"""Divergences that see means and covariances only: of the normal laws that have them.

.. math:: \mathrm{BW}^2 = \lVert m - m' \rVert^2 + \operatorname{tr} C + \operatorname{tr} C'
    - 2 \operatorname{tr} (C^{1/2} C' C^{1/2})^{1/2}, \qquad
    \mathrm{MD} = \lVert m - m' \rVert^2 + \lVert C - C' \rVert_F^2

With weighted, centered points as the rows of X and Y, the last trace is the sum of the singular
values of :math:`X Y^\top`. Its gradient by X is :math:`U V^\top Y`, of the singular vectors that
belong to values above zero; so it is there for clouds with fewer points than dimensions, too.

Source:
    Dowson and Landau (1982), The Fréchet distance between multivariate normal distributions, J.
    Multivariate Anal. 12.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd import Function

from bayesattn.autocasting import full_precision
from bayesattn.divergences.point_clouds import PointClouds, Weights, weighted_clouds
from bayesattn.first_derivatives import first_derivative

__all__ = ["BuresWasserstein", "MomentDistance", "bures_wasserstein", "moment_distance"]


def bures_wasserstein(
    query: Float[Tensor, "*#batch query dim"],
    key: Float[Tensor, "*#batch key dim"],
    query_mask: Bool[Tensor, "*#batch query"] | None = None,
    key_mask: Bool[Tensor, "*#batch key"] | None = None,
    weights: Weights | None = None,
) -> Float[Tensor, "*batch"]:
    """Squared Wasserstein distance of the normal laws with the clouds' means and covariances.

    There are no second derivatives.

    Args:
        query: First cloud.
        key: Second cloud.
        query_mask: True takes part.
        key_mask: True takes part.
        weights: How much each query and each key counts: nonnegative, of any positive sum.

    Returns:
        In float32 or wider, not negative.

    Raises:
        ValueError: As :func:`~bayesattn.divergences.weighted_clouds` does.
    """
    clouds = weighted_clouds(query, key, query_mask, key_mask, weights)
    with full_precision(clouds.query):
        apart, x, y = _centered(clouds)
        total = x.square().sum((-2, -1)) + y.square().sum((-2, -1)) - 2 * _NuclearNorm.of(x, y)
    return (apart + total).clamp_min(0.0)


def moment_distance(
    query: Float[Tensor, "*#batch query dim"],
    key: Float[Tensor, "*#batch key dim"],
    query_mask: Bool[Tensor, "*#batch query"] | None = None,
    key_mask: Bool[Tensor, "*#batch key"] | None = None,
    weights: Weights | None = None,
) -> Float[Tensor, "*batch"]:
    """Squared distances of means and of covariances, added up; arguments as above.

    Raises:
        ValueError: As :func:`~bayesattn.divergences.weighted_clouds` does.
    """
    clouds = weighted_clouds(query, key, query_mask, key_mask, weights)
    with full_precision(clouds.query):
        apart, x, y = _centered(clouds)
        return apart + (x.mT @ x - y.mT @ y).square().sum((-2, -1))


@dataclass(frozen=True)
class BuresWasserstein:
    """Squared Bures-Wasserstein distance; see :func:`bures_wasserstein`."""

    def __call__(
        self,
        query: Float[Tensor, "*#batch query dim"],
        key: Float[Tensor, "*#batch key dim"],
        query_mask: Bool[Tensor, "*#batch query"] | None = None,
        key_mask: Bool[Tensor, "*#batch key"] | None = None,
        weights: Weights | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Distance of two clouds; see :class:`~bayesattn.divergences.Divergence`."""
        return bures_wasserstein(query, key, query_mask, key_mask, weights)


@dataclass(frozen=True)
class MomentDistance:
    """Squared distances of means and covariances; see :func:`moment_distance`."""

    def __call__(
        self,
        query: Float[Tensor, "*#batch query dim"],
        key: Float[Tensor, "*#batch key dim"],
        query_mask: Bool[Tensor, "*#batch query"] | None = None,
        key_mask: Bool[Tensor, "*#batch key"] | None = None,
        weights: Weights | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Distance of two clouds; see :class:`~bayesattn.divergences.Divergence`."""
        return moment_distance(query, key, query_mask, key_mask, weights)


def _centered(clouds: PointClouds) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distance of the means, and points about them times the root of their weights."""
    # About a point of theirs, so that clouds far from the origin lose no digits.
    origin = clouds.query[..., :1, :].detach()
    means, factors = [], []
    for points, weights in (
        (clouds.query - origin, clouds.query_weights),
        (clouds.key - origin, clouds.key_weights),
    ):
        means.append((weights[..., None] * points).sum(-2))
        counts = weights > 0
        roots = torch.where(counts, torch.where(counts, weights, 1.0).sqrt(), 0.0)
        factors.append(roots[..., None] * (points - means[-1][..., None, :]))
    return (means[0] - means[1]).square().sum(-1), *factors


class _NuclearNorm(Function):
    """Sum of the singular values of a product of two matrices, by factors as small as their width.

    Of X = Q R and Y = Q' R', the singular values are those of R R'ᵀ.
    """

    generate_vmap_rule = True

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Tensor:
        norm, _, _ = cls.apply(x, y)  # pyright: ignore[reportGeneralTypeIssues]
        return norm

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # What is not finite comes back by the traces.
        x, y = (torch.nan_to_num(part, 0.0, 0.0, 0.0) for part in (x, y))
        (basis, left), (other_basis, right) = torch.linalg.qr(x), torch.linalg.qr(y)
        u, values, vh = torch.linalg.svd(left @ right.mT, full_matrices=False)
        # Relative to the factors, among which the product was rounded.
        size = (x.square().sum((-2, -1)) * y.square().sum((-2, -1))).sqrt()
        least = 16 * torch.finfo(x.dtype).eps * size[..., None]
        # A value of zero has no gradient to speak of; the least of all is none.
        polar = (u * (values > least)[..., None, :]) @ vh
        return values.sum(-1), basis @ (polar @ right), other_basis @ (polar.mT @ left)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, *slopes = output
        ctx.save_for_backward(*inputs, *slopes)
        ctx.mark_non_differentiable(*slopes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        x, y, *slopes = ctx.saved_tensors
        inputs = (gradient[..., None, None], *slopes, x, y)
        refusal = "bures_wasserstein has no second derivatives"
        by_x, by_y = first_derivative(_scaled_slopes, inputs, refusal)
        return by_x, by_y


def _scaled_slopes(
    gradient: Tensor, by_x: Tensor, by_y: Tensor, _x: Tensor, _y: Tensor
) -> tuple[Tensor, Tensor]:
    """Slopes at points on which they depend, in a way that is not known here."""
    return gradient * by_x, gradient * by_y
