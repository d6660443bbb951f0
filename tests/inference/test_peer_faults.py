"""Faults that Stein samplers elsewhere have shown, each on a target whose answer is known.

Latent sites that are mixed up, log-determinants that are dropped, instances that share their state,
a repulsion that attracts. The answers are quadrature and closed forms; NUTS is held to them too.
"""

import math
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import digamma, polygamma
from torch import Tensor

from bayesattn.inference import NUTS, SVGD
from bayesattn.inference.coordinates import identity
from bayesattn.inference.particle_views import WholeParticles
from bayesattn.inference.stein import direction
from bayesattn.kernels import IMQ, RBF
from tests.validation.scores import effective_sample_size


class Moments(NamedTuple):
    """Exact mean and standard deviation of each unconstrained coordinate."""

    mean: Tensor
    sd: Tensor


def regression(features, response):
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([features.shape[-1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("row", len(response)):
        pyro.sample("response", dist.Normal(features @ weight, sigma), obs=response)


def logistic_regression(features, label):
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([features.shape[-1]]).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(label)):
        pyro.sample("label", dist.Bernoulli(logits=features @ weight + bias), obs=label)


def regression_data():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(40, 3, generator=generator)
    noise = 0.45 * torch.randn(40, generator=generator)
    return features, features @ torch.tensor([1.0, -2.0, 0.5]) + noise


def logistic_data():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(60, 2, generator=generator)
    logits = features @ torch.tensor([1.0, -2.5]) + 0.5
    return features, torch.bernoulli(torch.sigmoid(logits), generator=generator)


def regression_moments(features, response) -> Moments:
    """A grid over log sigma; given sigma, the weights are Gaussian and y ~ N(0, s^2 I + X X^T)."""
    count, dim = features.shape
    log_sigma = torch.linspace(-2.5, 1.0, 2001)
    variance = (2 * log_sigma).exp()[:, None, None]
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(count), variance * torch.eye(count) + features @ features.T
    )
    log_weights = marginal.log_prob(response) - variance[:, 0, 0] / 2 + log_sigma
    covariance = torch.linalg.inv(features.T @ features / variance + torch.eye(dim))
    mean = (covariance @ (features.T @ response / variance[:, 0])[..., None])[..., 0]
    spread = torch.cat([covariance.diagonal(dim1=1, dim2=2), torch.zeros(2001, 1)], 1)
    means = torch.cat([mean, log_sigma[:, None]], 1)
    return weighted_moments(log_weights, means, spread + means**2)


def logistic_moments(features, label) -> Moments:
    """A grid over all three coordinates."""
    axis = torch.linspace(-5.0, 5.0, 51)
    points = torch.cartesian_prod(axis, axis, axis)
    logits = points[:, :2] @ features.T + points[:, 2:]
    log_likelihood = (label * logits - torch.nn.functional.softplus(logits)).sum(-1)
    log_weights = log_likelihood - points.square().sum(-1) / 2
    return weighted_moments(log_weights, points, points**2)


def weighted_moments(log_weights, means, seconds) -> Moments:
    weights = torch.softmax(log_weights, 0)
    mean = weights @ means
    return Moments(mean, (weights @ seconds - mean**2).sqrt())


TARGETS = {
    "regression": (regression, regression_data, regression_moments),
    "logistic": (logistic_regression, logistic_data, logistic_moments),
}


def target(name):
    model, make_data, moments = TARGETS[name]
    data = make_data()
    return model, data, moments(*data)


def is_recovered(particles: Tensor, exact: Moments) -> bool:
    """Means within a tenth of a standard deviation, standard deviations within a tenth."""
    shift = (particles.mean(0) - exact.mean) / exact.sd
    ratio = particles.std(0) / exact.sd
    return bool((shift.abs() < 0.1).all() and ((ratio - 1).abs() < 0.1).all())


@pytest.mark.parametrize("name", TARGETS)
def test_sites_keep_their_own_entries(name):
    """Default settings; the particles that a site-major packing would give fail the same bound."""
    model, data, exact = target(name)
    posterior = SVGD(model).run(*data, num_steps=1500, seed=0, progress=False)
    particles = posterior.unconstrained[0]
    assert is_recovered(particles, exact)
    first = posterior.draws["weight"].shape[-1]
    mixed = torch.cat([particles[:, :first].flatten(), particles[:, first:].flatten()])
    assert not is_recovered(mixed.reshape(particles.shape), exact)


@pytest.mark.parametrize("name", TARGETS)
def test_untrained_particles_are_not_recovered(name):
    model, data, exact = target(name)
    posterior = SVGD(model).run(*data, num_steps=1, seed=0, progress=False)
    assert not is_recovered(posterior.unconstrained[0], exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_nuts_meets_the_same_answer(name):
    """Means within four Monte Carlo standard errors of quadrature."""
    model, data, exact = target(name)
    posterior = NUTS(model).run(*data, warmup_steps=300, num_samples=500, seed=0, progress=False)
    draws = posterior.unconstrained
    size = effective_sample_size(draws)
    assert size.min() > 100
    error = (draws[0].mean(0) - exact.mean) / exact.sd
    assert (error.abs() * size.sqrt() < 4).all()
    assert ((draws[0].std(0) / exact.sd - 1).abs() < 4 / (2 * size).sqrt()).all()


def gamma_prior():
    pyro.sample("rate", dist.Gamma(3.0, 1.0))


def gamma_poisson(counts):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("count_index", len(counts)):
        pyro.sample("count", dist.Poisson(rate), obs=counts)


def beta_bernoulli(outcomes):
    chance = pyro.sample("chance", dist.Beta(2.0, 1.0))
    with pyro.plate("trial", len(outcomes)):
        pyro.sample("outcome", dist.Bernoulli(chance), obs=outcomes)


def log_gamma_moments(shape, rate) -> Moments:
    """Of log x for x ~ Gamma(shape, rate)."""
    return moments_of(digamma(shape) - math.log(rate), polygamma(1, shape))


def logit_beta_moments(a, b) -> Moments:
    """Of logit x for x ~ Beta(a, b)."""
    return moments_of(digamma(a) - digamma(b), polygamma(1, a) + polygamma(1, b))


def moments_of(mean, variance) -> Moments:
    return Moments(*torch.tensor([[mean], [np.sqrt(variance)]], dtype=torch.float64))


CONJUGATE = {
    "gamma prior": (gamma_prior, (), log_gamma_moments(3.0, 1.0), 3.0),
    "gamma posterior": (
        gamma_poisson,
        (torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64),),
        log_gamma_moments(7.0, 4.0),
        7 / 4,
    ),
    "beta posterior": (
        beta_bernoulli,
        (torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64),),
        logit_beta_moments(5.0, 2.0),
        5 / 7,
    ),
}


