"""Tests of bayesattn.inference.initialization: starts of every kind, and those that do not fit."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import (
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)

from bayesattn.inference.initialization import initial_values, set_apart
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.posterior import Posterior


def program(observed):
    location = pyro.sample("location", dist.Normal(5.0, 2.0).expand([3]).to_event(1))
    scale = pyro.sample("scale", dist.Gamma(4.0, 2.0))
    kind = pyro.sample("kind", dist.Bernoulli(0.3))
    with pyro.plate("row", len(observed)):
        pyro.sample("observed", dist.Normal(location.sum() + kind, scale), obs=observed)


@pytest.fixture
def density():
    return LogDensity(program, torch.linspace(-1.0, 1.0, 7))


def values(density, count, init, generator):
    return density.constrain(initial_values(density, count, init, generator))


def test_by_default_starts_are_uniform_on_the_unconstrained_scale(density, generator):
    starts = initial_values(density, 2000, None, generator)
    assert starts.abs().max() < 2
    assert starts.mean(0).abs().max() < 4 * (4 / 12**0.5) / 2000**0.5
    assert (starts.std(0) - 4 / 12**0.5).abs().max() < 0.05


def test_one_value_is_given_to_all(density, generator):
    init = {"location": [1.0, 2.0, 3.0], "scale": 2}
    found = values(density, 5, init, generator)
    torch.testing.assert_close(found["location"], torch.tensor([[1.0, 2.0, 3.0]] * 5))
    torch.testing.assert_close(found["scale"], torch.full((5,), 2.0))


def test_many_values_go_to_one_each(density, generator):
    init = {"location": torch.randn(5, 3, generator=generator), "scale": torch.arange(1.0, 6.0)}
    found = values(density, 5, init, generator)
    torch.testing.assert_close(found["location"], init["location"])
    torch.testing.assert_close(found["scale"], init["scale"])


@pytest.mark.parametrize(
    "strategy",
    [
        init_to_mean,
        init_to_mean(),
        init_to_median(num_samples=7),
        init_to_feasible,
        init_to_sample,
        init_to_uniform(radius=0.1),
        init_to_value(values={"scale": torch.tensor(2.0)}),
    ],
    ids=["mean", "mean()", "median", "feasible", "sample", "uniform", "value"],
)
def test_pyros_strategies_are_taken(strategy, density, generator):
    """Discrete sites are summed out, so no strategy is asked about them."""
    starts = initial_values(density, 4, strategy, generator)
    assert starts.shape == (4, 4)
    assert starts.isfinite().all()


def test_strategies_are_applied_by_site(density, generator):
    found = values(density, 3, init_to_mean, generator)
    torch.testing.assert_close(found["location"], torch.full((3, 3), 5.0))
    torch.testing.assert_close(found["scale"], torch.full((3,), 2.0))
    found = values(density, 3, init_to_sample, generator)
    assert len(found["location"].unique(dim=0)) == 3


def posterior_of(count, chains=1):
    return Posterior(
        {
            "location": torch.arange(3.0 * count * chains).reshape(chains, count, 3),
            "scale": 1 + torch.arange(1.0 * count * chains).reshape(chains, count),
        },
        method="test",
        draws_are="particles",
    )


def test_draws_of_a_posterior_are_taken_without_replacement(density, generator):
    found = values(density, 6, posterior_of(3, chains=2), generator)
    assert sorted(found["scale"].round().tolist()) == [1, 2, 3, 4, 5, 6]
    rows = found["scale"] - 1
    torch.testing.assert_close(found["location"], 3 * rows[:, None] + torch.arange(3.0))


def test_draws_of_a_posterior_are_taken_again_once_all_were(density, generator):
    found = values(density, 7, posterior_of(3), generator)
    counts = torch.bincount(found["scale"].round().long())[1:]
    assert sorted(counts.tolist()) == [2, 2, 3]


def test_heads_are_put_together_into_networks(generator):
    def heads():
        with pyro.plate("head", 2):
            pyro.sample("weight", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("bias", dist.Normal(0.0, 1.0))

    posterior = Posterior(
        {"weight": torch.arange(12.0).reshape(2, 2, 3)},
        method="test",
        draws_are="heads",
        point_estimates={"bias": torch.tensor([7.0, 8.0])},
        attrs={"particle_plate": "head", "particle_plate_axes": {"weight": 0}},
    )
    found = values(LogDensity(heads), 2, posterior, generator)
    chains = (found["bias"] - 7).long()
    assert torch.equal(found["weight"], posterior.draws["weight"][chains])


def test_equal_particles_are_set_apart(generator):
    """A hundredth of the spread of each coordinate; particles that differ are left alone."""
    distinct = torch.randn(5, 2, generator=generator)
    assert set_apart(distinct, generator) is distinct
    assert set_apart(distinct[:1], generator) is not None
    particles = torch.tensor([[0.0, 5.0], [0.0, 5.0], [1000.0, 5.0]])
    apart = set_apart(particles, generator)
    assert len(apart.unique(dim=0)) == 3
    moved = (apart - particles).abs()
    assert moved[:, 0].max() > 1
    assert moved.max(0).values.tolist() < [40.0, 0.05]


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"scale": 1.0}, r"init must give values for the sites \['location', 'scale'\]"),
        ({"scale": 1.0, "location": [1.0, 2.0]}, r"init\['location'\] must have shape \(3,\), or"),
        ({"scale": -1.0, "location": [1.0, 2.0, 3.0]}, "init does not fit.* supports.*scale"),
        ({"scale": 0.0, "location": [1.0, 2.0, 3.0]}, "init does not fit.* supports.*scale"),
        ("median", "init must be a Posterior, a mapping .* got str"),
        (lambda site: torch.zeros(5), r"init\['location'\] must have shape \(3,\), got \(5,\)"),
    ],
    ids=["missing", "shape", "support", "end", "kind", "strategy"],
)
@pytest.mark.usefixtures("unchecked_types")
def test_starts_that_do_not_fit_are_refused(init, message, density, generator):
    with pytest.raises(ValueError, match=message):
        initial_values(density, 4, init, generator)


def test_posteriors_that_do_not_fit_are_refused(density, generator):
    posterior = posterior_of(3)
    lacking = posterior.replace(draws={"scale": posterior.draws["scale"]})
    with pytest.raises(ValueError, match=r"the posterior lacks \['location'\]"):
        initial_values(density, 2, lacking, generator)
    wrong = posterior.replace(draws=posterior.draws | {"location": torch.zeros(1, 3, 2)})
    with pytest.raises(ValueError, match=r"init\['location'\] must have shape \(3,\), got \(2,\)"):
        initial_values(density, 2, wrong, generator)
