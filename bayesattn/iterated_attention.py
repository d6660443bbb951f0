r"""Doubly-normalized attention as EM: queries are centers that move to the keys they account for.

.. math:: \xi_{ij} = \frac{\pi_i \, N(k_j \mid \mu_i, \sigma^2 I)}{\sum_l \pi_l \,
    N(k_j \mid \mu_l, \sigma^2 I)}, \qquad
    \mu_i \leftarrow \sum_j A_{ij} k_j, \qquad A_{ij} = \frac{\xi_{ij}}{\sum_l \xi_{il}}

The keys are data of a mixture of normal laws around the queries. One step from the queries
themselves is doubly-normalized attention; each step raises the likelihood of the keys.

Source:
    Ding et al. (2020), arXiv:2009.14308; the derivation is ours, as only its abstract was at hand.
    The E- and M-step are those of slot attention without its network, Locatello et al. (2020),
    arXiv:2006.15055.
"""

import math

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from bayesattn.contraction import inner_products, weighted_sums
from bayesattn.kernels.distances import squared_distances
from bayesattn.masking import combine_masks, masked_softmax

__all__ = ["em_attention", "log_normal", "log_shares"]

Number = int | float


def em_attention(
    query: Float[Tensor, "*_batch query _dim"],
    key: Float[Tensor, "*_batch key _dim"],
    value: Float[Tensor, "*_batch key _value_dim"] | None = None,
    *,
    num_steps: int = 1,
    variance: Number | Float[Tensor, "..."] | None = None,
    log_mixing: Float[Tensor, "*_batch _query"] | None = None,
    query_mask: Shaped[Tensor, "*_batch _query"] | None = None,
    key_mask: Shaped[Tensor, "*_batch _key"] | None = None,
    attn_mask: Bool[Tensor, "*_batch _query _key"] | None = None,
) -> Float[Tensor, "*_batch query _value_dim"]:
    """Move the queries by all steps but the last, and average the values in the last one.

    Differentiable, and batched over all leading axes, for use within networks.

    Args:
        query: The centers to start from.
        key: The data.
        value: What is averaged; the keys by default.
        num_steps: T of EM; one is doubly-normalized attention.
        variance: Of each component, a number or "*batch 1 1"; the square root of the width by
            default, as in attention.
        log_mixing: Logits of the components' shares, kept at every step. By default half the
            squared norms of the given queries over the variance, as in attention; zeros for equal
            shares.
        query_mask: "*batch query", without the head axis: which queries are not padding.
        key_mask: "*batch key", without the head axis: which keys are not padding.
        attn_mask: "*batch head query key": which query may account for which key.

    Returns:
        Averages; zero for a query that sees no key.

    Raises:
        ValueError: If the number of steps is below one, or masks do not fit.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least one, got {num_steps}")
    if isinstance(variance, Number) and not 0.0 < variance < math.inf:
        raise ValueError(f"variance: expected a positive number, got {variance}")
    variance = math.sqrt(query.shape[-1]) if variance is None else variance
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    visible = combine_masks(
        (*batch, query.shape[-2], key.shape[-2]),
        attn_mask=attn_mask,
        query_mask=query_mask,
        key_mask=key_mask,
    ).pairs()
    norms = _half_norms(query, variance) if log_mixing is None else log_mixing[..., None]

    def weights_of(center: Tensor) -> Tensor:
        # The keys' own norms and all constants cancel in the softmax over queries.
        logits = inner_products(center / variance, key) + (norms - _half_norms(center, variance))
        return masked_softmax(log_shares(logits, visible, -2), visible)

    center = query
    for _ in range(num_steps - 1):
        center = weighted_sums(weights_of(center), key)
    return weighted_sums(weights_of(center), key if value is None else value)


def log_normal(
    center: Float[Tensor, "*#batch query dim"],
    point: Float[Tensor, "*#batch key dim"],
    variance: Number | Float[Tensor, "..."],
) -> Float[Tensor, "*#batch query key"]:
    """Log density of every point under the isotropic normal law around every center."""
    variance = torch.as_tensor(variance, dtype=center.dtype, device=center.device)
    norm = (2 * math.pi * variance).log() * (center.shape[-1] / 2)
    return -squared_distances(center, point) / (2 * variance) - norm


def log_shares(
    logits: Float[Tensor, "*#batch _some_query _some_key"],
    visible: Bool[Tensor, "*#batch _query _key"] | None,
    axis: int,
) -> Float[Tensor, "*#batch _query _key"]:
    """Normalize logits along an axis over what is visible; over all where nothing is."""
    if visible is None:
        return logits.log_softmax(axis)
    seen = visible | ~visible.any(axis, keepdim=True)
    return torch.where(seen, logits, -torch.inf).log_softmax(axis)


def _half_norms(center: Tensor, variance: Number | Tensor) -> Tensor:
    return center.square().sum(-1, keepdim=True) / (2 * variance)
