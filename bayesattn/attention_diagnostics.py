r"""How attention is spread: what each key receives, and over how many keys each query spreads it.

.. math:: m_j = \sum_i A_{ij}, \qquad H_i = -\sum_j A_{ij} \log A_{ij}

A key is explained away, at :math:`\varepsilon`, if :math:`m_j < \varepsilon`. Weights are formed
for some queries at a time, so memory is linear in the sequence wherever the fused route exists.

Source:
    Ding et al. (2020), Attention that does not explain away, arXiv:2009.14308.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from bayesattn.attention_choices import LogitsFunction, NormalizationFunction, mixes_queries
from bayesattn.functional import attention_weights
from bayesattn.fused_route import fused_attention, is_fusible, reduce_logits
from bayesattn.masking import Masks, combine_masks, with_infinities
from bayesattn.networks.attention_call import AttentionCall
from bayesattn.networks.taps import last_calls
from bayesattn.normalizations.columns import Softmax
from bayesattn.normalizations.protocol import Normalization, mixture

__all__ = ["AttentionStatistics", "attention_statistics", "layer_statistics"]

Number = float | int
# Entries of the weights that are held at once.
_BLOCK_ENTRIES = 2**22


class AttentionStatistics(NamedTuple):
    """How each head spreads its attention.

    Attributes:
        column_mass: Attention that each key receives from all queries; zero for padding.
        entropy: Of each query's weights, in nats; zero for padding.
        query_mask: Which queries count.
        key_mask: Which keys count: those that some query may see.
    """

    column_mass: Float[Tensor, "*batch head key"]
    entropy: Float[Tensor, "*batch head query"]
    query_mask: Bool[Tensor, "*batch head query"]
    key_mask: Bool[Tensor, "*batch head key"]

    def explained_away_rate(self, threshold: float = 0.1) -> Float[Tensor, "*batch head"]:
        """Part of the keys that receive less than a threshold; NaN where there is no key.

        A mass that is NaN makes the rate NaN.

        Raises:
            ValueError: If the threshold is not positive.
        """
        if not threshold > 0.0:
            raise ValueError(f"threshold: expected a positive number, got {threshold}")
        below = (self.column_mass < threshold).to(self.column_mass.dtype)
        below = torch.where(self.column_mass.isnan(), torch.nan, below)
        counted = torch.where(self.key_mask, below, 0.0)
        return counted.sum(-1) / self.key_mask.sum(-1).to(counted.dtype)

    def effective_attended_keys(self) -> Float[Tensor, "*batch head"]:
        """Over how many keys a query spreads its attention, the mean of exp(entropy)."""
        counts = torch.where(self.query_mask, self.entropy.exp(), 0.0)
        return counts.sum(-1) / self.query_mask.sum(-1).to(counts.dtype)

    def effective_keys(self) -> Float[Tensor, "*batch head"]:
        """How many keys share the attention of all queries: exp(entropy) of their masses."""
        share = self.column_mass / self.column_mass.sum(-1, keepdim=True)
        return torch.special.entr(share).sum(-1).exp()


@torch.no_grad()
def attention_statistics(
    query: Float[Tensor, "*_batch query _dim"],
    key: Float[Tensor, "*_batch key _dim"],
    *,
    attn_mask: Shaped[Tensor, "*_batch _query _key"] | None = None,
    query_mask: Shaped[Tensor, "*_batch _query"] | None = None,
    key_mask: Shaped[Tensor, "*_batch _key"] | None = None,
    is_causal: bool = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    logits: LogitsFunction | None = None,
    normalization: NormalizationFunction | None = None,
) -> AttentionStatistics:
    """Column masses and entropies of attention; the arguments are :func:`bayesattn.attention`'s.

    Heads are the third axis from the right; one is added where there is none. No gradients.

    Raises:
        ValueError: If shapes, types or masks do not fit together.
    """
    if query.ndim == 2:
        query, key = query[None], key[None]
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    if attn_mask is not None:
        attn_mask = with_infinities(attn_mask) if mixes_queries(normalization) else attn_mask
        batch = torch.broadcast_shapes(batch, attn_mask.shape[:-2])
    given: dict[str, Any] = {
        "attn_mask": attn_mask,
        "query_mask": query_mask,
        "key_mask": key_mask,
        "is_causal": is_causal,
    }
    shape = (*batch, query.shape[-2], key.shape[-2])
    masks = combine_masks(shape, **given, device=query.device)
    settings = {"scale": scale, "logits": logits, "normalization": normalization}
    if is_fusible(query, key, masks, logits, normalization):
        blocks = _blocks_of_weights(query, key, masks, **settings)
    else:
        blocks = iter([attention_weights(query, key, **given, **settings)])
    mass, entropies = 0.0, []
    for weights in blocks:
        weights = weights.expand(*batch, *weights.shape[-2:])
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        mass = mass + weights.sum(-2)
        entropies.append(torch.special.entr(weights).sum(-1))
    assert isinstance(mass, Tensor)
    pairs = masks.pairs()
    seen = torch.ones((), dtype=torch.bool, device=query.device) if pairs is None else pairs
    seen = seen.expand(shape)
    return AttentionStatistics(mass, torch.cat(entropies, -1), seen.any(-1), seen.any(-2))


def layer_statistics(model: nn.Module) -> AbstractContextManager[dict[str, AttentionStatistics]]:
    """Collect the statistics of every attention layer that :mod:`bayesattn.networks` knows.

    Within the context each call of a layer puts its statistics into the dictionary, under the
    layer's name; the last call counts. Nothing is left on the modules::

        with layer_statistics(model) as statistics:
            model(tokens)
        statistics["layers.0.self_attn"].explained_away_rate(0.1)  # (sentence, head)

    Raises:
        ValueError: If the model has no such layer.
    """

    def statistics(call: AttentionCall) -> AttentionStatistics:
        return attention_statistics(call.query, call.key, **call.settings)

    return last_calls(model, statistics, caller="layer_statistics")


def _blocks_of_weights(
    query: Tensor,
    key: Tensor,
    masks: Masks,
    scale: Number | None,
    logits: LogitsFunction | None,
    normalization: NormalizationFunction | None,
) -> Iterator[Tensor]:
    """Weights of some queries after the other, under what all queries come to."""
    reduced = reduce_logits(query, key, scale, logits, normalization)
    assert reduced is not None
    fused = fused_attention(reduced, masks)
    choice = normalization if isinstance(normalization, Normalization) else Softmax()
    components = choice.components(fused)
    assert components is not None
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = max(1, _BLOCK_ENTRIES // max(1, query[..., 0, 0].numel() * key.shape[-2]))
    for first in range(0, query.shape[-2], rows):
        some = slice(first, first + rows)
        weights = mixture(fused.values_of(some).to(dtype), components, masks.keys)
        if masks.queries is not None:
            weights = torch.where(masks.queries[..., some, :], weights, 0.0)
        yield weights
