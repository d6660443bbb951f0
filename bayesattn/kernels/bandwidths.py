"""Bandwidths: the name of a rule, or what the bandwidth is."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Bandwidth", "Number", "check_bandwidth", "fixed_square"]

# A whole number will do, which run-time type checks do not take for a float.
Number = float | int
Bandwidth = str | Number | Tensor


def check_bandwidth(kernel: str, bandwidth: Bandwidth, rules: tuple[str, ...]) -> None:
    """Refuse what is neither one of some rules nor a positive number or floating tensor.

    Raises:
        ValueError: So.
    """
    if isinstance(bandwidth, str):
        valid = bandwidth in rules
    elif isinstance(bandwidth, Tensor):
        valid = bandwidth.is_floating_point()
    else:
        valid = 0.0 < bandwidth < math.inf
    if not valid:
        rule = " or ".join(map(repr, rules))
        raise ValueError(
            f"{kernel} bandwidth: expected {rule} or a positive number, got {bandwidth!r}"
        )


def fixed_square(bandwidth: Number | Tensor, like: Float[Tensor, "*batch"]) -> Tensor:
    """Square of a bandwidth that is no rule, one a batch, a constant to differentiation."""
    if isinstance(bandwidth, Tensor):
        return bandwidth.detach().to(like).square().expand_as(like)
    return torch.full_like(like.detach(), bandwidth**2)
