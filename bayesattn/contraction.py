r"""The two matrix products of attention, with operands that need not share all leading axes.

.. math:: s_{ij} = \sum_d q_{id} k_{jd}, \qquad o_{id} = \sum_j a_{ij} v_{jd}

A plain matrix product expands both operands to their common leading axes first: one query per head
against the tokens of every sentence copies the tokens once per head, and under ``torch.func.vmap``
once per particle too. Here an operand keeps to the axes that it has, so that the axes that only one
operand has join the rows of one matrix product.
"""

import string

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from bayesattn.autocasting import autocast_type

__all__ = ["has_tangent", "inner_products", "inside_transform", "is_mapped", "weighted_sums"]

# Whether the compiler knows what to make of the question for transforms.
_IS_TRACEABLE = torch.__version__ >= "2.13"


def inner_products(
    query: Float[Tensor, "*#batch query dim"], key: Float[Tensor, "*#batch key dim"]
) -> Float[Tensor, "*#batch query key"]:
    """Inner product of every query with every key."""
    return _contract_batched(query, key, "qd", "kd", "qk")


def weighted_sums(
    weights: Float[Tensor, "*#batch query key"], value: Float[Tensor, "*#batch key dim"]
) -> Float[Tensor, "*#batch query dim"]:
    """Sum of the values under every query's weights."""
    return _contract_batched(weights, value, "qk", "kd", "qd")


def inside_transform() -> bool:
    """Whether a transform of ``torch.func``, such as vmap or grad, is in force.

    Compiled by a PyTorch before 2.13, the answer is no; what follows is right, but may be slower.
    """
    if torch.compiler.is_dynamo_compiling() and not _IS_TRACEABLE:
        return False
    # PyTorch has no public name for this.
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()  # pyright: ignore[reportAttributeAccessIssue]
    return depth > 0


def is_mapped(tensor: Tensor) -> bool:
    """Whether a gradient is taken for many directions at once, as by ``is_grads_batched=``."""
    # That is an older vmap, which is none of torch.func's transforms.
    return torch._C._functorch.is_legacy_batchedtensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]


def has_tangent(*parts: object) -> bool:
    """Whether forward-mode differentiation goes on by a tensor, or a parameter of a module."""
    if torch.compiler.is_compiling():
        return False
    tensors = [part for part in parts if isinstance(part, Tensor)]
    for part in parts:
        tensors += part.parameters() if isinstance(part, nn.Module) else ()
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _contract_batched(
    left: Tensor, right: Tensor, left_axes: str, right_axes: str, axes: str
) -> Tensor:
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    letters = string.ascii_uppercase[: len(batch)]
    left, left_letters = _own_axes(left, letters)
    right, right_letters = _own_axes(right, letters)
    both = "".join(letter for letter in letters if letter in left_letters + right_letters)
    result = _contract(
        left, right, left_letters + left_axes, right_letters + right_axes, both + axes
    )
    return result.reshape(*batch, *result.shape[-2:])


def _own_axes(operand: Tensor, letters: str) -> tuple[Tensor, str]:
    batch = operand.shape[:-2]
    aligned = letters[len(letters) - len(batch) :]
    kept = [(size, letter) for size, letter in zip(batch, aligned, strict=True) if size != 1]
    operand = operand.reshape(*(size for size, _ in kept), *operand.shape[-2:])
    return operand, "".join(letter for _, letter in kept)


def _contract(left: Tensor, right: Tensor, left_axes: str, right_axes: str, axes: str) -> Tensor:
    dtype = autocast_type(left)
    if dtype is not None:
        # Cast here and not inside, so that backward meets the types that forward did.
        left, right = left.to(dtype), right.to(dtype)
    if inside_transform() and not torch.compiler.is_compiling():
        return _Contraction.apply(left, right, left_axes, right_axes, axes)
    return torch.einsum(f"{left_axes},{right_axes}->{axes}", left, right)


class _Contraction(torch.autograd.Function):
    """An einsum of two operands that is one under vmap too: only mapped operands get the axis."""

    @staticmethod
    def forward(left: Tensor, right: Tensor, left_axes: str, right_axes: str, axes: str) -> Tensor:
        return torch.einsum(f"{left_axes},{right_axes}->{axes}", left, right)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        left, right, *ctx.axes = inputs
        ctx.save_for_backward(left, right)
        ctx.save_for_forward(left, right)

    @staticmethod
    def backward(ctx, gradient):
        (left, right), (left_axes, right_axes, axes) = ctx.saved_tensors, ctx.axes
        to_left = to_right = None
        if ctx.needs_input_grad[0]:
            to_left = _contract(gradient, right, axes, right_axes, left_axes)
        if ctx.needs_input_grad[1]:
            to_right = _contract(left, gradient, left_axes, axes, right_axes)
        return to_left, to_right, None, None, None

    @staticmethod
    def jvp(ctx, left_tangent, right_tangent, *_):
        left, right = ctx.saved_tensors
        terms = []
        if left_tangent is not None:
            terms.append(_contract(left_tangent, right, *ctx.axes))
        if right_tangent is not None:
            terms.append(_contract(left, right_tangent, *ctx.axes))
        return sum(terms[1:], start=terms[0])

    @staticmethod
    def vmap(info, in_dims, left, right, left_axes, right_axes, axes):
        mapped = next(x for x in string.ascii_letters if x not in left_axes + right_axes + axes)
        if in_dims[0] is not None:
            left, left_axes = left.movedim(in_dims[0], 0), mapped + left_axes
        if in_dims[1] is not None:
            right, right_axes = right.movedim(in_dims[1], 0), mapped + right_axes
        return _contract(left, right, left_axes, right_axes, mapped + axes), 0
