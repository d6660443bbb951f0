"""Tests of kernels of features, and of sets of frequencies, against pairs of particles."""

import itertools
import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jacrev
from torch.fx.experimental.proxy_tensor import make_fx

from bayesattn.divergences import squared_mmd
from bayesattn.inference import SPOS, SVGD
from bayesattn.kernels import (
    IMQ,
    RBF,
    Equivariant,
    FeatureMap,
    FeatureTerms,
    FrequencySets,
    Kernel,
    Linear,
    PerSite,
    Pullback,
    ScalarKernel,
    Sum,
    Terms,
    normal_probes,
)
from bayesattn.kernels.feature_maps import DifferentiatedTerms
from tests.compilation import in_one_graph

# Two sets of three frequencies of width two, seen at five lags.
SETS = FrequencySets(2, 2, normal_probes(5, 2, scale=0.4))
DIM = 12


def invariants(x):
    """Some features without closed-form derivatives that signs of coordinates do not change."""
    first, second = x.square().chunk(2, -1)
    return torch.cat([first.tanh(), (first * second).mean(-1, keepdim=True)], -1)


MAPS = {"frequency sets": SETS, "function": invariants}
INNER = {
    "RBF": RBF(),
    "IMQ": IMQ(0.7, exponent=0.3),
    "sum": Sum((RBF(), Linear()), (0.5, 2.0)),
}
every_map = pytest.mark.parametrize("name", MAPS)
every_inner = pytest.mark.parametrize("inner", INNER)
both = pytest.mark.parametrize("make", [Pullback, Equivariant])


def cloud(generator, *shape):
    """Particles that are of the size of the features' scales."""
    return 0.5 * torch.randn(*shape, DIM, generator=generator)


def matrix_valued(make, features, fixed):
    """The kernel between two particles as a matrix, from the mathematics."""

    def matrix(x, y):
        value = fixed.gram(features(x)[None], features(y)[None])[0, 0]
        if make is Pullback:
            return value * torch.eye(len(x))
        return value * jacrev(features)(x).T @ jacrev(features)(y)

    return matrix


def divergence(matrix, y):
    """Of the rows' index by the argument of a function to matrices."""
    return jacrev(matrix)(y).diagonal(dim1=0, dim2=2).sum(-1)


# ---------------------------------------------------------------- kernels of features


@both
@every_map
@every_inner
@pytest.mark.parametrize("count", [1, 4])
def test_terms_are_those_of_loops_over_pairs(make, name, inner, count, generator):
    """Mutants: i and j exchanged, the Jacobian of the wrong particle, no second derivatives."""
    features = MAPS[name]
    x, score = cloud(generator, 2, count)
    kernel = make(features, INNER[inner])
    fixed = INNER[inner].frozen(features(x))
    matrix = matrix_valued(make, features, fixed)
    smooth = torch.stack([sum(matrix(a, b) @ s for b, s in zip(x, score, strict=True)) for a in x])
    repulsion = torch.stack([sum(divergence(lambda y, a=a: matrix(y, a), b) for b in x) for a in x])
    own = torch.stack([divergence(lambda y, a=a: matrix(a, y).T, a) for a in x])
    terms = kernel(x)
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(terms.smooth(score), smooth, **close)
    torch.testing.assert_close(terms.repulsion, repulsion, **close)
    torch.testing.assert_close(terms.own_slope, own, **close)
    torch.testing.assert_close(terms.gram, fixed.gram(features(x), features(x)), **close)
    torch.testing.assert_close(terms.squared_bandwidth, fixed.squared_bandwidth(features(x)))


def test_repulsion_is_the_gradient_of_the_sum_of_the_gram_matrix(generator):
    """By each particle, the others held; every pair counts twice in the whole sum."""
    x = cloud(generator, 7).requires_grad_()
    kernel = Pullback(SETS).frozen(x)
    (total,) = torch.autograd.grad(kernel.gram(x, x.detach()).sum(1)[2], x)
    alone = torch.stack([torch.autograd.grad(kernel.gram(x, x.detach())[:, 2].sum(), x)[0].sum(0)])
    assert total[:2].abs().max() == 0
    torch.testing.assert_close(kernel(x).repulsion[2:3], alone)


