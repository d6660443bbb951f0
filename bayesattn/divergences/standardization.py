r"""Divergences that do not see what a change of units, or of gauge, does to clouds.

.. math:: \text{Whitened: } x \to C^{-1/2} (x - m), \qquad
    \text{ScaleFree: } x \to (x - m) / s, \qquad
    \text{Balanced: } q \to A^{-\top} q, \; k \to A (k + c)

Mean m, covariance C and root mean square s are those of both clouds together, each counted half.
Without such a map a network lowers a distance by shrinking all queries and keys. The last map is of
another kind: softmax attention does not see it, whatever A and c are, and here they are those for
which queries and keys have one mean and one covariance. So a balanced divergence is one of the
attention itself, and zero where the clouds differ in what attention cannot see. Gradients pass
through all of these statistics.

Source:
    The balance of two covariances: Moore (1981), Principal component analysis in linear systems,
    IEEE Trans. Autom. Control 26.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bayesattn.autocasting import full_precision
from bayesattn.divergences.point_clouds import (
    Divergence,
    PointClouds,
    Weights,
    check_divergence,
    weighted_clouds,
)

__all__ = ["Balanced", "ScaleFree", "Whitened"]

Number = float | int


class _Mapped(nn.Module, ABC):
    """A divergence of clouds that a map has been applied to; its parameters are this one's."""

    def __init__(self, divergence: Divergence) -> None:
        super().__init__()
        check_divergence(divergence)
        self.divergence = divergence

    def forward(
        self,
        query: Float[Tensor, "*#batch query dim"],
        key: Float[Tensor, "*#batch key dim"],
        query_mask: Bool[Tensor, "*#batch query"] | None = None,
        key_mask: Bool[Tensor, "*#batch key"] | None = None,
        weights: Weights | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Divergence of two clouds; see :class:`~bayesattn.divergences.Divergence`."""
        clouds = weighted_clouds(query, key, query_mask, key_mask, weights)
        with full_precision(clouds.query):
            mapped = self._map(clouds)
        return self.divergence(*mapped, query_mask, key_mask, weights)

    @abstractmethod
    def _map(self, clouds: PointClouds) -> tuple[Tensor, Tensor]:
        """Queries and keys as the divergence sees them."""

    def extra_repr(self) -> str:
        """The divergence, unless it shows itself."""
        return "" if isinstance(self.divergence, nn.Module) else repr(self.divergence)


class ScaleFree(_Mapped):
    """A divergence of clouds whose mean is zero and whose root mean square is one, together.

    Args:
        divergence: Of the scaled clouds.

    Raises:
        ValueError: If it is no function.
    """

    def _map(self, clouds: PointClouds) -> tuple[Tensor, Tensor]:
        x, y = _about_their_mean(clouds)
        squared = _half(clouds, lambda weights, z: (weights * z.square().sum(-1)).sum(-1), x, y)
        is_zero = squared == 0
        scale = torch.where(is_zero, 1.0, torch.where(is_zero, 1.0, squared).rsqrt())
        return x * scale[..., None, None], y * scale[..., None, None]


class _Ridged(_Mapped):
    """A map by covariances, to which a ridge is added."""

    def __init__(self, divergence: Divergence, *, ridge: Number = 1e-4) -> None:
        super().__init__(divergence)
        if not ridge > 0:
            raise ValueError(f"ridge: expected a positive number, got {ridge}")
        self.ridge = float(ridge)


class Whitened(_Ridged):
    """A divergence of clouds whose mean is zero and whose covariance is the identity, together.

    It is unchanged by any affine map of both clouds, if it is by rotations. Fewer points than
    dimensions all are equally far from each other then, but for the ridge, and little is left to
    pull: ScaleFree is for them.

    Args:
        divergence: Of the whitened clouds.
        ridge: Added to the covariance, as a part of its mean variance, for directions in which
            there is none.

    Raises:
        ValueError: If it is no function, or the ridge is not positive.
    """

    def _map(self, clouds: PointClouds) -> tuple[Tensor, Tensor]:
        x, y = _about_their_mean(clouds)
        factor = _cholesky(_half(clouds, _covariance, x, y), self.ridge)
        return _solved(factor, x), _solved(factor, y)


class Balanced(_Ridged):
    """A divergence of clouds in the gauge in which they have one mean and one covariance.

    It is unchanged by what leaves softmax attention unchanged, if it is by rotations. Each pair of
    clouds has a gauge of its own, where a layer has one for all its sentences: moments of order one
    and two are never told apart.

    Args:
        divergence: Of the balanced clouds.
        ridge: Added to each covariance, as a part of its mean variance, for directions in which
            there is none.

    Raises:
        ValueError: If it is no function, or the ridge is not positive.
    """

    def _map(self, clouds: PointClouds) -> tuple[Tensor, Tensor]:
        sides = ((clouds.query, clouds.query_weights), (clouds.key, clouds.key_weights))
        means = [(weights[..., None] * x).sum(-2, keepdim=True) for x, weights in sides]
        x, y = (side[0] - mean for side, mean in zip(sides, means, strict=True))
        of_queries, of_keys = (
            _cholesky(_covariance(weights, z), self.ridge)
            for z, (_, weights) in zip((x, y), sides, strict=True)
        )
        # With Lq and Lk of the covariances: A = (Lkᵀ Lq Lqᵀ Lk)^(1/4) Lk⁻¹.
        root = _root_of_symmetric_part(of_keys.mT @ of_queries)
        keys = _solved(of_keys, y) @ root
        back = torch.linalg.solve_ex(root, of_keys.mT)[0].mT
        # The mean of the queries, for divergences that see where the clouds are.
        return clouds.query @ back, keys + means[0] @ back


def _about_their_mean(clouds: PointClouds) -> tuple[Tensor, Tensor]:
    """Points of both clouds about their common mean."""
    origin = clouds.query[..., :1, :].detach()
    x, y = clouds.query - origin, clouds.key - origin
    mean = _half(clouds, lambda weights, z: (weights[..., None] * z).sum(-2), x, y)
    return x - mean[..., None, :], y - mean[..., None, :]


def _half(
    clouds: PointClouds, statistic: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> Tensor:
    return 0.5 * (statistic(clouds.query_weights, x) + statistic(clouds.key_weights, y))


def _covariance(weights: Tensor, points: Tensor) -> Tensor:
    return (weights[..., None] * points).mT @ points


def _cholesky(covariance: Tensor, ridge: float) -> Tensor:
    """Factor of a covariance with a ridge; of the identity where there is no variance at all."""
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    padded = torch.where(variance == 0, eye, covariance + ridge * variance * eye)
    return torch.linalg.cholesky_ex(padded)[0]


def _solved(factor: Tensor, points: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, points.mT, upper=False).mT


def _root_of_symmetric_part(matrix: Tensor) -> Tensor:
    r"""Square root of the symmetric factor H of a matrix H W, W a rotation.

    It stands on singular values, whose sums alone divide: gradients are finite at equal ones too,
    and no product of the matrix with itself squares its condition. W and the root are held fixed,
    and two steps of Newton's method, which change no value, give them first and second derivatives.
    """
    finite = torch.nan_to_num(matrix.detach(), 0.0, 0.0, 0.0)
    left, values, right = torch.linalg.svd(finite)
    values = values.clamp_min(torch.finfo(values.dtype).tiny)

    def divided(part: Tensor, by: Tensor) -> Tensor:
        sums = by[..., :, None] + by[..., None, :]
        return left @ ((left.mT @ part @ left) / sums) @ left.mT

    part = matrix @ (left @ right).mT
    for _ in range(2):
        turn = divided(part.mT - part, values)
        part = part + part @ (turn + 0.5 * turn @ turn)
    roots = values.sqrt()
    root = (left * roots[..., None, :]) @ left.mT
    for _ in range(2):
        root = root + divided(0.5 * (part + part.mT) - root @ root, roots)
    return root
