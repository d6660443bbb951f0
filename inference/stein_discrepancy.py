"""Whether a posterior's draws are those of its program: the kernel Stein discrepancy, tested.

Source:
    Liu, Lee and Jordan (2016), A kernelized Stein discrepancy, arXiv:1602.03253.
    Chwialkowski, Strathmann and Gretton (2016), A kernel test of goodness of fit,
    arXiv:1602.02964.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.inference.bootstrap import (
    bootstrap_p_value,
    multinomial_multipliers,
    sign_multipliers,
)
from bayesattn.inference.convergence import smallest_effective_size
from bayesattn.inference.log_density import DensitySettings, LogDensity
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.stein_statistics import SteinKernel, mean_of_distinct_pairs
from bayesattn.kernels import IMQ

__all__ = ["SteinDiscrepancy", "ksd"]

Number = float | int

# With fewer independent draws, no test is made.
_LEAST_DRAWS = 20


class SteinDiscrepancy(NamedTuple):
    """How far draws are from their program's posterior.

    Attributes:
        ksd: Root of the mean of the Stein kernel over all pairs of draws. Of K exact draws it is
            not zero but falls as one over the root of K: compare it at equal numbers of draws.
        squared: Unbiased estimate of the squared discrepancy, zero on average for exact draws
            however many they are, so that it may be negative; NaN for a single draw.
        p_value: How often exact draws would be as far off. NaN where draws are worth fewer than
            twenty independent ones, or are no sample: particles repel each other, so that they lie
            closer to the posterior than exact draws do.
    """

    ksd: float
    squared: float
    p_value: float


def ksd(
    posterior: Posterior,
    *,
    kernel: SteinKernel | None = None,
    scale: Float[Tensor, " dim"] | None = None,
    num_draws: int = 2000,
    num_bootstrap: int = 1000,
    change_probability: Number = 0.05,
    seed: int = 0,
    chunk_size: int | None = None,
) -> SteinDiscrepancy:
    """Kernel Stein discrepancy of a posterior's draws, and whether exact draws would be as far off.

    It is measured on the real line, each coordinate in units of ``scale``. The program is evaluated
    at all of its training data, with discrete sites summed out.

    Independent draws of a guide are tested by the multinomial bootstrap; Markov chains, thinned to
    as many draws as they are worth, by the wild one. Small discrepancies of many dimensions are
    hard to see, and so are wrong weights of modes far apart.

    Args:
        posterior: With its model and training arguments.
        kernel: In units of ``scale``; by default :class:`~bayesattn.kernels.IMQ` with the bandwidth
            that the median pair of a standard normal has, the root of twice the dimension.
        scale: Of each coordinate; by default the draws' own standard deviations. To compare
            posteriors, give all of them those of one:
            ``reference.unconstrained.flatten(0, 1).std(0)``.
        num_draws: Use so many draws in all at most, evenly spaced, since pairs are looked at.
        num_bootstrap: Replicates of the bootstrap.
        change_probability: Of the wild bootstrap; see
            :func:`~bayesattn.inference.bootstrap.sign_multipliers`.
        seed: For the bootstrap.
        chunk_size: Most draws evaluated at once, to bound memory.

    Raises:
        ValueError: Without a model; if draws are the heads of one network; if the program has
            subsampled plates or learned parameters; if the score is not finite somewhere; or if a
            coordinate does not vary and no scale is given.
    """
    for name, value in (("num_draws", num_draws), ("num_bootstrap", num_bootstrap)):
        if value < 1:
            raise ValueError(f"{name} must be at least one, got {value}")
    if not 0 < change_probability <= 0.5:
        raise ValueError(
            f"change_probability must be above zero and at most a half, got {change_probability}"
        )
    density = _full_data_density(posterior, chunk_size)
    draws = _unconstrained(posterior, density)
    scale = _checked_scale(density, draws.flatten(0, 1), scale)
    draws = _thinned(draws, num_draws // len(draws))
    scores = _finite_scores(density, draws.flatten(0, 1)) * scale
    kernel = IMQ((2 * density.dim) ** 0.5) if kernel is None else kernel
    gram = kernel.stein_gram(draws.flatten(0, 1) / scale, scores)
    generator = torch.Generator().manual_seed(seed)
    rows = multipliers = None
    if posterior.draws_are == "iid_guide":
        rows = torch.arange(len(gram))
        multipliers = multinomial_multipliers(num_bootstrap, len(gram), generator)
    elif posterior.draws_are == "markov":
        places = _independent_places(draws)
        num_chains, num_kept = places.shape
        rows, change = places.flatten(), change_probability
        multipliers = sign_multipliers(
            num_bootstrap, num_chains, num_kept, generator, change_probability=change
        )
    return SteinDiscrepancy(
        ksd=float(gram.mean().clamp_min(0.0).sqrt()),
        squared=float(mean_of_distinct_pairs(gram)),
        p_value=_p_value(gram, rows, multipliers),
    )


def _p_value(gram: Tensor, rows: Tensor | None, multipliers: Tensor | None) -> float:
    if rows is None or multipliers is None or len(rows) < _LEAST_DRAWS:
        return math.nan
    rows = rows.to(gram.device)
    return float(bootstrap_p_value(gram[rows][:, rows], multipliers.to(gram)))


def _full_data_density(posterior: Posterior, chunk_size: int | None) -> LogDensity:
    if posterior.draws_are == "heads":
        raise ValueError(
            "these draws are the heads of one network: no single one is a draw of the program's "
            "latents, so there is no score of it alone to measure by"
        )
    if posterior.model is None:
        raise ValueError(
            "this posterior has no model, so its score is not known; a loaded one gets both by "
            "Posterior.load(path, model=...).replace(args=..., kwargs=...)"
        )
    if posterior.point_estimates:
        raise ValueError(
            f"parameters {sorted(posterior.point_estimates)} were learned along with these draws, "
            "so there is no one posterior to measure by"
        )
    settings = DensitySettings(chunk_size=chunk_size)
    density = LogDensity(posterior.model, *posterior.args, settings=settings, **posterior.kwargs)
    if density.program.subsamples:
        raise ValueError(
            f"plates {sorted(density.program.subsamples)} are subsampled, so the score is known "
            "but roughly; give a posterior of the program at all data: "
            "posterior.replace(model=..., args=..., kwargs=...)"
        )
    return density


def _unconstrained(posterior: Posterior, density: LogDensity) -> Tensor:
    """Draws on the real line, (chain, draw, dim), in float64."""
    if posterior.unconstrained is None:
        samples = posterior.get_samples()
        rows = density.unconstrain({site.name: samples[site.name] for site in density.sites})
        draws = rows.unflatten(0, (posterior.num_chains, posterior.num_draws))
    else:
        draws = posterior.unconstrained
    if draws.shape[2:] != (density.dim,):
        raise ValueError(
            f"the program has {density.dim} unconstrained coordinates at these arguments, but "
            f"draws have shape {tuple(draws.shape)}"
        )
    return draws.to(density.device, torch.float64)


def _checked_scale(density: LogDensity, draws: Tensor, scale: Tensor | None) -> Tensor:
    if scale is not None:
        if scale.shape != (density.dim,):
            raise ValueError(
                f"scale: expected one for each of {density.dim} coordinates, got shape "
                f"{tuple(scale.shape)}"
            )
        scale = scale.detach().to(draws)
        is_bad, problem = ~((scale > 0) & scale.isfinite()), "is not positive"
    else:
        scale = draws.std(0, correction=min(1, len(draws) - 1))
        # Equal draws differ by the rounding of their mean.
        is_bad = ~(scale > 1e-12 * draws.abs().amax(0))
        problem = "is not known where draws do not vary; give scale="
    if is_bad.any():
        raise ValueError(f"scale {problem}: {', '.join(density.site_names(is_bad))}")
    return scale


def _thinned(draws: Tensor, most: int) -> Tensor:
    """At most so many draws of each chain, evenly spaced."""
    return draws[:, _evenly_spaced(draws.shape[1], most).to(draws.device)]


def _evenly_spaced(size: int, most: int) -> Tensor:
    count = min(size, max(1, most))
    return torch.linspace(0, size - 1, count, dtype=torch.float64).round().long()


def _finite_scores(density: LogDensity, particles: Tensor) -> Tensor:
    scores = density.value_and_score(particles)[1].to(particles.dtype)
    is_bad = ~scores.isfinite()
    if is_bad.any():
        raise ValueError(
            f"the score is not finite at {int(is_bad.any(1).sum())} of {len(scores)} draws, at "
            f"sites {density.site_names(is_bad.any(0))}"
        )
    return scores


def _independent_places(draws: Tensor) -> Tensor:
    """Rows of the flattened draws, (chain, kept), as many as the chains are worth."""
    num_chains, num_draws = draws.shape[:2]
    worth = smallest_effective_size(draws) if num_draws >= _LEAST_DRAWS else 0
    kept = _evenly_spaced(num_draws, int(worth) // num_chains)
    return torch.arange(num_chains)[:, None] * num_draws + kept
