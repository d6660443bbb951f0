"""Tests of bayesattn.divergences.energy."""

import numpy as np
import pytest
import torch
from scipy import stats

from bayesattn.divergences import Energy, energy_distance
from tests import reference


@pytest.mark.parametrize("unbiased", [False, True])
def test_is_that_of_loops(unbiased, generator):
    query = torch.randn(5, 3, generator=generator)
    key = 1 + torch.randn(4, 3, generator=generator)
    a, b = torch.rand(5, generator=generator), torch.rand(4, generator=generator)
    points = (x.numpy() for x in (query, key, a, b))
    expected = -reference.pair_contrast(lambda x, y: np.linalg.norm(x - y), *points, unbiased)
    ours = energy_distance(query, key, weights=(a, b), unbiased=unbiased)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    assert Energy(unbiased)(query, key, weights=(a, b)) == ours


def test_is_the_square_of_that_of_scipy_in_one_dimension(generator):
    query, key = torch.randn(7, 1, generator=generator), torch.randn(5, 1, generator=generator)
    a, b = torch.rand(7, generator=generator), torch.rand(5, generator=generator)
    expected = stats.energy_distance(*(x.flatten().numpy() for x in (query, key, a, b)))
    np.testing.assert_allclose(Energy()(query, key, weights=(a, b)), expected**2, rtol=1e-12)


def test_unbiased_estimate_has_the_mean_of_the_normal_laws(generator):
    """Of N(0, 1) and N(m, 1): 2 E|N(m, 2)| - 4 / sqrt pi."""
    query = torch.randn(20000, 4, 1, generator=generator)
    key = 1.5 + torch.randn(20000, 3, 1, generator=generator)
    folded = stats.foldnorm(1.5 / np.sqrt(2), scale=np.sqrt(2)).mean()
    expected = 2 * folded - 4 / np.sqrt(np.pi)
    for unbiased, is_near in ((True, True), (False, False)):
        values = Energy(unbiased)(query, key)
        error = abs(values.mean().item() - expected) / (values.std().item() / 20000**0.5)
        assert (error < 4) == is_near


def test_scales_as_the_points_do(generator):
    query, key = torch.randn(2, 5, 3, generator=generator)
    torch.testing.assert_close(Energy()(7 * query, 7 * key), 7 * Energy()(query, key))


def test_coincident_points_pull_no_way():
    query = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    Energy()(query, torch.tensor([[0.0, 0.0]])).backward()
    # Of 2 E|x - y| - E|x - x'|: the second query is drawn to the key, and pushed by the first.
    np.testing.assert_allclose(query.grad, [[0.5, 0.0], [0.5, 0.0]])
