r"""The products of heads' projections by their singular values, never formed at full size.

.. math:: W_{Q,h}^\top W_{K,h} = (U R_Q)(U' R_K)^{\top} = U\,(R_Q R_K^\top)\,U'^\top
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["HeadFactors", "head_factors", "squared_product_norms", "truncated_heads"]


class HeadFactors(NamedTuple):
    """Singular value decompositions of the heads' products.

    Attributes:
        left: Unit rows on the queries' side.
        values: Singular values, largest first.
        right: Unit rows on the keys' side.
    """

    left: Float[Tensor, "*layer head rank query_feature"]
    values: Float[Tensor, "*layer head rank"]
    right: Float[Tensor, "*layer head rank key_feature"]


def head_factors(
    query_weight: Float[Tensor, "*layer head dim query_feature"],
    key_weight: Float[Tensor, "*layer head dim key_feature"],
) -> HeadFactors:
    """Decompose the product of each head, at the cost of matrices as small as a head is wide."""
    basis, small = torch.linalg.qr(query_weight.mT)
    other_basis, other_small = torch.linalg.qr(key_weight.mT)
    left, values, right = torch.linalg.svd(small @ other_small.mT, full_matrices=False)
    return HeadFactors((basis @ left).mT, values, right @ other_basis.mT)


def squared_product_norms(
    query_weight: Float[Tensor, "*layer head dim query_feature"],
    key_weight: Float[Tensor, "*layer head other_dim key_feature"],
) -> Float[Tensor, "*layer head"]:
    """Squared Frobenius norms of products; by triangles, so that rows which cancel do so exactly.

    Grams would cost less, but leave the root of rounding.
    """
    query, key = (torch.linalg.qr(side.mT, mode="r").R for side in (query_weight, key_weight))
    return (query @ key.mT).square().sum((-2, -1))


def truncated_heads(
    factors: HeadFactors, dim: int
) -> tuple[
    Float[Tensor, "*layer head dim query_feature"],
    Float[Tensor, "*layer head dim key_feature"],
    Float[Tensor, "*layer"],
    Float[Tensor, "*layer head"],
]:
    """Heads of a width whose products are nearest to the given ones, balanced between both sides.

    Returns:
        Weights of queries and keys, zeros where there is less than the width; and relative errors,
        of all heads together and of each.
    """
    left, values, right = (
        part[..., :dim, :] for part in (factors.left, factors.values[..., None], factors.right)
    )
    missing = dim - left.shape[-2]
    root = values.sqrt()
    query, key = (
        torch.nn.functional.pad(root * part, (0, 0, 0, max(missing, 0))) for part in (left, right)
    )
    squares = factors.values.square()
    lost, whole = squares[..., dim:].sum(-1), squares.sum(-1)
    tiny = torch.finfo(squares.dtype).tiny
    of_all = (lost.sum(-1) / whole.sum(-1).clamp(min=tiny)).sqrt()
    return query, key, of_all, (lost / whole.clamp(min=tiny)).sqrt()