@pytest.mark.parametrize("name", CONJUGATE)
def test_constrained_sites_keep_their_log_determinant(name):
    """Gamma(3, 1) without it would come out as Gamma(2, 1), mean 2."""
    model, data, exact, mean = CONJUGATE[name]
    posterior = SVGD(model).run(*data, num_steps=1000, seed=0, progress=False)
    assert is_recovered(posterior.unconstrained[0], exact)
    (draws,) = posterior.draws.values()
    assert draws.mean().item() == pytest.approx(mean, rel=0.05)


def test_dropped_log_determinant_would_fail():
    dropped = log_gamma_moments(2.0, 1.0)
    exact = log_gamma_moments(3.0, 1.0)
    assert (dropped.mean - exact.mean).abs() > 0.1 * exact.sd


def test_two_instances_side_by_side_do_not_meet():
    """Stepping two problems in turns is, bit for bit, stepping each alone."""

    def begin(name, seed):
        model, make_data, _ = TARGETS[name]
        svgd = SVGD(model, num_particles=7)
        density = svgd.log_density(*make_data())
        generator = torch.Generator().manual_seed(seed)
        particles = torch.randn(1, 7, density.dim, generator=generator)
        frame = identity(torch.zeros(1, density.dim))
        state = svgd.init(particles, torch.zeros(1, 0), frame)

        stepper = svgd.stepper(density, WholeParticles(1))

        def advance(state):
            return svgd.step(state, stepper, generator)[0]

        return state, advance

    def alone(name, seed):
        state, advance = begin(name, seed)
        for _ in range(5):
            state = advance(state)
        return state.particles

    first, advance_first = begin("regression", 3)
    second, advance_second = begin("logistic", 4)
    for _ in range(5):
        first, second = advance_first(first), advance_second(second)
    assert torch.equal(first.particles, alone("regression", 3))
    assert torch.equal(second.particles, alone("logistic", 4))
    assert not pyro.get_param_store().keys()


@pytest.mark.parametrize("kernel", [RBF(), IMQ(), RBF(0.7), IMQ(0.7)], ids=repr)
def test_repulsion_repels(kernel):
    """Without a score, two particles move apart."""
    particles = torch.tensor([[-0.3, 0.1], [0.4, 0.2]])
    apart = particles[1] - particles[0]
    motion = direction(particles, torch.zeros(2, 2), kernel)
    assert (motion[1] - motion[0]) @ apart > 0


@pytest.mark.parametrize("start", [0.01, 5.0])
def test_particles_of_a_standard_normal_end_with_its_spread(start):
    """With the sign reversed they would collapse to a point."""

    def normal():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    init = {"x": start * torch.linspace(-1.0, 1.0, 50)}
    posterior = SVGD(normal, num_particles=50).run(num_steps=500, seed=0, progress=False, init=init)
    assert posterior.draws["x"].std().item() == pytest.approx(1.0, abs=0.1)
    assert posterior.draws["x"].mean().item() == pytest.approx(0.0, abs=0.05)
