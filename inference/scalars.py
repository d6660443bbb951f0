"""Numbers that change at each step, as a tensor that a graph takes."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Scalars"]


class Scalars:
    """Writes numbers into a tensor, on the CPU always the same one, through a view of its memory.

    Between graphs this takes a tenth of the time that making a tensor does. What was computed from
    the tensor must be so before the next call; on other devices, where that is not known, each call
    makes a new one.
    """

    def __init__(self) -> None:
        self._tensor = torch.empty(0, dtype=torch.float64)
        self._memory: Any = self._tensor.numpy().data

    def __call__(self, numbers: Sequence[float], like: Tensor) -> Float[Tensor, " number"]:
        """The numbers on a tensor's device.

        On the CPU they are double: a single number yields to the type of what it is combined with.
        """
        if like.device.type != "cpu":
            found = torch.tensor(numbers, dtype=like.dtype)
            return found.to(like.device, non_blocking=True)
        if len(numbers) != len(self._memory):
            self._tensor = torch.empty(len(numbers), dtype=torch.float64)
            self._memory = self._tensor.numpy().data
        for place, number in enumerate(numbers):
            self._memory[place] = number
        return self._tensor
