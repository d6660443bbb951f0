"""Torch's optimizers as routines use them: on a schedule, and able to forget one tensor.

Any optimizer works that steps on gradients alone. What a routine takes is a function that makes
one, such as ``functools.partial(torch.optim.SGD, lr=0.1)``, because its tensors come later.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

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

    def step(self, progress: float) -> None:
        """Move the tensors once."""
        factor = self._schedule(progress)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()

    def extend(self, tensors: Iterable[Tensor]) -> None:
        """Move further tensors too, with the rate that a new optimizer has."""
        fresh = list(tensors)
        if not fresh:
            return
        self._tensors += fresh
        self._optimizer.add_param_group({"params": fresh})
        groups = self._optimizer.param_groups[len(self._rates) :]
        self._rates += [self._optimizer.defaults["lr"] for _ in groups]

    def forget(self, tensor: Tensor) -> None:
        """Start anew with one tensor, and keep what is known of the others."""
        # Made again, since some optimizers make state of their own for each tensor at the start.
        fresh = self._make(self._tensors)
        for other in self._tensors:
            if other is not tensor and other in self._optimizer.state:
                fresh.state[other] = self._optimizer.state[other]
        self._optimizer = fresh
        self._rates = [group["lr"] for group in fresh.param_groups]


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
