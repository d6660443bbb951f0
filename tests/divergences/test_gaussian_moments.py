"""Tests of divergences of means and covariances: closed forms, lack of rank, and gradients."""

import numpy as np
import pytest
import torch
from scipy import linalg

from bayesattn.divergences import (
    BuresWasserstein,
    Divergence,
    MomentDistance,
    bures_wasserstein,
    moment_distance,
)
from tests.compilation import in_one_graph

DIVERGENCES = [BuresWasserstein(), MomentDistance()]


def moments(points, weights):
    weights = weights / weights.sum()
    mean = weights @ points
    return mean, (weights[:, None] * (points - mean)).T @ (points - mean)


def test_are_their_formulas_by_weighted_moments(generator):
    """Mutants: means over points, roots of weights twice, one covariance's trace."""
    query = torch.randn(9, 4, generator=generator)
    key = torch.randn(7, 4, generator=generator) @ torch.randn(4, 4, generator=generator) + 1
    a, b = torch.rand(9, generator=generator), torch.rand(7, generator=generator)
    (m, c), (other, d) = (moments(*(x.numpy() for x in pair)) for pair in ((query, a), (key, b)))
    root = linalg.sqrtm(c)
    cross = linalg.sqrtm(root @ d @ root).real
    expected = ((m - other) ** 2).sum() + np.trace(c + d - 2 * cross)
    found = bures_wasserstein(query, key, weights=(a, b))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    found = moment_distance(query, key, weights=(a, b))
    np.testing.assert_allclose(found, ((m - other) ** 2).sum() + ((c - d) ** 2).sum(), rtol=1e-12)


def test_shifts_and_scales_in_closed_form(generator):
    query, shift = torch.randn(8, 3, generator=generator), torch.tensor([1.0, -2.0, 0.5])
    torch.testing.assert_close(bures_wasserstein(query, query + shift), shift.square().sum())
    _, covariance = moments(query, torch.ones(8))
    trace = covariance.trace()
    centered = query - query.mean(0)
    torch.testing.assert_close(bures_wasserstein(centered, 3 * centered), 4 * trace)
    torch.testing.assert_close(
        moment_distance(centered, 3 * centered), 64 * covariance.square().sum()
    )


@pytest.mark.parametrize(("num_queries", "num_keys"), [(9, 7), (3, 2), (3, 9), (1, 4)])
def test_gradients_at_any_rank(num_queries, num_keys, generator):
    """Fewer points than dimensions leave covariances without full rank. Mutant: a plain root."""
    query = torch.randn(2, num_queries, 5, generator=generator, requires_grad=True)
    key = torch.randn(2, num_keys, 5, generator=generator, requires_grad=True)
    for divergence in DIVERGENCES:
        assert torch.autograd.gradcheck(lambda x, y, d=divergence: d(x, y), (query, key))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_equal_and_coinciding_clouds(divergence, generator):
    query = torch.randn(6, 4, generator=generator, requires_grad=True)
    value = divergence(query, query.detach().flip(0))
    assert value < 1e-12
    point = torch.zeros(3, 2, requires_grad=True)
    divergence(point, torch.ones(4, 2)).backward()
    torch.testing.assert_close(point.grad, torch.full((3, 2), -2 / 3))


def test_a_law_s_spread_is_seen_and_its_shape_is_not():
    """Of three points and two with the same mean and covariance they cannot tell."""
    two, three = torch.tensor([[-1.0], [1.0]]), torch.tensor([[-(1.5**0.5)], [0.0], [1.5**0.5]])
    for divergence in DIVERGENCES:
        assert divergence(two, three) < 1e-12
        assert divergence(two, 2 * three) > 0.9


