"""Tests of divergences of means and covariances: closed forms, lack of rank, and gradients."""

import numpy as np
import pytest
import torch
from scipy import linalg

from bayesattn.divergences import (
    BuresWasserstein,
    MomentDistance,
    bures_wasserstein,
    moment_distance,
)

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
