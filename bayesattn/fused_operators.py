"""Fused attention on the CPU as operators of PyTorch's: differentiable, one node in a graph each.

Tensors are "batch sequence dim". A recorded or compiled graph does not see the blocks inside, and
under ``torch.func.vmap`` the mapped axis joins the batch, so that the graph's size does not depend
on how many particles there are. They have no second derivatives, and say so.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from bayesattn import blockwise

__all__ = ["biased_attention", "doubly_normalized", "logsumexp"]

_LOWEST = -1e30
_NO_SECOND = "fused attention has no second derivatives; attention(..., route='dense') has them"


def logsumexp(
    query: Float[Tensor, "batch query dim"],
    key: Float[Tensor, "batch key dim"],
    key_bias: Float[Tensor, "batch key"] | None,
    scale: float,
) -> Float[Tensor, "batch query"]:
    """Logsumexp of each query's logits; see :func:`bayesattn.blockwise.blockwise_logsumexp`."""
    return _LogSumExp.apply(query, key, key_bias, scale)  # pyright: ignore[reportReturnType]


def biased_attention(
    query: Float[Tensor, "batch query dim"],
    key: Float[Tensor, "batch key dim"],
    value: Float[Tensor, "batch key value_dim"],
    key_bias: Float[Tensor, "batch key"],
    scale: float,
) -> Float[Tensor, "batch query value_dim"]:
    """Attention whose logits have a finite bias for each key."""
    output, _ = _BiasedAttention.apply(query, key, value, key_bias, scale)
    return output


def doubly_normalized(
    query: Float[Tensor, "batch query dim"],
    key: Float[Tensor, "batch key dim"],
    value: Float[Tensor, "batch key value_dim"],
    query_bias: Float[Tensor, "batch query"] | None,
    key_mask: Float[Tensor, "batch key"],
    scale: float,
) -> Float[Tensor, "batch query value_dim"]:
    """Attention normalized over queries, where the query bias counts, and then over keys.

    The mask is zero, or very low where a key takes no part.
    """
    inputs = (query, key, value, query_bias, key_mask, scale)
    output, _, _ = _DoublyNormalizedAttention.apply(*inputs)
    return output


