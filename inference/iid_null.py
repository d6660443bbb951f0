r"""How far off exact draws would be: a figure between draws of a reference and its other draws.

K independent draws of a reference with N draws are off by chance alone. Under that null, squared
distances between two samples (unbiased MMD² and energy distance) are nearly

.. math:: \left( \tfrac 1 K + \tfrac 1 N \right) \sum_l \lambda_l (z_l^2 - 1),
    \qquad z_l \sim \mathcal N(0, 1),

with weights of the reference alone, and distances and errors of moments go with the root of that
factor. So the null is simulated between disjoint random parts of the reference, of k and m draws,
and taken to K and N by the ratio of the factors. K may exceed N, and no draw is compared with
itself, as it is when a sample is bootstrapped: that makes the null too wide, the more so the more
dimensions there are.

Source:
    Gretton et al. (2012), A kernel two-sample test, JMLR 13, theorem 12.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["MomentErrors", "Splits", "figure_null", "moment_errors", "moment_null", "random_splits"]

# Parts need not be larger for the law to hold; their pairs are what takes time.
_MAX_QUERY, _MAX_KEY = 250, 500
_ENTRIES_AT_ONCE = 2**22
# Directions that a figure may look along.
_LINES = 100

Number = float | int

Figure = Callable[[Tensor, Tensor], Tensor]


class Splits(NamedTuple):
    """Pairs of disjoint parts of a reference.

    Attributes:
        query: Rows that stand for the draws of another posterior.
        key: Rows that stand for the reference.
        factor: Factor of squared distances for K and N draws, over that of these parts.
    """

    query: Int[Tensor, "null query"]
    key: Int[Tensor, "null key"]
    factor: Number


class MomentErrors(NamedTuple):
    """Over the entries of a site.

    Attributes:
        mean: Largest error of a mean, in the reference's standard deviations.
        lowest_ratio: Of a standard deviation to the reference's.
        highest_ratio: Likewise.
    """

    mean: Float[Tensor, "*null"]
    lowest_ratio: Float[Tensor, "*null"]
    highest_ratio: Float[Tensor, "*null"]


def random_splits(
    num_rows: int,
    *,
    num_draws: Number,
    num_null: int,
    seed: int,
    num_reference: Number | None = None,
) -> Splits:
    """Split a reference at random, again and again.

    Args:
        num_rows: Draws of the reference at hand, nearly independent; at least two.
        num_draws: K, those of the other posterior.
        num_null: How many splits.
        seed: For the choice of rows.
        num_reference: N, those of the reference; as many as are at hand by default.
    """
    query = max(1, min(int(num_draws), num_rows // 2, _MAX_QUERY))
    key = min(num_rows - query, _MAX_KEY)
    generator = torch.Generator().manual_seed(seed)
    # In one precision, so that the default one does not choose the splits.
    places = torch.rand(num_null, num_rows, generator=generator, dtype=torch.float64)
    order = places.argsort(-1)
    factor = (1 / num_draws + 1 / (num_reference or num_rows)) / (1 / query + 1 / key)
    return Splits(order[:, :query], order[:, query : query + key], factor)


def figure_null(
    reference: Float[Tensor, "reference dim"], splits: Splits, figure: Figure, power: Number
) -> Float[Tensor, " null"]:
    """Simulate the null of a figure between clouds.

    Args:
        reference: Its draws.
        splits: Parts of it.
        figure: From "null query dim" and "null key dim" to one number for each pair of clouds.
        power: How it goes with the factor of squared distances: 1, or 1/2 for distances.
    """
    sizes = splits.query.shape[1], splits.key.shape[1]
    entries = max(sum(sizes) * max(reference.shape[1], _LINES), max(sizes) ** 2)
    chunk = max(1, _ENTRIES_AT_ONCE // entries)
    values = [
        figure(reference[query], reference[key])
        for query, key in zip(splits.query.split(chunk), splits.key.split(chunk), strict=True)
    ]
    return torch.cat(values) * splits.factor**power


def moment_errors(
    draws: Float[Tensor, "draw entry"], reference: Float[Tensor, "reference entry"]
) -> MomentErrors:
    """Worst error of a mean and range of the ratios of standard deviations; NaN for one draw."""
    sd = reference.std(0)
    shift = (draws.mean(0) - reference.mean(0)) / sd
    ratio = draws.std(0) / sd if len(draws) > 1 else torch.full_like(sd, torch.nan)
    return MomentErrors(shift.abs().amax(), ratio.amin(), ratio.amax())


def moment_null(reference: Float[Tensor, "reference entry"], splits: Splits) -> MomentErrors:
    """Simulate the null of :func:`moment_errors`."""
    standard = (reference - reference.mean(0)) / reference.std(0)
    chunk = max(1, _ENTRIES_AT_ONCE // standard.shape[1])
    parts = []
    for query, key in zip(splits.query.split(chunk), splits.key.split(chunk), strict=True):
        mean, sd = _moments(standard, query)
        other_mean, other_sd = _moments(standard, key)
        # Logarithms of ratios lie evenly about zero, as errors of means do.
        ratio = (sd / other_sd).log() * splits.factor**0.5
        error = (mean - other_mean).abs().amax(1) * splits.factor**0.5
        parts.append((error, ratio.amin(1).exp(), ratio.amax(1).exp()))
    return MomentErrors(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _moments(
    values: Float[Tensor, "reference entry"], rows: Int[Tensor, "null row"]
) -> tuple[Float[Tensor, "null entry"], Float[Tensor, "null entry"]]:
    """Means and standard deviations of chosen rows, by products that hold no copy of them."""
    count = rows.shape[1]
    chosen = values.new_zeros(len(rows), len(values)).scatter(1, rows, 1 / count)
    mean = chosen @ values
    spread = (chosen @ values.square() - mean.square()).clamp_min(0)
    return mean, (spread * count / (count - 1)).sqrt() if count > 1 else spread * torch.nan
