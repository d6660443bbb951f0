"""Positive features: their mean, attention in linear time, and that no sum leaves the range."""

import math

import pytest
import torch

from bayesattn.functional import attention, attention_weights
from bayesattn.logits import PositiveFeatures
from bayesattn.normalizations import DoublyNormalized
from tests.logits.cases import DIM, HEADS

close = torch.testing.assert_close


def features_of(seed, *sizes, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PositiveFeatures(*sizes, **settings)


def test_logits_are_those_of_the_formula(generator):
    """Mutants: a power of the width in one of the terms, a sum for the mean."""
    logits = features_of(0, HEADS, DIM, 4)
    query, key = (torch.randn(2, HEADS, n, DIM, generator=generator) for n in (3, 5))
    found = logits(query, key)
    for head, i, j in ((0, 0, 0), (2, 2, 4)):
        q, k = query[1, head, i].tolist(), key[1, head, j].tolist()
        total = 0.0
        for m in range(4):
            w = logits.frequencies[head, m].tolist()
            exponent = sum(a * (x + y) for a, x, y in zip(w, q, k, strict=True)) / DIM**0.25
            exponent -= (sum(x * x for x in q) + sum(y * y for y in k)) / (2 * math.sqrt(DIM))
            total += math.exp(exponent) / 4
        assert found[1, head, i, j].item() == pytest.approx(math.log(total), rel=1e-10)


def test_their_mean_is_the_softmax_s_kernel(generator):
    """And their error falls with the root of their number."""
    query, key = (0.5 * torch.randn(1, n, DIM, generator=generator) for n in (6, 7))
    exact = (query @ key.mT / DIM**0.5).exp()
    errors = []
    for size in (64, 1024):
        logits = features_of(0, 60, DIM, size, draw="independent")
        errors.append((logits(query, key).exp() - exact).square().mean().sqrt().item())
    slope = math.log(errors[1] / errors[0]) / math.log(16)
    assert slope == pytest.approx(-0.5, abs=0.1)
    many = features_of(1, 60, DIM, 1024)(query, key).exp()
    close(many.mean(0), exact[0], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_no_sum_leaves_the_range(size, generator):
    """Sums of products of features would be zero over zero: exponents here go to thousands."""
    parts = [size * torch.randn(1, HEADS, n, DIM, generator=generator) for n in (6, 9)]
    value = torch.randn(1, HEADS, 9, DIM, generator=generator)
    logits = features_of(0, HEADS, DIM, 16)
    through = (logits.frequencies @ part.mT / DIM**0.25 for part in parts)
    to_features, from_features = (
        part.mT - x.square().sum(-1, keepdim=True) / (2 * DIM**0.5)
        for part, x in zip(through, parts, strict=True)
    )
    exact = (to_features[..., :, None, :] + from_features[..., None, :, :]).logsumexp(-1)
    expected = exact.softmax(-1) @ value
    found = attention(*parts, value, logits=logits, route="fused")
    close(found, expected, rtol=1e-8, atol=1e-10)


def test_auto_takes_linear_time_where_the_sequence_is_long(generator):
    """Nothing kept for backward is as large as queries times keys; under a causal mask it is."""
    logits = features_of(0, 1, 2, 4)
    size = 512
    parts = [torch.randn(1, size, 2, generator=generator, requires_grad=True) for _ in "qkv"]
    largest = []
    for settings in ({}, {"normalization": DoublyNormalized()}, {"is_causal": True}):
        seen = [0]

        def pack(tensor, seen=seen):
            seen[0] = max(seen[0], tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attention(*parts, logits=logits, **settings)
        largest.append(seen[0])
    assert largest[0] <= 8 * size
    assert largest[1] <= 8 * size
    assert largest[2] >= size**2


def test_attention_nears_the_softmax_as_features_grow(generator):
    """Total variation at width 64, with 64 and with 4096 features."""
    query, key = (torch.randn(4, 60, 64, generator=generator) for _ in range(2))
    exact = attention_weights(query, key)
    far = []
    for size in (64, 4096):
        weights = attention_weights(query, key, logits=features_of(0, 4, 64, size))
        far.append(((weights - exact).abs().sum(-1) / 2).mean().item())
    assert 0.5 < far[0] < 0.65
    assert far[1] < 0.42


def test_dropout_takes_the_dense_route(generator):
    parts = [torch.randn(1, 8, 2, generator=generator) for _ in "qkv"]
    logits = features_of(0, 1, 2, 4)
    with pytest.raises(ValueError, match="route: expected 'dense' with dropout_p= of weights that"):
        attention(*parts, logits=logits, dropout_p=0.5, route="fused")
    with torch.random.fork_rng(devices=[]):
        assert attention(*parts, logits=logits, dropout_p=0.5).shape == (1, 8, 2)


def test_frequencies_that_are_not_learned_are_saved_and_stay():
    logits = features_of(0, 2, 3, 4, learns=False)
    assert "frequencies" in logits.state_dict()
    assert not logits.frequencies.requires_grad
    assert features_of(0, 2, 3).num_features == 6


@pytest.mark.usefixtures("unchecked_types")
def test_refusals():
    with pytest.raises(ValueError, match="num_features must be a whole number, at least 1, got 0"):
        PositiveFeatures(2, 3, 0)
    with pytest.raises(ValueError, match="draw must be one of"):
        PositiveFeatures(2, 3, draw="uniform")
