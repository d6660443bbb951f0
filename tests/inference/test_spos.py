"""SPOS: the law of its chains, its noise, and what it shares with SVGD."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesattn.inference import NUTS, SPOS, SVGD
from bayesattn.inference.coordinates import Affine, identity
from bayesattn.inference.langevin import SPOSState, diffused
from bayesattn.inference.particle_views import WholeParticles
from bayesattn.kernels import IMQ, RBF, Blocks, Linear, Preconditioned

QUIET = {"seed": 0, "progress": False}
# Mean and standard deviation of the logarithm of a Gamma(3, 1) variable: psi(3), psi'(3)^(1/2).
LOG_GAMMA_MEAN, LOG_GAMMA_SD = 0.92278, 0.62838


def normal():
    pyro.sample("x", dist.Normal(torch.zeros(()), 1.0))


def skewed():
    pyro.sample("x", dist.Gamma(torch.tensor(3.0), 1.0))


def slopes(data):
    """Three correlated coefficients in a plate, and one beside them."""
    with pyro.plate("head", 3):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    design = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.5]])
    with pyro.plate("row", 3):
        pyro.sample("y", dist.Normal(design @ slope + level, 0.7), obs=data)


SLOPES_DATA = torch.tensor([1.0, -0.5, 0.3])


def exact_slopes():
    """Mean and covariance of the posterior of ``slopes``: slopes first, then level."""
    design = torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.5, 1.0]])
    covariance = torch.linalg.inv(torch.eye(4) + design.mT @ design / 0.49)
    return covariance @ design.mT @ SLOPES_DATA.to(design) / 0.49, covariance


def sampled(model, num_particles, langevin, noise, *, step_size=0.02, num_samples=300):
    """Sixteen chains, in as many clouds as that takes, with nothing measured from the particles."""
    routine = SPOS(
        model,
        num_particles=num_particles,
        noise=noise,
        langevin=langevin,
        step_size=step_size,
        kernel=RBF(1.0),
        metric="none",
    )
    length = {"warmup_steps": 300, "num_samples": num_samples, "num_runs": 16 // num_particles}
    return routine.run(**length, **QUIET).unconstrained


@pytest.mark.parametrize("num_particles", [1, 2, 8])
@pytest.mark.parametrize("langevin", [pytest.param(1.0, marks=pytest.mark.slow), 0.1])
def test_exact_noise_has_the_posterior_as_each_chains_law(num_particles, langevin):
    """Mutants: noise without K, which is far too narrow for few particles; drift without tau."""
    found = sampled(skewed, num_particles, langevin, "exact")
    assert found.shape == (16, 300, 1)
    assert abs(found.mean().item() - LOG_GAMMA_MEAN) < 0.2 * LOG_GAMMA_SD
    assert abs(math.log(found.std().item() / LOG_GAMMA_SD)) < 0.15


@pytest.mark.parametrize("langevin", [1.0, 0.1])
def test_published_noise_is_too_narrow_for_one_particle(langevin):
    found = sampled(normal, 1, langevin, "paper").std().item()
    assert found == pytest.approx((langevin / (1 + langevin)) ** 0.5, rel=0.1)


@pytest.mark.parametrize("noise", ["exact", "paper"])
def test_noise_has_its_covariance(noise, generator):
    """The linear map of the noise, found by pushing basis vectors through the step."""
    working = torch.randn(1, 5, 2, generator=generator)
    kernel, step_size, langevin = IMQ(1.3), 0.1, 0.3
    nothing = torch.zeros(1, 0)
    state = SPOSState(working, nothing, identity(working[:, 0]), kernel, nothing)

    def moved(normal):
        return diffused(
            lambda rows: (-rows.square().sum(-1) / 2, -rows),
            state,
            normal.expand(1, 5, 2),
            torch.zeros(1, 0),
            view=WholeParticles(1),
            noise=noise,
            langevin=langevin,
            step_size=step_size,
        )[0]

    still = moved(torch.zeros(1, 5, 1))
    columns = [(moved(basis[None, :, None]) - still)[0, :, 0] for basis in torch.eye(5)]
    matrix = torch.stack(columns, -1)
    expected = langevin * torch.eye(5)
    if noise == "exact":
        expected = expected + kernel.gram(working[0], working[0]) / 5
    torch.testing.assert_close(matrix @ matrix.mT, 2 * step_size * expected)


@pytest.mark.parametrize(
    "kernel",
    [
        RBF(1.3),
        IMQ(1.3),
        Linear(1.3, 0.7, torch.tensor([0.2, -0.4])),
        RBF(1.3) + Linear(1.3, 0.7, torch.tensor([0.2, -0.4])),
        Blocks([IMQ(0.8), Linear(0.9, 1.0, torch.tensor([0.3]))], [1, 1]),
        Preconditioned(
            Linear(1.3, 0.7, torch.tensor([0.2, -0.4])), torch.tensor([[2.0, 0.0], [0.5, 0.3]])
        ),
    ],
    ids=lambda kernel: type(kernel).__name__,
)
def test_exact_noise_has_the_divergence_of_its_covariance_as_drift(kernel, generator):
    """Where the score is zero, what is left of the drift; the covariance by autograd.

    Mutant: without the kernel's slope at a particle itself, which radial kernels do not have.
    """
    working = torch.randn(3, 2, generator=generator, dtype=torch.float32).double()

    def covariance(flat):
        terms = kernel(flat.reshape(3, 2))
        columns = [terms.smooth(unit.reshape(3, 2)).flatten() for unit in torch.eye(6)]
        return torch.stack(columns, -1) / 3

    jacobian = torch.autograd.functional.jacobian(covariance, working.flatten())
    divergence = torch.einsum("ijj->i", jacobian).reshape(1, 3, 2)
    nothing = torch.zeros(1, 0)
    state = SPOSState(working[None], nothing, identity(working[:1]), kernel, nothing)
    moved = diffused(
        lambda rows: (rows.sum(-1), torch.zeros_like(rows)),
        state,
        torch.zeros(1, 3, 2),
        nothing,
        view=WholeParticles(1),
        noise="exact",
        langevin=0.2,
        step_size=0.1,
    )[0]
    torch.testing.assert_close((moved - working) / 0.1, divergence)


def test_without_noise_it_is_svgd_by_plain_steps(generator):
    """After the transient; tau and the paper's noise vanish together."""
    start = {"x": torch.randn(7, generator=generator)}
    spos = SPOS(normal, num_particles=7, noise="paper", langevin=0, step_size=0.3, metric="none")
    found = spos.run(warmup_steps=0, num_samples=4, thinning=5, init=start, **QUIET)
    optimizer = functools.partial(torch.optim.SGD, lr=0.3)
    kernel = IMQ().frozen(start["x"][:, None])
    svgd = SVGD(normal, num_particles=7, kernel=kernel, optimizer=optimizer, metric="none",
                schedule=lambda _: 1.0)  # fmt: skip
    # The state that is kept is the one before its step.
    expected = svgd.run(num_steps=19, init=start, **QUIET)
    torch.testing.assert_close(found.unconstrained[:, -1], expected.unconstrained[0])


