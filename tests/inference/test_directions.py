"""Directions of a cloud of particles, and the routines that follow them without Stein's mixing."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesattn.inference import SGLD, SPOS, SVGD, WGD
from bayesattn.inference.directions import stein_direction, wasserstein_direction
from bayesattn.kernels import IMQ, RBF, Linear, PerSite, Preconditioned, Separate

QUIET = {"seed": 0, "progress": False}


def normal():
    pyro.sample("x", dist.Normal(torch.zeros(()), 1.0))


def correlated():
    scale = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    pyro.sample("x", dist.MultivariateNormal(torch.tensor([1.0, -2.0]), scale_tril=scale))


@pytest.mark.parametrize("kernel", [RBF(0.7), IMQ(1.3)])
def test_a_density_estimate_pushes_by_minus_its_score(kernel, generator):
    """Mutants: the mass of the other index; a mean for the sum; the sign."""
    particles, drive = torch.randn(2, 3, 7, 5, generator=generator)
    parts = wasserstein_direction(kernel(particles), drive)
    place = particles.clone().requires_grad_()
    kernel.gram(place, particles).sum(-1).log().sum().backward()
    torch.testing.assert_close(parts.repulsion, -place.grad)
    torch.testing.assert_close(parts.drive, drive)


def test_each_block_has_a_density_of_its_own(generator):
    particles, drive = torch.randn(2, 7, 5, generator=generator)
    terms = PerSite(RBF(0.9)).over({"a": 2, "b": 3})(particles)
    ours = wasserstein_direction(terms, drive)
    alone = [
        wasserstein_direction(RBF(0.9)(x), d)
        for x, d in zip(particles.split([2, 3], -1), drive.split([2, 3], -1), strict=True)
    ]
    torch.testing.assert_close(ours.repulsion, torch.cat([part.repulsion for part in alone], -1))


@pytest.mark.parametrize("direction", [stein_direction, wasserstein_direction])
def test_one_particle_and_duplicates_climb_alone(direction, generator):
    drive = torch.randn(2, 5, generator=generator)
    alone = direction(RBF()(torch.zeros(1, 5)), drive[:1])
    torch.testing.assert_close(alone.drive + alone.repulsion, drive[:1])
    parts = direction(RBF()(torch.zeros(2, 5)), drive)
    assert parts.drive.isfinite().all()
    torch.testing.assert_close(parts.repulsion, torch.zeros(2, 5))


def test_separate_particles_know_nothing_of_each_other(generator):
    particles, drive, noise = torch.randn(3, 7, 5, generator=generator)
    terms = Separate()(particles)
    parts = stein_direction(terms, drive)
    torch.testing.assert_close(parts.drive + parts.repulsion, drive)
    torch.testing.assert_close(terms.fluctuate(noise, 0.44), 1.2 * noise)
    assert Separate().frozen(particles) == Separate()


@pytest.mark.parametrize("bandwidth", [0.6, 0.8])
def test_wgd_is_too_narrow_by_its_kernel(bandwidth):
    """At rest the estimate, of variance v + h², is the target. Mutant: Stein's direction."""
    routine = WGD(normal, num_particles=60, kernel=RBF(bandwidth), metric="none")
    found = routine.run(num_steps=800, **QUIET).unconstrained[0, :, 0]
    assert found.mean().item() == pytest.approx(0, abs=0.02)
    assert found.var(correction=0).item() == pytest.approx(1 - bandwidth**2, abs=0.02)
    stein = SVGD(normal, num_particles=60, kernel=RBF(bandwidth), metric="none")
    variance = stein.run(num_steps=800, **QUIET).unconstrained.var().item()
    assert abs(variance - (1 - bandwidth**2)) > 0.2


def test_wgd_takes_steps_of_svgd_of_its_own_direction(generator):
    """Step for step by hand, with stochastic gradient descent."""
    settings = {"optimizer": lambda tensors: torch.optim.SGD(tensors, lr=0.1), "metric": "none"}
    routine = WGD(normal, num_particles=5, kernel=RBF(), schedule=lambda _: 1.0, **settings)
    start = torch.randn(5, generator=generator)
    ours = routine.run(num_steps=3, init={"x": start}, **QUIET).unconstrained[0, :, 0]
    by_hand = start.clone()[:, None]
    for _ in range(3):
        parts = wasserstein_direction(RBF()(by_hand), -by_hand)
        by_hand = by_hand + 0.1 * (parts.drive + parts.repulsion)
    torch.testing.assert_close(ours, by_hand[:, 0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("kernel", [Linear(), RBF() + Linear(), PerSite(Linear()), Separate()])
def test_wgd_needs_a_density(kernel):
    with pytest.raises(ValueError, match="kernel: WGD estimates a density"):
        WGD(normal, kernel=kernel)
    with pytest.raises(ValueError, match="kernel: WGD"):
        WGD(normal, kernel=Preconditioned(RBF(), torch.eye(1)))


@pytest.mark.slow
def test_chains_of_langevin_dynamics_have_the_posterior_as_their_law():
    """Mutants: noise without the factor two; a drift that the number of particles divides."""
    routine = SGLD(correlated, num_particles=8, step_size=0.02, compile="record")
    posterior = routine.run(warmup_steps=400, num_samples=500, thinning=20, **QUIET)
    assert posterior.unconstrained.shape == (8, 500, 2)
    found = posterior.unconstrained.flatten(0, 1)
    # 4000 draws a time of 20 * .02 apart, on scales of about one.
    torch.testing.assert_close(found.mean(0), torch.tensor([1.0, -2.0]), atol=0.1, rtol=0)
    expected = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    torch.testing.assert_close(torch.cov(found.T), expected, atol=0.15, rtol=0)
    start = SGLD(correlated, num_particles=8).run(warmup_steps=400, num_samples=1, **QUIET)
    assert not torch.allclose(torch.cov(start.unconstrained.flatten(0, 1).T), expected, atol=0.15)
    assert posterior.attrs["chains_interact"] == 0
    assert SPOS(correlated).chains_interact


def test_a_chain_is_the_same_beside_others():
    """Mutant: particles that interact."""

    def run(start):
        routine = SGLD(normal, num_particles=len(start), step_size=1e-9)
        lengths = {"warmup_steps": 60, "num_samples": 3, "thinning": 1}
        return routine.run(**lengths, init={"x": start}, **QUIET).unconstrained[0, -1]

    torch.testing.assert_close(
        run(torch.tensor([0.5, 1.0])), run(torch.tensor([0.5, -3.0])), atol=1e-3, rtol=0
    )
