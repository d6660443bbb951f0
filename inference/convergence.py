"""What a reader must know before trusting draws of Markov chains, or of independent runs."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from pyro.ops.stats import effective_sample_size, gelman_rubin, split_gelman_rubin
from torch import Tensor

__all__ = ["bayesian_fraction", "chain_problems", "run_problems", "smallest_effective_size"]

# Below these, figures say nothing.
_FEWEST_DRAWS = 20
_LOWEST_EFFICIENCY = 0.05
_LOWEST_ENERGY_FRACTION = 0.2
_LARGEST_RHAT = 1.1
_MOST_DEEP = 0.1


def chain_problems(
    draws: Float[Tensor, "chain draw dim"], statistics: Mapping[str, Tensor], max_tree_depth: int
) -> list[str]:
    """Say in words what is wrong with some chains; empty if nothing is.

    Args:
        draws: Unconstrained.
        statistics: ``diverging``, ``tree_depth`` and ``energy`` of each draw.
        max_tree_depth: The sampler's bound.
    """
    problems = []
    num_chains, num_draws = draws.shape[:2]
    total = num_chains * num_draws
    diverging = int(statistics["diverging"].sum())
    if diverging:
        problems.append(f"{diverging} of {total} draws diverged")
    deep = int((statistics["tree_depth"] >= max_tree_depth).sum())
    if deep > _MOST_DEEP * total:
        problems.append(f"{deep} of {total} draws reached the largest tree depth, {max_tree_depth}")
    if num_draws < _FEWEST_DRAWS:
        return problems
    size = smallest_effective_size(draws)
    if not size >= _LOWEST_EFFICIENCY * total:
        problems.append(
            f"the smallest effective sample size is {size:.0f} of {total} draws; run longer, or "
            "reparametrize (coordinates='laplace')"
        )
    fraction = float(bayesian_fraction(statistics["energy"]).min())
    if not fraction >= _LOWEST_ENERGY_FRACTION:
        problems.append(f"the energy changes too little from draw to draw (E-BFMI {fraction:.2f})")
    if num_chains > 1:
        worst = float(split_gelman_rubin(draws.double()).nan_to_num(nan=torch.inf).max())
        # Short chains that agree reach some more by chance.
        if worst > _LARGEST_RHAT + 10 / num_draws:
            problems.append(f"the chains disagree: the largest split R-hat is {worst:.2f}")
    return problems


def run_problems(
    draws: Float[Tensor, "chain draw dim"], site_names: Callable[[Tensor], list[str]]
) -> list[str]:
    """Say in words whether independent runs disagree on what the posterior is; empty if not.

    Args:
        draws: Unconstrained, independent within each run.
        site_names: Names of the sites with a True among their coordinates.
    """
    num_runs, num_draws = draws.shape[:2]
    if num_runs == 1 or num_draws < _FEWEST_DRAWS:
        return []
    # Points, as a delta guide gives, have no spread to measure distances by.
    is_point = (draws.amax(1) == draws.amin(1)).any(0)
    rhat = gelman_rubin(draws.double()).masked_fill(is_point, 1.0)
    worst = float(rhat.max())
    if worst <= _LARGEST_RHAT + 10 / num_draws:
        return []
    site = site_names(rhat == rhat.max())[0]
    problem = (
        f"the {num_runs} runs disagree: the largest R-hat between them is {worst:.2f}, at site "
        f"{site!r}; some found another optimum, or slices of a plate in another order"
    )
    return [problem]


def smallest_effective_size(draws: Float[Tensor, "chain draw dim"]) -> float:
    """Effective sample size of the worst coordinate; zero where one never moves."""
    num_chains, num_draws, _ = draws.shape
    # Pyro holds a matrix of lags for each coordinate, so they go by some at a time.
    at_once = max(1, 2**24 // (num_chains * num_draws**2))
    parts = [effective_sample_size(part) for part in draws.double().split(at_once, -1)]
    # Estimates from short chains that swing may be negative.
    return max(0.0, float(torch.cat(parts).nan_to_num(nan=0.0).min()))


def bayesian_fraction(energy: Float[Tensor, "chain draw"]) -> Float[Tensor, " chain"]:
    """Estimated Bayesian fraction of missing information (E-BFMI) of each chain.

    Source:
        Betancourt (2016), Diagnosing suboptimal cotangent disintegrations, arXiv:1604.00695.
    """
    energy = energy.double()
    return energy.diff(dim=-1).square().mean(-1) / energy.var(-1)
