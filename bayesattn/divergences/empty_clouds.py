"""Divergences of a batch in which some clouds may have no point: zero there, without a gradient."""

from contextlib import nullcontext

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bayesattn.divergences.point_clouds import Divergence
from bayesattn.divergences.value_checks import known_values

__all__ = ["divergence_or_zero"]


def divergence_or_zero(
    divergence: Divergence,
    query: Float[Tensor, "*batch query dim"],
    key: Float[Tensor, "*batch key dim"],
    query_mask: Bool[Tensor, "*#batch query"],
    key_mask: Bool[Tensor, "*#batch key"],
) -> tuple[Float[Tensor, "*batch"], Bool[Tensor, "*batch"]]:
    """Compare the clouds of a batch, where both have points that take part.

    Args:
        divergence: Which.
        query: First clouds.
        key: Second clouds.
        query_mask: True takes part.
        key_mask: True takes part.

    Returns:
        Divergences, zero where a cloud has no point; and where both have some.
    """
    compared = (query_mask.any(-1) & key_mask.any(-1)).expand(query.shape[:-2])
    empty = ~compared[..., None]
    # Values of their own before any arithmetic, so that no gradient passes.
    query, key = (torch.where(empty[..., None], 1.0, points) for points in (query, key))
    # Compiled code looks at no values anyhow.
    with nullcontext() if torch.compiler.is_compiling() else known_values():
        found = divergence(query, key, query_mask | empty, key_mask | empty, None)
    return torch.where(compared, found, 0.0), compared