@both
def test_protocols_hold(make, generator):
    kernel = make(SETS)
    assert isinstance(kernel, Kernel)
    assert isinstance(kernel(cloud(generator, 5)), Terms)
    assert isinstance(kernel, ScalarKernel) == (make is Pullback)
    assert isinstance(SETS, FeatureMap)
    assert not isinstance(invariants, FeatureMap)
    assert isinstance(SETS.at(cloud(generator, 5)), FeatureTerms)
    assert kernel.kernel == RBF()


def test_gram_of_two_clouds_is_that_of_their_features(generator):
    x, y = cloud(generator, 2, 5), cloud(generator, 7)
    for inner in INNER.values():
        kernel = Pullback(SETS, inner)
        torch.testing.assert_close(kernel.gram(x, y), inner.gram(SETS(x), SETS(y)))
        squared = inner.squared_bandwidth(SETS(x))
        torch.testing.assert_close(kernel.squared_bandwidth(x), squared)


@both
@every_inner
def test_frozen_keeps_what_depends_on_particles(make, inner, generator):
    x, score = cloud(generator, 2, 5)
    kernel = make(SETS, INNER[inner])
    frozen = kernel.frozen(x)
    assert type(frozen) is make
    torch.testing.assert_close(frozen(x).repulsion, kernel(x).repulsion)
    torch.testing.assert_close(frozen(x).smooth(score), kernel(x).smooth(score))
    squared = kernel(x).squared_bandwidth
    torch.testing.assert_close(frozen(3 * x + 1).squared_bandwidth, squared)


@both
@every_map
def test_batches_vmap_and_graphs_agree_with_each_cloud(make, name, generator):
    x, score, normal = cloud(generator, 3, 2, 4)
    kernel = make(MAPS[name], INNER["sum"])

    def everything(particles, scores, numbers):
        terms = kernel(particles)
        noise = terms.fluctuate(numbers, 0.1)
        return terms.smooth(scores), terms.repulsion, terms.own_slope, noise

    alone = [torch.stack(part) for part in zip(*map(everything, x, score, normal), strict=True)]
    with torch.no_grad():
        graph = make_fx(everything)(x.flip(0), score.flip(0), normal.flip(0))
        others = (
            everything(x, score, normal),
            torch.vmap(everything)(x, score, normal),
            graph(x, score, normal),
        )
    for other in others:
        for ours, expected in zip(other, alone, strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.compile
@both
@every_map
def test_compiles_in_one_graph(make, name, generator):
    x, score = cloud(generator, 2, 5)

    def everything(particles, scores):
        terms = make(MAPS[name], INNER["sum"])(particles)
        return terms.smooth(scores), terms.repulsion

    torch.testing.assert_close(in_one_graph(everything, x, score), everything(x, score))


@both
def test_differentiation_sees_constant_settings(make, generator):
    x = cloud(generator, 2).requires_grad_()
    kernel = make(SETS, INNER["sum"])
    frozen = kernel.frozen(x)

    def figures(particles, of=frozen):
        terms = of(particles)
        return terms.gram, terms.repulsion, terms.smooth(torch.ones_like(particles))

    ours, fixed = (
        torch.autograd.grad(sum(part.square().sum() for part in figures(x, of)), x)[0]
        for of in (kernel, frozen)
    )
    torch.testing.assert_close(ours, fixed)
    assert torch.autograd.gradcheck(figures, x)


@both
@every_map
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_numbers_are_computed_in_float32(make, name, dtype, generator):
    x, score = cloud(generator, 2, 20).to(dtype)
    wide = make(MAPS[name])(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        ours = make(MAPS[name])(x)
        smooth = ours.smooth(score)
    assert ours.repulsion.dtype == ours.own_slope.dtype == smooth.dtype == dtype
    assert torch.equal(ours.repulsion, wide.repulsion.to(dtype))
    exact = make(MAPS[name])(x.double())
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.3}
    torch.testing.assert_close(ours.repulsion.double(), exact.repulsion, **close)
    torch.testing.assert_close(smooth.double(), exact.smooth(score.double()), **close)
    if make is Pullback:
        with torch.autocast("cpu", torch.bfloat16):
            gram = make(MAPS[name]).gram(x, x)
        assert torch.equal(gram, make(MAPS[name]).gram(x.float(), x.float()).to(dtype))


@both
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("floor", [0.7, 1e-3])
def test_covariance_of_noise_is_that_of_the_kernel(make, count, floor, generator):
    """Mutants: M or the coordinates left out of what the matrix is divided by."""
    terms = make(SETS, IMQ())(cloud(generator, count))
    basis = torch.eye(count * DIM).view(-1, count, DIM)
    factor = torch.stack([terms.fluctuate(axis, floor).flatten() for axis in basis], 1)
    whole = torch.stack([terms.smooth(axis).flatten() for axis in basis], 1)
    expected = whole / count + floor * torch.eye(count * DIM)
    torch.testing.assert_close(factor @ factor.T, expected, rtol=1e-10, atol=1e-11)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**16), count=st.integers(1, 4))
