"""Tests of noise whose covariance is a kernel."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from bayesattn.kernels import IMQ, RBF, Blocks, Linear, Preconditioned, Sum

LOWER = torch.tensor([[2.0, 0.0, 0.0], [-1.0, 0.5, 0.0], [0.3, 0.7, 1.5]], dtype=torch.float64)
ALL = {
    "IMQ": IMQ(),
    "RBF, narrow": RBF(0.3),
    "linear": Linear(),
    "linear without offset": Linear(offset=0.0),
    "sum": Sum((RBF(), Linear()), (0.5, 2.0)),
    "blocks": Blocks((IMQ(), RBF(0.5)), (1, 2)),
    "preconditioned": Preconditioned(IMQ(), LOWER),
    "diagonal": Preconditioned(IMQ(), torch.tensor([3.0, 0.2, 1.0], dtype=torch.float64)),
    "preconditioned block": Blocks((IMQ(), Preconditioned(IMQ(), LOWER[:2, :2])), (1, 2)),
}
every_kernel = pytest.mark.parametrize("name", ALL)


def pushed(map_, *shape, dtype=torch.float64):
    """Matrix of a linear map of tensors of one shape, by its values at the basis vectors."""
    size = torch.Size(shape).numel()
    basis = torch.eye(size, dtype=dtype).reshape(size, *shape)
    return torch.stack([map_(vector).flatten() for vector in basis], 1)


def matrix_of(kernel, particles):
    """K over particles and coordinates."""
    return pushed(kernel(particles).smooth, *particles.shape, dtype=particles.dtype)


@every_kernel
@pytest.mark.parametrize("floor", [0.7, 1e-3, 0])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_covariance_of_noise_is_that_of_the_kernel(name, floor, count, generator):
    """Mutants: M left out, the floor under the wrong axes, a root taken twice."""
    x = torch.randn(count, 3, generator=generator)
    terms = ALL[name](x)
    factor = pushed(lambda normal: terms.fluctuate(normal, floor), count, 3)
    expected = matrix_of(ALL[name], x) / count + floor * torch.eye(3 * count)
    torch.testing.assert_close(factor @ factor.T, expected, rtol=1e-12, atol=1e-13)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 7, 97])
def test_noise_of_duplicates_and_narrow_numbers(name, dtype, count, generator):
    """Gram matrices that are singular, also those that rounding has made a little indefinite."""
    normal = torch.randn(count, 3, generator=generator).to(dtype)
    for spread in (0.0, 1e-4, 1.0):
        x = (7.3 + spread * torch.randn(count, 3, generator=generator)).to(dtype)
        x[1] = x[0]
        for floor in (0.0, 1e-2):
            noise = ALL[name](x).fluctuate(normal, floor)
            assert noise.dtype == dtype
            assert noise.isfinite().all()
            # The largest eigenvalue is at most the trace of K, and normals are below five.
            bound = matrix_of(ALL[name], x.double()).trace() / count + floor
            assert noise.double().norm() <= 1.2 * bound.sqrt() * normal.double().norm()


@every_kernel
def test_duplicates_shake_alike(name, generator):
    """Without a floor, particles at one place stay at one place."""
    x = torch.randn(5, 3, generator=generator)
    x[3] = x[1]
    normal = torch.randn(5, 3, generator=generator)
    noise = ALL[name](x).fluctuate(normal, 0.0)
    torch.testing.assert_close(noise[3], noise[1], rtol=0, atol=1e-5)


@every_kernel
def test_noise_of_batches_is_that_of_each_also_in_a_graph(name, generator):
    x, normal = torch.randn(2, 4, 5, 3, generator=generator)
    kernel = ALL[name]

    def noise(particles, numbers):
        return kernel(particles).fluctuate(numbers, 0.1)

    alone = torch.stack([noise(a, b) for a, b in zip(x, normal, strict=True)])
    torch.testing.assert_close(noise(x, normal), alone)
    torch.testing.assert_close(torch.vmap(noise)(x, normal), alone)
    with torch.no_grad():
        graph = make_fx(noise)(x.flip(0), normal.flip(0))
        torch.testing.assert_close(graph(x, normal), alone)


def test_particles_that_are_no_numbers_raise_nothing():
    """That is for the watch to report, with the site and the step."""
    x = torch.zeros(5, 3)
    x[2, 1] = torch.nan
    assert IMQ()(x).fluctuate(torch.ones(5, 3), 0.1).isnan().any()
