"""A covariance that cannot be factorized at some particles leaves the others as they are."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesattn.inference import (
    NUTS,
    SVGD,
    ConvergenceWarning,
    DensitySettings,
    LogDensity,
    NonFiniteError,
)
from bayesattn.inference.recording import record

# Correlation of a bivariate normal; beyond ±1 there is none.
INSIDE, OUTSIDE = [0.3, -0.6, 0.9], 1.5


def correlated(y, *, wide=1.0):
    """A program whose covariance is indefinite over a part of the line."""
    rho = pyro.sample("rho", dist.Normal(0.0, wide))
    one = torch.ones_like(rho)
    covariance = torch.stack([torch.stack([one, rho]), torch.stack([rho, one])])
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance), obs=y)


def by_hand(rho, y, wide=1.0):
    determinant = 1 - rho**2
    quadratic = y.square().sum(-1) - 2 * rho * y.prod(-1)
    of_each = (
        -quadratic / (2 * determinant) - determinant.log() / 2 - torch.tensor(2 * torch.pi).log()
    )
    return of_each.sum() + dist.Normal(0.0, wide).log_prob(rho)


@pytest.fixture
def y(generator):
    common = torch.randn(20, 1, generator=generator)
    return common + torch.randn(20, 2, generator=generator) / 2


@pytest.mark.parametrize("mode", ["record", pytest.param("inductor", marks=pytest.mark.compile)])
def test_only_the_rows_that_fail_are_not_finite(y, mode):
    rows = torch.tensor([*INSIDE[:2], OUTSIDE, INSIDE[2]])[:, None].requires_grad_()
    density = LogDensity(correlated, y, settings=DensitySettings(compile=mode))
    value, score = density.value_and_score(rows.detach())
    kept = [0, 1, 3]
    expected = torch.stack([by_hand(rows[i, 0], y) for i in kept])
    (gradient,) = torch.autograd.grad(expected.sum(), rows)
    torch.testing.assert_close(value[kept], expected.detach())
    torch.testing.assert_close(score[kept], gradient[kept])
    assert value[2].isnan()
    assert score[2].isnan().all()


def test_hessians_too(y):
    rows = torch.tensor([[INSIDE[0]], [-OUTSIDE]])
    _, _, hessian = LogDensity(correlated, y).value_score_and_hessian(rows)
    expected = torch.autograd.functional.hessian(lambda rho: by_hand(rho, y), rows[0, 0])
    torch.testing.assert_close(hessian[0, 0, 0], expected)
    assert hessian[1].isnan().all()


@pytest.mark.parametrize("coordinates", ["raw", "laplace"])
def test_searches_and_trajectories_reject_what_has_no_density(y, coordinates):
    """Half of the starts of the search lie outside, and long trajectories leave all the time."""
    nuts = NUTS(correlated, step_size=1.0, coordinates=coordinates)
    start = {"rho": torch.zeros(1)} if coordinates == "raw" else None
    with pytest.warns(ConvergenceWarning, match="diverged"):
        posterior = nuts.run(
            y, wide=10.0, warmup_steps=50, num_samples=100, seed=0, progress=False, init=start
        )
    rho = posterior.draws["rho"]
    assert rho.abs().max() < 1
    assert rho.std() > 0


def test_particles_that_leave_are_reported_with_what_there_was(y):
    svgd = SVGD(correlated, optimizer=lambda particles: torch.optim.SGD(particles, lr=1.0))
    with pytest.raises(NonFiniteError, match="y"):
        svgd.run(y, num_steps=50, seed=0, progress=False)


@pytest.mark.parametrize(
    ("operation", "inverse"),
    [
        (torch.linalg.cholesky, False),
        (torch.linalg.inv, True),
        (lambda a: torch.linalg.solve(a, torch.eye(2)), True),
        (lambda a: torch.linalg.solve(a, torch.ones(2)), True),
    ],
)
def test_factors_inverses_and_solutions(operation, inverse):
    good = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    bad = torch.zeros(2, 2) if inverse else -good
    rows = torch.stack([good, bad, good + torch.eye(2)])
    function = torch.func.vmap(operation)
    (found,) = record(lambda a: (function(a),), (rows,), num_batched=1)(rows)
    torch.testing.assert_close(found[[0, 2]], function(rows[[0, 2]]))
    assert found[1].isnan().all()


def test_data_that_fail_for_every_particle_are_an_error_that_says_why():
    rows, data = torch.ones(3, 2), -torch.eye(2)

    def function(rows, data):
        return (torch.func.vmap(lambda row: torch.linalg.cholesky(data) @ row)(rows),)

    graph = record(function, (rows, data), num_batched=1)
    with pytest.raises(RuntimeError, match="not positive-definite"):
        graph(rows, data)
