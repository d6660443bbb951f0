r"""Means over seeds with their standard errors, and differences of rivals, seed by seed.

.. math:: \mathrm{SE}(\bar x) = \frac{1}{\sqrt n}
    \sqrt{\frac{1}{n - 1} \sum_s (x_s - \bar x)^2}, \qquad
    \Delta = \frac{1}{n} \sum_s (x_s - b_s)

Rivals share seeds, splits, initial weights and the order of batches, so what these do to both
cancels in each difference.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

__all__ = ["Estimate", "mean_and_error", "mean_over_tasks", "paired_difference"]

BySeed = Mapping[int, float]


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: The mean.
        error: Its standard error, NaN from a single seed.
        count: The number of seeds.
    """

    mean: float
    error: float
    count: int

    def interval(self, level: float = 0.95) -> float:
        """Give half the width of Student's interval of this level, NaN from a single seed."""
        if self.count < 2:
            return math.nan
        return float(stats.t.ppf(0.5 + level / 2, self.count - 1)) * self.error

    def excludes_zero(self, level: float = 0.95) -> bool:
        """Tell whether zero lies outside of Student's interval; never from a single seed."""
        return abs(self.mean) > self.interval(level)


def mean_and_error(values: BySeed) -> Estimate:
    """Average over seeds.

    Raises:
        ValueError: If there is no value.
    """
    if not values:
        raise ValueError("values: expected one for each seed, got none")
    numbers = np.array(list(values.values()), dtype=float)
    several = len(numbers) > 1
    error = numbers.std(ddof=1) / math.sqrt(len(numbers)) if several else math.nan
    return Estimate(float(numbers.mean()), float(error), len(numbers))


def paired_difference(values: BySeed, baseline: BySeed) -> Estimate:
    """Average the differences from a baseline over the seeds that both have.

    Raises:
        ValueError: If they have no seed in common.
    """
    shared = sorted(values.keys() & baseline.keys())
    if not shared:
        raise ValueError(
            f"values and baseline: expected a seed in common, got {sorted(values)} "
            f"and {sorted(baseline)}"
        )
    return mean_and_error({seed: values[seed] - baseline[seed] for seed in shared})


def mean_over_tasks(tasks: Mapping[str, BySeed]) -> dict[int, float]:
    """Average over tasks, seed by seed, where every task has that seed; empty without tasks."""
    if not tasks:
        return {}
    shared = set.intersection(*(set(values) for values in tasks.values()))
    return {seed: float(np.mean([values[seed] for values in tasks.values()])) for seed in shared}
