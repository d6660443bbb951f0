r"""Bootstraps of degenerate sums over pairs of draws, such as that of a Stein kernel.

.. math:: S = \sum_{i \ne j} u_{ij}, \qquad S_b = \sum_{i \ne j} w_{bi} w_{bj} u_{ij}

Where the mean of :math:`u(x, \cdot)` is zero, multipliers :math:`w` of mean zero and variance one,
which depend on each other as the draws do, give :math:`S_b` the law of :math:`S`.

Source:
    Liu, Lee and Jordan (2016), A kernelized Stein discrepancy, arXiv:1602.03253, eq. 16.
    Chwialkowski, Strathmann and Gretton (2016), A kernel test of goodness of fit,
    arXiv:1602.02964, section 4. The diagonal is left out here.
"""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["bootstrap_p_value", "multinomial_multipliers", "sign_multipliers"]

Number = float | int


def bootstrap_p_value(
    gram: Float[Tensor, "draw draw"], multipliers: Float[Tensor, "bootstrap draw"]
) -> Float[Tensor, ""]:
    r"""How often a degenerate sum over pairs is as large as this one.

    .. math:: p = \frac{1 + \#\{b : S_b \ge S\}}{1 + B}, \qquad
        S_b = \sum_{i \ne j} w_{bi} w_{bj} u_{ij}, \quad S = \sum_{i \ne j} u_{ij}

    Args:
        gram: The Stein kernel between every two draws.
        multipliers: :math:`w`, of mean zero and variance one.

    Raises:
        ValueError: If there are fewer than two draws, or no multipliers.
    """
    if len(gram) < 2 or len(multipliers) == 0:
        raise ValueError(
            f"a bootstrap needs two draws and one replicate, got {len(gram)} and {len(multipliers)}"
        )
    pairs = gram - gram.diagonal().diag_embed()
    replicates = ((multipliers @ pairs) * multipliers).sum(-1)
    return (1 + (replicates >= pairs.sum()).sum()).to(gram.dtype) / (1 + len(multipliers))


def multinomial_multipliers(
    num_bootstrap: int, num_draws: int, generator: torch.Generator
) -> Float[Tensor, "bootstrap draw"]:
    """How often each independent draw is drawn again, less one."""
    drawn = torch.randint(num_draws, (num_bootstrap, num_draws), generator=generator)
    ones = torch.ones(drawn.shape, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add(1, drawn, ones) - 1


def sign_multipliers(
    num_bootstrap: int,
    num_chains: int,
    num_draws: int,
    generator: torch.Generator,
    *,
    change_probability: Number = 0.05,
) -> Float[Tensor, "bootstrap draw"]:
    """Signs that follow each other along a chain, as its draws do: the wild bootstrap.

    Args:
        num_bootstrap: Number of replicates.
        num_chains: Chains, one after another in the result, each with signs of its own.
        num_draws: Of each chain.
        generator: Of randomness.
        change_probability: That a sign differs from the one before; a half for independent draws,
            and small beside one over the number of draws over which a chain remembers.
    """
    shape = (num_bootstrap, num_chains, num_draws)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    changes = uniform < change_probability
    changes[..., 0] = uniform[..., 0] < 0.5
    return (1.0 - 2.0 * (changes.cumsum(-1) % 2)).to(torch.float64).flatten(1)
