"""Tests of maps that units and gauges cancel by: invariance, gradients, and what is wrapped."""

import pytest
import torch

from bayesattn.divergences import (
    MMD,
    Adversarial,
    Balanced,
    Energy,
    ScaleFree,
    Whitened,
    energy_distance,
    squared_mmd,
)
from bayesattn.inference import Alignment
from bayesattn.kernels import RBF
from tests.compilation import in_one_graph
from tests.heads import Classifier

DIM = 4
TINY = 1e-10
DTYPES = (torch.float32, torch.float64)
WRAPS = pytest.mark.parametrize(
    "wrap", [ScaleFree, Whitened, Balanced], ids=lambda wrap: wrap.__name__
)


@pytest.fixture
def clouds(generator):
    query = torch.randn(2, 9, DIM, generator=generator)
    key = torch.randn(2, 12, DIM, generator=generator)
    return query, key @ torch.randn(DIM, DIM, generator=generator) + 1


@pytest.fixture
def affine(generator):
    return 3 * torch.randn(DIM, DIM, generator=generator), torch.randn(DIM, generator=generator)


@pytest.mark.parametrize("divergence", [Energy(), MMD(RBF(1.3))], ids=repr)
def test_whitened_does_not_see_affine_maps(divergence, clouds, affine):
    """Mutants: the covariance of one cloud, the mean left in."""
    (query, key), (matrix, shift) = clouds, affine
    whitened = Whitened(divergence, ridge=TINY)
    mapped = [x @ matrix + shift for x in (query, key)]
    torch.testing.assert_close(whitened(*mapped), whitened(query, key), rtol=1e-6, atol=0)
    assert not torch.isclose(divergence(*mapped), divergence(query, key), rtol=0.05).any()


def test_whitened_clouds_have_the_identity_for_their_covariance(clouds):
    seen = []

    def look(query, key, *_):
        seen.extend((query, key))
        return query.sum((-2, -1))

    Whitened(look, ridge=TINY)(*clouds)
    for x, y in zip(*seen, strict=True):
        mean = 0.5 * (x.mean(0) + y.mean(0))
        torch.testing.assert_close(mean, torch.zeros(DIM), rtol=0, atol=1e-12)
        covariance = 0.5 * (x.T @ x / len(x) + y.T @ y / len(y))
        torch.testing.assert_close(covariance, torch.eye(DIM), rtol=1e-6, atol=1e-6)


def test_scale_free_does_not_see_similarities(clouds):
    query, key = clouds
    scale_free = ScaleFree(MMD(RBF(1.0)))
    torch.testing.assert_close(scale_free(7 * query + 2, 7 * key + 2), scale_free(query, key))
    torch.testing.assert_close(
        ScaleFree(Energy())(query, key),
        energy_distance(query, key) / _root_mean_square(query, key),
    )


def _root_mean_square(query, key):
    mean = 0.5 * (query.mean(1) + key.mean(1))[:, None]
    squares = [(x - mean).square().sum(-1).mean(1) for x in (query, key)]
    return (0.5 * (squares[0] + squares[1])).sqrt()


@pytest.mark.parametrize("wrap", [ScaleFree, Whitened], ids=lambda wrap: wrap.__name__)
def test_shrinking_gains_nothing(wrap, clouds):
    """Gradients pass through the statistics. Mutant: constant statistics."""
    scale = torch.ones((), requires_grad=True)
    (gradient,) = torch.autograd.grad(wrap(Energy())(*(scale * x for x in clouds)).sum(), scale)
    assert abs(gradient) < 1e-10
    (gradient,) = torch.autograd.grad(energy_distance(*(scale * x for x in clouds)).sum(), scale)
    assert gradient > 0.1


def test_balanced_does_not_see_the_gauge(clouds, affine):
    """Attention is the same, and a plain divergence falls or rises. Mutants: A for its inverse."""
    (query, key), (matrix, shift) = clouds, affine
    moved = query @ matrix.inverse(), (key + shift) @ matrix.T
    weights = [(q @ k.mT).softmax(-1) for q, k in ((query, key), moved)]
    torch.testing.assert_close(*weights)
    balanced = Balanced(Energy(), ridge=TINY)
    torch.testing.assert_close(balanced(*moved), balanced(query, key), rtol=1e-4, atol=1e-7)
    assert not torch.isclose(energy_distance(*moved), energy_distance(query, key), rtol=0.1).any()


def test_balanced_clouds_have_one_mean_and_covariance_and_the_same_attention(clouds):
    seen = []

    def look(query, key, *_):
        seen.extend((query, key))
        return query.sum((-2, -1))

    query, key = clouds
    Balanced(look, ridge=TINY)(query, key)
    new_query, new_key = seen
    torch.testing.assert_close(new_query.mean(1), new_key.mean(1))
    covariances = [torch.stack([x.T.cov(correction=0) for x in cloud]) for cloud in seen]
    torch.testing.assert_close(*covariances, rtol=1e-5, atol=1e-6)
    weights = [(q @ k.mT).softmax(-1) for q, k in ((query, key), (new_query, new_key))]
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-9)