@torch.library.custom_op("bayesattn::logsumexp", mutates_args=(), device_types="cpu")
def _logsumexp(query: Tensor, key: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
    """Logsumexp of each query's logits; see :func:`bayesattn.blockwise.blockwise_logsumexp`."""
    return blockwise.blockwise_logsumexp(query, key, key_bias, scale)


@torch.library.custom_op("bayesattn::logsumexp_gradient", mutates_args=(), device_types="cpu")
def _logsumexp_gradient(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    total: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return blockwise.logsumexp_gradient(gradient, query, key, key_bias, total, scale)


@torch.library.custom_op("bayesattn::biased_attention", mutates_args=(), device_types="cpu")
def _biased_attention(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention whose logits have a finite bias for each key, and its logsumexp."""
    return _flash(query, key, value, key_bias, scale)


@torch.library.custom_op("bayesattn::doubly_normalized", mutates_args=(), device_types="cpu")
def _doubly_normalized(
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
    mass = blockwise.blockwise_logsumexp(_accurate(key), _accurate(query), query_bias, scale)
    bias = torch.where(key_bias > _LOWEST, -mass, key_bias)
    return *_flash(query, key, value, bias, scale), bias


@torch.library.custom_op("bayesattn::attention_gradient", mutates_args=(), device_types="cpu")
def _attention_gradient(
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
    mass = None
    if is_doubly_normalized:
        mass = (total if query_bias is None else total + query_bias).exp()
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


def _accurate(part: Tensor) -> Tensor:
    """In single precision at least."""
    return part.to(torch.promote_types(part.dtype, torch.float32))


def _padded(part: Tensor, width: int) -> Tensor:
    return part if part.shape[-1] == width else F.pad(part, (0, width - part.shape[-1]))


def _flash(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    width = max(query.shape[-1], value.shape[-1])
    # PyTorch's kernel wants one width; columns of zeros change nothing.
    parts = [_padded(part, width)[:, None] for part in (query, key, value)]
    output, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *parts, attn_mask=key_bias[:, None, None], scale=scale
    )
    return output[:, 0, :, : value.shape[-1]].contiguous(), total[:, 0].contiguous()


# --- What autograd, vmap and recording need to know ----------------------------------------------


@_logsumexp.register_fake
def _(query: Tensor, _key: Tensor, _bias: Tensor | None, _scale: float) -> Tensor:
    return query.new_empty(query.shape[:2])


@_logsumexp_gradient.register_fake
def _(
    _gradient: Tensor, query: Tensor, key: Tensor, _bias: Tensor | None, _total: Tensor, _s: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), key.new_empty(key.shape[:2])


@_biased_attention.register_fake
def _(
    query: Tensor, _key: Tensor, value: Tensor, key_bias: Tensor, _scale: float
) -> tuple[Tensor, Tensor]:
    return _empty_results(query, value, key_bias)


@_doubly_normalized.register_fake
def _(
    query: Tensor,
    _key: Tensor,
    value: Tensor,
    _query_bias: Tensor | None,
    key_bias: Tensor,
    _scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return *_empty_results(query, value, key_bias), torch.empty_like(key_bias)


@_attention_gradient.register_fake
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
    to_query, to_key, to_value = (torch.empty_like(part) for part in (query, key, value))
    return to_query, to_key, to_value, torch.empty_like(key_bias), torch.empty_like(total)


def _empty_results(query: Tensor, value: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor]:
    shape = query.shape[:2]
    return query.new_empty(*shape, value.shape[-1]), key_bias.new_empty(shape)


def _join_batch(operator: Any) -> None:
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
    _logsumexp,
    _logsumexp_gradient,
    _biased_attention,
    _doubly_normalized,
    _attention_gradient,
):
    _join_batch(_operator)


class _LogSumExp(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, key: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
        return _logsumexp(query, key, key_bias, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        inputs = (gradient, *ctx.saved_tensors, ctx.scale)
        slopes = _first_derivative(_LogSumExpGradient, _logsumexp_gradient, inputs)
        has_bias = ctx.saved_tensors[2] is not None
        return *slopes[:2], slopes[2] if has_bias else None, None


class _BiasedAttention(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        return _biased_attention(query, key, value, key_bias, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple:
        inputs = (gradient, *ctx.saved_tensors, None, False, ctx.scale)
        slopes = _first_derivative(_AttentionGradient, _attention_gradient, inputs)
        return *slopes[:4], None


class _DoublyNormalizedAttention(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_bias: Tensor | None,
        key_bias: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _doubly_normalized(query, key, value, query_bias, key_bias, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        query, key, value, query_bias, _, ctx.scale = inputs
        result, total, key_bias = output
        ctx.save_for_backward(query, key, value, key_bias, result, total, query_bias)
        ctx.mark_non_differentiable(total, key_bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple:
        inputs = (gradient, *ctx.saved_tensors, True, ctx.scale)
        slopes = _first_derivative(_AttentionGradient, _attention_gradient, inputs)
        has_bias = ctx.saved_tensors[6] is not None
        return *slopes[:3], slopes[4] if has_bias else None, None, None


def _first_derivative(function: type[Function], operator: Any, inputs: tuple) -> tuple:
    # The compiler follows no function inside another's backward, and needs no derivative of it.
    if torch.compiler.is_compiling():
        return operator(*inputs)
    return function.apply(*inputs)  # pyright: ignore[reportReturnType]


class _LogSumExpGradient(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _logsumexp_gradient(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError(_NO_SECOND)


class _AttentionGradient(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _attention_gradient(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError(_NO_SECOND)
