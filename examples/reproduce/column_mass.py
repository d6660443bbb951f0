r"""How much attention each word receives in each layer of a trained encoder, and who gets none.

.. math:: m_j = \sum_i A_{ij}, \qquad \text{word } j \text{ is } \varepsilon
    \text{-explained-away if } m_j < \varepsilon

The mean of :math:`m_j` over the words of a sentence is one, whatever the normalization. Under the
doubly-normalized weights no word of a sentence of N words has less than 1/N.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from examples.reproduce.attention_maps import attention_maps
from examples.reproduce.text_tasks import Sentences

__all__ = ["EDGES", "THRESHOLDS", "profile", "summarize"]

THRESHOLDS = (0.1, 0.01, 0.001)
# Of the histogram over log10 of the mass; what is below the first edge counts in the first bin.
EDGES = torch.linspace(-6.0, 1.75, 63, dtype=torch.float64)


def profile(model: nn.Module, sentences: Sentences, batch_size: int = 256) -> list[dict[str, Any]]:
    """Describe what each attention layer does to the words of some sentences, layer by layer.

    Args:
        model: Has attention layers, in which words attend to words.
        sentences: What it reads, in evaluation mode.
        batch_size: Sentences that are read at once.

    Returns:
        What :func:`summarize` gives, for each layer.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for batch, maps in attention_maps(model, sentences, batch_size):
        for name, weights in maps.items():
            found.setdefault(name, []).append(_words(weights, batch.mask))
    return [
        summarize(*(torch.cat(parts) for parts in zip(*words, strict=True)))
        for words in found.values()
    ]


def summarize(
    mass: Float[Tensor, "word head"], attended: Float[Tensor, "word head"]
) -> dict[str, Any]:
    """Count, from each word's mass and from how many words it effectively attends to.

    Returns:
        "histogram" of log10 of the mass between ``EDGES``, over words and heads; "rates", for each
        threshold, the part of the words below it in each head; "in_all_heads", the part of the
        words below it in every head; "lowest" mass; "attended", the mean number in each head.
    """
    logarithm = mass.double().clamp_min(1e-300).log10()
    inside = logarithm.clamp(EDGES[0] + 1e-9, EDGES[-1] - 1e-9).flatten()
    counts = torch.histc(inside, len(EDGES) - 1, float(EDGES[0]), float(EDGES[-1]))
    below = {str(bound): mass < bound for bound in THRESHOLDS}
    return {
        "histogram": [int(count) for count in counts],
        "rates": {bound: _mean(is_below) for bound, is_below in below.items()},
        "in_all_heads": {
            bound: float(is_below.all(-1).double().mean()) for bound, is_below in below.items()
        },
        "lowest": float(mass.min()),
        "attended": _mean(attended),
    }


def _words(
    weights: Float[Tensor, "sentence head token token"], mask: Bool[Tensor, "sentence token"]
) -> tuple[Float[Tensor, "word head"], Float[Tensor, "word head"]]:
    """Give each word's mass, and the exponential of the entropy of its own weights."""
    weights = torch.where(mask[:, None, :, None], weights, 0.0)
    attended = torch.special.entr(weights).sum(-1).exp()
    return weights.sum(-2).movedim(1, -1)[mask], attended.movedim(1, -1)[mask]


def _mean(values: Tensor) -> list[float]:
    return values.double().mean(0).tolist()
