"""Telling whether a Python value is still the one that a recording has baked in."""

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["BY_VALUE", "Same", "fingerprint"]

BY_VALUE = frozenset(
    {bool, int, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
)

# Larger containers and arrays are told apart by identity: reading them at each call would cost more
# than the call.
_LARGEST_CONTAINER = 64
_LARGEST_ARRAY = 2**16


class Same:
    """Equal only to itself on the same object, which it keeps alive.

    Args:
        value: The object.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value


def fingerprint(value: Any) -> Hashable:
    """Return what stands for a value in a key.

    Numbers, texts, and small containers and arrays stand for themselves; of all else, tensors among
    them, it is said which object they are.
    """
    kind = type(value)
    if kind in BY_VALUE:
        return (kind, value)
    if isinstance(value, float | np.generic):
        # Tells zeros of either sign apart, and finds NaN equal to itself.
        return (kind, repr(value))
    if isinstance(value, Tensor):
        return (Same(value), value.dtype, value.shape)
    if isinstance(value, np.ndarray) and value.nbytes <= _LARGEST_ARRAY and value.dtype != object:
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, dict) and len(value) <= _LARGEST_CONTAINER:
        return (kind, *((fingerprint(k), fingerprint(v)) for k, v in value.items()))
    if isinstance(value, list | tuple) and len(value) <= _LARGEST_CONTAINER:
        return (kind, *map(fingerprint, value))
    if isinstance(value, set | frozenset) and len(value) <= _LARGEST_CONTAINER:
        return (kind, frozenset(map(fingerprint, value)))
    return Same(value)
