r"""A check of a log density against draws of its posterior, without sampling.

.. math::
    \mathbb E[s(w)] = 0, \qquad \mathbb E[s_i(w)\,(w_j - \mathbb E w_j)] = -\delta_{ij},

where :math:`s` is the score on the scale :math:`w` on which the draws are white.

Source:
    Stein's identity for the functions 1 and w_j; any density that vanishes at infinity.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class SteinCheck(NamedTuple):
    """How many standard errors each identity is off; near a standard normal if all is right."""

    mean: Float[Tensor, " dim"]
    covariance: Float[Tensor, "dim dim"]

    @property
    def worst(self) -> float:
        """The largest deviation of all."""
        return max(self.mean.abs().max().item(), self.covariance.abs().max().item())


def stein_check(draws: Float[Tensor, "draw dim"], scores: Float[Tensor, "draw dim"]) -> SteinCheck:
    """Compare the scores at independent draws with Stein's identities."""
    centered = draws - draws.mean(dim=0)
    factor = torch.linalg.cholesky(centered.T @ centered / len(draws))
    white = torch.linalg.solve_triangular(factor, centered.T, upper=False).T
    white_scores = scores @ factor
    products = white_scores[:, :, None] * white[:, None, :] + torch.eye(draws.shape[-1])
    return SteinCheck(_z_scores(white_scores), _z_scores(products))


def _z_scores(values: Tensor) -> Tensor:
    return values.mean(dim=0) / (values.std(dim=0) / len(values) ** 0.5)
