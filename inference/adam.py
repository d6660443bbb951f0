r"""Adam's update as a function of tensors, and what it remembers of them, as graphs take both.

.. math:: m' = \beta_1 m + (1 - \beta_1) g, \quad v' = \beta_2 v + (1 - \beta_2) g^2, \quad
          x' = x - \frac{a\, m'}{\sqrt{v'} / b + \varepsilon}

Source:
    Kingma and Ba (2015), Adam, arXiv:1412.6980, algorithm 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["AdamMemory", "AdamRule"]

# Above this, torch's own step, which moves tensors in place, costs no time that would be seen.
_MOST_ENTRIES = 2**18


class AdamRule(NamedTuple):
    """The update.

    Attributes:
        betas: Decay of the two moments.
        eps: Added to the denominator.
    """

    betas: tuple[float, float]
    eps: float

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor]) -> "AdamRule | None":
        """The rule of an optimizer, where that is plain Adam on small tensors."""
        if type(optimizer) is not torch.optim.Adam or len(optimizer.param_groups) != 1:
            return None
        group = optimizer.param_groups[0]
        hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
        others = ("amsgrad", "maximize", "weight_decay", "differentiable", "capturable", "fused")
        is_plain = not any(map(len, hooks)) and not any(group[name] for name in others)
        is_small = sum(tensor.numel() for tensor in tensors) <= _MOST_ENTRIES
        if not is_plain or not is_small or isinstance(group["lr"], Tensor):
            return None
        return cls(tuple(group["betas"]), group["eps"])

    def coefficients(self, rate: float, count: int) -> tuple[float, float]:
        """A and b of the update that is the given one in number, counted from one."""
        first, second = self.betas
        return rate / (1 - first**count), (1 - second**count) ** 0.5

    def __call__(
        self,
        value: Float[Tensor, "*shape"],
        gradient: Float[Tensor, "*shape"],
        mean: Float[Tensor, "*shape"],
        square: Float[Tensor, "*shape"],
        coefficients: Float[Tensor, "2"],
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Return value and moments after one update."""
        first, second = self.betas
        mean = mean + (1 - first) * (gradient - mean)
        square = second * square + (1 - second) * gradient * gradient
        denominator = square.sqrt() / coefficients[1] + self.eps
        return value - coefficients[0] * (mean / denominator), mean, square


class AdamMemory:
    """What Adam remembers of some tensors, taken out of its optimizer while a rule moves them.

    Between graphs, torch's dictionaries by tensors and its counts in tensors take longer than what
    they are for.

    Args:
        optimizer: Left behind until :meth:`put_back`.
        tensors: That it moves.

    Attributes:
        counts: Updates of each tensor so far.
        moments: Both moments of each tensor, one tensor after the other.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor]):
        self._states = [optimizer.state[tensor] for tensor in tensors]
        self.counts: list[int] = []
        self.moments: list[Tensor] = []
        for tensor, state in zip(tensors, self._states, strict=True):
            if not state:
                # As Adam would at its first step.
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(tensor, requires_grad=False)
                state["exp_avg_sq"] = torch.zeros_like(tensor, requires_grad=False)
            self.counts.append(int(state["step"]))
            self.moments += [state["exp_avg"], state["exp_avg_sq"]]

    def put_back(self) -> None:
        """Give the optimizer all of it."""
        moments = iter(self.moments)
        for state, count, mean, square in zip(
            self._states, self.counts, moments, moments, strict=True
        ):
            state["step"] = torch.full_like(state["step"], count)
            state["exp_avg"], state["exp_avg_sq"] = mean, square
