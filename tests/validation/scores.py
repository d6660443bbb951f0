"""How far draws are from a reference posterior, and how far exact draws would be.

Everything is on the unconstrained scale and in units of the reference's standard deviations, which
come from 1000 reference draws (standard error .03).
"""

from typing import NamedTuple

import arviz
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


class Scores(NamedTuple):
    """Of each coordinate.

    Attributes:
        shift: Error of the center, in reference standard deviations, with its sign.
        ratio: Width over the reference's width.
    """

    shift: Float[Tensor, " dim"]
    ratio: Float[Tensor, " dim"]

    @property
    def worst_shift(self) -> float:
        """The largest error of a center."""
        return self.shift.abs().max().item()

    def __str__(self) -> str:
        low, high = self.ratio.min().item(), self.ratio.max().item()
        return f"shift {self.worst_shift:.3f}, sd ratio {low:.2f}-{high:.2f}"


class Gate(NamedTuple):
    """What passes: the largest shift, and the ends of the ratio."""

    shift: float
    lowest_ratio: float
    highest_ratio: float

    def passes(self, scores: Scores) -> bool:
        """Whether all coordinates are within."""
        return bool(
            (scores.shift.abs() <= self.shift).all()
            and (scores.ratio >= self.lowest_ratio).all()
            and (scores.ratio <= self.highest_ratio).all()
        )


def by_moments(
    draws: Float[Tensor, "draw dim"], reference: Float[Tensor, "reference dim"]
) -> Scores:
    """Compare means and standard deviations."""
    sd = reference.std(dim=0)
    return Scores((draws.mean(dim=0) - reference.mean(dim=0)) / sd, draws.std(dim=0) / sd)


def by_quantiles(
    draws: Float[Tensor, "draw dim"], reference: Float[Tensor, "reference dim"]
) -> Scores:
    """Compare medians and the widths of the central 68 %, which a heavy tail does not move."""
    levels = torch.tensor([0.16, 0.5, 0.84])
    low, middle, high = draws.quantile(levels, dim=0)
    reference_low, reference_middle, reference_high = reference.quantile(levels, dim=0)
    width = (reference_high - reference_low) / 2
    return Scores((middle - reference_middle) / width, (high - low) / 2 / width)


def iid_gate(num_draws: float) -> Gate:
    """What 95 % of exact samplers with so many independent draws pass, over all coordinates.

    The 95 % points of 14 posteriors, interpolated in the logarithm of the number of draws.
    """
    at = np.log(num_draws)
    columns = [np.interp(at, np.log(_IID_DRAWS), np.log(column)) for column in _IID_ROWS.T]
    return Gate(*(float(np.exp(column)) for column in columns))


def effective_sample_size(draws: Float[Tensor, "chain draw dim"]) -> Float[Tensor, " dim"]:
    """Bulk effective sample size of each coordinate."""
    columns = [arviz.ess(column.numpy(), method="bulk") for column in draws.unbind(-1)]
    return torch.as_tensor(np.array(columns, dtype=float))


_IID_DRAWS = np.array([10.0, 50.0, 100.0, 200.0, 1000.0])
_IID_ROWS = np.array(
    [
        [0.85, 0.47, 1.59],
        [0.35, 0.75, 1.26],
        [0.25, 0.82, 1.18],
        [0.18, 0.88, 1.13],
        [0.075, 0.94, 1.05],
    ]
)