@WRAPS
@pytest.mark.parametrize("num_queries", [6, 2])
def test_gradcheck_also_with_fewer_points_than_dimensions(wrap, num_queries, clouds, generator):
    query, key = clouds[0][:, :num_queries], clouds[1]
    leaves = [query.clone().requires_grad_(), key.clone().requires_grad_()]
    divergence = wrap(MMD(RBF(1.0)))
    assert torch.autograd.gradcheck(lambda x, y: divergence(x, y), leaves)


@WRAPS
def test_masks_weights_batches_and_transforms(wrap, clouds, generator):
    query, key = clouds
    divergence = wrap(Energy())
    mask = torch.rand(2, 9, generator=generator) < 0.7
    mask[:, :3] = True
    weights = (torch.rand(2, 9, generator=generator), None)
    spoiled = torch.where(mask[..., None], query, torch.nan).requires_grad_()
    found = divergence(spoiled, key, mask, None, weights)
    for i in range(2):
        kept = (weights[0][i][mask[i]], None)
        alone = divergence(query[i][mask[i]], key[i], None, None, kept)
        torch.testing.assert_close(found[i], alone)
    found.sum().backward()
    assert (spoiled.grad[~mask] == 0).all()
    mapped = torch.vmap(lambda x, y: divergence(x, y))(query, key)
    torch.testing.assert_close(mapped, divergence(query, key))
    gradients = torch.vmap(torch.func.grad(lambda x, y: divergence(x, y)))(query, key)
    assert gradients.isfinite().all()


@WRAPS
def test_points_that_all_coincide_are_left_alone(wrap):
    query = torch.ones(3, DIM, requires_grad=True)
    value = wrap(squared_mmd)(query, torch.ones(2, DIM))
    value.backward()
    assert value < 1e-12
    assert query.grad.isfinite().all()


def test_equal_eigenvalues_have_gradients():
    """Mutant: difference quotients of zero by zero."""
    query = torch.cat([torch.eye(DIM), -torch.eye(DIM)]).requires_grad_()
    key = (2 * torch.cat([torch.eye(DIM), -torch.eye(DIM)])).requires_grad_()
    divergence = Balanced(MMD(RBF(1.0)), ridge=TINY)
    (gradient,) = torch.autograd.grad(divergence(query, key + 0.1), query)
    assert gradient.isfinite().all()


def test_what_is_learned_is_not_hidden(generator):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier()
        alignment = Alignment(model, lambda heads, dim: Whitened(Adversarial(heads, dim)), 1.0)
    assert len(list(alignment.parameters())) > 0
    with alignment.observe():
        model(torch.randn(3, 5, 6, generator=generator))
    alignment.loss().backward()
    assert all(value.grad is not None for value in alignment.parameters())


@WRAPS
def test_second_derivatives(wrap, clouds):
    """Mutant: one step of Newton's method for the rotation, or for the root."""
    query, key = clouds[0][0, :5], clouds[1][0, :4]
    leaves = [query.requires_grad_(), key.requires_grad_()]
    divergence = wrap(MMD(RBF(1.0)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert torch.autograd.gradgradcheck(lambda x, y: divergence(x, y), leaves)


@WRAPS
@pytest.mark.parametrize(("num_points", "dim"), [(6, 32), (30, 64), (100, 24)])
def test_float32_is_near_float64_at_any_rank(wrap, num_points, dim, generator):
    """As a sentence's tokens have it. Mutant: the square of what the root is taken of."""
    query, key = torch.randn(2, 4, num_points, dim, generator=generator)
    narrow, wide = ([x.to(dtype).requires_grad_() for x in (query, key)] for dtype in DTYPES)
    divergence = wrap(Energy())
    with torch.autocast("cpu", torch.bfloat16):
        value = divergence(*narrow)
    exact = divergence(*wide)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=0)
    found, expected = (
        torch.cat(torch.autograd.grad(total.sum(), leaves), -2)
        for total, leaves in ((value, narrow), (exact, wide))
    )
    # Whitened, few points are all equally far from each other, and of a gradient little is left.
    plain = torch.cat(torch.autograd.grad(ScaleFree(Energy())(*wide).sum(), wide), -2)
    assert (found.double() - expected).norm() < 1e-3 * (expected.norm() + plain.norm())


@WRAPS
def test_a_cloud_without_weight_is_nan_where_values_are_not_looked_at(wrap, clouds):
    query, key = (x[0, :3] for x in clouds)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    values = torch.vmap(lambda m: wrap(Energy())(query, key, m))(mask)
    assert values.isnan().tolist() == [False, True]


@pytest.mark.compile
@WRAPS
def test_compiles_in_one_graph_with_its_gradient(wrap, clouds):
    query, key = clouds
    divergence = wrap(MMD(RBF(1.0)))
    mask = torch.arange(9) < torch.tensor([[6], [9]])
    leaf, other = query.clone().requires_grad_(), query.clone().requires_grad_()
    found, expected = in_one_graph(divergence, leaf, key, mask), divergence(other, key, mask)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), leaf), torch.autograd.grad(expected.sum(), other)
    )


@pytest.mark.usefixtures("unchecked_types")
def test_refuses():
    for wrap in (ScaleFree, Whitened, Balanced):
        with pytest.raises(
            ValueError, match=r"divergence: expected one of bayesattn\.divergences, .* got 3"
        ):
            wrap(3)
    for wrap in (Whitened, Balanced):
        with pytest.raises(ValueError, match="ridge: expected a positive number, got 0"):
            wrap(Energy(), ridge=0)
