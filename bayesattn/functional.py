r"""Attention, as functions: every query averages the values under weights that its logits give.

.. math:: o_i = \sum_j a_{ij} v_j, \qquad
    a_{ij} = \frac{m_{ij} e^{s_{ij}}}{\sum_l m_{il} e^{s_{il}}}, \qquad
    s_{ij} = \frac{q_i \cdot k_j}{\sqrt d} + b_{ij}

Source:
    Vaswani et al. (2017), Attention is all you need, arXiv:1706.03762, eq. 1.
"""

import math
import warnings
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from bayesattn.attention_choices import (
    LogitsFunction,
    NormalizationFunction,
    check_no_class,
    logits_given,
    mixes_queries,
    name_of_choice,
    pools_tokens,
    sees_all_tokens,
)
from bayesattn.autocasting import autocast_type
from bayesattn.contraction import (
    has_tangent,
    inner_products,
    inside_transform,
    weighted_sums,
)
from bayesattn.fused_route import attend_fused, check_route, reduce_logits, takes_fused
from bayesattn.logits import ConditionalLogits
from bayesattn.masking import (
    Masks,
    combine_masks,
    masked_softmax,
    refuse_leaks,
    with_infinities,
)
from bayesattn.normalizations.columns import Softmax
from bayesattn.shape_messages import shapes_of

__all__ = ["attention", "attention_weights", "logits_of_call"]

# A whole number is a number too, which run-time type checks do not take for a float.
Number = float | int


def attention(
    query: Float[Tensor, "*_batch query _dim"],
    key: Float[Tensor, "*_batch _key _dim"],
    value: Float[Tensor, "*_batch _key _value_dim"],
    *,
    attn_mask: Shaped[Tensor, "*_batch _query _key"] | None = None,
    query_mask: Shaped[Tensor, "*_batch _query"] | None = None,
    key_mask: Shaped[Tensor, "*_batch _key"] | None = None,
    is_causal: bool = False,
    scale: Number | None = None,
    dropout_p: Number = 0.0,
    enable_gqa: bool = False,
    logits: LogitsFunction | None = None,
    normalization: NormalizationFunction | None = None,
    route: str = "auto",
) -> Float[Tensor, "*_batch query _value_dim"]:
    """Average the values under each query's attention weights.

    Tensors are "*batch head query dim"; leading axes broadcast, and may be missing. In every mask
    True takes part. A query that sees no key, or is padding, gets zeros, and no gradient passes
    through it. What stands at masked places does not matter as long as products of it are finite.

    Args:
        query: What asks.
        key: What is asked, as wide as the queries.
        value: What is averaged, one for each key.
        attn_mask: Boolean; or float, added to the logits, where minus infinity forbids. For
            normalizations over queries, in which a key's bias cancels, so does all below -10⁴.
        query_mask: "*batch query", without the head axis: which queries are not padding.
        key_mask: "*batch key", without the head axis: which keys are not padding.
        is_causal: On top of the masks, query i sees keys 0 to i only.
        scale: Factor of the dot product; one over the square root of the width if None.
        dropout_p: Probability of dropping a weight, in force whenever positive.
        enable_gqa: There are fewer heads of keys and values, each for a run of query heads.
        logits: ``logits(query, key)`` in place of the scaled dot product: a
            :class:`bayesattn.logits.Logits` or a function.
        normalization: ``normalization(logits, mask)`` in place of the masked softmax: a
            :class:`bayesattn.normalizations.Normalization` or a function; the mask is boolean and
            broadcasts to the logits, or is None.
        route: "dense" forms the weights. "fused" does not, and has no second derivatives and no
            forward mode: softmax is ``F.scaled_dot_product_attention``, all else
            :mod:`bayesattn.fused`. "auto" is the faster one: dense where only that formula exists,
            for few queries and keys, and for few queries on keys shared between batches or heads,
            which fused ones copy.

    Returns:
        Averages, the same by either route.

    Raises:
        ValueError: If shapes, types or masks do not fit together, the route cannot be taken, or a
            normalization over queries would leak the future under a mask that shows no query a
            later key. In compiled code that is a RuntimeError; under ``torch.func`` masks are not
            looked at.

    Warns:
        UserWarning: If a normalization over queries meets a single query, whose weights are then
            uniform.
    """
    batch = _check(query, key, value, enable_gqa)
    _check_choices(route, dropout_p, scale, logits)
    attn_mask = _mask_for(
        logits, normalization, is_causal, attn_mask, query.shape[-2], key.shape[-2]
    )
    if enable_gqa:
        key, value = _repeat_heads(key, batch[-1]), _repeat_heads(value, batch[-1])
    normalization = None if isinstance(normalization, Softmax) else normalization
    if route == "auto" and has_tangent(query, key, value, attn_mask, logits, normalization):
        # Fused kernels have no forward mode.
        route = "dense"
    is_plain = logits is None and normalization is None
    has_pairs = attn_mask is not None or is_causal
    is_stock = is_plain and _takes_stock(route, query, key, batch, has_pairs)
    only_causal = is_causal and attn_mask is None and key_mask is None
    # The fused kernels know this one mask better than any tensor could tell them.
    causal_kernel = is_stock and only_causal
    masks = combine_masks(
        (*batch, query.shape[-2], key.shape[-2]),
        attn_mask=attn_mask,
        query_mask=query_mask,
        key_mask=key_mask,
        is_causal=is_causal and not causal_kernel,
        device=query.device,
    )
    logits = logits_given(logits, query, key, masks)
    if is_stock:
        settings = {"dropout_p": float(dropout_p), "scale": scale, "is_causal": causal_kernel}
        return _stock(query, key, value, masks, batch, settings)
    if takes_fused(route, query, key, masks, logits, normalization, float(dropout_p)):
        reduced = reduce_logits(query, key, scale, logits, normalization)
        if reduced is not None:
            return attend_fused(reduced, value, masks, normalization, float(dropout_p))
    weights = _dense_weights(query, key, masks, scale, logits, normalization)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return weighted_sums(weights.to(value.dtype), value)


