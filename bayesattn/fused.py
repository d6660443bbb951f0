r"""Two primitives that nearly all attention reduces to, in memory linear in the sequence.

.. math:: o_i = \sum_j \mathrm{softmax}_j(\alpha\, q_i \cdot k_j + b_j)\, v_j, \qquad
    \ell_i = \log \sum_j e^{\alpha\, q_i \cdot k_j + b_j}

On the CPU they are operators of our own around PyTorch's fused kernel, exact, with one sweep over
blocks for each gradient (:mod:`bayesattn.fused_operators`). On other devices, and with dropout,
they are PyTorch's public fused attention with the bias folded into the width
(:mod:`bayesattn.folding`). There are no second derivatives and no forward mode: the dense formulas
of :mod:`bayesattn.functional` have those.

Source:
    Dao et al. (2022), FlashAttention, arXiv:2205.14135, for the blocks. Doubly-normalized
    attention: Ding et al. (2020), arXiv:2009.14308; its one-sweep gradient is ours.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bayesattn import fused_gradients
from bayesattn.autocasting import autocast_type
from bayesattn.folding import folded_attention, folded_logsumexp
from bayesattn.fused_operators import LOWEST_BIAS

__all__ = ["attention_logsumexp", "attention_with_key_bias", "doubly_normalized_attention"]

Number = float | int


def attention_with_key_bias(
    query: Float[Tensor, "*_batch query _dim"],
    key: Float[Tensor, "*_batch _key _dim"],
    value: Float[Tensor, "*_batch _key _value_dim"],
    key_bias: Float[Tensor, "*_batch _key"] | None = None,
    *,
    scale: Number | None = None,
    dropout_p: Number = 0.0,
) -> Float[Tensor, "*_batch query _value_dim"]:
    """Average the values under the softmax of scaled dot products with a bias for each key.

    Leading axes broadcast. Where all keys are forbidden the result is zero, without a gradient.

    Args:
        query: What asks.
        key: What is asked, as wide as the queries.
        value: What is averaged, one for each key.
        key_bias: Added to the logits of a key; minus infinity forbids it. Zero if None.
        scale: Factor of the dot product; one over the square root of the width if None.
        dropout_p: Probability of dropping a weight, in force whenever positive.
    """
    query, key, value = _cast(query, key, value)
    batch = _leading_axes((query, 2), (key, 2), (value, 2), (key_bias, 1))
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    query, key, value = (_fold(part, batch, 2) for part in (query, key, value))
    bias, is_live = _folded_bias(key_bias, key, batch)
    if not query.numel() or not key.numel():
        return _unfold(query.new_zeros(*query.shape[:2], value.shape[-1]), batch)
    if query.device.type == "cpu" and dropout_p == 0:
        finite = _finite(bias)
        return _unfold(fused_gradients.biased_attention(query, key, value, finite, factor), batch)
    bias = torch.where(is_live, bias, 0.0)
    asking, asked, told = (part[None] for part in (query, key, value))
    output = folded_attention(asking, asked, told, bias[None], factor, float(dropout_p))[0]
    # A mask that is not there costs no copy.
    if key_bias is not None:
        output = torch.where(is_live[..., None], output, 0.0)
    return _unfold(output, batch)


def attention_logsumexp(
    query: Float[Tensor, "*_batch query _dim"],
    key: Float[Tensor, "*_batch _key _dim"],
    key_bias: Float[Tensor, "*_batch _key"] | None = None,
    *,
    scale: Number | None = None,
) -> Float[Tensor, "*_batch query"]:
    """Logsumexp over the keys of scaled dot products with a bias for each key.

    In single precision at least, whatever the type of the queries. Minus infinity, without a
    gradient, where all keys are forbidden. The arguments are those of
    :func:`attention_with_key_bias`.
    """
    query, key = _cast(query, key)
    batch = _leading_axes((query, 2), (key, 2), (key_bias, 1))
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    query, key = (_fold(part, batch, 2) for part in (query, key))
    bias, is_live = _folded_bias(key_bias, key, batch)
    if query.device.type == "cpu":
        finite = None if key_bias is None else _finite(bias)
        result = fused_gradients.logsumexp(query.to(bias.dtype), key.to(bias.dtype), finite, factor)
    else:
        bias = torch.where(is_live, bias, 0.0)
        result = folded_logsumexp(query[None], key[None], bias[None], factor)[0]
    return _unfold(torch.where(is_live, result, -torch.inf), batch)


def doubly_normalized_attention(
    query: Float[Tensor, "*_batch query _dim"],
    key: Float[Tensor, "*_batch _key _dim"],
    value: Float[Tensor, "*_batch _key _value_dim"],
    query_bias: Float[Tensor, "*_batch query"] | None = None,
    key_mask: Float[Tensor, "*_batch _key"] | None = None,
    *,
    scale: Number | None = None,
) -> Float[Tensor, "*_batch query _value_dim"]:
    r"""Average the values under weights normalized over queries first and over keys last.

    .. math:: o_i = \sum_j \mathrm{softmax}_j(s_{ij} - c_j)\, v_j, \qquad
        c_j = \log \sum_i e^{s_{ij} + a_i}

    On the CPU the gradient of both normalizations is one sweep with no more matrix products than a
    softmax's own: the whole costs eight of them, where softmax attention costs seven.

    Args:
        query: What asks.
        key: What is asked.
        value: What is averaged.
        query_bias: :math:`a`, log prior of a query in the first normalization; minus infinity
            leaves it out there.
        key_mask: Zero, or minus infinity where a key takes no part.
        scale: Factor of the dot product; one over the square root of the width if None.
    """
    if query.device.type != "cpu":
        total = attention_logsumexp(key, query, query_bias, scale=scale)
        bias = -torch.where(total > -torch.inf, total, 0.0)
        bias = bias if key_mask is None else bias + key_mask
        return attention_with_key_bias(query, key, value, bias, scale=scale)
    query, key, value = _cast(query, key, value)
    batch = _leading_axes((query, 2), (key, 2), (value, 2), (query_bias, 1), (key_mask, 1))
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    query, key, value = (_fold(part, batch, 2) for part in (query, key, value))
    mask, has_keys = _folded_bias(key_mask, key, batch)
    prior, has_queries = _folded_bias(query_bias, query, batch)
    if not query.numel() or not key.numel():
        return _unfold(query.new_zeros(*query.shape[:2], value.shape[-1]), batch)
    output = fused_gradients.doubly_normalized(
        query,
        key,
        value,
        None if query_bias is None else _finite(prior),
        mask.clamp(min=LOWEST_BIAS),
        factor,
    )
    if key_mask is not None or query_bias is not None:
        output = torch.where((has_keys & has_queries)[..., None], output, 0.0)
    return _unfold(output, batch)


def _cast(*parts: Tensor) -> tuple[Tensor, ...]:
    dtype = autocast_type(parts[0])
    return parts if dtype is None else tuple(part.to(dtype) for part in parts)


def _leading_axes(*parts: tuple[Tensor | None, int]) -> tuple[int, ...]:
    """Leading axes of tensors that have so many of their own."""
    shapes = (part.shape[: part.ndim - own] for part, own in parts if part is not None)
    return tuple(torch.broadcast_shapes(*shapes))


def _folded_bias(
    bias: Tensor | None, like: Tensor, batch: tuple[int, ...]
) -> tuple[Float[Tensor, "joined position"], Bool[Tensor, "joined 1"]]:
    """A bias for each position of a folded tensor, zero if None, and whether any is allowed."""
    if bias is None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        bias = torch.zeros(like.shape[:2], dtype=dtype, device=like.device)
        is_live = torch.full((len(like), 1), like.shape[1] > 0, device=like.device)
        return bias, is_live
    bias = _fold(bias.to(torch.promote_types(like.dtype, torch.float32)), batch, 1)
    return bias, (bias > -torch.inf).any(-1, keepdim=True)


def _finite(bias: Tensor) -> Tensor:
    """The lowest bias for minus infinity, and more for all that is finite."""
    return torch.where(bias > -torch.inf, bias.clamp(min=LOWEST_BIAS / 2), LOWEST_BIAS)


def _fold(part: Tensor, batch: tuple[int, ...], num_axes: int) -> Tensor:
    """Join the leading axes to one."""
    own = part.shape[part.ndim - num_axes :]
    return part.expand(*batch, *own).reshape(math.prod(batch), *own)


def _unfold(part: Tensor, batch: tuple[int, ...]) -> Tensor:
    return part.reshape(*batch, *part.shape[1:])
