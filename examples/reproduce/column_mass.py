r"""How much attention each word receives in each layer of a trained encoder, and who gets none.

.. math:: m_j = \sum_i A_{ij}, \qquad \text{word } j \text{ is } \varepsilon
    \text{-explained-away if } m_j < \varepsilon

The mean of :math:`m_j` over the words of a sentence is one, whatever the normalization. Under the
doubly-normalized weights no word of a sentence of N words has less than 1/N.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bayesattn.functional import attention_weights
from bayesattn.multihead import MultiheadAttention
from examples.reproduce.text_tasks import Sentences

__all__ = ["EDGES", "THRESHOLDS", "profile", "summarize"]

THRESHOLDS = (0.1, 0.01, 0.001)
# Of the histogram over log10 of the mass; what is below the first edge counts in the first bin.
EDGES = torch.linspace(-6.0, 1.75, 63, dtype=torch.float64)


@torch.no_grad()
def profile(model: nn.Module, sentences: Sentences, batch_size: int = 256) -> list[dict[str, Any]]:
    """Describe what each attention layer does to the words of some sentences, layer by layer.

    Args:
        model: Has layers of :class:`bayesattn.MultiheadAttention`, in the order they are called in.
        sentences: What it reads, in evaluation mode.
        batch_size: Sentences that are read at once.

    Returns:
        What :func:`summarize` gives, for each layer.
    """
    layers = [part for part in model.modules() if isinstance(part, MultiheadAttention)]
    masses: list[list[Tensor]] = [[] for _ in layers]
    sizes: list[list[Tensor]] = [[] for _ in layers]
    model.eval()
    for rows in sentences.mask.sum(-1).argsort().split(batch_size):
        batch = sentences.choose(rows)
        for place, weights in enumerate(_weights_of_call(model, layers, batch)):
            mass, size = _words(weights, batch.mask)
            masses[place].append(mass)
            sizes[place].append(size)
    return [
        summarize(torch.cat(mass), torch.cat(size))
        for mass, size in zip(masses, sizes, strict=True)
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


def _weights_of_call(
    model: nn.Module, layers: Sequence[MultiheadAttention], batch: Sentences
) -> list[Float[Tensor, "sentence head query key"]]:
    """Weights of each layer, as they are in one call of the model."""
    seen: dict[nn.Module, Tensor] = {}

    def keep(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        del output
        inputs = layer.attention_inputs(*args, **kwargs)
        seen[layer] = attention_weights(inputs.query, inputs.key, **inputs.settings)

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
    try:
        model(batch.tokens, batch.mask)
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[layer] for layer in layers]


def _words(
    weights: Float[Tensor, "sentence head token token"], mask: Bool[Tensor, "sentence token"]
) -> tuple[Float[Tensor, "word head"], Float[Tensor, "word head"]]:
    """Give each word's mass, and the exponential of the entropy of its own weights."""
    weights = torch.where(mask[:, None, :, None], weights, 0.0)
    attended = torch.special.entr(weights).sum(-1).exp()
    return weights.sum(-2).movedim(1, -1)[mask], attended.movedim(1, -1)[mask]


def _mean(values: Tensor) -> list[float]:
    return values.double().mean(0).tolist()
