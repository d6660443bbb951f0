"""Factors on a learning rate, or temperatures, by progress in [0, 1] through a run."""

import math
from collections.abc import Callable

__all__ = ["Number", "Schedule", "constant", "cosine_after_half"]

# A whole number is a number too, which run-time type checks do not take for a float.
Number = float | int

Schedule = Callable[[float], float]


def constant(progress: float) -> float:  # noqa: ARG001 (a schedule takes it)
    """One throughout."""
    return 1.0


def cosine_after_half(progress: float) -> float:
    """One for the first half, then half a cosine down to zero."""
    return 1.0 if progress < 0.5 else 0.5 * (1 + math.cos(math.pi * (2 * progress - 1)))
