r"""Divergences between queries and keys of observed calls, a mean over sentences for each head.

.. math:: \bar D_h = \frac{1}{n_h} \sum_{i} D(p^Q_{ih}, p^K_{ih})

Clouds are those of one head in one sentence, and never mixed. Sentences in which a head has no
query or no key that takes part do not count.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.divergences import Divergence
from bayesattn.networks import AttentionCall

__all__ = ["mean_divergence"]


def mean_divergence(
    divergence: Divergence, calls: Sequence[AttentionCall]
) -> Float[Tensor, " head"]:
    """Mean over the sentences of some calls of one layer.

    Args:
        divergence: Between the clouds of a batch of sentences and heads.
        calls: At least one.

    Returns:
        In float32 or wider; zero for a head without any sentence.
    """
    sums, counts = zip(*(_summed(divergence, call) for call in calls), strict=True)
    return torch.stack(sums).sum(0) / torch.stack(counts).sum(0).clamp(min=1)


def _summed(divergence: Divergence, call: AttentionCall) -> tuple[Tensor, Tensor]:
    query_mask, key_mask = call.cloud_masks()
    counts = query_mask.any(-1) & key_mask.any(-1)
    # A sentence without a cloud gets one that stands at zero, and is then left out.
    query, key = (
        torch.where(counts[..., None, None], points, 0.0)
        for points in (call.query, call.key_of_each_head())
    )
    found = divergence(
        query, key, query_mask | ~counts[..., None], key_mask | ~counts[..., None], None
    )
    return torch.where(counts, found, 0.0).sum(0), counts.sum(0)
