"""GPyTorch's processes are what they should be, wherever it is installed."""

import math
import random

import pytest
import torch
from torch.distributions import MultivariateNormal

from examples.reproduce.gaussian_process import KERNELS, Evidence, gaussian_process, is_installed
from examples.reproduce.regression_tasks import Points
from examples.reproduce.regression_training import RegressionBudget, train_regression
from examples.reproduce.spectral_process import import_gpytorch, strongest_frequencies

pytestmark = pytest.mark.usefixtures("seeded_layers")


@pytest.fixture(autouse=True)
def installed():
    if not is_installed():
        pytest.skip("gpytorch is not installed")
    # It draws when it is imported.
    state = random.getstate()
    import_gpytorch()
    random.setstate(state)


def points(num_points, generator):
    x = torch.randn(num_points, 2, generator=generator)
    y = (2 * x[:, 0]).sin() + 0.1 * torch.randn(num_points, generator=generator)
    return Points(x, y, torch.arange(num_points))


class Splits:
    def __init__(self, train, validation):
        self.train, self.validation = train, validation


def covariance(model, x, y):
    return model.process.kernel(x, y).to_dense().detach()


@pytest.mark.parametrize("kernel", KERNELS)
def test_evidence_and_forecasts_are_those_of_the_normal_law(kernel, generator):
    """Mutants: a sum of evidence; deviations without noise; variances for deviations."""
    train, other = points(13, generator), points(7, generator)
    model = gaussian_process(Splits(train, other), kernel=kernel)
    noise = 0.05 * torch.eye(13)
    inner = covariance(model, train.x, train.x) + noise
    mean = torch.zeros(13)
    expected = MultivariateNormal(mean, inner).log_prob(train.y) / 13
    torch.testing.assert_close(model.train().evidence(train).detach(), expected)
    loss = Evidence().loss(model, train, RegressionBudget(1), torch.Generator())
    torch.testing.assert_close(-loss.detach(), expected)
    with torch.no_grad():
        found, deviation = model.eval()(other, train)
    cross = covariance(model, other.x, train.x)
    torch.testing.assert_close(found, cross @ torch.linalg.solve(inner, train.y))
    rest = covariance(model, other.x, other.x) - cross @ torch.linalg.solve(inner, cross.mT)
    torch.testing.assert_close(deviation, (rest.diagonal() + 0.05).sqrt())


def test_spectral_mixture_is_its_formula(generator):
    """Mutants: waves of single features; a scale that is its inverse."""
    train = points(13, generator)
    kernel = gaussian_process(Splits(train, train), kernel="spectral").process.kernel
    torch.nn.init.normal_(kernel.log_pace)
    x, y = train.x[:4], train.x[4:9]
    expected = torch.zeros(4, 5)
    for log_weight, pace, frequency in zip(
        kernel.log_weight, kernel.log_pace.exp(), kernel.frequency, strict=True
    ):
        for i in range(4):
            for j in range(5):
                gap = x[i] - y[j]
                decay = (-(pace * gap).square().sum() / 2).exp()
                wave = (2 * math.pi * frequency @ gap).cos()
                expected[i, j] += (log_weight.exp() * decay * wave).detach()
    torch.testing.assert_close(kernel(x, y).to_dense().detach(), expected)
    whole = kernel(x, x).to_dense().diagonal()
    torch.testing.assert_close(kernel(x, x, diag=True), whole)


def test_planted_tones_are_found(generator):
    """Beside a line, and the weaker one too. Mutant: neighbors of the strongest alone."""
    time = torch.linspace(-1.7, 1.7, 200)
    waves = 3 * (2 * math.pi * 12 * time).cos() + 2 * (2 * math.pi * 5 * time).sin()
    y = 4 * time + waves
    found = strongest_frequencies(Points(time[:, None], y, torch.arange(200)), 2)
    assert found.abs().flatten().tolist() == pytest.approx([12, 5], abs=0.3)


def test_processes_are_trained_by_their_own_budget(generator):
    """Mutant: the networks' steps or rates."""
    train, validation = points(40, generator), points(20, generator)
    splits = Splits(train, validation)
    budget = RegressionBudget(1, process_steps=30, process_rates=(0.1, 0.2), num_looks=3)
    trained = train_regression(
        lambda: gaussian_process(splits, kernel="rbf"), splits, budget, 0, Evidence()
    )
    assert {name: len(curve) for name, curve in trained.curves.items()} == {"0.1": 3, "0.2": 3}
    mean, _ = trained.model(validation, train)
    assert (mean - validation.y).square().mean().sqrt() < 0.3