def test_heads_sample_the_joint_posterior_of_their_network():
    spos = SPOS(slopes, particle_plate="head", step_size=0.02, kernel=RBF(1.0))
    length = {"warmup_steps": 300, "num_samples": 400, "num_runs": 24}
    posterior = spos.run(SLOPES_DATA, **length, **QUIET)
    assert posterior.draws["slope"].shape == (24, 400, 3)
    assert posterior.draws["level"].shape == (24, 400)
    assert posterior.draws_are == "markov"
    assert posterior.attrs["chains_interact"] == 0
    mean, covariance = exact_slopes()
    found = posterior.unconstrained.flatten(0, 1)
    deviation = covariance.diagonal().sqrt()
    assert ((found.mean(0) - mean) / deviation).abs().max() < 0.2
    torch.testing.assert_close(
        found.T.cov() / deviation / deviation[:, None],
        covariance / deviation / deviation[:, None],
        atol=0.17,
        rtol=0,
    )


def test_what_is_outside_moves_in_units_of_its_curvature(generator):
    """Mutant: the step of the particles, at which a value this narrow does not stay finite."""

    def narrow(data):
        with pyro.plate("head", 3):
            tilt = pyro.sample("tilt", dist.Normal(0.0, 1.0))
        level = pyro.sample("level", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("row", len(data)):
            pyro.sample("y", dist.Normal(level + 0.01 * tilt.mean(), 1.0), obs=data)

    data = 0.7 + torch.randn(400, generator=generator)
    spos = SPOS(narrow, particle_plate="head", step_size=0.05)
    posterior = spos.run(data, warmup_steps=200, num_samples=200, num_runs=8, **QUIET)
    assert posterior.draws["level"].std().item() == pytest.approx(0.05, rel=0.15)


def test_what_is_outside_can_stay_fixed():
    spos = SPOS(slopes, particle_plate="head", outside="fixed")
    posterior = spos.run(SLOPES_DATA, warmup_steps=20, num_samples=3, num_runs=2, **QUIET)
    assert (posterior.draws["level"] == posterior.draws["level"][:, :1]).all()
    assert not (posterior.draws["slope"][:, 1:] == posterior.draws["slope"][:, :1]).any()


def test_each_particle_is_a_chain_with_its_log_density():
    spos = SPOS(slopes, num_particles=7)
    posterior = spos.run(SLOPES_DATA, warmup_steps=20, num_samples=5, num_runs=2, **QUIET)
    assert posterior.unconstrained.shape == (14, 5, 4)
    assert posterior.attrs["chains_interact"] == 1
    assert posterior.attrs["num_steps"] == 70
    density = spos.log_density(SLOPES_DATA)
    values, _ = density.value_and_score(posterior.unconstrained.flatten(0, 1))
    torch.testing.assert_close(posterior.sample_stats["lp"].flatten(), values)
    assert posterior.optimization["bandwidth"].shape == (14, 70)
    # Of one cloud they are the same curve, and frozen after the transient.
    assert (
        posterior.optimization["bandwidth"][0, 10:] == posterior.optimization["bandwidth"][6, -1]
    ).all()


def test_a_seed_says_all_and_no_state_is_left():
    spos = SPOS(slopes, num_particles=3)
    length = {"warmup_steps": 10, "num_samples": 3, "progress": False}
    first, again, other = (spos.run(SLOPES_DATA, seed=s, **length) for s in (1, 1, 2))
    assert torch.equal(first.unconstrained, again.unconstrained)
    assert not torch.equal(first.unconstrained, other.unconstrained)


def test_graphs_are_shared_between_runs():
    spos = SPOS(slopes, num_particles=3)
    length = {"warmup_steps": 10, "num_samples": 3, "progress": False}
    spos.run(SLOPES_DATA, seed=1, **length)
    count = spos.density_settings.graphs.num_recordings
    spos.run(SLOPES_DATA, seed=2, **length)
    assert spos.density_settings.graphs.num_recordings == count


def test_metric_is_that_of_the_transient(generator):
    """Badly scaled coordinates are sampled as well as good ones."""

    def uneven():
        pyro.sample("x", dist.Normal(torch.zeros(2), torch.tensor([0.01, 100.0])).to_event(1))

    spos = SPOS(uneven, num_particles=20, metric="full")
    scaled = Affine(torch.zeros(2), torch.tensor([0.01, 100.0]))
    start = {"x": scaled.apply(torch.randn(20, 2, generator=generator))}
    found = spos.run(warmup_steps=400, num_samples=200, init=start, **QUIET).unconstrained
    ratio = found.flatten(0, 1).std(0) / scaled.scale
    assert (ratio.log().abs() < 0.2).all()


@pytest.mark.slow
def test_particles_agree_with_nuts_on_a_regression(generator):
    design = torch.randn(101, 3, generator=generator)
    target = design @ torch.tensor([1.0, -2.0, 0.5]) + 0.5 * torch.randn(101, generator=generator)

    def model(design, target):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        noise = pyro.sample("noise", dist.HalfNormal(torch.ones(())))
        with pyro.plate("row", len(design)):
            pyro.sample("target", dist.Normal(design @ weight, noise), obs=target)

    nuts = NUTS(model).run(design, target, warmup_steps=200, num_samples=1000, **QUIET)
    spos = SPOS(model, num_particles=20)
    found = spos.run(design, target, warmup_steps=600, num_samples=300, **QUIET)
    for site, mean in nuts.mean().items():
        assert ((found.mean()[site] - mean).abs() < 0.2 * nuts.std()[site]).all()
        assert ((found.std()[site] / nuts.std()[site]).log().abs() < 0.15).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": "none"}, "noise must be one of 'exact', 'paper', got 'none'"),
        ({"step_size": 0}, "step_size must be a positive number, got 0"),
        ({"langevin": -1.0}, r"langevin must be a positive number, got -1\.0"),
        ({"outside": "fixed"}, "outside='fixed' goes with particle_plate"),
        ({"num_particles": 0}, "num_particles must be a whole number, at least 1, got 0"),
        ({"num_particles": 3, "particle_plate": "head"}, "not both: got 3 and 'head'"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SPOS(slopes, **settings)


def test_bad_lengths_are_refused():
    with pytest.raises(ValueError, match="num_samples must be a whole number, at least 1, got 0"):
        SPOS(normal).run(warmup_steps=1, num_samples=0)
    with pytest.raises(ValueError, match="thinning must be a whole number, at least 1, got 0"):
        SPOS(normal).run(warmup_steps=1, num_samples=1, thinning=0)