def padded(generator):
    """Clouds of a batch, each with masks and weights; some of what is left out is no number."""
    points = [torch.randn(3, n, 4, generator=generator) for n in (9, 7)]
    masks = [torch.rand(3, n, generator=generator) > 0.3 for n in (9, 7)]
    for mask in masks:
        mask[:, :2] = True
    weights = tuple(0.2 + torch.rand(3, n, generator=generator) for n in (9, 7))
    filling = torch.tensor([1.0, torch.nan, torch.inf, 1.0])
    points = [torch.where(m[..., None], x, filling) for x, m in zip(points, masks, strict=True)]
    return *points, *masks, weights


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_masks_batches_and_transforms(divergence, generator):
    """Mutant: a mean over all points."""
    query, key, query_mask, key_mask, weights = padded(generator)
    leaves = [query.requires_grad_(), key.requires_grad_()]
    found = divergence(*leaves, query_mask, key_mask, weights)
    for i in range(3):
        rows, columns = query_mask[i], key_mask[i]
        kept = (weights[0][i, rows], weights[1][i, columns])
        alone = divergence(query[i, rows], key[i, columns], weights=kept)
        torch.testing.assert_close(found[i], alone)
    gradients = torch.autograd.grad(found.sum(), leaves)
    for gradient, mask in zip(gradients, (query_mask, key_mask), strict=True):
        assert (gradient[~mask] == 0).all()
        assert gradient[mask].abs().sum(-1).min() > 0
    mapped = torch.vmap(
        torch.func.grad_and_value(lambda x, y, u, v, a, b: divergence(x, y, u, v, (a, b)))
    )(query.detach(), key.detach(), query_mask, key_mask, *weights)
    for one, other in zip(mapped, (gradients[0], found), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_gradcheck_by_weights(divergence, generator):
    query, key = (torch.randn(n, 3, generator=generator) for n in (5, 4))
    weights = [(0.2 + torch.rand(n, generator=generator)).requires_grad_() for n in (5, 4)]
    assert torch.autograd.gradcheck(lambda a, b: divergence(query, key, weights=(a, b)), weights)


def test_what_has_no_direction_in_common_does_not_turn_each_other(generator):
    """Of a product that is zero but for rounding. Mutant: values beside the largest of them."""
    axes, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    query = (torch.randn(5, 3, generator=generator) @ axes[:3]).requires_grad_()
    key = torch.randn(5, 3, generator=generator) @ axes[3:]
    (gradient,) = torch.autograd.grad(bures_wasserstein(query, key), query)
    # A point draws all to it, as the covariance of the keys were not there.
    torch.testing.assert_close(gradient, 2 / 5 * (query.detach() - key.mean(0)))


def test_only_the_distance_of_moments_has_second_derivatives(generator):
    query, key = (torch.randn(n, 3, generator=generator) for n in (6, 5))
    query.requires_grad_()
    (gradient,) = torch.autograd.grad(bures_wasserstein(query, key), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(gradient.sum(), query)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert torch.autograd.gradgradcheck(lambda x: moment_distance(x, key), query)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_a_cloud_without_weight_is_nan_where_values_are_not_looked_at(divergence, generator):
    points = torch.randn(3, 2, generator=generator)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    values = torch.vmap(lambda m: divergence(points, points + 1, m))(mask)
    assert values.isnan().tolist() == [False, True]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 512.0])
def test_narrow_types_are_computed_in_float32(divergence, dtype, offset, generator):
    """Also far from the origin. Mutants: no origin taken off, products under autocast."""
    points = [offset + 4 * torch.randn(n, 8, generator=generator) for n in (30, 20)]
    leaves = [x.to(dtype).requires_grad_() for x in points]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        value = divergence(*leaves)
    exact = divergence(*wide)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    found, expected = torch.autograd.grad(value, leaves), torch.autograd.grad(exact, wide)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() < 5e-3 * other.norm()


@pytest.mark.compile
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_compiles_in_one_graph_with_its_gradient(divergence, generator):
    query, key, *masks, _ = padded(generator)
    leaf, other = query.clone().requires_grad_(), query.clone().requires_grad_()
    found, expected = in_one_graph(divergence, leaf, key, *masks), divergence(other, key, *masks)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), leaf), torch.autograd.grad(expected.sum(), other)
    )


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_satisfies_the_protocol(divergence):
    assert isinstance(divergence, Divergence)
    assert hash(divergence) == hash(type(divergence)())
    with pytest.raises(ValueError, match="key_mask: expected a point"):
        divergence(torch.zeros(2, 3), torch.zeros(2, 3), None, torch.tensor([False, False]))
