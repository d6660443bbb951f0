"""Tests of bayesattn.divergences.kernel_discrepancy: the maximum mean discrepancy."""

import numpy as np
import pytest
import torch

from bayesattn.divergences import MMD, squared_mmd
from bayesattn.kernels import IMQ, RBF
from tests import reference

KERNELS = [RBF(), RBF(0.7), IMQ(), IMQ(2, exponent=1.5)]


def formula(kernel, squared):
    def value(x, y):
        distance = sum((x - y) ** 2)
        if isinstance(kernel, RBF):
            return np.exp(-distance / (2 * squared))
        return (1 + distance / squared) ** -kernel.exponent

    return value


@pytest.fixture
def clouds(generator):
    query = torch.randn(5, 3, generator=generator)
    return query, 0.5 + 2 * torch.randn(4, 3, generator=generator)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("unbiased", [False, True])
def test_is_that_of_loops(kernel, unbiased, clouds, generator):
    query, key = clouds
    a, b = torch.rand(5, generator=generator), torch.rand(4, generator=generator)
    pooled = torch.cat([query, key])
    value = formula(kernel, kernel.squared_bandwidth(pooled).item())
    expected = reference.pair_contrast(value, *(x.numpy() for x in (query, key, a, b)), unbiased)
    ours = squared_mmd(query, key, weights=(a, b), kernel=kernel, unbiased=unbiased)
    np.testing.assert_allclose(ours, expected, rtol=1e-10)
    torch.testing.assert_close(MMD(kernel, unbiased)(query, key, weights=(a, b)), ours)


def test_the_median_is_over_pooled_pairs_that_take_part(clouds):
    query, key = clouds
    query_mask = torch.tensor([True, True, False, True, False])
    key_mask = torch.tensor([False, True, True, True])
    pooled = torch.cat([query[query_mask], key[key_mask]])
    for kernel in (RBF(), IMQ()):
        ours = MMD(kernel)(query, key, query_mask, key_mask)
        fixed = MMD(kernel.frozen(pooled))
        torch.testing.assert_close(ours, fixed(query[query_mask], key[key_mask]))


def test_default_kernel_is_gaussian(clouds):
    assert squared_mmd(*clouds) == MMD(RBF())(*clouds) == MMD()(*clouds)


def test_two_points_in_closed_form():
    query, key = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    np.testing.assert_allclose(MMD(RBF(5.0))(query, key), 2 - 2 * np.exp(-0.5))
    np.testing.assert_allclose(MMD(IMQ(5.0))(query, key), 2 - 2 / np.sqrt(2))


def test_unbiased_estimate_has_the_mean_of_the_normal_laws(generator):
    """Of N(0, 1) and N(m, 1) with h = 1: MMD^2 = 2 (1 - exp(-m^2 / 6)) / sqrt 3."""
    query = torch.randn(20000, 4, 1, generator=generator)
    key = 1.5 + torch.randn(20000, 3, 1, generator=generator)
    expected = 2 * (1 - np.exp(-(1.5**2) / 6)) / np.sqrt(3)
    for unbiased, is_near in ((True, True), (False, False)):
        values = MMD(RBF(1.0), unbiased)(query, key)
        error = abs(values.mean().item() - expected) / (values.std().item() / 20000**0.5)
        assert (error < 4) == is_near


def test_unbiased_estimate_may_be_negative(generator):
    query, key = torch.randn(2, 50, 5, 2, generator=generator)
    assert MMD(unbiased=True)(query, key).min() < 0
    assert MMD()(query, key).min() > 0


def test_bandwidth_is_a_constant_to_differentiation(clouds):
    query, key = clouds
    query.requires_grad_()
    fixed = MMD(RBF().frozen(torch.cat([query, key])))
    ours, expected = (torch.autograd.grad(m(query, key), query)[0] for m in (MMD(), fixed))
    torch.testing.assert_close(ours, expected)


def test_refuses_the_rule_for_one_cloud(clouds):
    for build in (lambda: MMD(RBF("paper")), lambda: squared_mmd(*clouds, kernel=RBF("paper"))):
        with pytest.raises(ValueError, match="kernel: the bandwidth 'paper' counts the particles"):
            build()
