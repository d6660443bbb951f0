"""Divergences of batches in which some clouds have no point; what is taken for granted there."""

import pytest
import torch

from bayesattn.divergences import MMD, ConditionalTransport, Energy, squared_mmd
from bayesattn.divergences.empty_clouds import divergence_or_zero

DIVERGENCES = [Energy(), MMD(), ConditionalTransport()]


@pytest.fixture
def clouds(generator):
    """Whole clouds, a query cloud without a point, and padding that is no number."""
    query, key = (torch.randn(3, size, 2, generator=generator) for size in (5, 7))
    query_mask, key_mask = torch.ones(3, 5, dtype=torch.bool), torch.ones(3, 7, dtype=torch.bool)
    query_mask[1] = False
    key_mask[2, 4:] = False
    query[1], key[2, 4:] = torch.nan, torch.nan
    return query.requires_grad_(), key.requires_grad_(), query_mask, key_mask


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda one: type(one).__name__)
def test_empty_clouds_are_zero_and_have_no_gradient(divergence, clouds):
    query, key = clouds[:2]
    found, compared = divergence_or_zero(divergence, *clouds)
    assert compared.tolist() == [True, False, True]
    assert found[1] == 0
    for place, last in ((0, 7), (2, 4)):
        alone = divergence(query[place], key[place, :last])
        torch.testing.assert_close(found[place], alone)
    found.sum().backward()
    assert (query.grad[1] == 0).all()
    assert (key.grad[1] == 0).all()
    assert (key.grad[2, 4:] == 0).all()
    assert query.grad[0].abs().min() > 0


def test_masks_are_looked_at_again_afterwards(clouds):
    """What is known holds within, and not past an error either."""
    query, key, query_mask, key_mask = clouds

    def broken(*_):
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        divergence_or_zero(broken, *clouds)
    with pytest.raises(ValueError, match="query_mask: expected a point that takes part"):
        squared_mmd(query, key, query_mask, key_mask)
