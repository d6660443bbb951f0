"""Tests of linear, summed, block-diagonal and preconditioned kernels against pairs of points."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from bayesattn.divergences import squared_mmd
from bayesattn.kernels import (
    IMQ,
    RBF,
    Blocks,
    Kernel,
    Linear,
    PerSite,
    Preconditioned,
    ScalarKernel,
    Sum,
    Terms,
)
from tests import reference
from tests.compilation import in_one_graph

LOWER = torch.tensor([[2.0, 0.0, 0.0], [-1.0, 0.5, 0.0], [0.3, 0.7, 1.5]], dtype=torch.float64)
DIAGONAL = torch.tensor([3.0, 0.2, 1.0], dtype=torch.float64)


def rbf(squared):
    return lambda x, y: torch.exp(-(x - y).square().sum() / (2 * squared))


def imq(squared):
    return lambda x, y: (1 + (x - y).square().sum() / squared) ** -0.5


def linear(offset, squared, location):
    return lambda x, y: offset + ((x - location) * (y - location)).sum() / squared


def spread(x):
    """Mean squared distance from the mean."""
    mean = x.mean(0)
    return sum(((row - mean) ** 2).sum() for row in x) / len(x)


# Each kernel with what it is between two points: slices to (scale, function of two points).
def plain_blocks(name, x):
    median = torch.tensor(reference.median_of_pairs(x.tolist())) if len(x) > 1 else 1.0
    whole, eye = slice(0, 3), torch.eye(3)
    line = linear(1.0, spread(x), x.mean(0))
    if name == "linear":
        return [(whole, eye, line)]
    if name == "linear, fixed":
        return [(whole, eye, linear(0.5, 4.0, DIAGONAL))]
    if name == "sum":
        of_rbf = rbf(median / 2)
        return [(whole, eye, lambda a, b: 0.5 * of_rbf(a, b) + 2.0 * line(a, b))]
    if name == "blocks":
        return [(slice(0, 1), eye[:1, :1], imq(0.49)), (slice(1, 3), eye[:2, :2], rbf(0.25))]
    scale = LOWER if name == "preconditioned" else DIAGONAL.diag()
    inverse = torch.linalg.inv(scale)
    return [(whole, scale, lambda a, b: imq(0.81)(inverse @ a, inverse @ b))]


ALL = {
    "linear": Linear(),
    "linear, fixed": Linear(2, 0.5, DIAGONAL),
    "sum": Sum((RBF(), Linear()), (0.5, 2.0)),
    "blocks": Blocks((IMQ(0.7), RBF(0.5)), (1, 2)),
    "preconditioned": Preconditioned(IMQ(0.9), LOWER),
    "diagonal": Preconditioned(IMQ(0.9), DIAGONAL),
}
SCALAR = {name: kernel for name, kernel in ALL.items() if isinstance(kernel, ScalarKernel)}
every_kernel = pytest.mark.parametrize("name", ALL)
every_scalar = pytest.mark.parametrize("name", SCALAR)


@every_kernel
@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_terms_are_those_of_loops_over_pairs(name, count, generator):
    x, score = torch.randn(2, count, 3, generator=generator)
    terms = ALL[name](x)
    if count == 1 and name in ("linear", "sum"):
        # A single particle has no spread; nothing but the offset is left of the linear part.
        weight = {"linear": 1.0, "sum": 0.5 + 2.0}[name]
        torch.testing.assert_close(terms.smooth(score), weight * score)
        assert (terms.repulsion == 0).all()
        return
    smooth, repulsion = np.zeros((count, 3)), np.zeros((count, 3))
    for part, scale, value in plain_blocks(name, x):
        # K = B k Bᵀ, whose divergence by x_j is B Bᵀ times the gradient of k.
        outer = (scale @ scale.T).numpy()
        for i in range(count):
            for j in range(count):
                x_j = x[j].clone().requires_grad_()
                k = value(x_j[part], x[i, part])
                (gradient,) = torch.autograd.grad(k, x_j)
                smooth[i, part] += k.item() * outer @ score[j, part].numpy()
                repulsion[i, part] += outer @ gradient[part].numpy()
    np.testing.assert_allclose(terms.smooth(score), smooth, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(terms.repulsion, repulsion, rtol=1e-9, atol=1e-11)


@every_scalar
def test_gram_of_two_clouds_is_that_of_the_first_ones_settings(name, generator):
    x, y = torch.randn(2, 5, 3, generator=generator), torch.randn(7, 3, generator=generator)
    gram = SCALAR[name].gram(x, y)
    for b in range(2):
        ((_, _, value),) = plain_blocks(name, x[b])
        expected = [[value(row, column).item() for column in y] for row in x[b]]
        np.testing.assert_allclose(gram[b], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(SCALAR[name].gram(x, x), SCALAR[name](x).gram)


@every_kernel
def test_protocols_hold(name, generator):
    kernel = ALL[name]
    assert isinstance(kernel, Kernel)
    assert isinstance(kernel(torch.randn(5, 3, generator=generator)), Terms)
    assert isinstance(kernel, ScalarKernel) == (name in SCALAR)


@every_kernel
@given(seed=st.integers(0, 2**16), count=st.integers(1, 6))
def test_permuting_particles_permutes_the_terms(name, seed, count):
    generator = torch.Generator().manual_seed(seed)
    x, score = torch.randn(2, count, 3, generator=generator)
    order = torch.randperm(count, generator=generator)
    terms, permuted = ALL[name](x), ALL[name](x[order])
    torch.testing.assert_close(permuted.smooth(score[order]), terms.smooth(score)[order])
    torch.testing.assert_close(permuted.repulsion, terms.repulsion[order])


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_particles_at_one_place_stay_finite_and_do_not_repel(name, dtype):
    for count in (1, 2, 5):
        x = torch.full((count, 3), 7.3, dtype=dtype)
        terms = ALL[name](x)
        assert terms.repulsion.dtype == terms.smooth(x).dtype == dtype
        assert terms.smooth(x).isfinite().all()
        if name != "linear, fixed":
            assert (terms.repulsion == 0).all()


@every_kernel
def test_narrow_numbers_are_computed_in_float32(name, generator):
    x, score = torch.randn(2, 20, 3, generator=generator).bfloat16()
    ours, wide = ALL[name](x), ALL[name](x.double())
    close = {"rtol": 0.05, "atol": 0.3}
    torch.testing.assert_close(ours.repulsion.double(), wide.repulsion, **close)
    torch.testing.assert_close(ours.smooth(score).double(), wide.smooth(score.double()), **close)


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_float32_keeps_its_digits_far_from_the_origin(offset, generator):
    x = (offset + torch.randn(20, 5, generator=generator)).float()
    ours, exact = Linear()(x), Linear()(x.double())
    torch.testing.assert_close(ours.gram.double(), exact.gram, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.repulsion.double(), exact.repulsion, rtol=1e-4, atol=1e-5)


@every_kernel
def test_batches_vmap_and_graphs_agree_with_each_cloud(name, generator):
    x, score = torch.randn(2, 4, 5, 3, generator=generator)
    kernel = ALL[name]

    def everything(particles, scores):
        terms = kernel(particles)
        return terms.smooth(scores), terms.repulsion, terms.squared_bandwidth

    alone = [torch.stack(part) for part in zip(*map(everything, x, score), strict=True)]
    with torch.no_grad():
        graph = make_fx(everything)(x.flip(0), score.flip(0))
        others = (
            everything(x, score),
            torch.vmap(everything)(x, score),
            graph(x, score),
        )
    for other in others:
        for ours, expected in zip(other, alone, strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.compile
@every_kernel
def test_compiles_in_one_graph(name, generator):
    x, score = torch.randn(2, 7, 3, generator=generator)

    def everything(particles, scores):
        terms = ALL[name](particles)
        return terms.smooth(scores), terms.repulsion

    torch.testing.assert_close(in_one_graph(everything, x, score), everything(x, score))


@every_kernel
def test_frozen_keeps_what_depends_on_particles(name, generator):
    x, y = torch.randn(2, 5, 3, generator=generator)
    frozen = ALL[name].frozen(x)
    assert type(frozen) is type(ALL[name])
    torch.testing.assert_close(frozen(x).repulsion, ALL[name](x).repulsion)
    torch.testing.assert_close(frozen(x).smooth(y), ALL[name](x).smooth(y))
    squared = ALL[name](x).squared_bandwidth
    torch.testing.assert_close(frozen(3 * x + 1).squared_bandwidth, squared)


def test_a_frozen_linear_kernel_keeps_its_location(generator):
    """Mutant: a bandwidth that is fixed, with a location that follows the particles."""
    x = torch.randn(2, 5, 3, generator=generator)
    frozen = Linear().frozen(x)
    far = torch.randn(7, 3, generator=generator) + 10
    ours = frozen(far.expand(2, 7, 3)).gram
    for b in range(2):
        value = linear(1.0, spread(x[b]), x[b].mean(0))
        expected = [[value(row, column).item() for column in far] for row in far]
        np.testing.assert_allclose(ours[b], expected, rtol=1e-11)


@every_scalar
def test_differentiation_sees_constant_settings(name, generator):
    x = torch.randn(5, 3, generator=generator, requires_grad=True)
    y = torch.randn(2, 3, generator=generator)
    kernel, frozen = SCALAR[name], SCALAR[name].frozen(x)
    assert not kernel.squared_bandwidth(x).requires_grad
    ours, fixed = (torch.autograd.grad(k(x).gram.square().sum(), x)[0] for k in (kernel, frozen))
    torch.testing.assert_close(ours, fixed)
    assert torch.autograd.gradcheck(lambda z: frozen(z)[:2], x)
    assert torch.autograd.gradcheck(lambda z: frozen.gram(z, y), x)


# ---------------------------------------------------------------- what each of them promises


def descend(kernel, particles, score, num_steps=4000, rate=0.1):
    for _ in range(num_steps):
        terms = kernel(particles)
        phi = (terms.smooth(score(particles)) + terms.repulsion) / len(particles)
        particles = particles + rate * phi
    return particles


def gaussian():
    mean = torch.tensor([1.0, -2.0])
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]])
    precision = torch.linalg.inv(covariance)
    return mean, covariance, lambda x: (mean - x) @ precision


def test_linear_kernel_matches_the_moments_of_a_gaussian(generator):
    """Liu and Wang (2018): its fixed points have that mean and covariance exactly."""
    mean, covariance, score = gaussian()
    x = descend(Linear(), 3 * torch.randn(7, 2, generator=generator), score)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(x.T.cov(correction=0), covariance, rtol=0, atol=1e-8)
    still = Linear()(x).smooth(score(x)) + Linear()(x).repulsion
    torch.testing.assert_close(still, torch.zeros(7, 2), rtol=0, atol=1e-7)
    radial = descend(RBF(), x, score, num_steps=500)
    assert (radial.T.cov(correction=0) - covariance).abs().max() > 1e-3


def test_direction_of_a_preconditioned_kernel_is_that_of_its_coordinates(generator):
    w, score = torch.randn(2, 7, 3, generator=generator)
    for scale in (LOWER, DIAGONAL):
        matrix = scale if scale.ndim == 2 else scale.diag()
        x = w @ matrix.T
        ours, inner = Preconditioned(IMQ(), scale)(x), IMQ()(w)
        # Scores in coordinates w are Bᵀ times those in x.
        expected = (inner.smooth(score @ matrix) + inner.repulsion) @ matrix.T
        torch.testing.assert_close(ours.smooth(score) + ours.repulsion, expected)


def test_plus_is_a_sum_with_weights_of_one(generator):
    x = torch.randn(5, 3, generator=generator)
    total = RBF() + IMQ() + Linear()
    assert isinstance(total, Sum)
    expected = RBF()(x).gram + IMQ()(x).gram + Linear()(x).gram
    torch.testing.assert_close(total(x).gram, expected)
    with pytest.raises(TypeError):
        RBF() + Blocks([IMQ()], [3])  # type: ignore[operator]


def test_squared_bandwidths_of_combinations_are_means(generator):
    x = torch.randn(5, 3, generator=generator)
    assert Sum([IMQ(1.0), RBF(3.0)])(x).squared_bandwidth == 5
    assert Sum([IMQ(1.0), RBF(3.0)]).squared_bandwidth(x) == 5
    assert Blocks([IMQ(1.0), RBF(3.0)], [1, 2])(x).squared_bandwidth == 5


def test_each_site_has_its_own_kernel():
    widths = {"query": 2, "key": 3, "readout": 1}
    per_site = PerSite(IMQ(), {"key": RBF()})
    blocks = per_site.over(widths)
    assert blocks == Blocks((IMQ(), RBF(), IMQ()), (2, 3, 1))
    assert per_site.over(dict(widths)) is blocks
    assert per_site.over({"key": 3, "query": 2}) is not blocks
    with pytest.raises(ValueError, match=r"given for \['key'\], but a particle's sites are \['q"):
        per_site.over({"query": 2})


def test_a_block_does_not_see_the_other_coordinates(generator):
    x = torch.randn(5, 3, generator=generator)
    far = x * torch.tensor([1.0, 1e3, 1e3])
    blocks = PerSite().over({"narrow": 1, "wide": 2})
    torch.testing.assert_close(blocks(far).repulsion[:, 0], blocks(x).repulsion[:, 0])


def test_mmd_pools_the_bandwidths_of_a_sum(generator):
    x, y = torch.randn(2, 7, 3, generator=generator)
    parts = [squared_mmd(x, y, kernel=kernel) for kernel in (RBF(), IMQ())]
    ours = squared_mmd(x, y, kernel=Sum([RBF(), IMQ()], [2.0, 3.0]))
    torch.testing.assert_close(ours, 2 * parts[0] + 3 * parts[1])
    for kernel in (Linear(), RBF() + Linear(2.0), RBF("paper") + IMQ()):
        with pytest.raises(ValueError, match="of one cloud"):
            squared_mmd(x, y, kernel=kernel)
    fixed = Linear().frozen(torch.cat([x, y]))
    scale = fixed.squared_bandwidth(x)
    expected = (x.mean(0) - y.mean(0)).square().sum() / scale
    torch.testing.assert_close(squared_mmd(x, y, kernel=fixed), expected)


def test_reprs_show_the_settings():
    assert repr(Linear()) == "Linear(bandwidth='mean', offset=1.0, location=None)"
    assert repr(PerSite()) == "PerSite(kernel=IMQ(bandwidth='median', exponent=0.5), sites={})"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear("median"), "Linear bandwidth: expected 'mean' or a positive number"),
        (lambda: Linear(offset=-1), "Linear offset: expected a number from zero on, got -1"),
        (lambda: Sum([]), "at least one kernel, got none"),
        (lambda: Sum([IMQ()], [1, 2]), "one for each of 1 kernels, got 2"),
        (lambda: Sum([IMQ()], [-1]), r"expected positive numbers, got \(-1,\)"),
        (lambda: Blocks([IMQ()], [1, 2]), r"each of 1 kernels, got \(1, 2\)"),
        (lambda: Blocks([IMQ()], [0]), r"positive one for each of 1 kernels, got \(0,\)"),
        (lambda: Blocks([IMQ()], [2])(torch.zeros(5, 3)), r"sum of 3, .* got \(2,\)"),
        (lambda: Preconditioned(IMQ(), torch.ones(2, 3)), r"got shape \(2, 3\)"),
        (lambda: Preconditioned(IMQ(), torch.ones(())), r"got shape \(\)"),
        (lambda: Linear()(torch.zeros(0, 3)), "at least one particle, got none"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
