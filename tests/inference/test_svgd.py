"""Tests of bayesattn.inference.svgd and .stein: particles against loops, closed forms and descent.

Bounds on recovered moments are what exact samplers reach nineteen times in twenty: a thousand
independent draws are within .075 standard deviations in mean and 6 % in standard deviation.
"""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesattn.inference import ksd, stein
from bayesattn.inference.coordinates import Affine, identity
from bayesattn.inference.optimizers import ScheduledOptimizer
from bayesattn.inference.particle_views import WholeParticles
from bayesattn.inference.schedules import constant
from bayesattn.inference.svgd import SVGD, direction
from bayesattn.kernels import IMQ, RBF
from tests import reference

SHIFT, WIDTH = 0.075, 0.06
SGD = functools.partial(torch.optim.SGD, lr=0.05)


def correlated():
    """A Gaussian with correlations .8 and -.5, far from where particles start."""
    covariance = torch.tensor([[1.0, 0.8, 0.0], [0.8, 2.0, -0.4], [0.0, -0.4, 0.5]])
    mean = torch.tensor([1.0, -2.0, 4.0])
    pyro.sample("x", dist.MultivariateNormal(mean, covariance))


def standard(dim=2):
    pyro.sample("x", dist.Normal(0.0, 1.0).expand([dim]).to_event(1))


def categories(observed):
    """Draws from four categories, with a flat Dirichlet prior."""
    chances = pyro.sample("chances", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("row", len(observed)):
        pyro.sample("observed", dist.Categorical(chances), obs=observed)


def regression(features, response, batch=None):
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([features.shape[-1]]).to_event(1))
    with pyro.plate("row", len(response), subsample_size=batch) as rows:
        mean = features[rows] @ weight
        pyro.sample("response", dist.Normal(mean, 1.0), obs=response[rows])


def run(svgd, *args, num_steps=500, seed=0, **kwargs):
    return svgd.run(*args, num_steps=num_steps, seed=seed, progress=False, **kwargs)


# ---------------------------------------------------------------- the direction


KERNELS = {
    "RBF": (RBF(0.7), lambda x, y: torch.exp(-(x - y).square().sum() / (2 * 0.7**2))),
    "IMQ": (IMQ(0.7), lambda x, y: (1 + (x - y).square().sum() / 0.7**2) ** -0.5),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("num_particles", "dim"), [(1, 3), (2, 1), (5, 3), (7, 2)])
def test_direction_meets_loops(name, num_particles, dim, generator):
    """Mutant: a sign, the order of Gram's axes, or 1/M left out."""
    kernel, plain = KERNELS[name]
    particles = torch.randn(num_particles, dim, generator=generator)
    score = torch.randn(num_particles, dim, generator=generator)
    expected = reference.stein_direction(plain, particles.numpy(), score.numpy(), temperature=3.0)
    ours = direction(particles, score, kernel, 3.0)
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12)


@given(seed=st.integers(0, 2**16), num_particles=st.integers(1, 6), dim=st.integers(1, 4))
def test_permuting_particles_permutes_directions(seed, num_particles, dim):
    generator = torch.Generator().manual_seed(seed)
    particles = torch.randn(num_particles, dim, generator=generator)
    score = torch.randn(num_particles, dim, generator=generator)
    order = torch.randperm(num_particles, generator=generator)
    expected = direction(particles, score, IMQ())[order]
    ours = direction(particles[order], score[order], IMQ())
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_far_apart_particles_follow_their_own_scores(generator):
    particles = 1e3 * torch.arange(5.0)[:, None] * torch.ones(3)
    score = torch.randn(5, 3, generator=generator)
    torch.testing.assert_close(direction(particles, score, RBF(1.0), 2.0), score / (5 * 2.0))


