"""Fused attention on the CPU, and its gradients, as operators: one node in a graph each.

Tensors are "batch sequence dim". A recorded or compiled graph does not see the blocks inside, and
under ``torch.func.vmap`` the mapped axis joins the batch, so that the graph's size does not depend
on how many particles there are. :mod:`bayesattn.fused_gradients` tells autograd of them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesattn import blockwise
from bayesattn.autocasting import full_precision

__all__ = [
    "LOWEST_BIAS",
    "attention_gradient_operator",
    "biased_attention_operator",
    "doubly_normalized_operator",
    "join_batch",
    "logsumexp_gradient_operator",
    "logsumexp_operator",
]

# What stands for minus infinity where infinities would meet; far below any logit. What is finite
# stays above it, as far down as it may be.
LOWEST_BIAS = -1e30


@torch.library.custom_op("bayesattn::logsumexp", mutates_args=(), device_types="cpu")
def logsumexp_operator(query: Tensor, key: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
    """Logsumexp of each query's logits; see :func:`bayesattn.blockwise.blockwise_logsumexp`."""
    with full_precision(query):
        return blockwise.blockwise_logsumexp(query, key, key_bias, scale)


@torch.library.custom_op("bayesattn::logsumexp_gradient", mutates_args=(), device_types="cpu")
def logsumexp_gradient_operator(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    total: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`bayesattn.blockwise.logsumexp_gradient`."""
    with full_precision(query):
        return blockwise.logsumexp_gradient(gradient, query, key, key_bias, total, scale)


@torch.library.custom_op("bayesattn::biased_attention", mutates_args=(), device_types="cpu")
def biased_attention_operator(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention whose logits have a finite bias for each key, and its logsumexp.

    Zero where the bias of all keys is the lowest.
    """
    output, total = _flash(query, key, value, key_bias, scale)
    dead = _without_keys(key_bias)
    return output if dead is None else output.masked_fill_(dead, 0.0), total


@torch.library.custom_op("bayesattn::doubly_normalized", mutates_args=(), device_types="cpu")
def doubly_normalized_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bias: Tensor | None,
    key_bias: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Doubly-normalized attention, its logsumexp over keys, and the bias of each key that it took.

    ``query_bias`` counts in the first normalization, over queries; ``key_bias`` is for masks only:
    zero, or very low where a key takes no part.
    """
    with full_precision(query):
        mass = blockwise.blockwise_logsumexp(_accurate(key), _accurate(query), query_bias, scale)
    bias = torch.where(key_bias > LOWEST_BIAS, -mass, key_bias)
    return *_flash(query, key, value, bias, scale), bias.contiguous()


@torch.library.custom_op("bayesattn::attention_gradient", mutates_args=(), device_types="cpu")
def attention_gradient_operator(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor,
    output: Tensor,
    total: Tensor,
    query_bias: Tensor | None,
    is_doubly_normalized: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`bayesattn.blockwise.attention_gradient`."""
    dead = _without_keys(key_bias)
    gradient = gradient if dead is None else gradient.masked_fill(dead, 0.0)
    mass = None
    if is_doubly_normalized:
        mass = (total if query_bias is None else total + query_bias).exp()
    with full_precision(query):
        to_query, to_key, to_value, to_key_bias, to_query_bias = blockwise.attention_gradient(
            _accurate(gradient),
            _accurate(query),
            _accurate(key),
            _accurate(value),
            key_bias,
            _accurate(output),
            total,
            mass,
            scale,
        )
    to_query, to_key, to_value = (x.to(query.dtype) for x in (to_query, to_key, to_value))
    return to_query, to_key, to_value, to_key_bias, to_query_bias


def _without_keys(key_bias: Tensor) -> Tensor | None:
    """Which of the batch have no key that takes part, "batch 1 1"; None if all have one."""
    dead = (key_bias <= LOWEST_BIAS).all(-1)
    return dead[:, None, None] if dead.any() else None


def _accurate(part: Tensor) -> Tensor:
    """In single precision at least."""
    return part.to(torch.promote_types(part.dtype, torch.float32))


def _padded(part: Tensor, width: int) -> Tensor:
    """Rows of a width, whose numbers lie side by side."""
    if part.shape[-1] != width:
        return F.pad(part, (0, width - part.shape[-1]))
    return part if part.stride(-1) == 1 else part.contiguous()


def _flash(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    width = max(query.shape[-1], value.shape[-1])
    # PyTorch's kernel wants one width, for which columns of zeros change nothing, and rows whose
    # numbers lie side by side, which it does not check.
    parts = [_padded(part, width)[:, None] for part in (query, key, value)]
    output, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *parts, attn_mask=key_bias[:, None, None], scale=scale
    )
    return output[:, 0, :, : value.shape[-1]].contiguous(), total[:, 0].contiguous()


# --- What autograd, vmap and recording need to know ----------------------------------------------


@logsumexp_operator.register_fake
def _(query: Tensor, _key: Tensor, _bias: Tensor | None, _scale: float) -> Tensor:
    return query.new_empty(query.shape[:2])


@logsumexp_gradient_operator.register_fake
def _(
    _gradient: Tensor, query: Tensor, key: Tensor, _bias: Tensor | None, _total: Tensor, _s: float
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), key.new_empty(key.shape[:2])


@biased_attention_operator.register_fake
def _(
    query: Tensor, _key: Tensor, value: Tensor, key_bias: Tensor, _scale: float
) -> tuple[Tensor, Tensor]:
    return _empty_results(query, value, key_bias)


@doubly_normalized_operator.register_fake
def _(
    query: Tensor,
    _key: Tensor,
    value: Tensor,
    _query_bias: Tensor | None,
    key_bias: Tensor,
    _scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return *_empty_results(query, value, key_bias), key_bias.new_empty(key_bias.shape)


@attention_gradient_operator.register_fake
def _(
    _gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor,
    _output: Tensor,
    total: Tensor,
    _query_bias: Tensor | None,
    _is_doubly_normalized: bool,
    _scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    to_query, to_key, to_value = (part.new_empty(part.shape) for part in (query, key, value))
    to_key_bias, to_query_bias = key_bias.new_empty(key_bias.shape), total.new_empty(total.shape)
    return to_query, to_key, to_value, to_key_bias, to_query_bias


def _empty_results(query: Tensor, value: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor]:
    shape = query.shape[:2]
    return query.new_empty(*shape, value.shape[-1]), key_bias.new_empty(shape)


def join_batch(operator: Any) -> None:
    """Let the axis that vmap maps join the batch."""

    def rule(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        joined = [
            _joined(part, axis, info.batch_size) if isinstance(part, Tensor) else part
            for part, axis in zip(inputs, in_dims, strict=True)
        ]
        results = operator(*joined)
        single = isinstance(results, Tensor)
        apart = tuple(
            part.unflatten(0, (info.batch_size, -1) if len(part) else (info.batch_size, 0))
            for part in ([results] if single else results)
        )
        return (apart[0], 0) if single else (apart, (0,) * len(apart))

    operator.register_vmap(rule)


def _joined(part: Tensor, axis: int | None, size: int) -> Tensor:
    mapped = part.expand(size, *part.shape) if axis is None else part.movedim(axis, 0)
    return mapped.flatten(0, 1)


for _operator in (
    logsumexp_operator,
    logsumexp_gradient_operator,
    biased_attention_operator,
    doubly_normalized_operator,
    attention_gradient_operator,
):
    join_batch(_operator)