def test_matrices_between_particles_are_positive_semidefinite(seed, count):
    """Also with equivalents, whose Gram matrix is singular."""
    x = cloud(torch.Generator().manual_seed(seed), count)
    x = torch.cat([x, -x])
    for inner in (RBF(), IMQ()):
        gram = Pullback(SETS, inner)(x).gram
        assert torch.linalg.eigvalsh(gram).min() > -1e-13
        torch.testing.assert_close(gram.diagonal(offset=count), torch.ones(count))
        terms = Equivariant(SETS, inner)(x)
        basis = torch.eye(x.numel()).view(-1, *x.shape)
        whole = torch.vmap(terms.smooth)(basis).flatten(1)
        torch.testing.assert_close(whole, whole.T)
        assert torch.linalg.eigvalsh(whole).min() > -1e-12 * whole.diagonal().max()


@both
def test_one_particle_and_duplicates(make):
    for count in (1, 2, 5):
        terms = make(SETS)(torch.full((count, DIM), 0.3))
        torch.testing.assert_close(terms.gram, torch.ones(count, count))
        # Nothing pulls features that coincide apart; only those of other particles do.
        expected = torch.zeros(count, DIM) if make is Pullback else count * terms.own_slope
        torch.testing.assert_close(terms.repulsion, expected)


def test_sums_with_kernels_of_coordinates(generator):
    x = cloud(generator, 5)
    total = Pullback(SETS) + Linear()
    assert isinstance(total, Sum)
    expected = Pullback(SETS)(x).repulsion + Linear()(x).repulsion
    torch.testing.assert_close(total(x).repulsion, expected)


def test_jacobians_of_frequency_sets_are_never_held(generator):
    sets, count = FrequencySets(2, 5, normal_probes(4, 5)), 3
    x = torch.randn(2, count, 30, generator=generator)

    def direction(kernel, particles, scores):
        terms = kernel(particles)
        return terms.smooth(scores) + terms.repulsion

    for kernel in (Pullback(sets), Equivariant(sets)):
        graph = make_fx(partial(direction, kernel))(*x).graph
        tensors = [n.meta["tensor_meta"] for n in graph.nodes if "tensor_meta" in n.meta]
        assert len(tensors) > 20
        # Views of the probes, one for each frequency; Jacobians would be 720.
        assert max(tensor.shape.numel() for tensor in tensors) <= 120


# ---------------------------------------------------------------- sets of frequencies


