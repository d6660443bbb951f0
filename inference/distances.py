"""Distances between the joint draws of two posteriors, beside what exact draws would have."""

import math
from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from bayesattn.divergences import MMD, Energy, SlicedWasserstein
from bayesattn.inference.iid_null import figure_null, random_splits
from bayesattn.kernels import IMQ

__all__ = ["DISTANCES", "Distances"]

DISTANCES = ("sliced_w1", "energy", "mmd2")


class Distance(NamedTuple):
    """A distance between clouds.

    Attributes:
        function: From two clouds, or batches of them, to numbers.
        power: How it goes with one over the number of draws, where both laws are the same.
        least_draws: Fewer have none.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    power: float | int
    least_draws: int


class Distances:
    """Distances to one reference; nulls are simulated once for each number of draws.

    Args:
        reference: Nearly independent draws, standardized.
        num_null: Splits to simulate a null by.
        seed: For splits and projections.
    """

    def __init__(self, reference: Float[Tensor, "reference dim"], num_null: int, seed: int):
        self.reference, self._num_null, self._seed = reference, num_null, seed
        kernel = IMQ().frozen(reference)
        self._distances = {
            "sliced_w1": Distance(SlicedWasserstein(num_projections=100, seed=seed), 0.5, 1),
            "energy": Distance(Energy(unbiased=True), 1.0, 2),
            "mmd2": Distance(MMD(kernel=kernel, unbiased=True), 1.0, 2),
        }
        self._nulls: dict[int, dict[str, Tensor]] = {}

    def figures(self, draws: Float[Tensor, "draw dim"]) -> dict[str, float]:
        """Each distance, with the mean and the 95 % point of its null; NaN for too few draws."""
        nulls = self._null(len(draws))
        figures = {}
        for name, distance in self._distances.items():
            known = name in nulls
            value = distance.function(draws, self.reference) if known else math.nan
            figures[name] = float(value)
            figures[f"{name}_null"] = float(nulls[name].mean()) if known else math.nan
            figures[f"{name}_95"] = float(nulls[name].quantile(0.95)) if known else math.nan
        return figures

    def _null(self, num_draws: int) -> dict[str, Tensor]:
        if num_draws not in self._nulls:
            splits = random_splits(
                len(self.reference), num_draws=num_draws, num_null=self._num_null, seed=self._seed
            )
            self._nulls[num_draws] = {
                name: figure_null(self.reference, splits, distance.function, distance.power)
                for name, distance in self._distances.items()
                if num_draws >= distance.least_draws
            }
        return self._nulls[num_draws]
