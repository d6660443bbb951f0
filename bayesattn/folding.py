r"""Attention with a bias for each key, by PyTorch's public fused attention, on any device.

.. math:: s_{ij} + b_j = \alpha\, [q_i, 1] \cdot [k_j, b_j / \alpha]

The bias rides in one more column of queries and keys; two in half precision, where one rounds it
too coarsely. The logsumexp :math:`\ell_i` comes from attention with one more key, whose logit is
:math:`t_i`: with values one for the keys and zero for it, and the other way around, the two outputs
have the ratio :math:`e^{\ell_i - t_i}`. With :math:`t_i` the mean logit under the weights plus
:math:`\tfrac12 \log n`, which lies within :math:`\tfrac12 \log n` of :math:`\ell_i`, no exponential
overflows at any logits.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

__all__ = ["folded_attention", "folded_logsumexp"]

# PyTorch's kernels on GPUs want widths that are multiples of this.
_WIDTH = 8


def folded_attention(
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch head key dim"],
    value: Float[Tensor, "batch head key value_dim"],
    key_bias: Float[Tensor, "batch head key"],
    scale: float,
    dropout_p: float = 0.0,
) -> Float[Tensor, "batch head query value_dim"]:
    """Average the values under the softmax of logits with a bias for each key.

    Args:
        query: Not scaled yet.
        key: As wide as the queries.
        value: One for each key.
        key_bias: In single precision at least; minus infinity forbids, but not all keys at once.
        scale: Of the inner products.
        dropout_p: Probability of dropping a weight.
    """
    seen = key_bias > -torch.inf
    known = torch.where(seen, key_bias, 0.0)
    # A softmax does not see what all its logits share, and rounding is relative.
    center = known.detach().sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
    columns, unit = _columns(known - center, query.dtype, scale)
    columns = _forbid(columns, seen)
    ones = [torch.full_like(query[..., :1], unit)] * len(columns)
    queries, keys = _widened(query, ones), _widened(key, columns)
    return _attend(queries, keys, value, scale, dropout_p)


def folded_logsumexp(
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch head key dim"],
    key_bias: Float[Tensor, "batch head key"],
    scale: float,
) -> Float[Tensor, "batch head query"]:
    """Logsumexp of each query's logits, in single precision at least.

    The arguments are those of :func:`folded_attention`.
    """
    num_keys, dtype = key.shape[-2], query.dtype
    seen = key_bias > -torch.inf
    known = torch.where(seen, key_bias, 0.0)
    with torch.no_grad():
        center = known.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
        means = folded_attention(
            query, key, _widened(key, [(known - center)[..., None]]), key_bias, scale
        )
        means = means.to(known.dtype)
        width = key.shape[-1]
        logit = scale * (query * means[..., :width]).sum(-1) + means[..., width]
        logit = logit + 0.5 * math.log(num_keys)
        stand_in, unit = _columns(logit, dtype, scale)
        used = sum(column.to(known.dtype).squeeze(-1) for column in stand_in) * (unit * scale)
    columns, _ = _columns(known - center, dtype, scale)
    columns = _forbid(columns, seen)
    ones = [torch.full_like(query[..., :1], unit)] * len(columns)
    zeros = [torch.zeros_like(column) for column in columns]
    queries = _widened(query, [*ones, *stand_in])
    keys = _widened(key, [*columns, *zeros])
    extra = torch.zeros_like(keys[..., :1, :])
    first = key.shape[-1] + len(columns)
    extra[..., first : first + len(columns)] = unit
    is_extra = torch.arange(num_keys + 1, device=key.device) == num_keys
    value = torch.stack([~is_extra, is_extra], -1).to(dtype).expand(*key.shape[:-2], -1, -1)
    output = _attend(queries, torch.cat([keys, extra], -2), value, scale, 0.0).to(known.dtype)
    share = output.clamp(min=torch.finfo(known.dtype).tiny).log()
    return share[..., 0] - share[..., 1] + used + center


def _columns(bias: Tensor, dtype: torch.dtype, scale: float) -> tuple[list[Tensor], float]:
    """Columns whose sum, times the unit and the scale, is the bias as well as the type can say it.

    The unit is a power of two near one over the scale, so that it is exact in any type.
    """
    unit = 2.0 ** round(-math.log2(abs(scale))) if scale else 1.0
    bias = bias / (unit * scale) if scale else bias
    high = bias.to(dtype)
    if dtype == bias.dtype:
        return [high[..., None]], unit
    low = (bias - high.to(bias.dtype)).detach().to(dtype)
    return [high[..., None], low[..., None]], unit


def _forbid(columns: list[Tensor], seen: Tensor) -> list[Tensor]:
    lowest = max(-1e30, torch.finfo(columns[0].dtype).min / 2)
    return [torch.where(seen[..., None], columns[0], lowest), *columns[1:]]


def _widened(part: Tensor, columns: list[Tensor]) -> Tensor:
    return torch.cat([part, *(column.to(part.dtype) for column in columns)], -1)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout_p: float) -> Tensor:
    width = -(-max(query.shape[-1], value.shape[-1]) // _WIDTH) * _WIDTH
    parts = (F.pad(part, (0, width - part.shape[-1])) for part in (query, key, value))
    output = F.scaled_dot_product_attention(*parts, scale=scale, dropout_p=dropout_p)
    return output[..., : value.shape[-1]]
