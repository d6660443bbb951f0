"""Tests of bayesattn.divergences.permutation."""

import itertools
import math

import numpy as np
import pytest
import torch

from bayesattn.divergences import (
    MMD,
    Energy,
    PermutationTest,
    SlicedWasserstein,
    permutation,
    permutation_test,
)
from bayesattn.kernels import IMQ, RBF
from tests import reference

STATISTICS = [MMD(), MMD(IMQ()), Energy(), MMD(unbiased=True), SlicedWasserstein(8)]


def rbf(x, y, squared):
    return math.exp(-sum((x - y) ** 2) / (2 * squared))


def every_split(points, num_queries):
    """Squared MMD of every split, by loops, the first of them the one at hand."""
    points = points.numpy()
    squared = reference.median_of_pairs(points) / 2
    values = []
    for chosen in itertools.combinations(range(len(points)), num_queries):
        x = points[list(chosen)]
        y = points[[i for i in range(len(points)) if i not in chosen]]
        equal = np.ones(len(x)), np.ones(len(y))
        values.append(reference.pair_contrast(lambda p, q: rbf(p, q, squared), x, y, *equal))
    return np.array(values)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(2, 4), (3, 3), (1, 2)])
def test_draws_are_the_splits_that_there_are_and_equally_often(num_queries, num_keys, generator):
    """Mutants: queries of another number, a split that is left out or favored, wrong signs."""
    points = torch.randn(num_queries + num_keys, 2, generator=generator)
    values = every_split(points, num_queries)
    test = permutation_test(points[:num_queries], points[num_queries:], num_permutations=5000)
    np.testing.assert_allclose(test.statistic, values[0], rtol=1e-10)
    null = test.null.numpy()
    assert np.abs(null[:, None] - values).min(1).max() < 1e-12
    for value in values:
        part = (np.abs(values - value) < 1e-12).mean()
        error = math.sqrt(part * (1 - part) / len(null))
        assert abs((np.abs(null - value) < 1e-12).mean() - part) < 4 * error + 1e-12
    # Splits that mirror the one at hand tie with it, whatever rounding says.
    part = (values >= values[0] - 1e-12).mean()
    error = math.sqrt(part * (1 - part) / len(null))
    assert abs(test.p_value.item() - part) < 4 * error + 1 / len(null)


@pytest.mark.parametrize("statistic", STATISTICS, ids=repr)
def test_statistics_are_those_of_the_divergences(statistic, generator):
    """With masks and batches; the splits of the Gram matrix are those of one by one."""
    query = torch.randn(4, 1, 5, 2, generator=generator)
    key = torch.randn(4, 3, 6, 2, generator=generator)
    query_mask = torch.arange(5) < torch.tensor([5, 2, 3, 4])[:, None, None]
    key_mask = torch.rand(4, 3, 6, generator=generator) > 0.4
    key_mask[..., 1:3] = True
    clouds = query, key, query_mask, key_mask
    found = permutation_test(*clouds, statistic=statistic, num_permutations=30)
    assert found.null.shape == (30, 4, 3)
    torch.testing.assert_close(found.statistic, statistic(*clouds), rtol=1e-10, atol=1e-14)
    slow = permutation_test(*clouds, statistic=lambda *c: statistic(*c), num_permutations=30)
    torch.testing.assert_close(found.null, slow.null, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.p_value, slow.p_value)


@pytest.mark.parametrize("statistic", [MMD(), Energy()], ids=repr)
def test_level_is_exact_under_the_null(statistic, generator):
    """Of 19 permutations p is uniform on 1/20, 2/20, ...; mutants: no one added, ties for less."""
    query = torch.randn(1500, 5, 2, generator=generator)
    key = torch.randn(1500, 7, 2, generator=generator)
    key_mask = torch.arange(7) < torch.randint(3, 8, (1500, 1), generator=generator)
    key = torch.where(key_mask[..., None], key, 50.0)
    found = permutation_test(query, key, None, key_mask, statistic=statistic, num_permutations=19)
    for level in (0.05, 0.25, 0.5, 0.75):
        error = math.sqrt(level * (1 - level) / 1500)
        part = (found.p_value <= level + 1e-9).double().mean().item()
        assert abs(part - level) < 4 * error


def test_differences_are_found(generator):
    query = torch.randn(100, 15, 3, generator=generator)
    same = torch.randn(100, 15, 3, generator=generator)
    for other in (same + 1.5, 4 * same):
        power = (permutation_test(query, other).p_value <= 0.05).double().mean()
        assert power > 0.9
    assert (permutation_test(query, same).p_value <= 0.05).double().mean() < 0.2


def test_sentences_together_see_what_single_ones_do_not(generator):
    """Level within sentences that differ much among themselves, and power beyond each one's."""
    centers = 10 * torch.randn(20, 200, 1, 2, generator=generator)
    query, key = centers + torch.randn(2, 20, 200, 5, 2, generator=generator)
    apart = permutation_test(query, key, num_permutations=99)
    together = apart.mean(0)
    torch.testing.assert_close(together.statistic, apart.statistic.mean(0))
    torch.testing.assert_close(together.null, apart.null.mean(1))
    torch.testing.assert_close(apart.mean(-1).null, apart.null.mean(2))
    for level in (0.1, 0.5):
        error = math.sqrt(level * (1 - level) / 200)
        assert abs((together.p_value <= level + 1e-9).double().mean() - level) < 4 * error
    shifted = permutation_test(query, key + 0.7, num_permutations=99)
    assert (shifted.p_value <= 0.05).double().mean() < 0.4
    assert (shifted.mean(0).p_value <= 0.05).double().mean() > 0.9


