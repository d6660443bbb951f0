"""Tests of bayesattn.structured_pooling."""

import pytest
import torch

from bayesattn.structured_pooling import StructuredSelfAttention

BATCH, TOKENS, WIDTH, HIDDEN, HEADS = 2, 5, 7, 11, 3


@pytest.fixture
def layer(untouched_global_state):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return StructuredSelfAttention(WIDTH, HIDDEN, HEADS)


def test_equals_the_formula(layer, generator):
    """Of Lin et al., sentence by sentence and head by head, over the tokens that take part."""
    tokens = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)
    lengths = (TOKENS, 3)
    mask = torch.arange(TOKENS) < torch.tensor(lengths)[:, None]
    pooled, weights = layer(tokens, mask)
    for sentence, length in enumerate(lengths):
        part = tokens[sentence, :length]
        scores = layer.query_weight @ torch.tanh(layer.key_weight @ part.mT)
        for head in range(HEADS):
            exponentials = scores[head].exp()
            expected = exponentials / exponentials.sum()
            torch.testing.assert_close(weights[sentence, head, :length], expected)
            torch.testing.assert_close(pooled[sentence, head], expected @ part)
        assert not weights[sentence, :, length:].any()
    whole = layer(tokens[:1])
    torch.testing.assert_close(whole[0], pooled[:1])
    torch.testing.assert_close(whole[1], weights[:1])


def test_padding_does_not_matter(layer, generator):
    tokens = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[1, 2:] = False
    other = torch.where(mask[..., None], tokens, 100.0)
    torch.testing.assert_close(layer(other, mask)[0], layer(tokens, mask)[0])
    pooled, weights = layer(tokens, torch.zeros_like(mask))
    assert not pooled.any()
    assert not weights.any()


def test_every_parameter_gets_a_gradient(layer, generator):
    tokens = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)
    layer(tokens)[0].square().sum().backward()
    assert {name for name, _ in layer.named_parameters()} == {"key_weight", "query_weight"}
    assert all(parameter.grad.abs().min() > 0 for parameter in layer.parameters())


def test_errors(layer):
    with pytest.raises(ValueError, match="num_heads: expected at least 1, got 0"):
        StructuredSelfAttention(WIDTH, HIDDEN, 0)
    with pytest.raises(ValueError, match="tokens: expected width 7, got 8"):
        layer(torch.ones(BATCH, TOKENS, WIDTH + 1))
    tokens = torch.ones(BATCH, TOKENS, WIDTH)
    # A mask of one sentence would broadcast to all.
    with pytest.raises(ValueError, match=r"mask: expected 'batch token' \(2, 5\), got \(1, 5\)"):
        type(layer).forward.__wrapped__(layer, tokens, torch.ones(1, TOKENS, dtype=torch.bool))
