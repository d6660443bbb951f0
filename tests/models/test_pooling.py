"""Attention pooling: its function, and how much memory a recorded density takes."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bayesattn.inference import LogDensity
from bayesattn.models.pooling import pool
from tests.models.cases import (
    DIM,
    NUM_CLASSES,
    NUM_HEADS,
    NUM_SENTENCES,
    NUM_TOKENS,
    WIDTH,
    make_data,
    make_model,
)

NUM_PARTICLES = 17


class Sizes(TorchDispatchMode):
    """Notes the size of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.sizes |= {leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return result


def test_pooling_is_scaled_dot_product_attention(generator):
    tokens, mask, _ = make_data(generator)
    query = torch.randn(NUM_HEADS, DIM, generator=generator)
    pooled, weights = pool(query, tokens[1:], mask[1:])
    expected = F.scaled_dot_product_attention(
        query.expand(NUM_SENTENCES - 1, NUM_HEADS, DIM),
        tokens[1:],
        tokens[1:],
        attn_mask=mask[1:, None],
    )
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(weights @ tokens[1:], expected)


def test_query_of_zero_averages_all_words(generator):
    tokens, mask, _ = make_data(generator)
    pooled, weights = pool(torch.zeros(1, DIM), tokens, mask)
    count = mask.sum(-1).clamp(min=1)[:, None]
    torch.testing.assert_close(weights[:, 0], mask / count)
    torch.testing.assert_close(pooled[:, 0], (tokens * mask[..., None]).sum(1) / count)


def test_hidden_layer_bounds_the_logits(generator):
    query, hidden = torch.full((1, WIDTH), 3.0), torch.randn(WIDTH, DIM, generator=generator)
    tokens = 100 * torch.randn(NUM_SENTENCES, NUM_TOKENS, DIM, generator=generator)
    _, weights = pool(query, tokens, None, hidden)
    logits = torch.tanh(tokens @ hidden.mT).sum(-1) * 3.0
    torch.testing.assert_close(weights[:, 0], logits.softmax(-1))


@pytest.mark.parametrize("name", ["pooling", "hidden"])
def test_no_tensor_of_particles_sentences_heads_tokens_and_features(name, generator):
    model, data = make_model(name), make_data(generator)
    density = LogDensity(model, *data)
    density.value_and_score(torch.randn(NUM_PARTICLES, density.dim, generator=generator))
    with Sizes() as watch:
        density.value_and_score(torch.randn(NUM_PARTICLES, density.dim, generator=generator))
    sizes = watch.sizes
    # The largest is the attention's, or one that a model cannot do without.
    per_sentence = [NUM_HEADS * NUM_TOKENS, NUM_HEADS * DIM, NUM_CLASSES]
    if name == "hidden":
        per_sentence.append(NUM_TOKENS * WIDTH)
    largest = max(NUM_PARTICLES * NUM_SENTENCES * max(per_sentence), density.dim * NUM_PARTICLES)
    assert max(sizes) == largest
    assert math.prod((NUM_PARTICLES, NUM_SENTENCES, NUM_HEADS, NUM_TOKENS)) in sizes