def test_directions_of_several_runs_are_those_of_each(generator):
    particles = torch.randn(3, 5, 2, generator=generator)
    score = torch.randn(3, 5, 2, generator=generator)
    together = direction(particles, score, IMQ())
    alone = [direction(x, s, IMQ()) for x, s in zip(particles, score, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- steps


def test_far_apart_svgd_is_gradient_ascent_over_the_number_of_particles():
    """Particles of a standard normal at whole distances, with a kernel that does not reach."""
    start = torch.tensor([[-40.0, 0.0], [0.0, 40.0], [40.0, 0.0]])
    svgd = SVGD(
        standard, num_particles=3, kernel=RBF(0.1), optimizer=SGD, schedule=constant, metric="none"
    )
    posterior = run(svgd, num_steps=7, init={"x": start})
    torch.testing.assert_close(posterior.draws["x"][0], start * (1 - 0.05 / 3) ** 7)


@pytest.mark.parametrize("metric", ["auto", "none"])
def test_one_particle_climbs_to_the_mode(metric):
    """M = 1: plain gradient ascent, whatever the kernel and the temperature of the target."""
    start = torch.tensor([2.0, -1.0])
    svgd = SVGD(
        standard, num_particles=1, optimizer=SGD, schedule=constant, temperature=2.0, metric=metric
    )
    posterior = run(svgd, num_steps=7, init={"x": start})
    torch.testing.assert_close(posterior.draws["x"][0, 0], start * (1 - 0.05 / 2) ** 7)


def test_settings_are_stored_as_given():
    kernel, schedule = RBF(), constant
    svgd = SVGD(
        standard, num_particles=7, kernel=kernel, optimizer=SGD, schedule=schedule, temperature=2
    )
    assert (svgd.num_particles, svgd.particle_plate, svgd.temperature) == (7, None, 2)
    assert svgd.kernel is kernel
    assert svgd.optimizer is SGD
    assert svgd.schedule is schedule


def test_temperature_may_be_a_function_of_progress():
    """An annealed run ends where an untempered one ends."""
    svgd = SVGD(standard, num_particles=50, temperature=lambda t: 1 + 9 * (1 - t) ** 4)
    draws = run(svgd, num_steps=400).draws["x"][0]
    torch.testing.assert_close(draws.std(0), torch.ones(2), rtol=WIDTH, atol=0)


def test_twice_the_temperature_widens_by_the_root_of_two():
    draws = run(SVGD(standard, temperature=2.0), num_steps=400).draws["x"][0]
    torch.testing.assert_close(draws.std(0), torch.full((2,), math.sqrt(2)), rtol=WIDTH, atol=0)


def test_temperature_is_checked_as_the_run_goes():
    with pytest.raises(ValueError, match=r"temperature\(0.5\) must be a positive number, got 0"):
        run(SVGD(standard, temperature=lambda t: float(t < 0.5)), num_steps=4)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(torch.optim.SGD, lr=0.3, momentum=0.9),
        functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0),
        functools.partial(torch.optim.RMSprop, lr=0.05),
        functools.partial(torch.optim.Adagrad, lr=0.5),
        functools.partial(torch.optim.Adadelta, lr=1.0),
        functools.partial(torch.optim.NAdam, lr=0.1),
    ],
    ids=lambda make: make.func.__name__,
)
def test_any_optimizer_works_also_across_changes_of_the_metric(make):
    """Adagrad makes its state when it is made, so that state cannot merely be dropped."""
    svgd = SVGD(standard, num_particles=20, optimizer=make, metric="full")
    draws = run(svgd, num_steps=300).draws["x"][0]
    torch.testing.assert_close(draws.std(0), torch.ones(2), rtol=0.15, atol=0)
    assert draws.mean(0).abs().max() < 0.1


# ---------------------------------------------------------------- recovery


def moments_of(draws):
    return draws.mean(0), draws.T.cov()


def covers_the_gaussian(draws):
    covariance = torch.tensor([[1.0, 0.8, 0.0], [0.8, 2.0, -0.4], [0.0, -0.4, 0.5]])
    sd = covariance.diagonal().sqrt()
    mean, found = moments_of(draws)
    shift = (mean - torch.tensor([1.0, -2.0, 4.0])) / sd
    error = (found - covariance) / (sd[:, None] * sd)
    return bool(shift.abs().max() < SHIFT and error.abs().max() < 2 * WIDTH)


@pytest.mark.parametrize("metric", ["full", "diagonal", "none"])
def test_a_correlated_gaussian_is_recovered(metric):
    posterior = run(SVGD(correlated, metric=metric), num_steps=800)
    assert covers_the_gaussian(posterior.draws["x"][0])


def test_untrained_particles_do_not_cover_the_gaussian():
    assert not covers_the_gaussian(run(SVGD(correlated), num_steps=1).draws["x"][0])


def test_a_simplex_is_recovered():
    """Dirichlet(1 + counts), skewed; default settings, within 1500 steps."""
    observed = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 3])
    posterior = run(SVGD(categories), observed, num_steps=1000)
    draws = posterior.draws["chances"][0]
    exact = dist.Dirichlet(torch.bincount(observed) + 1.0)
    sd = exact.variance.sqrt()
    assert ((draws.mean(0) - exact.mean) / sd).abs().max() < SHIFT
    torch.testing.assert_close(draws.std(0), sd, rtol=0.1, atol=0)
    torch.testing.assert_close(draws.sum(-1), torch.ones(100))
    untrained = run(SVGD(categories), observed, num_steps=1).draws["chances"][0]
    assert ((untrained.mean(0) - exact.mean) / sd).abs().max() > SHIFT