def attention_weights(
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
) -> Float[Tensor, "*_batch query key"]:
    """Attention weights of every query; the arguments are those of :func:`attention`.

    Returns:
        Weights, zero where masked; under the softmax, each row that sees a key sums to one.

    Raises:
        ValueError: If shapes, types or masks do not fit together.
    """
    batch = _check(query, key, None, enable_gqa)
    _check_choices("dense", 0.0, scale, logits)
    attn_mask = _mask_for(
        logits, normalization, is_causal, attn_mask, query.shape[-2], key.shape[-2]
    )
    masks = combine_masks(
        (*batch, query.shape[-2], key.shape[-2]),
        attn_mask=attn_mask,
        query_mask=query_mask,
        key_mask=key_mask,
        is_causal=is_causal,
        device=query.device,
    )
    if enable_gqa:
        key = _repeat_heads(key, batch[-1])
    logits = logits_given(logits, query, key, masks)
    return _dense_weights(query, key, masks, scale, logits, normalization)


def logits_of_call(
    logits: LogitsFunction | None,
    query: Float[Tensor, "*_batch query _dim"],
    key: Float[Tensor, "*_batch key _dim"],
    *,
    attn_mask: Shaped[Tensor, "*_batch _query _key"] | None = None,
    query_mask: Shaped[Tensor, "*_batch _query"] | None = None,
    key_mask: Shaped[Tensor, "*_batch _key"] | None = None,
    is_causal: bool = False,
) -> LogitsFunction | None:
    """Logits as they are for one call: where they are drawn, what further calls may go on with.

    The arguments are those of :func:`attention`.

    Raises:
        ValueError: If they depend on all tokens, and a causal mask hides some.
    """
    if not isinstance(logits, ConditionalLogits):
        return logits
    attn_mask = _mask_for(logits, None, is_causal, attn_mask, query.shape[-2], key.shape[-2])
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    masks = combine_masks(
        (*batch, query.shape[-2], key.shape[-2]),
        attn_mask=attn_mask,
        query_mask=query_mask,
        key_mask=key_mask,
        is_causal=is_causal,
        device=query.device,
    )
    return logits_given(logits, query, key, masks)


def _dense_weights(
    query: Tensor,
    key: Tensor,
    masks: Masks,
    scale: Number | None,
    logits: LogitsFunction | None,
    normalization: NormalizationFunction | None,
) -> Tensor:
    if logits is None:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        values = inner_products(query * factor, key)
    else:
        values = logits(query, key)
    if masks.bias is not None:
        # In a narrower type what was finite must not become infinite.
        wide = masks.bias.to(torch.promote_types(masks.bias.dtype, query.dtype))
        values = values + wide.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
    pairs = masks.pairs()
    if normalization is None:
        return masked_softmax(values, pairs)
    weights = normalization(values, pairs)
    return weights if pairs is None else torch.where(pairs, weights, 0.0)


def _stock(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    batch: tuple[int, ...],
    settings: dict[str, Any],
) -> Tensor:
    mask, live = masks.bias, masks.queries
    if masks.keys is not None:
        # A row without a key is let see all, so that no kernel meets it, and zeroed after.
        sees = masks.keys.any(-1, keepdim=True)
        live = sees if live is None else live & sees
        mask = masks.keys | ~sees
        if masks.bias is not None:
            mask = torch.where(sees, torch.where(masks.keys, masks.bias, -torch.inf), 0.0)
            mask = mask.to(query.dtype)
    parts = [query, key, value] if mask is None else [query, key, value, mask]
    batch = torch.broadcast_shapes(batch, *(part.shape[:-2] for part in parts))
    heads = batch[-1] if batch else 1
    outer = batch[:-1]
    folded = [_fold(part, outer, heads) for part in parts[:3]]
    if mask is not None:
        mask = _fold(mask, outer, mask.shape[-3] if mask.ndim > 2 else 1)
    output = F.scaled_dot_product_attention(*folded, attn_mask=mask, **settings)
    output = output.reshape(*batch, *output.shape[-2:])
    return output if live is None else torch.where(live, output, 0.0)