def test_what_takes_no_part_does_not_matter(generator):
    query, key = torch.randn(2, 3, 6, 2, generator=generator)
    query_mask = torch.rand(3, 6, generator=generator) > 0.3
    key_mask = torch.rand(3, 6, generator=generator) > 0.3
    query_mask[:, 0] = key_mask[:, 0] = True
    found = permutation_test(query, key, query_mask, key_mask)
    filled = [
        torch.where(mask[..., None], points, torch.nan)
        for points, mask in ((query, query_mask), (key, key_mask))
    ]
    torch.testing.assert_close(permutation_test(*filled, query_mask, key_mask), found)


def test_permutations_of_batch_elements_are_their_own(generator):
    query, key = (torch.randn(6, 2, generator=generator).expand(4, 6, 2) for _ in range(2))
    null = permutation_test(query, key).null
    assert (null[:, :1] != null[:, 1:]).any(0).all()


def test_a_number_fixes_the_permutations_and_a_generator_draws_new_ones(generator):
    clouds = torch.randn(2, 6, 2, generator=generator)
    null = permutation_test(*clouds, seed=3).null
    assert torch.equal(permutation_test(*clouds, seed=3).null, null)
    assert not torch.equal(permutation_test(*clouds, seed=4).null, null)
    once, again = (permutation_test(*clouds, seed=generator).null for _ in range(2))
    assert not torch.equal(once, again)


def test_memory_is_bounded_and_pieces_make_the_whole(generator, monkeypatch):
    clouds = torch.randn(2, 3, 6, 2, generator=generator)
    whole = permutation_test(*clouds, num_permutations=50)
    monkeypatch.setattr(permutation, "_ENTRIES", 300)
    sizes = []
    splits = permutation._random_splits

    def watched(*args):
        for some in splits(*args):
            sizes.append(some.numel())
            yield some

    monkeypatch.setattr(permutation, "_random_splits", watched)
    torch.testing.assert_close(permutation_test(*clouds, num_permutations=50), whole)
    assert len(sizes) == 7
    assert max(sizes) <= 300


def test_points_that_coincide_and_single_points_are_no_evidence():
    """Every split ties; mutants: a strict comparison, ties left to rounding."""
    same = torch.full((5, 3), 0.1)
    for statistic in (MMD(), Energy(), MMD(RBF(0.3)), SlicedWasserstein(3)):
        for points in (same, same.float(), same + 1e4):
            assert permutation_test(points, points[:3], statistic=statistic).p_value == 1
    one, other = torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 5.0]])
    assert permutation_test(one, other).p_value == 1


def test_ties_of_means_are_ties(generator):
    """Of pairs every split ties; mutant: sums in another order, which round apart."""
    query, key = torch.randn(2, 7, 501, 1, 3, generator=generator).float()
    found = permutation_test(query, key, statistic=Energy(), num_permutations=20)
    for axis in (0, 1, -2):
        assert (found.mean(axis).p_value == 1).all()
    order = torch.randperm(501, generator=generator)
    shuffled = PermutationTest(found.statistic, found.null[:, :, order])
    assert (shuffled.mean(1).p_value == 1).all()


def test_single_precision_tells_clouds_apart(generator):
    """Far from the origin, or under a broad kernel, whose values are nearly one; under autocast."""
    query = torch.randn(2, 50, 3, generator=generator)
    key = torch.randn(2, 50, 3, generator=generator)
    for statistic, offset in ((MMD(), 100), (Energy(), 100), (MMD(RBF(30.0)), 0)):
        exact = permutation_test(query + offset, key + offset, statistic=statistic)
        with torch.autocast("cpu", torch.bfloat16):
            clouds = (query + offset).float(), (key + offset).float()
            found = permutation_test(*clouds, statistic=statistic)
        error = (found.null.double() - exact.null).abs().max(0).values
        assert (error < 1e-3 * exact.null.std(0)).all()


def test_no_number_is_no_evidence():
    """Mutant: comparisons with NaN, all False, would make p the least there is."""
    assert PermutationTest(torch.tensor(torch.nan), torch.ones(9)).p_value.isnan()
    assert PermutationTest(torch.tensor(1.0), torch.full((9,), torch.nan)).p_value == 1
    query = torch.tensor([[torch.nan, 0.0], [0.0, 1.0]])
    assert permutation_test(query, torch.ones(2, 2)).p_value.isnan()


def test_no_gradients_are_kept(generator):
    query = torch.randn(5, 2, generator=generator, requires_grad=True)
    found = permutation_test(query, query + 1)
    assert not found.statistic.requires_grad
    assert not found.null.requires_grad


def test_refuses(unchecked_types):
    points = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="weights: expected None, for equal weights"):
        permutation_test(points, points, weights=(None, torch.ones(3)))
    assert permutation_test(points, points, weights=(None, None)).p_value == 1
    with pytest.raises(ValueError, match="num_permutations: expected at least one, got 0"):
        permutation_test(points, points, num_permutations=0)
    with pytest.raises(ValueError, match="query_mask: expected a point that takes part"):
        permutation_test(points, points, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(IndexError):
        permutation_test(points, points).mean(0)
