"""Tests of bayesattn.kernels."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from bayesattn.kernels import (
    IMQ,
    RBF,
    median_squared_distance,
    pairwise_repulsion,
    squared_distances,
)
from tests import reference
from tests.compilation import in_one_graph

ALL = [RBF(), RBF("paper"), RBF(0.7), IMQ(), IMQ(exponent=0.3), IMQ(2, exponent=1.5)]
SEEDS = st.integers(0, 2**16)


def cloud(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def formula(kernel, squared):
    """The kernel of two points from the mathematics; ``squared`` is h^2 or c^2."""

    def value(x, y):
        distance = ((x - y) ** 2).sum()
        if isinstance(kernel, RBF):
            return torch.exp(-distance / (2 * squared))
        return (1 + distance / squared) ** (-kernel.exponent)

    return value


@pytest.mark.parametrize("kernel", ALL, ids=repr)
@pytest.mark.parametrize("shape", [(2, 1), (3, 5), (7, 2)])
def test_gram_and_repulsion_are_those_of_the_formula(kernel, shape, generator):
    x = torch.randn(shape, generator=generator)
    terms = kernel(x)
    value = formula(kernel, kernel.squared_bandwidth(x).item())
    gram = [[value(a, b).item() for b in x] for a in x]
    np.testing.assert_allclose(terms.gram, gram, rtol=1e-12)
    repulsion = reference.kernel_repulsion(value, x.numpy())
    np.testing.assert_allclose(terms.repulsion, repulsion, rtol=1e-10, atol=1e-13)


def test_bandwidths_are_those_of_the_rules(generator):
    x = torch.randn(7, 3, generator=generator)
    median = reference.median_of_pairs(x.tolist())
    expected = {
        RBF(): median / 2,
        RBF("paper"): median / (2 * np.log(8)),
        RBF(0.7): 0.49,
        IMQ(): median,
        IMQ(2): 4.0,
    }
    for kernel, squared in expected.items():
        np.testing.assert_allclose(kernel.squared_bandwidth(x), squared, rtol=1e-12)
    np.testing.assert_allclose(median_squared_distance(x), median, rtol=1e-12)


def test_the_median_pair_has_the_promised_kernel_value(generator):
    """With three particles the median pair is one pair: k = 1/e, 1/(M + 1) and 2^-beta."""
    x = torch.randn(3, 4, generator=generator)
    promised = {RBF(): np.exp(-1), RBF("paper"): 1 / 4, IMQ(exponent=0.3): 2**-0.3}
    for kernel, value in promised.items():
        np.testing.assert_allclose(kernel(x).gram.triu(1).flatten().sort().values[-2], value)


def test_imq_is_no_product_of_one_dimensional_kernels():
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(IMQ(1.0)(x).gram[0, 1], 3**-0.5, rtol=1e-12)  # the product: 1/2


@pytest.mark.parametrize("kernel", ALL, ids=repr)
def test_repulsion_moves_particles_apart(kernel):
    x = torch.tensor([[0.0, 1.0], [0.5, 1.0]])
    repulsion = kernel(x).repulsion
    assert repulsion[0, 0] < 0 < repulsion[1, 0]
    assert (repulsion[:, 1] == 0).all()


@pytest.mark.parametrize("kernel", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_particle_and_duplicates(kernel, dtype):
    """Where the median distance is zero: no repulsion, and a kernel of one."""
    for count in (1, 2, 5):
        x = torch.full((count, 3), 7.3, dtype=dtype)
        gram, repulsion, *_ = kernel(x)
        assert gram.dtype == repulsion.dtype == dtype
        assert (gram == 1).all()
        assert (repulsion == 0).all()


def mostly_duplicates(generator):
    """One far particle, beside which the distances between the others are lost to rounding."""
    x = torch.randn(37, generator=generator) + 1e-4 * torch.randn(12, 37, generator=generator)
    x[0] *= 1e3
    return x.float()


def test_distances_lost_to_rounding_are_never_negative(generator):
    x = mostly_duplicates(generator)
    assert squared_distances(x).min() == 0
    assert squared_distances(x, x.clone()).min() == 0
    torch.testing.assert_close(squared_distances(x)[0, 1:], torch.cdist(x[:1], x[1:])[0].square())


@pytest.mark.parametrize("kernel", [RBF(), RBF("paper"), IMQ()], ids=repr)
def test_bandwidth_is_not_made_of_rounding(kernel, generator):
    x = mostly_duplicates(generator)
    gram, repulsion, *_ = kernel(x)
    assert repulsion.isfinite().all()
    assert gram[1:, 1:].min() > 0.9
    assert gram[0, 1:].max() < 0.1


@pytest.mark.parametrize("kernel", ALL, ids=repr)
def test_two_particles_at_any_distance_stay_finite(kernel):
    for distance in (1e-12, 1e-3, 1e6):
        x = torch.tensor([[0.0], [distance]], dtype=torch.float32)
        gram, repulsion, *_ = kernel(x)
        assert gram.isfinite().all()
        assert repulsion.isfinite().all()


@given(seed=SEEDS, num_particles=st.integers(1, 6), dim=st.integers(1, 4))
def test_permuting_particles_permutes_the_terms(seed, num_particles, dim):
    x = cloud(seed, num_particles, dim)
    order = torch.randperm(num_particles, generator=torch.Generator().manual_seed(seed))
    for kernel in ALL:
        terms, permuted = kernel(x), kernel(x[order])
        torch.testing.assert_close(permuted.gram, terms.gram[order][:, order])
        torch.testing.assert_close(permuted.repulsion, terms.repulsion[order])


@given(seed=SEEDS, num_particles=st.integers(1, 8), dim=st.integers(1, 4))
def test_gram_is_positive_definite_and_bounded(seed, num_particles, dim):
    x = cloud(seed, num_particles, dim)
    for kernel in ALL:
        gram = kernel(x).gram
        assert torch.equal(gram.diagonal(), torch.ones(num_particles))
        assert gram.min() > 0
        assert gram.max() <= 1
        torch.testing.assert_close(gram, gram.T, rtol=0, atol=1e-15)
        assert torch.linalg.eigvalsh(gram).min() > -1e-13


@given(seed=SEEDS, num_particles=st.integers(1, 6), dim=st.integers(1, 4))
def test_repulsions_sum_to_zero(seed, num_particles, dim):
    """Every pair pushes both ways alike, so the mean of the particles does not move."""
    for kernel in ALL:
        total = kernel(cloud(seed, num_particles, dim)).repulsion.sum(0)
        torch.testing.assert_close(total, torch.zeros(dim), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", ALL, ids=repr)
def test_batch_axes_equal_a_loop_and_vmap(kernel, generator):
    x = torch.randn(2, 3, 5, 4, generator=generator)
    terms, mapped = kernel(x), torch.vmap(torch.vmap(kernel))(x)
    for i in range(2):
        for j in range(3):
            single = kernel(x[i, j])
            for part, alone, under in zip(terms, single, mapped, strict=True):
                torch.testing.assert_close(part[i, j], alone)
                torch.testing.assert_close(under[i, j], alone)


@pytest.mark.parametrize("kernel", ALL, ids=repr)
def test_gram_of_two_clouds(kernel, generator):
    x, y = torch.randn(2, 5, 3, generator=generator), torch.randn(7, 3, generator=generator)
    gram = kernel.gram(x, y)
    assert gram.shape == (2, 5, 7)
    for b in range(2):
        value = formula(kernel, kernel.squared_bandwidth(x[b]).item())
        expected = [[value(row, column).item() for column in y] for row in x[b]]
        np.testing.assert_allclose(gram[b], expected, rtol=1e-11)
    torch.testing.assert_close(kernel.gram(x, x), kernel(x).gram)


@pytest.mark.parametrize("kernel", ALL, ids=repr)
def test_frozen_keeps_the_bandwidth_and_the_kind(kernel, generator):
    x = torch.randn(2, 5, 3, generator=generator)
    frozen = kernel.frozen(x)
    assert type(frozen) is type(kernel)
    assert getattr(frozen, "exponent", None) == getattr(kernel, "exponent", None)
    torch.testing.assert_close(frozen(x).repulsion, kernel(x).repulsion)
    torch.testing.assert_close(frozen.squared_bandwidth(3 * x), kernel.squared_bandwidth(x))
    assert not torch.allclose(frozen(3 * x).gram, kernel(x).gram)


def test_differentiation_sees_a_constant_bandwidth(generator):
    x = torch.randn(5, 3, generator=generator, requires_grad=True)
    y = torch.randn(2, 3, generator=generator)
    for kernel in (RBF(), IMQ()):
        assert not kernel.squared_bandwidth(x).requires_grad
        frozen = kernel.frozen(x)
        ours, fixed = (
            torch.autograd.grad(k(x).gram.square().sum(), x)[0] for k in (kernel, frozen)
        )
        torch.testing.assert_close(ours, fixed)
        assert torch.autograd.gradcheck(lambda z, k=frozen: k(z), x)
        assert torch.autograd.gradcheck(lambda z, k=frozen: k.gram(z, y), x)


@pytest.mark.parametrize("kernel", ALL, ids=repr)
@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (3, 5), (7, 2)])
def test_stein_gram_is_that_of_autograd(kernel, shape, generator):
    x, scores = torch.randn(2, *shape, generator=generator)
    value = formula(kernel, kernel.squared_bandwidth(x).item())
    points, slopes = x.tolist(), scores.tolist()
    expected = [
        [reference.stein_kernel(value, a, b, s, t) for b, t in zip(points, slopes, strict=True)]
        for a, s in zip(points, slopes, strict=True)
    ]
    np.testing.assert_allclose(kernel.stein_gram(x, scores), expected, rtol=1e-9, atol=1e-12)


@given(seed=SEEDS, num_particles=st.integers(1, 8), dim=st.integers(1, 4))
def test_stein_gram_is_positive_definite(seed, num_particles, dim):
    x, scores = cloud(seed, 2, num_particles, dim)
    for kernel in ALL:
        gram = kernel.stein_gram(x, scores)
        torch.testing.assert_close(gram, gram.T, rtol=0, atol=1e-13)
        assert torch.linalg.eigvalsh(gram).min() > -1e-11 * gram.abs().max()


@pytest.mark.parametrize("kernel", ALL, ids=repr)
def test_stein_gram_of_batches_duplicates_and_half_precision(kernel, generator):
    x, scores = torch.randn(2, 3, 5, 4, generator=generator)
    x[0, 1:] = x[0, 0]
    ours, mapped = kernel.stein_gram(x, scores), torch.vmap(kernel.stein_gram)(x, scores)
    for i in range(3):
        torch.testing.assert_close(ours[i], kernel.stein_gram(x[i], scores[i]))
        torch.testing.assert_close(mapped[i], ours[i])
    assert ours.isfinite().all()
    half, narrow = x[1].bfloat16(), scores[1].bfloat16()
    wide = kernel.stein_gram(half.float(), narrow.float())
    assert torch.equal(kernel.stein_gram(half, narrow), wide.bfloat16())


def test_stein_gram_holds_nothing_as_large_as_particle_particle_dim(generator):
    count, dim = 23, 19
    x, scores = torch.randn(2, count, dim, generator=generator)
    graph = make_fx(lambda y, s: (IMQ().stein_gram(y, s), RBF().stein_gram(y, s)))(x, scores).graph
    sizes = [n.meta["tensor_meta"].shape.numel() for n in graph.nodes if "tensor_meta" in n.meta]
    assert max(sizes) <= count * max(count, dim)


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_float32_keeps_its_digits_far_from_the_origin(offset, generator):
    """Particles are rounded at the offset, the distances between them then are not."""
    x = (offset + torch.randn(20, 5, generator=generator)).float()
    y = (offset + torch.randn(7, 5, generator=generator)).float()
    for kernel in (RBF(), IMQ()):
        ours, exact = kernel(x), kernel(x.double())
        torch.testing.assert_close(ours.gram.double(), exact.gram, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.repulsion.double(), exact.repulsion, rtol=1e-4, atol=1e-5)
    distances = squared_distances(x, y).double()
    expected = torch.cdist(x.double(), y.double()).square()
    torch.testing.assert_close(distances, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype, generator):
    x = torch.randn(20, 5, generator=generator).to(dtype)
    for kernel in (RBF(), IMQ()):
        ours, wide = kernel(x), kernel(x.float())
        assert kernel.squared_bandwidth(x).dtype == torch.float32
        assert torch.equal(ours.gram, wide.gram.to(dtype))
        assert torch.equal(ours.repulsion, wide.repulsion.to(dtype))
        assert kernel.gram(x, x).dtype == dtype


def test_autocast_does_not_reach_the_distances(generator):
    x = torch.randn(20, 5, generator=generator, dtype=torch.float32)
    outside, distances = IMQ()(x), squared_distances(x, x[:3])
    with torch.autocast("cpu", torch.bfloat16):
        inside = IMQ()(x)
        torch.testing.assert_close(squared_distances(x, x[:3]), distances)
    torch.testing.assert_close(inside.gram, outside.gram)
    torch.testing.assert_close(inside.repulsion, outside.repulsion)


def test_nothing_as_large_as_particle_particle_dim_is_held(generator):
    """Every tensor of the recorded graph, gradients of the Gram matrix included, is small."""
    count, dim = 23, 19
    x = torch.randn(count, dim, generator=generator)

    def everything(z):
        gradient = torch.func.grad(lambda p: IMQ()(p).gram.sum() + RBF("paper")(p).gram.sum())(z)
        return IMQ()(z), RBF("paper")(z), gradient

    graph = make_fx(everything)(x).graph
    sizes = [n.meta["tensor_meta"].shape.numel() for n in graph.nodes if "tensor_meta" in n.meta]
    assert len(sizes) > 20
    assert max(sizes) <= count * max(count, dim)


def test_runs_under_no_grad_and_replays_as_a_graph(generator):
    x, other = torch.randn(2, 7, 3, generator=generator)
    graph = make_fx(IMQ())(x)
    with torch.no_grad():
        for ours, replayed in zip(IMQ()(other), graph(other), strict=True):
            torch.testing.assert_close(ours, replayed)


@pytest.mark.compile
@pytest.mark.parametrize("kernel", [RBF("paper"), IMQ(), IMQ(2.0)], ids=repr)
def test_compiles_in_one_graph(kernel, generator):
    x = torch.randn(7, 3, generator=generator)
    torch.testing.assert_close(in_one_graph(kernel.__call__, x), kernel(x))


def test_the_diagonal_of_the_slope_does_not_matter(generator):
    x, slope = torch.randn(5, 3, generator=generator), torch.rand(5, 5, generator=generator)
    ours = pairwise_repulsion(slope, x)
    torch.testing.assert_close(pairwise_repulsion(slope + 7 * torch.eye(5), x), ours)
    torch.testing.assert_close(ours, (slope[..., None] * (x[:, None] - x[None])).sum(1))


def test_repr_shows_the_settings():
    assert repr(RBF("paper")) == "RBF(bandwidth='paper')"
    assert repr(IMQ(0.5)) == "IMQ(bandwidth=0.5, exponent=0.5)"


@pytest.mark.parametrize("bandwidth", [0, -1.0, float("nan"), float("inf"), "mean"])
def test_refuses_a_bandwidth(bandwidth):
    for kernel in (RBF, IMQ):
        with pytest.raises(ValueError, match=r"bandwidth: expected 'median'.*positive number, got"):
            kernel(bandwidth)
    with pytest.raises(ValueError, match="IMQ bandwidth: expected 'median' or a positive number"):
        IMQ("paper")


@pytest.mark.parametrize("exponent", [0, -0.5, float("nan"), float("inf")])
def test_refuses_an_exponent(exponent):
    with pytest.raises(ValueError, match="IMQ exponent: expected a positive number, got"):
        IMQ(exponent=exponent)


def test_refuses_no_particles():
    with pytest.raises(ValueError, match=r"at least one particle, got none: shape \(0, 3\)"):
        IMQ()(torch.zeros(0, 3))
