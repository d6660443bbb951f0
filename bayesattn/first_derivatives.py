"""Gradients that have no gradient themselves, and say so instead of being silently wrong."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["first_derivative"]


def first_derivative(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Any, ...], refusal: str
) -> tuple[Tensor, ...]:
    """Call a function, for the backward pass of another, and refuse to differentiate it.

    Args:
        function: Gives new tensors, no views of its inputs.
        inputs: What it takes; what it depends on stands among them.
        refusal: Message of the RuntimeError.
    """
    # The compiler follows no function inside another's backward, and needs no derivative of it.
    if torch.compiler.is_compiling():
        return function(*inputs)
    return _FirstDerivative.apply(function, refusal, *inputs)  # pyright: ignore[reportReturnType]


class _FirstDerivative(Function):
    """A function that is itself a gradient, and has none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Any, refusal: str, *inputs: Any) -> tuple[Tensor, ...]:
        return function(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.refusal = inputs[1]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError(ctx.refusal)
