r"""The weight of a penalty at which the posterior mean of what it penalizes is what one asks for.

.. math:: \pi_\lambda(\theta) \propto \pi_0(\theta) \, e^{-\lambda D(\theta)}, \qquad
    \frac{d}{d\lambda} \, \mathbb E_\lambda D = -\operatorname{Var}_\lambda D \le 0

The mean falls with the weight, so that there is one weight for each mean within reach. It is
bracketed, and the bracket is narrowed, by a few runs, each from where the last one ended.

Source:
    Both lines are the first two derivatives of the logarithm of the normalizer, as of any
    exponential family: Wainwright and Jordan (2008), Graphical models, exponential families, and
    variational inference, proposition 3.1.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.argument_checks import check_count, check_positive
from bayesattn.inference.convergence import smallest_effective_size
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.running import ConvergenceWarning
from bayesattn.inference.schedules import Number

__all__ = ["WeightSearch", "WeightTrial", "weight_for_target"]

# What the weight is multiplied or divided by until the target is between two means.
_STRIDE = 4.0
# How near to an end of the bracket, as a part of it, the next weight may be.
_MARGIN = 0.1

Run = Callable[[float, Posterior | None], Posterior]


class WeightTrial(NamedTuple):
    """What one run found.

    Attributes:
        weight: λ.
        mean: Of the penalized sites, over draws and entries.
        error: Its Monte-Carlo standard error; NaN of a single draw.
    """

    weight: float
    mean: float
    error: float


class WeightSearch(NamedTuple):
    """Outcome of a search.

    Attributes:
        weight: λ whose mean is nearest to the target.
        posterior: At that weight.
        trials: All runs in their order, the first at weight zero.
    """

    weight: float
    posterior: Posterior
    trials: tuple[WeightTrial, ...]


def weight_for_target(
    run: Run,
    target: Number,
    *,
    sites: Sequence[str] = ("divergence",),
    tolerance: Number = 0.05,
    first_weight: Number | None = None,
    max_runs: int = 12,
) -> WeightSearch:
    """Find the weight at which the posterior mean of penalized sites is the target.

    ::

        def run(weight, init):
            aligned = AlignmentFactor(MMD(), weight)
            model = MultiHeadSelfAttention(4, 8, Categorical(7), alignment=aligned)
            return SVGD(model).run(tokens, mask, intent, num_steps=500, init=init, seed=0)

        found = weight_for_target(run, target=0.1)

    The mean is what the routine finds, which is exact for none: with particles or a guide, the
    weight is that of their approximation.

    Args:
        run: From a weight, and where to start (None at first), to the posterior. With one seed for
            all runs, chance takes less part in their differences.
        target: Mean over draws and over all entries of the sites.
        sites: Deterministic or latent sites of the program that the weight penalizes the sum of.
        tolerance: How far from the target the mean may be, as a part of the target.
        first_weight: First one after zero; by default from the variance at zero, as if the sum had
            a gamma law.
        max_runs: Most runs.

    Returns:
        With a warning if no mean was within tolerance, or chance may have been the reason.

    Raises:
        ValueError: If no weight leads to the target, as far as was tried; or if an argument is out
            of range.
    """
    check_positive("target", target)
    check_positive("tolerance", tolerance)
    check_count("max_runs", max_runs, least=2)
    if first_weight is not None:
        check_positive("first_weight", first_weight)
    search = _Search(run, float(target), tuple(sites), float(tolerance) * float(target))
    search.attempt(0.0)
    if search.trials[0].mean < target and not search.is_over:
        raise ValueError(
            f"target: expected less than the mean at weight zero, {_told(search.trials[0])}, since "
            f"a weight only lowers it, got {target}"
        )
    while not search.is_over and len(search.trials) < max_runs:
        search.attempt(search.next_weight(first_weight))
    return search.outcome()


class _Search:
    """Runs so far, and the two that the target lies between."""

    def __init__(self, run: Run, target: float, sites: tuple[str, ...], allowed: float):
        self._run, self._target, self._sites, self._allowed = run, target, sites, allowed
        self.trials: list[WeightTrial] = []
        self._above: tuple[WeightTrial, Posterior] | None = None
        self._below: tuple[WeightTrial, Posterior] | None = None
        self._first_guess = 1.0

    def attempt(self, weight: float) -> None:
        """Run at a weight, from the nearer end of the bracket."""
        posterior = self._run(weight, self._start(weight))
        figures, num_entries = _figures(posterior, self._sites)
        mean, error = float(figures.mean()), _standard_error(figures, posterior.draws_are)
        if not math.isfinite(mean):
            raise ValueError(f"sites: expected finite values, got a mean of {mean} at {weight=}")
        if not self.trials:
            self._first_guess = _gamma_guess(figures, num_entries, self._target)
        trial = WeightTrial(weight, mean, error)
        self.trials.append(trial)
        if mean > self._target:
            self._above = trial, posterior
        else:
            self._below = trial, posterior

    @property
    def is_over(self) -> bool:
        """Whether the last mean is the target, as far as is asked for or can be told."""
        last = self.trials[-1]
        gap = abs(last.mean - self._target)
        return gap <= self._allowed or gap <= last.error

    def next_weight(self, first_weight: Number | None) -> float:
        """Further out until the target is between two means, then between these."""
        assert self._above is not None
        above = self._above[0]
        if self._below is None:
            guess = self._first_guess if first_weight is None else float(first_weight)
            return above.weight * _STRIDE or guess
        below = self._below[0]
        if above.weight == 0:
            return below.weight / _STRIDE
        # A straight line between logarithms, to which many penalties come near.
        low, high = math.log(above.weight), math.log(below.weight)
        tiny = torch.finfo(torch.float64).tiny
        fall = math.log(above.mean) - math.log(max(below.mean, tiny))
        part = (math.log(above.mean) - math.log(self._target)) / fall if fall > 0 else 0.5
        return math.exp(low + min(max(part, _MARGIN), 1 - _MARGIN) * (high - low))

    def outcome(self) -> WeightSearch:
        """The end of the bracket that is nearer to the target."""
        ends = [end for end in (self._above, self._below) if end is not None]
        nearest, posterior = min(ends, key=lambda end: abs(end[0].mean - self._target))
        if self.is_over:
            nearest = self.trials[-1]
            posterior = next(p for trial, p in ends if trial is nearest)
        elif self._below is None:
            raise ValueError(
                f"target: expected a mean of {list(self._sites)} within reach, got {self._target}, "
                f"but the least that was found is {_told(nearest)}"
            )
        if not abs(nearest.mean - self._target) <= self._allowed:
            warnings.warn(
                f"the mean nearest to the target {self._target:.4g} is {_told(nearest)}, in "
                f"{len(self.trials)} runs; make them longer, or max_runs or the tolerance larger",
                ConvergenceWarning,
                stacklevel=3,
            )
        return WeightSearch(nearest.weight, posterior, tuple(self.trials))

    def _start(self, weight: float) -> Posterior | None:
        ends = [end for end in (self._above, self._below) if end is not None]
        if not ends:
            return None
        return min(ends, key=lambda end: abs(end[0].weight - weight))[1]


def _figures(posterior: Posterior, sites: Sequence[str]) -> tuple[Float[Tensor, "chain draw"], int]:
    """Mean over the entries of all sites at each draw, and how many entries there are."""
    values = posterior.predict(sites=sites)
    entries = torch.cat([value.flatten(2).double() for value in values.values()], -1)
    return entries.mean(-1), entries.shape[-1]


def _standard_error(figures: Float[Tensor, "chain draw"], draws_are: str) -> float:
    """Of the mean: from draws as independent as they are, or from the chains if they differ more.

    Particles are taken for independent draws, though they lie more evenly.
    """
    num_chains, num_draws = figures.shape
    spread = float(figures.std()) if figures.numel() > 1 else math.nan
    size: float = figures.numel()
    if draws_are == "markov" and num_draws > 3 and spread > 0:
        size = max(1.0, smallest_effective_size(figures[..., None]))
    within = spread / size**0.5
    between = float(figures.mean(1).std()) / num_chains**0.5 if num_chains > 1 else 0.0
    return max(within, between)


def _gamma_guess(figures: Float[Tensor, "chain draw"], num_entries: int, target: float) -> float:
    """Weight whose mean would be the target if the sum of all entries had a gamma law."""
    if figures.numel() == 1 or not (variance := num_entries * float(figures.var())) > 0:
        return 1.0
    mean = float(figures.mean())
    guess = mean / variance * (mean / target - 1)
    return guess if 0 < guess < math.inf else 1.0


def _told(trial: WeightTrial) -> str:
    return f"{trial.mean:.4g} ± {trial.error:.2g} at weight {trial.weight:.4g}"
