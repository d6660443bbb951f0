r"""Exact Gaussian processes by GPyTorch, the baseline outside of attention.

.. math:: y \sim \mathcal N\bigl(m, K_\theta + \sigma^2 I\bigr)

where :math:`\theta` and :math:`\sigma` maximize the evidence of all training points. GPyTorch comes
with ``pip install -e '.[bench]'``.

Source:
    Gardner et al. (2018), arXiv:1809.11165.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from examples.reproduce.regression_tasks import Points, RegressionSplits
from examples.reproduce.regression_training import RegressionBudget
from examples.reproduce.spectral_process import import_gpytorch, spectral_mixture

__all__ = ["KERNELS", "Evidence", "GaussianProcess", "gaussian_process", "is_installed"]

_NUM_COMPONENTS = 4
# Of unit variance targets.
_LEAST_NOISE, _FIRST_NOISE = 1e-6, 0.05


class GaussianProcess(nn.Module):
    """A Gaussian process with a constant mean and noise that is the same everywhere.

    It learns and predicts in float64, whatever its inputs are.

    Args:
        kernel: Of inputs in standard units.
        training: What it is conditioned on, as predictions need it.
    """

    def __init__(self, kernel: nn.Module, training: Points):
        super().__init__()
        gpytorch = import_gpytorch()
        likelihood = gpytorch.likelihoods.GaussianLikelihood(
            noise_constraint=gpytorch.constraints.GreaterThan(_LEAST_NOISE)
        )
        likelihood.noise = _FIRST_NOISE
        self.process: Any = _exact(training, likelihood, kernel).double()

    def evidence(self, training: Points) -> Float[Tensor, ""]:
        """Log density of all training targets, over their number."""
        gpytorch = import_gpytorch()
        log_density = gpytorch.mlls.ExactMarginalLogLikelihood(
            self.process.likelihood, self.process
        )
        return log_density(self.process(training.x.double()), training.y.double())

    def forward(
        self, targets: Points, known: Points
    ) -> tuple[Float[Tensor, " point"], Float[Tensor, " point"]]:
        """Give means and deviations of targets, noise included; known are the training points."""
        del known
        predicted = self.process.likelihood(self.process(targets.x.double()))
        return predicted.mean.to(targets.x), predicted.stddev.to(targets.x)


class Evidence:
    """All hyperparameters maximize the evidence; each step sees all training points."""

    def schedule(self, budget: RegressionBudget) -> tuple[int, tuple[float, ...]]:
        """Give those of Gaussian processes."""
        return budget.process_steps, budget.process_rates

    def loss(
        self, model: Any, training: Points, budget: RegressionBudget, order: torch.Generator
    ) -> Float[Tensor, ""]:
        """Give the negative evidence of a point."""
        del budget, order
        return -model.evidence(training)


def is_installed() -> bool:
    """Tell whether GPyTorch is there."""
    return find_spec("gpytorch") is not None


def gaussian_process(splits: RegressionSplits, *, kernel: str) -> GaussianProcess:
    """Build an untrained process with one of ``KERNELS``."""
    return GaussianProcess(KERNELS[kernel](splits.train), splits.train)


def _rbf(training: Points) -> nn.Module:
    kernels = import_gpytorch().kernels
    return kernels.ScaleKernel(kernels.RBFKernel(ard_num_dims=training.x.shape[1]))


def _matern(training: Points) -> nn.Module:
    kernels = import_gpytorch().kernels
    return kernels.ScaleKernel(kernels.MaternKernel(nu=2.5, ard_num_dims=training.x.shape[1]))


def _spectral_mixture(training: Points) -> nn.Module:
    return spectral_mixture(training, _NUM_COMPONENTS)


KERNELS: dict[str, Callable[[Points], nn.Module]] = {
    "rbf": _rbf,
    "matern": _matern,
    "spectral": _spectral_mixture,
}


def _exact(training: Points, likelihood: nn.Module, kernel: nn.Module) -> nn.Module:
    gpytorch = import_gpytorch()

    class Exact(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(training.x.double(), training.y.double(), likelihood)
            self.mean = gpytorch.means.ConstantMean()
            self.kernel = kernel

        def forward(self, x: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    return Exact()
