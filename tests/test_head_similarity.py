"""Measures of how alike heads are, against formulas written out, and their bounds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesattn.head_similarity import (
    centered_kernel_alignment,
    cosine_similarity,
    effective_heads,
    jensen_shannon,
    mean_over_pairs,
)

HEADS, QUERIES, KEYS, DIM = 3, 5, 7, 4
sizes = st.integers(1, 4)


def seeded(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_cosines_are_those_of_angles():
    rows = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -2.0], [0.0, 0.0]])
    root = 0.5**0.5
    expected = [[1, root, 0, 0], [root, 1, -root, 0], [0, -root, 1, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(cosine_similarity(rows), torch.tensor(expected, dtype=rows.dtype))


@pytest.mark.parametrize(("samples", "dim"), [(11, 4), (4, 11), (5, 5)])
def test_alignment_by_its_definition(samples, dim):
    """Both ways of summing. Mutants: features that are not centred, the norm for its square."""
    features = seeded(0, 2, HEADS, samples, dim) + 3.0
    found = centered_kernel_alignment(features)
    centering = torch.eye(samples) - 1 / samples
    grams = centering @ features @ features.mT @ centering
    for batch in range(2):
        for i in range(HEADS):
            for j in range(HEADS):
                one, other = grams[batch, i], grams[batch, j]
                expected = (one * other).sum() / (one.norm() * other.norm())
                torch.testing.assert_close(found[batch, i, j], expected)


def test_alignment_does_not_see_rotations_scales_and_shifts():
    features = seeded(0, 1, 20, DIM)
    turn, _ = torch.linalg.qr(seeded(1, DIM, DIM))
    pair = torch.cat([features, 3 * features @ turn + 5])
    torch.testing.assert_close(centered_kernel_alignment(pair), torch.ones(2, 2))
    flat = torch.cat([features, torch.ones_like(features)])
    torch.testing.assert_close(centered_kernel_alignment(flat), torch.eye(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_samples_that_are_equal_up_to_rounding_are_no_differences(dtype, scale):
    constants = torch.tensor([3.3, 2.31], dtype=dtype)[:, None, None]
    found = centered_kernel_alignment(scale * constants.expand(2, 11, DIM))
    torch.testing.assert_close(found, torch.eye(2, dtype=dtype))
    features = scale * seeded(0, 2, 11, DIM).to(dtype)
    torch.testing.assert_close(
        centered_kernel_alignment(features), centered_kernel_alignment(features / scale)
    )


def test_what_is_not_finite_has_no_effective_number():
    similarity = torch.stack([torch.eye(2), torch.full((2, 2), torch.nan)])
    found = effective_heads(similarity)
    assert found[0] == pytest.approx(2)
    assert found[1].isnan()


def test_divergence_by_its_definition():
    weights = torch.softmax(seeded(0, 2, HEADS, QUERIES, KEYS), -1)
    found = jensen_shannon(weights)
    for i in range(HEADS):
        for j in range(HEADS):
            one, other = weights[:, i], weights[:, j]
            middle = (one + other) / 2
            apart = [(a * (a / middle).log()).sum(-1) for a in (one, other)]
            torch.testing.assert_close(found[:, i, j], (sum(apart) / 2).mean(-1))


def test_divergence_is_zero_of_twins_and_log_two_of_strangers():
    weights = torch.eye(4)[:3, None].expand(3, 2, 4)
    expected = math.log(2) * (1 - torch.eye(3))
    torch.testing.assert_close(jensen_shannon(weights), expected)
    twins = torch.softmax(seeded(0, 1, QUERIES, KEYS), -1).expand(2, QUERIES, KEYS)
    torch.testing.assert_close(jensen_shannon(twins), torch.zeros(2, 2))


def test_queries_that_do_not_count_do_not_matter():
    weights = torch.softmax(seeded(0, 2, HEADS, QUERIES, KEYS), -1)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True, False, True, True, False]])
    found = jensen_shannon(weights, mask)
    for batch in range(2):
        expected = jensen_shannon(weights[batch][:, mask[batch]])
        torch.testing.assert_close(found[batch], expected)
    with pytest.raises(ValueError, match="a query at least"):
        jensen_shannon(weights[..., :0, :])


@given(num_heads=sizes, num_twins=sizes)
def test_effective_heads_count_what_differs(num_heads, num_twins):
    """Groups of twins count once each."""
    rows = torch.eye(num_heads).repeat(num_twins, 1)
    found = effective_heads(cosine_similarity(rows))
    assert found.item() == pytest.approx(num_heads)


@given(num_heads=sizes, samples=st.integers(2, 6), dim=sizes, seed=st.integers(0, 20))
def test_bounds_symmetry_and_order(num_heads, samples, dim, seed):
    features = seeded(seed, num_heads, samples, dim)
    order = torch.randperm(num_heads, generator=torch.Generator().manual_seed(seed))
    weights = torch.softmax(features, -1)
    for function, data in (
        (lambda x: cosine_similarity(x.flatten(1)), features),
        (centered_kernel_alignment, features),
        (jensen_shannon, weights),
    ):
        found = function(data)
        torch.testing.assert_close(found, found.mT)
        torch.testing.assert_close(function(data[order]), found[order][:, order])
        assert found.abs().max() <= 1.0
        own = torch.zeros(num_heads) if function is jensen_shannon else torch.ones(num_heads)
        torch.testing.assert_close(found.diagonal(), own)
        if function is not jensen_shannon:
            assert 1 - 1e-9 <= effective_heads(found) <= num_heads + 1e-9


def test_mean_over_pairs_leaves_the_diagonal_out():
    values = torch.tensor([[5.0, 1.0, 2.0], [1.0, 7.0, 3.0], [2.0, 3.0, 9.0]])
    assert mean_over_pairs(values) == 2.0
    assert mean_over_pairs(values[:1, :1]).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_measured_in_float32_also_under_autocast(dtype):
    features = seeded(0, HEADS, 9, DIM).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = [cosine_similarity(features.flatten(1)), centered_kernel_alignment(features)]
    expected = [
        cosine_similarity(features.float().flatten(1)),
        centered_kernel_alignment(features.float()),
    ]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
