"""Penalties on heads that are alike: their formulas, gradients, and life in a model."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bayesattn import HeadPenalty, StructuredSelfAttention
from bayesattn.head_penalties import (
    cosine_penalty,
    density_penalty,
    head_outputs,
    head_weights,
    orthogonality_penalty,
)
from bayesattn.inference.directions import wasserstein_direction
from bayesattn.kernels import IMQ, RBF
from bayesattn.networks import attention_calls
from tests.heads import Classifier

pytestmark = pytest.mark.usefixtures("seeded_layers")

HEADS, TOKENS, EMBED = 3, 5, 6


def test_orthogonality_is_lin_s():
    """Zero where each head sees one key, another's none. Mutants: the mean for the sum, |A A'|."""
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    assert orthogonality_penalty(weights) == 0.25
    assert orthogonality_penalty(torch.eye(3)[:2]) == 0
    assert orthogonality_penalty(torch.eye(3)[:1].expand(2, 3)) == 2


def test_cosines_of_pairs_are_squared(generator):
    rows = torch.tensor([[1.0, 0.0], [-2.0, -2.0], [0.0, 3.0]])
    torch.testing.assert_close(cosine_penalty(rows), torch.tensor((0.5 + 0.5 + 0) / 3))
    assert cosine_penalty(rows[:1]) == 0


@pytest.mark.parametrize("penalty", [orthogonality_penalty, cosine_penalty])
def test_gradients_are_those_of_differences(penalty, generator):
    rows = torch.randn(2, HEADS, TOKENS, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(penalty, rows)


@pytest.mark.parametrize("kernel", [None, RBF(1.5), IMQ()])
def test_density_s_gradient_is_the_repulsion_of_an_ensemble(kernel, generator):
    rows = torch.randn(2, HEADS, TOKENS, generator=generator, requires_grad=True)
    (gradient,) = torch.autograd.grad(density_penalty(rows, kernel).sum(), rows)
    terms = (kernel or RBF())(rows.detach())
    repulsion = wasserstein_direction(terms, torch.zeros_like(rows)).repulsion
    torch.testing.assert_close(-HEADS * gradient, repulsion)


def test_a_penalty_is_the_mean_over_layers_calls_and_queries(generator):
    model = Classifier(EMBED, HEADS)
    tokens = torch.randn(2, TOKENS, EMBED, generator=generator)
    penalty = HeadPenalty(model, orthogonality_penalty)
    with penalty.observe():
        model(tokens)
    with attention_calls(model) as calls:
        model(tokens)
    expected = []
    for (call,) in calls.values():
        maps = call.weights().transpose(1, 2)
        values = [orthogonality_penalty(maps[i, j]) for i in range(2) for j in range(TOKENS)]
        expected.append(torch.stack(values).mean())
    torch.testing.assert_close(penalty.loss(), torch.stack(expected).mean())
    with penalty.observe():
        model(tokens[:1])
    assert penalty.loss() != torch.stack(expected).mean()


def test_rows_are_of_weights_or_outputs(generator):
    pooling = StructuredSelfAttention(EMBED, 4, HEADS)
    tokens = torch.randn(2, TOKENS, EMBED, generator=generator)
    with attention_calls(pooling) as calls:
        pooled, weights = pooling(tokens)
    (call,) = calls[""]
    torch.testing.assert_close(head_weights(call), weights)
    torch.testing.assert_close(head_outputs(call), pooled.transpose(0, 1).flatten(1))


@pytest.mark.parametrize(
    ("penalty", "rows"),
    [
        (orthogonality_penalty, head_weights),
        (cosine_penalty, head_outputs),
        (density_penalty, head_outputs),
        (density_penalty, head_weights),
    ],
)
def test_descending_a_penalty_makes_heads_differ(penalty, rows, generator):
    pooling = StructuredSelfAttention(EMBED, 4, HEADS)
    with torch.no_grad():
        near = torch.randn(1, 4, generator=generator).expand(HEADS, 4)
        pooling.query_weight.copy_(near + 0.01 * torch.randn(HEADS, 4, generator=generator))
    tokens = torch.randn(20, TOKENS, EMBED, generator=generator)
    optimizer = torch.optim.Adam(pooling.parameters(), lr=0.05)
    diversity = HeadPenalty(pooling, penalty, rows)

    def spread():
        with torch.no_grad():
            weights = pooling(tokens)[1]
        return (weights - weights.mean(1, keepdim=True)).norm()

    before = spread()
    for _ in range(30):
        optimizer.zero_grad()
        with diversity.observe():
            pooling(tokens)
        diversity.loss().backward()
        optimizer.step()
    assert spread() > 5 * before


def test_calls_of_a_layer_count_as_one_layer(generator):
    model = Classifier(EMBED, HEADS)
    tokens = torch.randn(2, TOKENS, EMBED, generator=generator)
    penalty = HeadPenalty(model, orthogonality_penalty)
    values = []
    for layer, some in ((0, tokens), (0, tokens[:1]), (1, tokens)):
        with penalty.observe():
            model.layers[layer](some, some, some)
        values.append(penalty.loss())
    with penalty.observe():
        for layer, some in ((0, tokens), (0, tokens[:1]), (1, tokens)):
            model.layers[layer](some, some, some)
    expected = ((values[0] + values[1]) / 2 + values[2]) / 2
    torch.testing.assert_close(penalty.loss(), expected)


def test_activation_checkpointing_changes_nothing(generator):
    """Mutant: what is observed computes within the region, which then does less the second time."""
    model = Classifier(EMBED, HEADS)
    tokens = torch.randn(2, TOKENS, EMBED, generator=generator)
    penalty = HeadPenalty(model, cosine_penalty, head_outputs)

    def gradients(run):
        model.zero_grad()
        with penalty.observe():
            output = run(model, tokens)
        (output.square().sum() + penalty.loss()).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients(lambda model, tokens: model(tokens))
    again = gradients(lambda model, tokens: checkpoint(model, tokens, use_reentrant=False))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="use_reentrant=False"), penalty.observe():
        checkpoint(model, tokens.requires_grad_(), use_reentrant=True)


def test_products_are_in_full_precision_under_autocast(generator):
    weights = torch.softmax(torch.randn(2, HEADS, TOKENS, generator=generator), -1).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = orthogonality_penalty(weights)
    assert torch.equal(found, orthogonality_penalty(weights))


def test_nothing_observed_is_an_error(generator, unchecked_types):
    model = Classifier(EMBED, HEADS)
    penalty = HeadPenalty(model, cosine_penalty)
    with pytest.raises(RuntimeError, match="within observe"):
        penalty.loss()
    with penalty.observe():
        model(torch.randn(2, TOKENS, EMBED, generator=generator))
    with penalty.observe():
        pass
    with pytest.raises(RuntimeError, match="within observe"):
        penalty.loss()
    with pytest.raises(ValueError, match="expected functions"):
        HeadPenalty(model, "cosine")
    other = HeadPenalty(nn.Linear(2, 2), cosine_penalty)
    with pytest.raises(ValueError, match="found none"), other.observe():
        pass
