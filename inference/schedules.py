"""Learning-rate factors by progress in [0, 1] through a run."""

import math
from collections.abc import Callable

__all__ = ["Schedule", "constant", "cosine_after_half"]

Schedule = Callable[[float], float]


def constant(progress: float) -> float:
    """One throughout."""
    return 1.0


def cosine_after_half(progress: float) -> float:
    """One for the first half, then half a cosine down to zero."""
    return 1.0 if progress < 0.5 else 0.5 * (1 + math.cos(math.pi * (2 * progress - 1)))
