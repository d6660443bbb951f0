"""Forces between heads, against loops and autograd, and what they may and may not depend on."""

import pytest
import torch
from torch import nn

from bayesattn.inference import CircuitForce, SteinForce, WassersteinForce
from bayesattn.kernels import IMQ, RBF, Linear, PerSite, Separate
from bayesattn.networks import circuit_products, head_circuits
from tests.heads import one_batch, paper_gradient

EMBED, HEADS, WIDTH = 15, 3, 5
FORCES = {
    "stein": SteinForce(),
    "stein, imq": SteinForce(IMQ()),
    "wasserstein": WassersteinForce(),
    "circuits": CircuitForce(),
}


@pytest.fixture
def heads():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return one_batch(nn.MultiheadAttention(EMBED, HEADS), ("query", "key"), joint=True)


def test_stein_force_is_the_paper_s_by_loops(heads, generator):
    """Mutants: h for h squared, the sign of R, the sum for the mean, the median with its zeros."""
    particles = heads.particles()
    gradients = torch.randn(particles.shape, generator=generator)
    along, away, _ = SteinForce()(heads, particles, -gradients)
    expected = paper_gradient(particles[0].tolist(), gradients[0].tolist(), alpha=0.3)
    torch.testing.assert_close(-(along + 0.3 * away)[0], torch.tensor(expected))


def test_repulsion_is_the_gradient_of_the_kernel(heads):
    particles = heads.particles()
    force = SteinForce(RBF(2.0))
    away = force(heads, particles, torch.zeros_like(particles)).repulsion
    moved = particles.clone().requires_grad_()
    for head in range(HEADS):
        kernel = RBF(2.0).gram(moved, particles[:, head : head + 1]).sum() / HEADS
        (slope,) = torch.autograd.grad(kernel, moved)
        # Of the head itself the kernel is flat, so the sum is over the others.
        torch.testing.assert_close(away[:, head], slope.sum(1))


@pytest.mark.parametrize("kernel", [RBF(), RBF(1.5), IMQ()])
@pytest.mark.parametrize("roles", [("query", "key"), ("value", "output")])
def test_circuit_repulsion_climbs_down_the_density_of_circuits(kernel, roles):
    """The other heads' circuits, and the bandwidth, held fixed; circuits formed as matrices."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        heads = one_batch(nn.MultiheadAttention(EMBED, HEADS), roles, joint=True)
    particles = heads.particles()
    away = CircuitForce(kernel)(heads, particles, torch.zeros_like(particles)).repulsion
    moved = particles.clone().requires_grad_()
    left, right = head_circuits(heads, moved)
    circuits = (left.mT @ right).flatten(2)
    fixed = circuits.detach()
    # Of the fixed ones, as at first argument bandwidths are measured.
    density = kernel.gram(fixed, circuits).sum(-2)
    (slope,) = torch.autograd.grad(density.log().sum(), moved)
    torch.testing.assert_close(away, -slope)
    assert away.norm() > 1e-3


def test_circuit_force_turns_with_the_gauge(heads, generator):
    """Turning a head's queries and keys turns its push, and changes nobody else's."""
    particles = heads.particles()
    turn, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))
    drive = torch.zeros_like(particles)

    def turned(rows):
        query, key = (part.clone() for part in heads.parts(rows))
        query[0, 1], key[0, 1] = turn @ query[0, 1], turn @ key[0, 1]
        return torch.cat([query.flatten(2), key.flatten(2)], -1)

    for force, holds in ((CircuitForce(), True), (WassersteinForce(), False)):
        before = turned(force(heads, particles, drive).repulsion)
        after = force(heads, turned(particles), drive).repulsion
        assert torch.allclose(before, after, rtol=1e-8, atol=1e-10) == holds


def test_circuit_force_pushes_circuits_apart(heads):
    particles = heads.particles()

    def spread(rows):
        circuits = head_circuits(heads, rows)
        products = circuit_products(circuits, circuits)[0]
        norms = products.diagonal()
        return (norms[:, None] + norms - 2 * products).sum()

    push = CircuitForce()(heads, particles, torch.zeros_like(particles)).repulsion
    assert spread(particles + 0.1 * push) > spread(particles)


@pytest.mark.parametrize("force", FORCES.values(), ids=FORCES)
def test_the_order_of_heads_does_not_matter(force, heads, generator):
    particles = heads.particles()
    drive = torch.randn(particles.shape, generator=generator)
    order = torch.tensor([2, 0, 1])
    before = force(heads, particles, drive)
    after = force(heads, particles[:, order], drive[:, order])
    torch.testing.assert_close(after.drive, before.drive[:, order])
    torch.testing.assert_close(after.repulsion, before.repulsion[:, order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_heads", [1, 2, 3])
@pytest.mark.parametrize("force", FORCES.values(), ids=FORCES)
def test_one_head_follows_its_gradient_and_twins_stay_finite(force, num_heads, dtype, generator):
    """The median of twins' distances is zero, and so is their push; of circuits up to rounding."""
    with torch.random.fork_rng(devices=[]):
        heads = one_batch(nn.MultiheadAttention(num_heads, num_heads), ("query", "key"), joint=True)
    shape = (1, 1, heads.particles().shape[-1])
    twins, drive = (
        torch.randn(shape, generator=generator).to(dtype).expand(1, num_heads, -1) for _ in range(2)
    )
    parts = force(heads, twins, drive)
    torch.testing.assert_close(parts.drive, drive)
    rounding = 0.05 if isinstance(force, CircuitForce) else 0.0
    torch.testing.assert_close(parts.repulsion, torch.zeros_like(drive), atol=rounding, rtol=0.0)


def test_separate_heads_follow_their_gradients(heads, generator):
    particles = heads.particles()
    drive = torch.randn(particles.shape, generator=generator)
    parts = SteinForce(Separate())(heads, particles, drive)
    torch.testing.assert_close(parts.drive, drive)
    assert not parts.repulsion.any()


def test_far_heads_do_not_feel_each_other(heads, generator):
    particles = 1e4 * heads.particles()
    drive = torch.randn(particles.shape, generator=generator)
    parts = SteinForce(RBF(1.0))(heads, particles, drive)
    torch.testing.assert_close(parts.drive, drive / HEADS)
    parts = WassersteinForce(RBF(1.0))(heads, particles, drive)
    torch.testing.assert_close(parts.drive, drive)


@pytest.mark.parametrize("force", [WassersteinForce, CircuitForce])
def test_densities_are_estimated_by_radial_kernels_alone(force, unchecked_types):
    with pytest.raises(ValueError, match="RBF or IMQ"):
        force(Linear())


@pytest.mark.parametrize("kernel", ["rbf", RBF, PerSite()])
def test_what_is_no_kernel_is_refused(kernel, unchecked_types):
    with pytest.raises(ValueError, match="SteinForce kernel: expected a kernel"):
        SteinForce(kernel)
