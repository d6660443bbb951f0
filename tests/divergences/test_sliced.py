"""Tests of bayesattn.divergences.sliced."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bayesattn.divergences import SlicedWasserstein, sliced_wasserstein
from bayesattn.divergences.sliced import random_directions, wasserstein_on_a_line


@given(
    seed=st.integers(0, 2**16),
    num_queries=st.integers(1, 6),
    num_keys=st.integers(1, 6),
    ties=st.booleans(),
)
def test_on_a_line_is_that_of_scipy(seed, num_queries, num_keys, ties):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_queries, generator=generator)
    key = torch.randn(num_keys, generator=generator)
    if ties:
        query, key = query.round(), key.round()
    a = 0.1 + torch.rand(num_queries, generator=generator)
    b = 0.1 + torch.rand(num_keys, generator=generator)
    expected = stats.wasserstein_distance(*(x.numpy() for x in (query, key, a, b)))
    ours = wasserstein_on_a_line(query, key, a / a.sum(), b / b.sum())
    np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-14)
    sliced = SlicedWasserstein(3)(query[:, None], key[:, None], weights=(a, b))
    np.testing.assert_allclose(sliced, expected, rtol=1e-11, atol=1e-14)


def test_is_the_mean_over_directions(generator):
    query, key = torch.randn(5, 3, generator=generator), torch.randn(4, 3, generator=generator)
    directions = torch.randn(7, 3, generator=generator)
    expected = [
        stats.wasserstein_distance((query @ d / d.norm()).numpy(), (key @ d / d.norm()).numpy())
        for d in directions
    ]
    ours = sliced_wasserstein(query, key, directions=directions)
    np.testing.assert_allclose(ours, np.mean(expected), rtol=1e-11)
    torch.testing.assert_close(SlicedWasserstein(directions=directions)(query, key), ours)


def test_of_a_shift_is_its_mean_projection(generator):
    """E |cos| in the plane is 2 / pi, so a shift by v is 2 |v| / pi away."""
    query = torch.randn(5, 2, generator=generator)
    value = SlicedWasserstein(20000)(query, query + torch.tensor([3.0, 4.0]))
    np.testing.assert_allclose(value, 10 / np.pi, rtol=0.02)


def test_projections_of_far_clouds_lose_no_digits(generator):
    query, key = (1e5 + torch.randn(2, 20, 3, generator=generator)).float()
    exact = SlicedWasserstein()(query.double(), key.double())
    torch.testing.assert_close(SlicedWasserstein()(query, key).double(), exact, rtol=1e-5, atol=0)


def test_random_directions_are_uniform_unit_vectors():
    for seed in (3, torch.Generator().manual_seed(3)):
        directions = random_directions(20000, 3, seed)
        torch.testing.assert_close(directions.norm(dim=-1), torch.ones(20000))
        torch.testing.assert_close(directions.mean(0), torch.zeros(3), rtol=0, atol=0.02)
        second = directions.T @ directions / 20000
        torch.testing.assert_close(second, torch.eye(3) / 3, rtol=0, atol=0.02)


def test_a_number_fixes_the_directions_and_a_generator_draws_new_ones(generator):
    query, key = torch.randn(2, 5, 3, generator=generator)
    fixed, fresh = SlicedWasserstein(3, seed=1), SlicedWasserstein(3, seed=generator)
    assert fixed(query, key) == fixed(query, key) != SlicedWasserstein(3, seed=2)(query, key)
    assert fresh(query, key) != fresh(query, key)


def test_gradient_moves_points_to_where_they_belong():
    """On a line, each query's gradient has the sign of its way from the key of its rank."""
    query = torch.tensor([[0.0], [5.0], [2.0]], requires_grad=True)
    key = torch.tensor([[3.0], [1.0], [4.5]])
    SlicedWasserstein(1)(query, key).backward()
    np.testing.assert_allclose(query.grad.flatten(), [-1 / 3, 1 / 3, -1 / 3])


def test_refuses(unchecked_types):
    points = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="num_projections: expected at least one, got 0"):
        SlicedWasserstein(0)
    for directions in (torch.ones(4, 3), torch.ones(2), torch.ones(0, 2)):
        with pytest.raises(ValueError, match="directions: expected 'projection 2', at least one"):
            sliced_wasserstein(points, points, directions=directions)
