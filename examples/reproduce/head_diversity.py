r"""How different the heads of a trained classifier are, in their weights and in their attention.

.. math:: S_{ij} = 1 - \mathrm{JS}_{ij} / \log 2

is a similarity of attention maps that is positive semidefinite (Hein and Bousquet, 2005, Hilbertian
metrics and positive definite kernels on probability measures); heads in effect are counted by it.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bayesattn.head_diagnostics import weight_similarity
from bayesattn.head_similarity import effective_heads, jensen_shannon, mean_over_pairs
from examples.reproduce.attention_maps import attention_maps
from examples.reproduce.text_tasks import Sentences

__all__ = ["DIVERSITY", "head_diversity"]

DIVERSITY = ("head cosine", "map divergence", "effective heads")


def head_diversity(model: nn.Module, sentences: Sentences) -> dict[str, float | None]:
    """Describe the heads of a classifier by three figures, each the mean over layers.

    Args:
        model: Takes tokens and mask, in evaluation mode.
        sentences: What its attention is looked at on; padding does not count.

    Returns:
        "head cosine", between the weights of two heads, the mean over pairs, and over queries, keys
        and values where a head has all of them; "map divergence", Jensen-Shannon's between the
        attention of two heads, in nats, the mean over pairs, words and sentences; "effective
        heads", by the same divergences. The first two are None where there is one head alone.
    """
    divergences = map_divergences(model, sentences).values()
    similarities = [1 - divergence / math.log(2) for divergence in divergences]
    figures = (
        _mean([mean_over_pairs(cosines) for cosines in weight_similarity(model).values()]),
        _mean([mean_over_pairs(divergence) for divergence in divergences]),
        _mean([effective_heads(similarity) for similarity in similarities]),
    )
    return dict(zip(DIVERSITY, figures, strict=True))


def map_divergences(model: nn.Module, sentences: Sentences) -> Mapping[str, Tensor]:
    """Give each layer's divergences between the attention of its heads, "head head", in nats."""
    sums: dict[str, Tensor] = {}
    for batch, maps in attention_maps(model, sentences):
        for name, weights in maps.items():
            # Pooling has one query, which belongs to no word.
            counted = None if weights.shape[-2] == 1 else batch.mask
            total = jensen_shannon(weights.double(), counted).sum(0)
            sums[name] = sums.get(name, 0.0) + total
    return {name: total / len(sentences.label) for name, total in sums.items()}


def _mean(values: list[Tensor]) -> float | None:
    mean = float(torch.stack(values).mean())
    return None if math.isnan(mean) else mean