def relabeled(seed):
    """An order and signs of the frequencies within each set, as a signed permutation matrix."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(2):
        order = torch.randperm(3, generator=generator)
        signs = torch.randint(2, (3,), generator=generator) * 2.0 - 1
        blocks.append(torch.kron(torch.eye(3)[order] * signs, torch.eye(2)))
    return torch.block_diag(*blocks)


def test_features_are_means_of_cosines(generator):
    particle = cloud(generator)
    frequencies, expected = particle.view(2, 3, 2).tolist(), []
    for frequency_set in frequencies:
        for lag in SETS.probes.tolist():
            turns = [sum(w * u for w, u in zip(f, lag, strict=True)) for f in frequency_set]
            expected.append(np.mean([math.cos(2 * math.pi * turn) for turn in turns]))
    np.testing.assert_allclose(SETS(particle), expected, rtol=1e-12)


def test_derivatives_in_closed_form_are_those_of_pytorch(generator):
    x, vectors = cloud(generator, 2, 2, 4)
    ours, slow = SETS.at(x), DifferentiatedTerms(SETS.__call__, x, SETS(x))
    assert torch.equal(ours.features, SETS(x))
    torch.testing.assert_close(ours.laplacian(), slow.laplacian())
    torch.testing.assert_close(ours.push(vectors), slow.push(vectors))
    covectors = torch.randn(2, 4, 10, generator=generator)
    torch.testing.assert_close(ours.pull(covectors), slow.pull(covectors))
    pairs = torch.randn(2, 3, 4, 10, generator=generator)
    torch.testing.assert_close(ours.gather(pairs), slow.gather(pairs))
    torch.testing.assert_close(ours.gather_pushed(pairs), slow.gather_pushed(pairs))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**16))
def test_order_and_signs_within_sets_do_not_matter(seed):
    """Each particle relabeled in its own way; mutants: sets pooled, or frequencies not averaged."""
    generator = torch.Generator().manual_seed(seed)
    x, score = cloud(generator, 2, 4)
    labels = torch.stack([relabeled(seed + i) for i in range(4)])
    other, moved = ((labels @ part[..., None])[..., 0] for part in (x, score))
    torch.testing.assert_close(SETS(other), SETS(x))
    torch.testing.assert_close(Pullback(SETS).gram(x, other), Pullback(SETS).gram(x, x))
    terms, relabeled_terms = Equivariant(SETS)(x), Equivariant(SETS)(other)
    expected = (labels @ (terms.repulsion + terms.smooth(score))[..., None])[..., 0]
    ours = relabeled_terms.repulsion + relabeled_terms.smooth(moved)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9)
    assert not torch.allclose(SETS(x.roll(DIM // 2, -1)), SETS(x))


@pytest.mark.parametrize("num_probes", [1, 4, 6, 9])
def test_features_move_with_as_many_coordinates_as_there_are_probes(num_probes, generator):
    """Until all of them: then a set is determined by its features, in its neighborhood."""
    sets = FrequencySets(1, 2, normal_probes(num_probes, 2, scale=0.4))
    jacobian = jacrev(sets)(cloud(generator)[:6])
    assert torch.linalg.matrix_rank(jacobian) == min(num_probes, 6)


def test_multiples_of_a_lag_determine_sets_on_a_line():
    """Sets with equal means of cosines but other means of their squares; one probe fewer fails."""
    lag = 0.25
    first, second = (
        torch.tensor(cosines).acos() / (2 * math.pi * lag) for cosines in ([0.6, 0.0], [0.5, 0.1])
    )
    at_one, at_both = (FrequencySets(1, 1, lag * torch.arange(1.0, n)[:, None]) for n in (2, 3))
    torch.testing.assert_close(at_one(first), at_one(second))
    # Mean of cos 2t = 2 cos² t - 1 over two frequencies.
    difference = at_both(first)[1] - at_both(second)[1]
    torch.testing.assert_close(difference, torch.tensor(0.36 - 0.26))


def test_probes_are_drawn_from_a_seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = normal_probes(4000, 2, scale=torch.tensor([1.0, 3.0]), seed=5)
        torch.manual_seed(2)
        torch.testing.assert_close(
            normal_probes(4000, 2, scale=torch.tensor([1, 3]), seed=5), first
        )
    assert not torch.equal(normal_probes(7, 2), normal_probes(7, 2, seed=1))
    torch.testing.assert_close(first.std(0), torch.tensor([1.0, 3.0]), rtol=0.05, atol=0)
    torch.testing.assert_close(FrequencySets(1, 3).probes, normal_probes(32, 3))


def test_refuses():
    with pytest.raises(ValueError, match="num_sets must be a whole number, at least 1, got 0"):
        FrequencySets(0, 2)
    with pytest.raises(ValueError, match="dim must be a whole number, at least 1, got 0"):
        FrequencySets(1, 0)
    with pytest.raises(ValueError, match="num_probes must be a whole number, at least 1, got 0"):
        normal_probes(0, 2)
    for shape in ((5, 3), (2,), (0, 2)):
        with pytest.raises(ValueError, match="probes: expected at least one of width 2, got shape"):
            FrequencySets(1, 2, torch.ones(shape))
    for call in (SETS, SETS.at, Pullback(SETS), Equivariant(SETS)):
        with pytest.raises(ValueError, match=r"a multiple of 4, got dimension 10"):
            call(torch.ones(3, 10))
    with pytest.raises(ValueError, match=r"a multiple of 4, got dimension 0"):
        SETS(torch.ones(3, 0))


def test_clouds_of_equivalents_are_no_distance_apart(generator):
    x = cloud(generator, 7)
    y = (torch.stack([relabeled(i) for i in range(7)]) @ x[..., None])[..., 0]
    kernel = Pullback(SETS).frozen(x)
    assert squared_mmd(x, y, kernel=RBF()) > 1e-2
    torch.testing.assert_close(squared_mmd(x, y, kernel=kernel), torch.tensor(0.0))


# ---------------------------------------------------------------- Stein variational descent

PLACES = torch.tensor([0.3, 0.75, 1.2], dtype=torch.float64)
SD = 0.05
LINE = FrequencySets(1, 1, torch.linspace(0.125, 1, 8, dtype=torch.float64)[:, None])


def equivalents():
    signs = itertools.product((1.0, -1.0), repeat=len(PLACES))
    orders = itertools.permutations(PLACES.tolist())
    return torch.stack(
        [torch.tensor(s) * torch.tensor(o) for s, o in itertools.product(signs, orders)]
    )


def frequencies_of_any_order(num_heads=1):
    """A normal distribution about three places, in each order with all signs: 48 modes a head."""
    modes = equivalents()
    with pyro.plate("head", num_heads):
        improper = dist.Normal(torch.zeros(3), 1.0).to_event(1).mask(False)
        frequency = pyro.sample("frequency", improper)
        offset = pyro.sample("offset", dist.Normal(2.0, 0.5))
        near = dist.Normal(modes, SD).log_prob(frequency[..., None, :]).sum(-1)
        pyro.factor("target", near.logsumexp(-1))
    return offset


def kernel_values(kernel, generator):
    """Of κ at the probes over ten particles, mean and standard deviation in two runs; exact."""
    modes, shape = equivalents(), (2, 10)
    chosen = torch.randint(len(modes), shape, generator=generator)
    start = modes[chosen] + 0.3 * SD * torch.randn(*shape, 3, generator=generator)
    offset = 2 + 0.3 * torch.randn(20, 1, generator=generator)
    init = {"frequency": start.flatten(0, 1)[:, None], "offset": offset}
    svgd = SVGD(frequencies_of_any_order, num_particles=10, kernel=kernel, metric="none")
    posterior = svgd.run(num_steps=200, num_runs=2, seed=0, init=init, progress=False)
    found = LINE(posterior["frequency"].squeeze(-2))
    exact = LINE(modes[0] + SD * torch.randn(20000, 3, generator=generator))
    spread = (found.std(1).mean(-1) / exact.std(0).mean()).tolist()
    return spread, (found.mean(1) - exact.mean(0)).abs().max().item(), posterior


def test_particles_spread_over_kernels_rather_than_over_copies(generator):
    """Ten particles of 48 modes: plain kernels leave each at the peak of a mode of its own."""
    sites = {"frequency": Equivariant(LINE)}
    spread, error, posterior = kernel_values(PerSite(sites=sites), generator)
    assert min(spread) > 0.85
    assert max(spread) < 1.1
    assert error < 0.01
    # Another site of the same particles is as it is without.
    offset = posterior["offset"].squeeze(-1)
    torch.testing.assert_close(offset.std(1), torch.full((2,), 0.5), rtol=0.1, atol=0)
    wasted, *_ = kernel_values(PerSite(RBF()), generator)
    assert max(wasted) < 0.5


def test_scores_of_mirror_images_cancel_in_numbers_but_not_in_matrices():
    """What is written down: why a number-valued kernel of features is no kernel for SVGD."""
    x = torch.tensor([[0.5], [-0.5]])
    score = (0.3 - x.abs()) * x.sign() / SD**2
    numbers, matrices = Pullback(LINE)(x), Equivariant(LINE)(x)
    torch.testing.assert_close(numbers.smooth(score), torch.zeros(2, 1))
    ours = matrices.smooth(score)
    assert ours[0] < 0 < ours[1]
    torch.testing.assert_close(ours[0], -ours[1])


def heads_of_two():
    return PerSite(sites={"frequency": Equivariant(FrequencySets(2, 1, LINE.probes))})


def starts_of_two(generator):
    frequency = equivalents()[torch.randint(48, (5, 2), generator=generator)]
    offset = 2 + 0.1 * torch.randn(5, 2, generator=generator)
    return {"frequency": frequency, "offset": offset}


def test_heads_of_one_particle_are_sets_of_its_own(generator):
    """A step by hand; and runs share their graphs. Mutant: coordinates in another order."""
    svgd = SVGD(frequencies_of_any_order, num_particles=5, kernel=heads_of_two(), metric="none")
    density = svgd.log_density(2)
    kernel = svgd.kernel_of(density, svgd.view(density, 1))
    start = starts_of_two(generator)
    particles = torch.cat([start["frequency"].flatten(1), start["offset"]], -1)
    ours = kernel(particles).blocks[0].at.features.unflatten(-1, (2, 8))
    torch.testing.assert_close(ours, LINE(start["frequency"]))
    posterior = svgd.run(2, num_steps=5, seed=0, init=start, progress=False)
    assert posterior["frequency"].shape == (1, 5, 2, 3)
    assert posterior.optimization["bandwidth"].isfinite().all()
    before = svgd.density_settings.graphs.num_recordings
    svgd.run(2, num_steps=5, seed=0, init=start, progress=False)
    assert svgd.density_settings.graphs.num_recordings == before


@pytest.mark.slow
def test_a_sampler_freezes_and_shakes_equivariant_particles(generator):
    spos = SPOS(
        frequencies_of_any_order,
        num_particles=5,
        kernel=heads_of_two(),
        metric="none",
        step_size=1e-4,
    )
    lengths = {"warmup_steps": 20, "num_samples": 10, "seed": 0, "progress": False}
    posterior = spos.run(2, init=starts_of_two(generator), **lengths)
    assert posterior["frequency"].isfinite().all()
    assert posterior["frequency"].std(1).min() > 0


@pytest.mark.parametrize(
    "wrapped", [lambda k: k, lambda k: PerSite(RBF(), {"frequency": k}), lambda k: PerSite(k)]
)
def test_coordinates_stay_those_that_features_know(wrapped):
    """Mutants: a diagonal metric from twenty particles on, Laplace coordinates."""
    kernel = wrapped(Equivariant(FrequencySets(1, 2)))
    assert SVGD(int, num_particles=50, kernel=kernel).metric == "none"
    assert SVGD(int, num_particles=50, kernel=RBF() + RBF()).metric == "auto"
    for mixing in ({"metric": "diagonal"}, {"coordinates": "laplace"}):
        with pytest.raises(ValueError, match=r"kernel of features reads|does not go with a kernel"):
            SVGD(int, num_particles=50, kernel=kernel, **mixing)
