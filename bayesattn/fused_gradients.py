"""Fused attention on the CPU with its gradients: what autograd and vmap see of the operators.

Tensors are "batch sequence dim". There are no second derivatives, and no forward mode.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from bayesattn.first_derivatives import first_derivative
from bayesattn.fused_operators import (
    attention_gradient_operator,
    biased_attention_operator,
    doubly_normalized_operator,
    logsumexp_gradient_operator,
    logsumexp_operator,
)

__all__ = ["biased_attention", "doubly_normalized", "logsumexp"]

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


class _LogSumExp(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, key: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
        return logsumexp_operator(query, key, key_bias, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        # Read once: activation checkpointing hands each tensor out a single time.
        saved = ctx.saved_tensors
        inputs = (gradient, *saved, ctx.scale)
        slopes = first_derivative(logsumexp_gradient_operator, inputs, _NO_SECOND)
        has_bias = saved[2] is not None
        return *slopes[:2], slopes[2] if has_bias else None, None


class _BiasedAttention(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        return biased_attention_operator(query, key, value, key_bias, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple:
        inputs = (gradient, *ctx.saved_tensors, None, False, ctx.scale)
        slopes = first_derivative(attention_gradient_operator, inputs, _NO_SECOND)
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
        return doubly_normalized_operator(query, key, value, query_bias, key_bias, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        query, key, value, query_bias, _, ctx.scale = inputs
        result, total, key_bias = output
        ctx.save_for_backward(query, key, value, key_bias, result, total, query_bias)
        ctx.mark_non_differentiable(total, key_bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple:
        saved = ctx.saved_tensors
        inputs = (gradient, *saved, True, ctx.scale)
        slopes = first_derivative(attention_gradient_operator, inputs, _NO_SECOND)
        has_bias = saved[6] is not None
        return *slopes[:3], slopes[4] if has_bias else None, None, None
