"""Tests of bayesattn.pairwise_logits."""

import pytest
import torch

from bayesattn.logits import AdditiveLogits, DotProduct, EdgeLogits, GaussianLogits, Logits
from bayesattn.pairwise_logits import check_pairwise, logits_of_edges

HEADS, QUERIES, KEYS, DIM = 3, 5, 7, 4


class Dense(Logits):
    """Of all pairs together only."""

    def forward(self, query, key):
        return torch.cdist(query, key)


class SometimesReduces(Logits):
    def reduce(self, query, key):
        return None


@pytest.fixture
def parts(generator):
    query = torch.randn(HEADS, QUERIES, DIM, generator=generator)
    key = torch.randn(HEADS, KEYS, DIM, generator=generator)
    edges = torch.tensor([[0, 6, 6, 3, 2], [4, 0, 0, 1, 3]])
    return query, key, edges


def drawn(choice, generator):
    with torch.no_grad():
        for parameter in choice.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return choice


@pytest.fixture
def additive(untouched_global_state, generator):
    with torch.random.fork_rng(devices=[]):
        return drawn(AdditiveLogits(HEADS, DIM, negative_slope=0.3), generator)


def test_additive_equals_the_formula(additive, parts):
    """Mutants: query and key exchanged; one head's vector for all; no bend below zero."""
    query, key, edges = parts
    additive.requires_grad_(False)
    found, dense = additive.on_edges(query, key, edges), additive(query, key)
    assert dense.shape == (HEADS, QUERIES, KEYS)
    for head in range(HEADS):
        for number, (source, target) in enumerate(edges.T.tolist()):
            total = float(
                query[head, target] @ additive.query_vector[head]
                + key[head, source] @ additive.key_vector[head]
            )
            expected = total if total > 0 else 0.3 * total
            assert found[head, number].item() == pytest.approx(expected, rel=1e-12)
            assert dense[head, target, source].item() == pytest.approx(expected, rel=1e-12)
    assert (dense > 0).any()
    assert (dense < 0).any()


def test_additive_has_batches(additive, generator):
    query = torch.randn(2, HEADS, QUERIES, DIM, generator=generator)
    key = torch.randn(2, HEADS, KEYS, DIM, generator=generator)
    for row in range(2):
        torch.testing.assert_close(additive(query, key)[row], additive(query[row], key[row]))


@pytest.mark.parametrize("name", ["scaled", "given scale", "gaussian"])
def test_what_reduces_is_known_on_edges(name, parts, generator):
    """Biases of queries and keys both. Mutant: a bias that is left out."""
    query, key, edges = parts
    choice = {
        "scaled": DotProduct(),
        "given scale": DotProduct(0.7),
        "gaussian": drawn(GaussianLogits(HEADS, DIM), generator),
    }[name]
    found = logits_of_edges(choice, query, key, edges)
    expected = choice(query, key)[:, edges[1], edges[0]]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if name == "scaled":
        assert torch.equal(found, logits_of_edges(None, query, key, edges))


def test_half_precision_is_widened(additive, parts):
    query, key, edges = parts
    query, key = query.bfloat16(), key.bfloat16()
    for choice in (None, additive):
        found = logits_of_edges(choice, query, key, edges)
        assert found.dtype == torch.float32
        exact = logits_of_edges(choice, query.double(), key.double(), edges)
        torch.testing.assert_close(found.double(), exact, rtol=0.03, atol=0.03)


def test_what_is_dense_only_is_refused(additive, parts):
    """Mutants: a plain function called; a choice without reduce that is found out at a call."""
    for choice in (Dense(), Logits(), lambda query, key: query @ key.mT):
        with pytest.raises(ValueError, match=r"logits: expected a choice .* single pairs.*, got "):
            check_pairwise(choice)
        with pytest.raises(ValueError, match="single pairs"):
            logits_of_edges(choice, *parts)
    for choice in (None, DotProduct(), additive, SometimesReduces()):
        check_pairwise(choice)
    with pytest.raises(ValueError, match="got SometimesReduces"):
        logits_of_edges(SometimesReduces(), *parts)
    with pytest.raises(TypeError, match="EdgeLogits must define on_edges"):
        logits_of_edges(EdgeLogits(), *parts)


def test_sizes_must_be_positive():
    for sizes in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match="num_heads and dim must be positive"):
            AdditiveLogits(*sizes)
