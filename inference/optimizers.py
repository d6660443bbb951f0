"""Torch's optimizers as routines use them: on a schedule, and able to forget one tensor.

Any optimizer works that steps on gradients alone. What a routine takes is a function that makes
one, such as ``functools.partial(torch.optim.SGD, lr=0.1)``, because its tensors come later.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.inference.schedules import Schedule

__all__ = ["AdamRule", "Optimizer", "ScheduledOptimizer", "check_optimizer"]

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


# Above this, torch's own step, which moves tensors in place, costs no time that would be seen.
_MOST_ENTRIES = 2**18


class AdamRule(NamedTuple):
    r"""Adam's update as a function of tensors, so that a graph can hold it.

    .. math:: m' = \beta_1 m + (1 - \beta_1) g, \quad v' = \beta_2 v + (1 - \beta_2) g^2, \quad
              x' = x - \frac{a\, m'}{\sqrt{v'} / b + \varepsilon}

    Attributes:
        betas: Decay of the two moments.
        eps: Added to the denominator.

    Source:
        Kingma and Ba (2015), Adam, arXiv:1412.6980, algorithm 1.
    """

    betas: tuple[float, float]
    eps: float

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

    @functools.cached_property
    def rule(self) -> AdamRule | None:
        """The optimizer as a function of tensors, where it is plain Adam on small tensors."""
        optimizer = self._optimizer
        if type(optimizer) is not torch.optim.Adam or len(optimizer.param_groups) != 1:
            return None
        group = optimizer.param_groups[0]
        hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
        others = ("amsgrad", "maximize", "weight_decay", "differentiable", "capturable")
        is_plain = not any(map(len, hooks)) and not any(group[name] for name in others)
        is_small = sum(tensor.numel() for tensor in self._tensors) <= _MOST_ENTRIES
        if not is_plain or not is_small or isinstance(group["lr"], Tensor):
            return None
        return AdamRule(tuple(group["betas"]), group["eps"])

    def moments(self) -> list[Tensor]:
        """Both moments of each tensor, one tensor after the other, as :attr:`rule` takes them."""
        found = []
        for tensor in self._tensors:
            state = self._optimizer.state[tensor]
            if not state:
                # As Adam would at its first step.
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(tensor, requires_grad=False)
                state["exp_avg_sq"] = torch.zeros_like(tensor, requires_grad=False)
            found += [state["exp_avg"], state["exp_avg_sq"]]
        return found

    def coefficients(self, rule: AdamRule, progress: float) -> list[float]:
        """Those of the next update of each tensor, two a tensor; the update is counted."""
        factor, found = self._schedule(progress), []
        for tensor in self._tensors:
            count = self._optimizer.state[tensor]["step"]
            count += 1
            found += rule.coefficients(self._rates[0] * factor, int(count))
        return found

    def accept(self, values: Sequence[Tensor]) -> None:
        """Take over each tensor's value and moments after an update by :attr:`rule`."""
        kept, moments = [], self.moments()
        for index, tensor in enumerate(self._tensors):
            kept += [tensor.detach(), *moments[2 * index : 2 * index + 2]]
        torch._foreach_copy_(kept, list(values))  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer, without the tensors."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where a state was taken."""
        self._optimizer.load_state_dict(state)

    def extend(self, tensors: Iterable[Tensor]) -> None:
        """Move further tensors too, with the rate that a new optimizer has."""
        fresh = list(tensors)
        if not fresh:
            return
        self.__dict__.pop("rule", None)
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
