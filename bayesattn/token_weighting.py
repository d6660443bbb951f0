r"""Products of heads as tokens feel them, at unit scale, and the way back from their factors.

.. math:: T_h = C_Q^{1/2}\, W_{Q,h}^\top W_{K,h}\, C_K^{1/2}

With second moments :math:`C` of what asks and what is asked, a squared norm of an error is the mean
square by which it moves the logits of such tokens, asking and asked independently.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.alternating_least_squares import Factors, HeadProducts
from bayesattn.argument_checks import check_type

__all__ = ["WeighedProducts", "weighed_products"]

# Of a second moment's mean eigenvalue; directions that no token takes weigh this much.
_LEAST_MOMENT = 1e-6
# Of the largest entry or eigenvalue, what rounding may make of symmetry and of zero.
_ROUNDING = 1e-4


class WeighedProducts(NamedTuple):
    """Products of heads, weighed and scaled.

    Attributes:
        products: Of a batch of layers, each side's largest entry one; in the weights' type, at
            least float32.
        roots: By which queries and keys are weighed, each with its inverse; None where they are
            not.
        scales: What the products of each layer are to be multiplied by.
    """

    products: HeadProducts
    roots: tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]
    scales: Float[Tensor, " layer"]

    def unweighed(self, factors: Factors) -> Factors:
        """Factors of the weights' products, at unit scale, from those of these; in float64."""
        query, mixing, key = (part.double() for part in factors)
        query, key = (
            rows if root is None else rows @ root[1]
            for rows, root in zip((query, key), self.roots, strict=True)
        )
        return Factors(query, mixing, key)

    def weighed(self, factors: Factors) -> Factors:
        """Factors of these products from those of the weights', at their own scale; in float64."""
        query, mixing, key = (part.double() for part in factors)
        scale = self.scales.rsqrt()[:, None, None]
        query, key = (
            scale * (rows if root is None else rows @ root[0])
            for rows, root in zip((query, key), self.roots, strict=True)
        )
        return Factors(query, mixing, key)

    def rescaled(self, factors: Factors) -> Factors:
        """Factors at the weights' own scale, which queries and keys bear alike."""
        root = self.scales.sqrt()[:, None, None]
        return Factors(factors.query * root, factors.mixing, factors.key * root)


def weighed_products(
    query_weight: Float[Tensor, "..."],
    key_weight: Float[Tensor, "..."],
    query_moment: Float[Tensor, "..."] | None = None,
    key_moment: Float[Tensor, "..."] | None = None,
) -> WeighedProducts:
    """Check weights and second moments, and bring them together.

    Args:
        query_weight: "*layer head dim query_feature".
        key_weight: "*layer head dim key_feature".
        query_moment: "*#layer query_feature query_feature".
        key_moment: "*#layer key_feature key_feature".

    Raises:
        TypeError: If weights are no tensors.
        ValueError: If shapes or types do not fit, something is not finite, or a moment is none.
    """
    _check(query_weight, key_weight)
    dtype = torch.promote_types(query_weight.dtype, torch.float32)
    query, query_roots, query_scale = _unit_side("query_moment", query_weight, query_moment)
    key, key_roots, key_scale = _unit_side("key_moment", key_weight, key_moment)
    products = HeadProducts(query.to(dtype), key.to(dtype))
    return WeighedProducts(products, (query_roots, key_roots), query_scale * key_scale)


def _unit_side(
    name: str, weight: Tensor, moment: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor]:
    """One side of all layers, weighed, with a largest entry of one; its roots, and its scale."""
    side = weight.detach().double().reshape(-1, *weight.shape[-3:])
    roots = None
    if moment is not None:
        roots = _roots(name, moment, weight.shape[-1], weight.shape[:-3])
        side = side @ roots[0][:, None]
    largest = side.abs().amax((1, 2, 3))
    largest = torch.where(largest > 0, largest, 1.0)
    return side / largest[:, None, None, None], roots, largest


def _roots(name: str, moment: Tensor, size: int, batch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Symmetric roots of second moments, one for each layer, and their inverses."""
    layers = moment.shape[:-2]
    given = (1,) * (len(batch) - len(layers)) + tuple(layers)
    fits = len(given) == len(batch) and all(
        have in (1, want) for have, want in zip(given, batch, strict=True)
    )
    if moment.ndim < 2 or moment.shape[-2:] != (size, size) or not fits:
        of_layers = f", of one layer or {tuple(batch)}" if batch else ""
        raise ValueError(
            f"{name}: expected {size} x {size}{of_layers}, got shape {tuple(moment.shape)}"
        )
    if not bool(moment.isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got some that are not")
    wide = moment.detach().double()
    if not torch.allclose(wide, wide.mT, rtol=0, atol=_ROUNDING * float(wide.abs().max())):
        raise ValueError(f"{name}: expected a symmetric matrix, got one that is not")
    values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    if bool((values[..., 0] < -_ROUNDING * values.abs().amax(-1)).any()):
        raise ValueError(f"{name}: expected no negative eigenvalue, got {float(values.min()):.3g}")
    # A moment of zeros weighs all directions alike.
    values = torch.where(values[..., -1:] > 0, values, 1.0)
    least = _LEAST_MOMENT * values.mean(-1, keepdim=True)
    root = values.clamp(min=least).sqrt()[..., None, :]
    whole, inverse = (
        part.expand(*batch, size, size).reshape(-1, size, size)
        for part in (vectors * root @ vectors.mT, vectors / root @ vectors.mT)
    )
    return whole, inverse


def _check(query: Tensor, key: Tensor) -> None:
    check_type("query_weight", query, Tensor)
    check_type("key_weight", key, Tensor)
    if query.ndim < 3 or key.ndim != query.ndim or query.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            "query_weight, key_weight: expected 'head dim feature' of the same heads and widths, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if 0 in query.shape or 0 in key.shape:
        raise ValueError(f"query_weight: expected no empty axis, got {tuple(query.shape)}")
    for name, weight in (("query_weight", query), ("key_weight", key)):
        if not weight.is_floating_point():
            raise ValueError(f"{name}: expected real floating-point numbers, got {weight.dtype}")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got some that are not")