def _fold(part: Tensor, outer: tuple[int, ...], heads: int) -> Tensor:
    part = part.expand(*outer, heads, *part.shape[-2:])
    return part.reshape(math.prod(outer), heads, *part.shape[-2:])


def _repeat_heads(part: Tensor, num_heads: int) -> Tensor:
    return part.repeat_interleave(num_heads // part.shape[-3], dim=-3)


def _takes_stock(
    route: str, query: Tensor, key: Tensor, batch: tuple[int, ...], has_pairs: bool
) -> bool:
    """Whether softmax goes to PyTorch's own fused attention, which vmap unrolls."""
    if route != "auto":
        return route == "fused" and (has_pairs or not inside_transform())
    copied_to_no_gain = key.shape[:-2] != batch and query.shape[-2] < query.shape[-1]
    return not (copied_to_no_gain or inside_transform())


def _check(query: Tensor, key: Tensor, value: Tensor | None, enable_gqa: bool) -> tuple[int, ...]:
    parts = {"query": query, "key": key} | ({} if value is None else {"value": value})
    fewest = 3 if enable_gqa else 2
    if any(part.ndim < fewest for part in parts.values()):
        raise ValueError(f"attention: expected at least {fewest} axes, got {shapes_of(parts)}")
    if query.shape[-1] != key.shape[-1] or query.shape[-1] == 0:
        raise ValueError(f"attention: query and key must have one width, got {shapes_of(parts)}")
    if value is not None and key.shape[-2] != value.shape[-2]:
        raise ValueError(f"attention: every key needs its value, got {shapes_of(parts)}")
    if len({part.dtype for part in parts.values()}) > 1 and autocast_type(query) is None:
        names = ", ".join(f"{name} {part.dtype}" for name, part in parts.items())
        raise ValueError(f"attention: expected one type, got {names}")
    shapes = [tuple(part.shape[:-2]) for part in parts.values()]
    if enable_gqa:
        shapes = _shapes_of_groups(shapes, parts)
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(
            f"attention: leading axes must broadcast, got {shapes_of(parts)}"
        ) from None
    return tuple(torch.broadcast_shapes(*shapes[:2]))


def _shapes_of_groups(
    shapes: list[tuple[int, ...]], parts: dict[str, Tensor]
) -> list[tuple[int, ...]]:
    num_heads, *fewer = (shape[-1] for shape in shapes)
    if len(set(fewer)) > 1 or num_heads % fewer[0]:
        raise ValueError(
            "enable_gqa: query heads must be a multiple of the heads of key and value, got "
            f"{shapes_of(parts)}"
        )
    return [(*shape[:-1], num_heads) for shape in shapes]


def _check_choices(
    route: str,
    dropout_p: Number,
    scale: Number | None,
    logits: LogitsFunction | None,
) -> None:
    check_route(route)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability, got {dropout_p}")
    check_no_class("logits", logits)
    if scale is not None and logits is not None:
        raise ValueError(f"scale: with logits= it belongs to those, got {scale}")


def _mask_for(
    logits: LogitsFunction | None,
    normalization: NormalizationFunction | None,
    is_causal: bool,
    attn_mask: Tensor | None,
    num_queries: int,
    num_keys: int,
) -> Tensor | None:
    """The mask as the choices need it, if they can do with such a mask at all."""
    if pools_tokens(logits) and attn_mask is not None:
        attn_mask = with_infinities(attn_mask)
    if sees_all_tokens(logits):
        reason = (
            f"logits: {type(logits).__name__} pools over all tokens, so under a causal mask each "
            "query would learn of later ones; expected logits that pool over the first token or "
            "none"
        )
        _refuse_causal(reason, is_causal, attn_mask, num_queries, num_keys)
    if not mixes_queries(normalization):
        return attn_mask
    attn_mask = None if attn_mask is None else with_infinities(attn_mask)
    if not hasattr(normalization, "mixes_queries"):
        # A function that does not say may be one over keys alone.
        return attn_mask
    name = name_of_choice(normalization)
    if num_queries == 1 and num_keys > 1:
        warnings.warn(
            f"{name} normalizes over queries, and of a single one all weights are alike: it gives "
            "the plain mean of the values",
            stacklevel=3,
        )
    if getattr(normalization, "is_causal", False):
        return attn_mask
    reason = (
        f"normalization: {name} normalizes over queries, so under a causal mask each query "
        "would learn of later ones; expected CausalDoublyNormalized or Softmax"
    )
    _refuse_causal(reason, is_causal, attn_mask, num_queries, num_keys)
    return attn_mask


def _refuse_causal(
    reason: str, is_causal: bool, attn_mask: Tensor | None, num_queries: int, num_keys: int
) -> None:
    if is_causal and num_queries > 1:
        raise ValueError(reason)
    if attn_mask is not None:
        refuse_leaks(attn_mask, num_queries, num_keys, reason)