def regression_data(generator, count):
    features = torch.randn(count, 3, generator=generator)
    noise = torch.randn(count, generator=generator)
    return features, features @ torch.tensor([1.0, -2.0, 0.5]) + noise


def test_minibatches_and_full_batches_agree(generator):
    """The noise of minibatches leaves the moments within what 100 exact draws would have.

    A subsample that is drawn once for all would move the mean by some two standard deviations.
    """
    features, response = regression_data(generator, 500)
    precision = features.T @ features + torch.eye(3)
    mean = torch.linalg.solve(precision, features.T @ response)
    sd = torch.linalg.inv(precision).diagonal().sqrt()
    full = run(SVGD(regression, num_particles=50), features, response, num_steps=400)
    small = SVGD(regression, num_particles=50)
    part = run(small, features, response, num_steps=1200, batch=100)
    for posterior, shift, width in [(full, SHIFT, WIDTH), (part, 0.25, 0.18)]:
        draws = posterior.draws["weight"][0]
        assert ((draws.mean(0) - mean) / sd).abs().max() < shift
        torch.testing.assert_close(draws.std(0), sd, rtol=width, atol=0)


def test_laplace_coordinates_recover_from_units_of_any_size():
    def scaled():
        pyro.sample(
            "x", dist.Normal(torch.tensor([0.0, 1e5]), torch.tensor([1e-4, 1e3])).to_event(1)
        )

    draws = run(SVGD(scaled, coordinates="laplace"), num_steps=300).draws["x"][0]
    sd = torch.tensor([1e-4, 1e3])
    assert ((draws.mean(0) - torch.tensor([0.0, 1e5])) / sd).abs().max() < SHIFT
    torch.testing.assert_close(draws.std(0), sd, rtol=WIDTH, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_data_are_enough(dtype, generator):
    features, response = (part.to(dtype) for part in regression_data(generator, 40))
    posterior = run(SVGD(regression, num_particles=30), features, response, num_steps=300)
    draws = posterior.draws["weight"][0].double()
    wide = features.double()
    mean = torch.linalg.solve(wide.T @ wide + torch.eye(3), wide.T @ response.double())
    sd = torch.linalg.inv(wide.T @ wide + torch.eye(3)).diagonal().sqrt()
    assert posterior.unconstrained.dtype == torch.float32
    assert ((draws.mean(0) - mean) / sd).abs().max() < (0.1 if dtype == torch.float32 else 0.5)


# ---------------------------------------------------------------- runs and starts


def test_runs_together_are_the_runs_alone(generator):
    starts = torch.randn(3, 11, 2, generator=generator)
    svgd = SVGD(standard, num_particles=11)
    together = run(svgd, num_steps=120, num_runs=3, init={"x": starts.flatten(0, 1)})
    for index in range(3):
        alone = run(svgd, num_steps=120, init={"x": starts[index]})
        torch.testing.assert_close(together.draws["x"][index], alone.draws["x"][0])
        for name, curve in together.optimization.items():
            torch.testing.assert_close(curve[index], alone.optimization[name][0])


def test_chunks_change_nothing():
    whole = run(SVGD(correlated, num_particles=11), num_steps=60)
    parts = run(SVGD(correlated, num_particles=11, chunk_size=4), num_steps=60)
    torch.testing.assert_close(whole.draws["x"], parts.draws["x"])


def test_first_of_several_runs_is_the_one_of_a_single_run():
    svgd = SVGD(standard, num_particles=5)
    several, one = run(svgd, num_steps=20, num_runs=2), run(svgd, num_steps=20)
    torch.testing.assert_close(several.draws["x"][:1], one.draws["x"])
    assert not torch.equal(several.draws["x"][0], several.draws["x"][1])


def test_particles_at_one_place_separate():
    """Mutant: equal starts left as they are have equal directions forever."""
    posterior = run(SVGD(standard), num_steps=300, init={"x": torch.tensor([3.0, -1.0])})
    draws = posterior.draws["x"][0]
    assert len(draws.unique(dim=0)) == 100
    torch.testing.assert_close(draws.std(0), torch.ones(2), rtol=WIDTH, atol=0)


def test_other_coordinates_leave_the_particles_and_the_state_of_what_is_outside(generator):
    """Mutants: dropping all of the optimizer's state; working coordinates left as they were."""
    make = functools.partial(ScheduledOptimizer, torch.optim.Adam, constant)
    particles = torch.randn(1, 5, 2, generator=generator)
    state = stein.init(particles, torch.ones(1, 3), identity(torch.zeros(1, 2)), make)
    for tensor in (state.working, state.outside):
        tensor.grad = torch.ones_like(tensor)
    state.optimizer.step(0.0)
    before = state.particles
    metric = Affine(torch.tensor([[1.0, -2.0]]), torch.tensor([[[2.0, 0.0], [1.0, 0.5]]]))
    moved = stein.remeasured(state, metric)
    torch.testing.assert_close(moved.particles, before)
    kept = moved.optimizer._optimizer.state
    assert state.outside in kept
    assert state.working not in kept


def test_statistics_of_particles_are_those_of_the_last_state(generator):
    """The norm of a particle's direction in the coordinates and at the temperature of the run."""
    svgd = SVGD(standard, num_particles=7, temperature=3.0, metric="none")
    posterior = run(svgd, num_steps=10)
    particles = posterior.draws["x"][0]
    phi = direction(particles, -particles, IMQ(), 3.0)
    torch.testing.assert_close(posterior.sample_stats["stein_norm"][0], phi.norm(dim=-1))
    expected = dist.Normal(0.0, 1.0).log_prob(particles).sum(-1)
    torch.testing.assert_close(posterior.sample_stats["lp"][0], expected)
    curves = posterior.optimization
    assert set(curves) == {"log_density", "stein_norm", "bandwidth"}
    assert all(curve.shape == (1, 10) for curve in curves.values())


def test_graphs_are_recorded_once_for_all_runs():
    svgd = SVGD(standard, num_particles=5)
    run(svgd, num_steps=3)
    before = svgd.density_settings.graphs.num_recordings
    run(svgd, num_steps=3, seed=1)
    assert svgd.density_settings.graphs.num_recordings == before


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_particles": 0}, "num_particles must be a whole number, at least 1, got 0"),
        ({"num_particles": 2.5}, "num_particles must be a whole number"),
        ({"num_particles": 3, "particle_plate": "head"}, "not both"),
        ({"outside": "ignore"}, "outside must be one of 'optimize', 'fixed'"),
        ({"outside": "fixed"}, "goes with particle_plate"),
        ({"metric": "round"}, "metric must be one of"),
        ({"coordinates": "polar"}, "coordinates must be one of"),
        ({"coordinates": "laplace", "particle_plate": "head"}, "mixes the slices"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS evaluates the objective by itself"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, "must be a function from a list"),
        ({"optimizer": lambda tensors: None}, "returned None"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.usefixtures("unchecked_types")
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SVGD(standard, **settings)


def test_a_full_metric_needs_more_particles_than_dimensions():
    with pytest.raises(ValueError, match="needs more particles than the 2 dimensions of one"):
        run(SVGD(standard, num_particles=2, metric="full"), num_steps=3)


def test_no_particles_are_refused():
    with pytest.raises(ValueError, match="at least one particle, got none"):
        SVGD(standard).init(torch.zeros(1, 0, 2), torch.zeros(1, 0), identity(torch.zeros(1, 2)))


def test_one_step_by_hand_is_one_step_of_a_run(generator):
    """The pure step under run: the same start, the same move."""
    start = torch.randn(5, 2, generator=generator)
    svgd = SVGD(standard, num_particles=5)
    state = svgd.init(start[None], torch.zeros(1, 0), identity(torch.zeros(1, 2)))
    stepper = svgd.stepper(svgd.log_density(), WholeParticles(1))
    state, info = svgd.step(state, stepper, generator)
    posterior = run(svgd, num_steps=1, init={"x": start})
    torch.testing.assert_close(state.particles, posterior.unconstrained)
    torch.testing.assert_close(info.stein_norm[:, None], posterior.optimization["stein_norm"])


def test_it_stops_once_the_discrepancy_is_small():
    """The figure is that of ksd(), and larger at the look before."""
    svgd = SVGD(standard, num_particles=30)
    posterior = run(svgd, num_steps=2000, stop_below_ksd=0.04, check_every=10)
    assert posterior.attrs["is_settled"] == 1
    done = posterior.attrs["num_steps"]
    assert 10 < done < 2000
    assert ksd(posterior).ksd < 0.04
    before = run(svgd, num_steps=2000, stop_below_ksd=1e-9, check_every=10)
    assert before.attrs["num_steps"] == 2000
    assert "is_settled" not in before.attrs


def test_a_stopping_rule_needs_scores_of_whole_networks():
    with pytest.raises(ValueError, match="stop_below_ksd must be a positive number, got 0"):
        run(SVGD(standard), num_steps=3, stop_below_ksd=0)
