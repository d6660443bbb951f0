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
from bayesattn.divergences.empty_clouds import divergence_or_zero
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
    clouds = (call.query, call.key_of_each_head())
    found, counts = divergence_or_zero(divergence, *clouds, *call.cloud_masks())
    return found.sum(0), counts.sum(0)
