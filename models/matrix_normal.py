r"""Matrix normal laws whose columns are independent, with one covariance of the rows.

.. math:: X \sim MN(M, \Sigma, I), \qquad X_{:j} \sim N(M_{:j}, \Sigma)
"""

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

__all__ = ["MatrixNormal"]


class MatrixNormal(TorchDistribution):
    """Law of a matrix with columns that are independent and alike but for their means.

    Args:
        loc: Mean.
        row_covariance: Of the entries of each column; symmetric and positive definite.
    """

    arg_constraints: ClassVar[dict] = {
        "loc": constraints.independent(constraints.real, 2),
        "row_covariance": constraints.positive_definite,
    }
    support = constraints.independent(constraints.real, 2)  # type: ignore[assignment]
    has_rsample = True

    def __init__(
        self,
        loc: Float[Tensor, "row column"],
        row_covariance: Float[Tensor, "row row"],
        validate_args: bool | None = None,
    ):
        self.loc, self.row_covariance = loc, row_covariance
        super().__init__(torch.Size(), loc.shape, validate_args=validate_args)
        self._factor = torch.linalg.cholesky(row_covariance)

    @property
    def mean(self) -> Float[Tensor, "row column"]:
        """Mean."""
        return self.loc

    @property
    def variance(self) -> Float[Tensor, "row column"]:
        """Of each entry."""
        return self.row_covariance.diagonal()[:, None].expand(self.loc.shape)

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draw matrices, in leading axes of a shape."""
        noise = torch.randn((*sample_shape, *self.loc.shape)).to(self.loc)
        return self.loc + self._factor @ noise

    def log_prob(self, value: Float[Tensor, "*batch row column"]) -> Float[Tensor, "*batch"]:
        """Log density, in nats."""
        white = torch.linalg.solve_triangular(self._factor, value - self.loc, upper=False)
        constant = self.loc.numel() * math.log(2 * math.pi) / 2
        return -white.square().sum((-2, -1)) / 2 - constant - self._log_volume()

    def entropy(self) -> Float[Tensor, ""]:
        """Differential entropy, in nats."""
        return self.loc.numel() * (1 + math.log(2 * math.pi)) / 2 + self._log_volume()

    def _log_volume(self) -> Float[Tensor, ""]:
        return self.loc.shape[1] * self._factor.diagonal().log().sum()
