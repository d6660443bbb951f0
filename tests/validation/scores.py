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


def iid_gate(
    reference: Float[Tensor, "reference dim"], num_draws: float, level: float = 0.95
) -> Gate:
    """What an exact sampler with so many independent draws passes with probability ``level``.

    By simulation: both the draws and a reference as long as the given one are drawn from it, so
    that the error of a finite reference is allowed for. The probability to miss is shared equally
    among the gate's three bounds.
    """
    generator = torch.Generator().manual_seed(0)
    shifts, ratios = [], []
    for _ in range(_NUM_SETS // 100):
        mean, sd = _resampled_moments(reference, round(num_draws), generator)
        reference_mean, reference_sd = _resampled_moments(reference, len(reference), generator)
        shifts.append((mean - reference_mean) / reference_sd)
        ratios.append(sd / reference_sd)
    missed, ratio = (1 - level) / 3, torch.cat(ratios)
    return Gate(
        shift=torch.cat(shifts).abs().amax(dim=1).quantile(1 - missed).item(),
        lowest_ratio=ratio.amin(dim=1).quantile(missed).item(),
        highest_ratio=ratio.amax(dim=1).quantile(1 - missed).item(),
    )


def effective_sample_size(draws: Float[Tensor, "chain draw dim"]) -> Float[Tensor, " dim"]:
    """Bulk effective sample size of each coordinate."""
    columns = [arviz.ess(column.numpy(), method="bulk") for column in draws.unbind(-1)]
    return torch.as_tensor(np.array(columns, dtype=float))


_NUM_SETS = 4000


def _resampled_moments(
    reference: Tensor, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of 100 sets of so many rows, "set dim" each."""
    rows = reference[torch.randint(len(reference), (100, size), generator=generator)]
    return rows.mean(dim=1), rows.std(dim=1)
