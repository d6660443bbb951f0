"""LogDensity on the eight reference posteriors: Stein's identities, and Pyro's own sums."""

import pyro.distributions as dist
import pytest
import torch

from bayesattn.inference.log_density import LogDensity
from tests.validation.oracle import oracle, with_extra_prior
from tests.validation.references import NAMES, coordinate_names, load, unconstrained
from tests.validation.stein import SteinCheck, stein_check

# Over some 300 z-scores, right programs exceed 4.5 standard errors one time in 500.
BOUND = 4.5

# For each posterior a factor that makes one prior plainly wrong.
WRONG_PRIORS = {
    "eight_schools": ("tau", dist.HalfNormal(1.0)),
    "kidiq": ("beta", dist.Normal(0.0, 10.0)),
    "earnings": ("beta", dist.Normal(0.0, 1.0)),
    "kilpisjarvi": ("alpha", dist.Normal(0.0, 30.0)),
    "sblrc": ("beta", dist.Normal(0.0, 0.03)),
    "mesquite": ("beta", dist.Normal(0.0, 1.0)),
    "gauss_mix": ("theta", dist.Beta(50.0, 5.0)),
    "gp_regr": ("rho", dist.Gamma(25.0, 2.0)),
}


@pytest.mark.parametrize("name", NAMES)
def test_density_satisfies_steins_identities(name):
    reference = load(name)
    assert checked(LogDensity(reference.model, *reference.data), reference.draws).worst < BOUND


@pytest.mark.parametrize("name", NAMES)
def test_wrong_prior_fails_steins_identities(name):
    reference = load(name)
    wrong = with_extra_prior(reference.model, *WRONG_PRIORS[name])
    assert checked(LogDensity(wrong, *reference.data), reference.draws).worst > 6


@pytest.mark.parametrize("name", ["eight_schools", "gp_regr"])
def test_dropped_log_determinant_fails_steins_identities(name):
    """Without log |d tau / d log tau| the score of a positive site is one too small."""
    reference = load(name)
    draws = unconstrained(reference)
    _, scores = LogDensity(reference.model, *reference.data).value_and_score(draws)
    positive = [site in {"tau", "rho", "alpha", "sigma"} for site in coordinate_names(reference)]
    assert stein_check(draws, scores - torch.tensor(positive).double()).worst > 6


@pytest.mark.parametrize("name", NAMES)
def test_density_equals_pyros_sum_with_log_determinants(name):
    reference = load(name)
    draws = unconstrained(reference)[::40]
    values, scores = LogDensity(reference.model, *reference.data).value_and_score(draws)
    expected_values, expected_scores = oracle(reference)(draws)
    torch.testing.assert_close(values, expected_values, rtol=1e-10, atol=1e-9)
    size = expected_scores.abs().amax(dim=0).clamp(min=1.0)
    torch.testing.assert_close(scores / size, expected_scores / size, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_bijections_meet_the_reference_draws(name):
    reference = load(name)
    density = LogDensity(reference.model, *reference.data)
    particles = density.unconstrain(reference.draws)
    torch.testing.assert_close(particles, unconstrained(reference), rtol=1e-12, atol=1e-12)
    assert [site.name for site in density.sites] == list(reference.draws)
    for site, value in density.constrain(particles).items():
        torch.testing.assert_close(value, reference.draws[site], rtol=1e-9, atol=1e-12)


def checked(density: LogDensity, draws: dict[str, torch.Tensor]) -> SteinCheck:
    particles = density.unconstrain(draws)
    return stein_check(particles, density.value_and_score(particles)[1])
