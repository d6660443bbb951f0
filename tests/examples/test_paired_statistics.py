"""Means, errors and paired differences, held against numpy's and scipy's own."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from examples.reproduce.paired_statistics import (
    Estimate,
    mean_and_error,
    mean_over_tasks,
    paired_difference,
)


def by_seed(generator, number):
    return dict(enumerate(torch.randn(number, generator=generator).tolist()))


def test_mean_and_error(generator):
    """Mutant: ddof=0."""
    values = by_seed(generator, 7)
    estimate = mean_and_error(values)
    numbers = np.array(list(values.values()))
    np.testing.assert_allclose(estimate, (numbers.mean(), stats.sem(numbers), 7))


def test_paired_difference_is_the_paired_t_test(generator):
    """Mutants: an unpaired error; the normal law's quantile in place of Student's."""
    values, baseline = by_seed(generator, 5), by_seed(generator, 5)
    estimate = paired_difference(values, baseline)
    test = stats.ttest_rel(list(values.values()), list(baseline.values()))
    assert estimate.mean / estimate.error == pytest.approx(test.statistic)
    low, high = test.confidence_interval(0.95)
    assert estimate.interval() == pytest.approx((high - low) / 2)
    assert estimate.interval(0.5) < estimate.interval(0.9)


def test_pairing_goes_by_seed_not_by_order(generator):
    """Mutant: zip over the values."""
    baseline = by_seed(generator, 5)
    values = {11: 3.0} | {seed: baseline[seed] + 0.25 for seed in (4, 2, 3)}
    mean, error, count = paired_difference(values, baseline)
    assert (mean, count) == (pytest.approx(0.25), 3)
    assert error == pytest.approx(0, abs=1e-12)


def test_a_single_seed_has_no_error_and_proves_nothing():
    estimate = mean_and_error({0: 5.0})
    assert estimate.mean == 5.0
    assert math.isnan(estimate.error)
    assert not estimate.excludes_zero()


@pytest.mark.parametrize(("mean", "excludes"), [(2.77, False), (-2.78, True)])
def test_interval_excludes_zero(mean, excludes):
    """Student's quantile for five seeds is 2.776."""
    assert Estimate(mean, 1.0, 5).excludes_zero() is excludes


def test_mean_over_tasks_needs_every_task():
    tasks = {"a": {0: 1.0, 1: 2.0, 2: 7.0}, "b": {0: 3.0, 2: 9.0, 3: 5.0}}
    assert mean_over_tasks(tasks) == {0: 2.0, 2: 8.0}


def test_errors():
    with pytest.raises(ValueError, match="values: expected one for each seed, got none"):
        mean_and_error({})
    with pytest.raises(ValueError, match=r"seed in common, got \[0\] and \[1\]"):
        paired_difference({0: 1.0}, {1: 1.0})
