"""A divergence between large clouds, estimated from some of their points."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bayesattn.divergences import Divergence

__all__ = ["SampledPoints"]


class SampledPoints(nn.Module):
    """Take other points of large clouds at each call, the same of queries and keys.

    Args:
        divergence: What is estimated; a module of its own is learned as it would be by itself.
        max_points: Clouds of no more are taken as they are.
        seed: Of the choice, which leaves torch's own random state as it is.
    """

    def __init__(self, divergence: Divergence | Callable[..., Tensor], max_points: int, seed: int):
        super().__init__()
        self.divergence, self.max_points = divergence, max_points
        self.generator = torch.Generator().manual_seed(seed)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        query_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        weights: Any = None,
    ) -> Tensor:
        """Estimate the divergence of two clouds; weights are not for large ones."""
        if max(query.shape[-2], key.shape[-2]) <= self.max_points:
            return self.divergence(query, key, query_mask, key_mask, weights)
        if query.shape[-2] != key.shape[-2] or weights is not None:
            raise ValueError(
                "query and key: expected as many of one as of the other and no weights, got "
                f"{query.shape[-2]} and {key.shape[-2]}"
            )
        rows = torch.randperm(query.shape[-2], generator=self.generator)[: self.max_points]
        masks = (None if mask is None else mask[..., rows] for mask in (query_mask, key_mask))
        return self.divergence(query[..., rows, :], key[..., rows, :], *masks)
