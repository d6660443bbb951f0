"""Draws of two posteriors on one scale: pooled, nearly independent, standardized by the first."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bayesattn.inference.posterior import Posterior

__all__ = [
    "Clouds",
    "common_clouds",
    "effective_draws",
    "nearly_independent",
    "pooled",
    "varying",
    "worth",
]

_LEAST_DRAWS = 20
_LARGEST_CORRELATION = 0.05
_MOST_COORDINATES = 200


class Clouds(NamedTuple):
    """Draws of a reference and of another posterior, in the reference's standard deviations.

    Attributes:
        reference: About a mean of zero, with standard deviations of one.
        draws: Of the other posterior.
        scale: ``"unconstrained"`` or ``"constrained"``.
        num_constant: Entries left out because the reference has but one value of them.
    """

    reference: Float[Tensor, "reference dim"]
    draws: Float[Tensor, "draw dim"]
    scale: str
    num_constant: int


def common_clouds(
    reference: Posterior, other: Posterior, sites: Sequence[str] | None = None
) -> Clouds:
    """Lay all sites out side by side, on the real line where both posteriors know it.

    Args:
        reference: What is standardized by.
        other: Another posterior.
        sites: Only these, on their own supports.
    """
    if sites is None and _know_one_line(reference, other):
        scale = "unconstrained"
        lines = (reference.unconstrained, other.unconstrained)
        clouds = [pooled(line) for line in lines if line is not None]
    else:
        scale = "constrained"
        shared = [name for name in reference.draws if name in other.draws]
        chosen = shared if sites is None else list(sites)
        clouds = [
            torch.cat([pooled(posterior.draws[name]) for name in chosen], 1)
            for posterior in (reference, other)
        ]
    exact, draws = clouds
    kept = varying(exact)
    mean, sd = exact[:, kept].mean(0), exact[:, kept].std(0)
    exact, draws = ((cloud[:, kept] - mean) / sd for cloud in (exact, draws))
    return Clouds(exact, draws, scale, int((~kept).sum()))


def varying(draws: Float[Tensor, "draw entry"]) -> Bool[Tensor, " entry"]:
    """Which entries have a standard deviation to measure by; weights of padding have none."""
    return draws.std(0) > 1e-12 * draws.mean(0).abs()


def pooled(values: Float[Tensor, "chain draw *shape"] | Tensor) -> Float[Tensor, "row entry"]:
    """Chains after one another, entries side by side, in float64 on the CPU."""
    return values.detach().cpu().double().flatten(0, 1).reshape(values.shape[:2].numel(), -1)


def nearly_independent(posterior: Posterior, most: int) -> Posterior:
    """Thin evenly, to ``most`` draws in all, and Markov chains until neighbors hardly resemble.

    Their correlation is taken for that of an autoregression with the same effective sample size:
    thinned to just that size, chains would keep an eighth of it, which distances between clouds,
    unbiased for independent draws only, would show.
    """
    wanted = total = posterior.num_chains * posterior.num_draws
    share = worth(posterior) / total
    if share < 1:
        correlation = (1 - share) / (1 + share)
        stride = math.log(_LARGEST_CORRELATION) / math.log(correlation)
        wanted = max(total / max(stride, 1.0), _LEAST_DRAWS)
    per_chain = max(1, int(min(wanted, most)) // posterior.num_chains)
    return posterior if per_chain >= posterior.num_draws else posterior.thin(per_chain)


def worth(posterior: Posterior) -> float | int:
    """To how many independent draws its draws amount: fewer than it has for Markov chains only."""
    total = posterior.num_chains * posterior.num_draws
    return min(total, effective_draws(posterior)) if posterior.draws_are == "markov" else total


def effective_draws(posterior: Posterior) -> float:
    """Bulk effective sample size of a typical coordinate: the median over (some) coordinates."""
    import arviz  # half of the import time of this package

    if posterior.num_draws < 4:
        return float(posterior.num_chains * posterior.num_draws)
    if posterior.unconstrained is not None:
        columns = posterior.unconstrained
    else:
        columns = torch.cat([value.double().flatten(2) for value in posterior.draws.values()], 2)
    columns = columns.flatten(2).detach().cpu().double().numpy()
    step = -(-columns.shape[-1] // _MOST_COORDINATES)
    sizes = [
        float(arviz.ess(columns[..., i], method="bulk"))
        for i in range(0, columns.shape[-1], step)
        if np.ptp(columns[..., i]) > 0
    ]
    known = [size for size in sizes if np.isfinite(size)]
    return float(np.median(known)) if known else float(columns.shape[0] * columns.shape[1])


def _know_one_line(reference: Posterior, other: Posterior) -> bool:
    first, second = reference.unconstrained, other.unconstrained
    return (
        first is not None
        and second is not None
        and "heads" not in (reference.draws_are, other.draws_are)
        and list(reference.draws) == list(other.draws)
        and first.shape[2:] == second.shape[2:]
    )
