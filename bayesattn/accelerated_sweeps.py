"""Sweeps of alternating least squares with momentum, from several starts, until they settle.

Each sweep starts ahead on the way of the last one, and from where that ended if the error rose.

Source:
    Mitchell, Ye and De Sterck (2020), Nesterov acceleration of alternating least squares for
    canonical tensor decomposition, Numer. Linear Algebra Appl. 27.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.alternating_least_squares import (
    Factors,
    HeadProducts,
    explained_norms,
    extrapolated,
    sweep,
)
from bayesattn.factor_errors import over, residual_errors

__all__ = ["Fit", "best_fit"]

# How far ahead a sweep starts, in steps of the last.
_NEAREST, _FARTHEST = 0.3, 1.0
_IDLE_SWEEPS = 3
# Sweeps from each start before the best goes on alone.
_TRIAL_SWEEPS = 10


class Fit(NamedTuple):
    """Factors, and how they were found.

    Attributes:
        factors: Where the sweeps ended.
        history: Relative error after each sweep, and before the first. Differences of squared
            norms: below the root of rounding they tell nothing.
        starts: Name of the start of each layer.
        has_settled: Whether three sweeps lowered no layer's error by more than the tolerance.
    """

    factors: Factors
    history: Float[Tensor, "layer sweep"]
    starts: tuple[str, ...]
    has_settled: bool


def best_fit(
    products: HeadProducts,
    starts: Sequence[tuple[str, Factors]],
    num_iterations: int,
    tolerance: float,
) -> Fit:
    """Sweep from the start that is best for each layer after some sweeps from all."""
    is_only = len(starts) == 1
    count = num_iterations if is_only else min(_TRIAL_SWEEPS, num_iterations)
    trials = [_swept(products, start, count, tolerance) for _, start in starts]
    if is_only:
        best = torch.zeros(len(products.query), dtype=torch.int64, device=products.query.device)
    else:
        # Not by the histories, which cannot tell apart what is nearly exact.
        best = torch.stack([residual_errors(products, found)[0] for found, _ in trials]).argmin(0)
    factors = Factors(
        *(_picked(parts, best) for parts in zip(*(f for f, _ in trials), strict=True))
    )
    longest = max(errors.shape[1] for _, errors in trials)
    history = _picked([_lengthened(errors, longest) for _, errors in trials], best)
    left = num_iterations - (longest - 1)
    if not is_only and left > 0:
        factors, more = _swept(products, factors, left, tolerance)
        history = torch.cat([history, more[:, 1:]], 1)
    names = tuple(starts[place][0] for place in best.tolist())
    return Fit(factors, history, names, _has_settled(history, tolerance))


def _swept(
    products: HeadProducts, factors: Factors, count: int, tolerance: float
) -> tuple[Factors, Tensor]:
    whole = products.squared_norms.sum(-1)
    errors = [_relative(whole, explained_norms(products, factors))]
    before, ahead = factors, whole.new_full(whole.shape, _FARTHEST)
    for _ in range(count):
        found, explained = sweep(products, extrapolated(before, factors, ahead))
        lost = _relative(whole, explained)
        is_worse = lost > errors[-1]
        if bool(is_worse.any()):
            plain, explained = sweep(products, factors)
            found = Factors(
                *(
                    torch.where(is_worse[:, None, None], *parts)
                    for parts in zip(plain, found, strict=True)
                )
            )
            lost = torch.where(is_worse, _relative(whole, explained), lost)
        ahead = torch.where(is_worse, ahead / 2, ahead * 1.15).clamp(_NEAREST, _FARTHEST)
        before, factors = factors, found
        errors.append(lost)
        if _has_settled(torch.stack(errors[-1 - _IDLE_SWEEPS :], 1), tolerance):
            break
    return factors, torch.stack(errors, 1)


def _has_settled(errors: Tensor, tolerance: float) -> bool:
    """Whether no layer gained more in the last sweeps; one alone may be a momentum's first."""
    if errors.shape[1] <= _IDLE_SWEEPS:
        return bool((errors[:, -1] == 0).all())
    return bool((errors[:, -1 - _IDLE_SWEEPS] - errors[:, -1] <= tolerance).all())


def _relative(whole: Tensor, explained: Tensor) -> Tensor:
    return over((whole - explained.sum(-1)).clamp(min=0), whole).sqrt()


def _picked(parts: Sequence[Tensor], best: Tensor) -> Tensor:
    return torch.stack(tuple(parts))[best, torch.arange(len(best), device=best.device)]


def _lengthened(errors: Tensor, length: int) -> Tensor:
    return torch.cat([errors, errors[:, -1:].expand(-1, length - errors.shape[1])], 1)
