r"""Training of a regression under a budget, with every choice left to the validation part.

Each learning rate is tried from the same start on the same points, for the same number of steps,
with a linear warm-up and a linear decay; the learning rate and the step with the best log score on
the validation points win. Predictions of validation and test points look at the training points.
The test part is never seen here.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Normal

from examples.reproduce.kernel_rivals import LogitsRun, drawn
from examples.reproduce.protocol import Build
from examples.reproduce.regression_tasks import Points, RegressionSplits

__all__ = [
    "Forecast",
    "Method",
    "RandomTargets",
    "RegressionBudget",
    "TrainedRegression",
    "forecast",
    "train_regression",
]

_WARMUP = 0.1


@dataclass(frozen=True)
class RegressionBudget:
    """What every rival is given.

    Attributes:
        num_steps: Of networks, for each learning rate.
        learning_rates: Peaks of their schedules that are tried. The default was best, of that and
            1e-2, on the validation points of one split of each of three tasks.
        process_steps: Of Gaussian processes, each of which sees all training points.
        process_rates: Theirs.
        batch_size: Targets of a network's step.
        num_known: Other points that they look at.
        num_looks: How often the validation part is looked at, for each learning rate.
        num_draws: Of the frequencies, where a model draws some, for each forecast.
    """

    num_steps: int
    learning_rates: tuple[float, ...] = (3e-3,)
    process_steps: int = 80
    process_rates: tuple[float, ...] = (0.1,)
    batch_size: int = 32
    num_known: int = 128
    num_looks: int = 12
    num_draws: int = 4


class Method(Protocol):
    """How a model is trained."""

    def schedule(self, budget: RegressionBudget) -> tuple[int, tuple[float, ...]]:
        """Give the number of steps and the learning rates."""
        ...

    def loss(
        self, model: nn.Module, training: Points, budget: RegressionBudget, order: torch.Generator
    ) -> Float[Tensor, ""]:
        """Give the negative log likelihood of a point, the mean over those of a step."""
        ...


class RandomTargets:
    """Some training points are predicted from others, different ones at each step."""

    def schedule(self, budget: RegressionBudget) -> tuple[int, tuple[float, ...]]:
        """Give those of networks."""
        return budget.num_steps, budget.learning_rates

    def loss(
        self, model: nn.Module, training: Points, budget: RegressionBudget, order: torch.Generator
    ) -> Float[Tensor, ""]:
        """Predict as many as a batch holds."""
        rows = torch.randperm(len(training.y), generator=order)
        # At least as many are left to look at.
        num_targets = min(budget.batch_size, len(rows) // 2)
        targets = training.choose(rows[:num_targets])
        known = training.choose(rows[num_targets:][: budget.num_known])
        return -Normal(*model(targets, known)).log_prob(targets.y).mean()


class Forecast(NamedTuple):
    """Normal predictions of some points; the mixture of several where a model draws.

    Attributes:
        mean: Of each.
        deviation: Of each, noise included.
    """

    mean: Float[Tensor, "draw point"]
    deviation: Float[Tensor, "draw point"]

    def log_score(self, y: Float[Tensor, " point"]) -> float:
        """Mean log density of targets, in nats."""
        densities = Normal(*self).log_prob(y).logsumexp(0) - math.log(len(self.mean))
        return float(densities.mean())

    def error(self, y: Float[Tensor, " point"]) -> float:
        """Root of the mean square that means are off by."""
        return float((self.mean.mean(0) - y).square().mean().sqrt())


class TrainedRegression(NamedTuple):
    """The chosen model.

    Attributes:
        model: In evaluation mode, as it was after the chosen step.
        choices: The learning rate, the step (from one) and their log score on validation.
        curves: For each learning rate, the log score at each look.
    """

    model: nn.Module
    choices: dict[str, float]
    curves: dict[str, list[float]]


def train_regression(
    build: Build, splits: RegressionSplits, budget: RegressionBudget, seed: int, method: Method
) -> TrainedRegression:
    """Train from the start with each learning rate, and choose by the validation points.

    Args:
        build: Gives the untrained model; ``model(targets, known)`` gives means and deviations.
        splits: What is learned from, and what decides.
        budget: How much is done.
        seed: Of the order of the points and of draws, so the same for all rivals.
        method: How it is trained.

    Raises:
        ValueError: If no learning rate leads to a finite log score.
    """
    curves: dict[str, list[float]] = {}
    best: tuple[float, float, int] | None = None
    state: dict[str, Tensor] = {}
    model = build()
    with torch.random.fork_rng(devices=[]):
        for rate in method.schedule(budget)[1]:
            model = build()
            curve = curves[str(rate)] = []
            for step in _looks(model, splits.train, budget, rate, seed, method):
                found = forecast(model, splits.validation, splits.train, budget.num_draws)
                curve.append(found.log_score(splits.validation.y))
                if curve[-1] > (-math.inf if best is None else best[0]):
                    best, state = (curve[-1], rate, step), copy.deepcopy(model.state_dict())
    if best is None:
        raise ValueError(f"budget: expected one look at least with a finite score, got {budget}")
    score, learning_rate, step = best
    model.load_state_dict(state)
    choices = {"learning_rate": learning_rate, "step": step, "validation_log_score": score}
    return TrainedRegression(model.eval(), choices, curves)


@torch.no_grad()
def forecast(model: nn.Module, targets: Points, known: Points, num_draws: int) -> Forecast:
    """Predict targets from known points, in evaluation mode."""
    model.eval()
    draws = drawn(model, lambda: torch.stack(model(targets, known)), num_draws)
    return Forecast(*draws.unbind(1))


def _looks(
    model: nn.Module,
    training: Points,
    budget: RegressionBudget,
    learning_rate: float,
    seed: int,
    method: Method,
) -> Iterator[int]:
    """Train, and give the number of the step at each look."""
    num_steps, _ = method.schedule(budget)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    run = LogitsRun(len(training.y))
    before_step = run.attach(model, optimizer, num_steps)
    rising = max(1, round(_WARMUP * num_steps))
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    looks = {round(num_steps * look / budget.num_looks) for look in range(1, budget.num_looks + 1)}
    for step in range(1, num_steps + 1):
        model.train()
        falling = (num_steps + 1 - step) / (num_steps + 1 - rising)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(step / rising, falling)
        optimizer.zero_grad()
        run.loss(lambda: method.loss(model, training, budget, order)).backward()
        before_step()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in looks:
            yield step
