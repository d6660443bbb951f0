"""Tests of adversaries: what the best of them finds, who ascends, and that heads are told apart."""

import math

import pytest
import torch
from torch import nn

from bayesattn.divergences import Adversarial, Divergence
from tests.compilation import in_one_graph

pytestmark = pytest.mark.usefixtures("seeded_layers")

HEADS, DIM = 3, 5


def trained(adversary, query, key, num_steps=400):
    """Let an adversary learn by one backward pass of the sum, which all else would descend."""
    optimizer = torch.optim.Adam(adversary.parameters(), lr=0.02)
    for _ in range(num_steps):
        optimizer.zero_grad()
        adversary(query, key).sum().backward()
        optimizer.step()
    return adversary(query, key).detach()


def test_is_the_formula_with_its_discriminator(generator):
    """Mutants: queries and keys exchanged, masks unheard, sums for means."""
    query = torch.randn(2, HEADS, 7, DIM, generator=generator)
    key = torch.randn(2, HEADS, 4, DIM, generator=generator)
    mask = torch.tensor([[True] * 7, [True, True, False, True, False, False, True]])[:, None]
    adversary = Adversarial(HEADS, DIM)
    assert isinstance(adversary, Divergence)
    told_query, told_key = (adversary.discriminator(x).sigmoid()[..., 0] for x in (query, key))
    found = adversary(query, key, mask)
    for i in range(2):
        kept = told_query[i][:, mask[i, 0]]
        expected = kept.log().mean(-1) + (1 - told_key[i]).log().mean(-1) + 2 * math.log(2)
        torch.testing.assert_close(found[i], expected)


def test_discriminator_is_a_highway_layer_and_two_maps(generator):
    points = torch.randn(HEADS, 6, DIM, generator=generator)
    adversary = Adversarial(HEADS, DIM, hidden_dim=7)
    highway, perceptron = adversary.discriminator
    for head in range(HEADS):
        x = points[head]

        def mapped(layer, x, head=head):
            return x @ layer.weight[head] + layer.bias[head]

        gate = torch.sigmoid(mapped(highway.gate, x))
        y = gate * torch.relu(mapped(highway.change, x)) + (1 - gate) * x
        hidden = nn.functional.leaky_relu(mapped(perceptron[0], y), 0.2)
        torch.testing.assert_close(
            adversary.discriminator(points)[head], mapped(perceptron[2], hidden)
        )
    assert perceptron[0].weight.shape == (HEADS, DIM, 7)


def test_the_best_one_finds_twice_the_jensen_shannon_divergence():
    """Of laws on two points, which a discriminator can learn to the end."""
    places = torch.tensor([[0.0], [1.0]])
    p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.3, 0.7])
    mean = (p + q) / 2
    divergence = 0.5 * ((p * (p / mean).log()).sum() + (q * (q / mean).log()).sum())
    adversary = Adversarial(1, 1)
    optimizer = torch.optim.Adam(adversary.parameters(), lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        adversary(places[None], places[None], weights=(p, q)).sum().backward()
        optimizer.step()
    found = adversary(places[None], places[None], weights=(p, q))
    torch.testing.assert_close(found[0], 2 * divergence, rtol=1e-3, atol=0)


def test_parameters_ascend_and_both_clouds_descend(generator):
    """One pass trains both; neither cloud is cut off. Mutants: no reversal, of points, detached."""
    query, key = torch.randn(2, HEADS, 6, DIM, generator=generator)
    query, key = query.requires_grad_(), (key + 1).requires_grad_()
    adversary = Adversarial(HEADS, DIM)
    for leaves, sign in ((list(adversary.parameters()), 1), ([query], -1), ([key], -1)):
        before = adversary(query, key).sum()
        gradients = torch.autograd.grad(before, leaves)
        with torch.no_grad():
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf -= 1e-3 * gradient
            after = adversary(query, key).sum()
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf += 1e-3 * gradient
        assert sign * (after - before) > 0


def test_heads_that_exchange_roles_are_told_apart(generator):
    """Their pooled mixtures are equal: one discriminator for all heads finds nothing."""
    cloud = torch.randn(40, 2, generator=generator)
    query, key = torch.stack([cloud, cloud + 3]), torch.stack([cloud + 3, cloud])
    assert trained(Adversarial(2, 2), query, key).min() > 1.0
    shared = trained(Adversarial(1, 2), query.flatten(0, 1)[None], key.flatten(0, 1)[None])
    assert abs(shared) < 0.05


def test_descending_against_it_brings_clouds_together(generator):
    """Mutant: the clouds ascend, and drift apart as in some modes of the published code."""
    query = torch.randn(1, 30, 2, generator=generator)
    key = (query.flip(1) + 2).requires_grad_()
    adversary = Adversarial(1, 2)
    groups = [{"params": [key], "lr": 0.02}, {"params": adversary.parameters(), "lr": 0.02}]
    optimizer = torch.optim.Adam(groups)
    assert (key.mean(1) - query.mean(1)).norm() > 2
    for _ in range(300):
        optimizer.zero_grad()
        adversary(query, key).sum().backward()
        optimizer.step()
    assert (key.mean(1) - query.mean(1)).norm() < 0.7


def test_padding_has_no_part(generator):
    query, key = torch.randn(2, HEADS, 6, DIM, generator=generator)
    mask = torch.arange(6) < 4
    adversary = Adversarial(HEADS, DIM)
    expected = adversary(query[:, :4], key)
    query[:, 4:] = torch.nan
    query.requires_grad_()
    found = adversary(query, key, mask)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert (query.grad[:, 4:] == 0).all()
    assert query.grad[:, :4].abs().min() > 0
    assert all(value.grad.isfinite().all() for value in adversary.parameters())


def test_gradcheck(generator):
    query, key = torch.randn(2, HEADS, 4, DIM, generator=generator)
    assert torch.autograd.gradcheck(
        Adversarial(HEADS, DIM), [query.requires_grad_(), key.requires_grad_()]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_computed_in_float32(dtype, generator):
    query, key = torch.randn(2, HEADS, 6, DIM, generator=generator).to(dtype)
    adversary = Adversarial(HEADS, DIM).float()
    value = adversary(query, key)
    assert value.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adversary(query, key), value)


@pytest.mark.compile
def test_compiles_in_one_graph(generator):
    query, key = torch.randn(2, HEADS, 6, DIM, generator=generator)
    adversary = Adversarial(HEADS, DIM)
    torch.testing.assert_close(in_one_graph(adversary, query, key), adversary(query, key))


@pytest.mark.usefixtures("unchecked_types")
def test_refuses():
    for sizes in ((0, 4), (2, 0)):
        with pytest.raises(ValueError, match="expected at least one, got 0"):
            Adversarial(*sizes)
    with pytest.raises(ValueError, match="hidden_dim: expected at least one"):
        Adversarial(2, 4, hidden_dim=0)
    with pytest.raises(ValueError, match="points: expected"):
        Adversarial(2, 4)(torch.zeros(3, 5, 4), torch.zeros(3, 5, 4))
