"""Stein's identities at the reference draws: the translated programs and the bridge are right."""

import pyro.distributions as dist
import pytest
import torch

from tests.validation.oracle import oracle, with_extra_prior
from tests.validation.references import NAMES, coordinate_names, load, unconstrained
from tests.validation.stein import stein_check

# 4.5 standard errors: over 258 z-scores, right programs fail one time in some 500.
BOUND = 4.5

# For each posterior one prior that is plainly wrong, on top of the right one.
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
def test_reference_draws_are_in_the_order_of_the_program(name):
    reference = load(name)
    assert unconstrained(reference).shape == (1000, len(coordinate_names(reference)))
    assert unconstrained(reference).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_program_satisfies_steins_identities(name):
    reference = load(name)
    draws = unconstrained(reference)
    _, scores = oracle(reference)(draws)
    assert stein_check(draws, scores).worst < BOUND


@pytest.mark.parametrize("name", NAMES)
def test_wrong_prior_fails_steins_identities(name):
    reference = load(name)
    draws = unconstrained(reference)
    wrong = with_extra_prior(reference.model, *WRONG_PRIORS[name])
    _, scores = oracle(reference, wrong)(draws)
    assert stein_check(draws, scores).worst > 6


@pytest.mark.parametrize("name", ["eight_schools", "gp_regr"])
def test_dropped_log_determinant_fails_steins_identities(name):
    """Without log |d tau / d log tau| the score of a positive site is one too small."""
    reference = load(name)
    draws = unconstrained(reference)
    _, scores = oracle(reference)(draws)
    positive = torch.tensor(
        [n in {"tau", "rho", "alpha", "sigma"} for n in coordinate_names(reference)]
    )
    assert stein_check(draws, scores - positive.double()).worst > 6
