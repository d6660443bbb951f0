"""Torch's optimizers as routines use them: on a schedule, and able to forget one tensor.

Any optimizer works that steps on gradients alone. What a routine takes is a function that makes
one, such as ``functools.partial(torch.optim.SGD, lr=0.1)``, because its tensors come later.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesattn.inference.adam import AdamMemory, AdamRule
from bayesattn.inference.schedules import Schedule

__all__ = ["Optimizer", "ScheduledOptimizer", "check_optimizer"]

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


class ScheduledOptimizer:
    """An optimizer whose learning rates are its own times a factor by progress.

    Args:
        make: Makes the optimizer of a list of tensors.
        schedule: Factor by progress in [0, 1].
        tensors: What it moves, in place, along their ``grad``.
    """

    def __init__(self, make: Optimizer, schedule: Schedule, tensors: Iterable[Tensor]):
        self._make, self._schedule = make, schedule
        self._tensors = list(tensors)
        self._optimizer = make(self._tensors)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._memory: AdamMemory | None = None

    def step(self, progress: float) -> None:
        """Move the tensors once."""
        self._put_back()
        factor = self._schedule(progress)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()

    @functools.cached_property
    def rule(self) -> AdamRule | None:
        """The optimizer as a function of tensors, where it is plain Adam on small tensors."""
        return AdamRule.of(self._optimizer, self._tensors)

    def moments(self) -> list[Tensor]:
        """Both moments of each tensor, one tensor after the other, as :attr:`rule` takes them."""
        return self._taken().moments

    def coefficients(self, rule: AdamRule, progress: float) -> list[float]:
        """Those of the next update of each tensor, two a tensor; the update is counted."""
        counts, rate = self._taken().counts, self._rates[0] * self._schedule(progress)
        counts[:] = [count + 1 for count in counts]
        return [number for count in counts for number in rule.coefficients(rate, count)]

    def accept(self, values: Sequence[Tensor]) -> None:
        """Take over each tensor's value and moments, which become this one's own.

        Args:
            values: After an update by :attr:`rule`: value, mean and square of each tensor in turn.
        """
        moments: list[Tensor] = []
        for index, tensor in enumerate(self._tensors):
            value, mean, square = values[3 * index : 3 * index + 3]
            # Not copied: what shares the old memory keeps the old value.
            tensor.data = value
            moments += (mean, square)
        self._taken().moments = moments

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer, without the tensors."""
        self._put_back()
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where a state was taken."""
        self._memory = None
        self._optimizer.load_state_dict(state)

    def extend(self, tensors: Iterable[Tensor]) -> None:
        """Move further tensors too, with the rate that a new optimizer has."""
        fresh = list(tensors)
        if not fresh:
            return
        self._put_back()
        self.__dict__.pop("rule", None)
        self._tensors += fresh
        self._optimizer.add_param_group({"params": fresh})
        groups = self._optimizer.param_groups[len(self._rates) :]
        self._rates += [self._optimizer.defaults["lr"] for _ in groups]

    def forget(self, tensor: Tensor) -> None:
        """Start anew with one tensor, and keep what is known of the others."""
        self._put_back()
        # Made again, since some optimizers make state of their own for each tensor at the start.
        fresh = self._make(self._tensors)
        for other in self._tensors:
            if other is not tensor and other in self._optimizer.state:
                fresh.state[other] = self._optimizer.state[other]
        self._optimizer = fresh
        self._rates = [group["lr"] for group in fresh.param_groups]

    def _taken(self) -> AdamMemory:
        if self._memory is None:
            self._memory = AdamMemory(self._optimizer, self._tensors)
        return self._memory

    def _put_back(self) -> None:
        if self._memory is not None:
            self._memory.put_back()
            self._memory = None


def check_optimizer(make: Any) -> None:
    """Refuse what makes no optimizer, or one that cannot step on given gradients.

    Raises:
        ValueError: Says what came instead.
    """
    wanted = (
        "optimizer must be a function from a list of tensors to a torch optimizer, such as "
        "functools.partial(torch.optim.SGD, lr=0.1)"
    )
    if isinstance(make, torch.optim.Optimizer) or not callable(make):
        raise ValueError(f"{wanted}, got {make!r}")
    try:
        optimizer = make([torch.zeros(1, 1, 1, requires_grad=True)])
    except Exception as error:
        raise ValueError(f"{wanted}; called with one, {make!r} failed: {error}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"{wanted}; called with one, {make!r} returned {optimizer!r}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the objective by itself, through a closure; "
            "give an optimizer that steps on gradients, such as torch.optim.Adam"
        )
