"""RBF × magnitude: the scaled dot product at p = 2, its formula by loops, learned p, and layers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bayesattn.conversion import convert
from bayesattn.functional import attention, attention_weights
from bayesattn.logits import DotProduct, RBFMagnitude
from bayesattn.multihead import MultiheadAttention
from bayesattn.normalizations import DoublyNormalized

HEADS, DIM, QUERIES, KEYS = 3, 5, 7, 11
close = torch.testing.assert_close


@pytest.fixture
def clouds(generator):
    return [torch.randn(2, HEADS, size, DIM, generator=generator) for size in (QUERIES, KEYS)]


def by_hand(query, key, p):
    """One logit, as the formula says."""
    dim = len(query)
    scale = dim ** (1 - 2 / p)
    norms = [scale * sum(abs(x) ** p for x in row) ** (2 / p) for row in (query, key)]
    distance = sum((x - y) ** 2 for x, y in zip(query, key, strict=True))
    return (-distance + sum(norms)) / (2 * math.sqrt(dim))


@pytest.mark.parametrize("p", [1.0, 1.8, 2.0, 3.0, 7.5])
def test_logits_are_those_of_the_formula(clouds, p):
    """Mutants: a magnitude over 2 d^¼ (the published code), of power p, no factor for the width."""
    query, key = clouds
    found = RBFMagnitude(p)(query, key)
    for i, j in ((0, 0), (3, 8), (6, 10)):
        expected = by_hand(query[1, 2, i].tolist(), key[1, 2, j].tolist(), p)
        assert found[1, 2, i, j].item() == pytest.approx(expected, rel=1e-12)


def test_it_is_the_softmax_at_two(clouds):
    """To rounding, learned or not; by formed weights, and by PyTorch's kernel with a key's bias."""
    query, key = clouds
    expected = F.scaled_dot_product_attention(query, key, key)
    for logits in (RBFMagnitude(), RBFMagnitude(num_heads=HEADS)):
        for route in ("dense", "fused", "auto"):
            found = attention(query, key, key, logits=logits, route=route)
            close(found, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("normalization", [None, DoublyNormalized()], ids=repr)
def test_routes_agree(clouds, normalization):
    query, key = (part.requires_grad_() for part in clouds)
    logits = RBFMagnitude(3.0, num_heads=HEADS)
    settings = {"logits": logits, "normalization": normalization}
    slopes = []
    for route in ("dense", "fused"):
        output = attention(query, key, key, route=route, **settings)
        slopes.append(
            torch.autograd.grad(output.sin().sum(), [query, key, logits.magnitude.log_excess])
        )
    for one, other in zip(*slopes, strict=True):
        close(one, other)


def test_softmax_sees_the_magnitude_of_keys_alone(clouds):
    query, key = clouds
    weights = attention_weights(query, key, logits=RBFMagnitude(3.0))
    reduced = RBFMagnitude(3.0).reduce(query, key)
    alone = reduced.scale * query @ key.mT + reduced.key_bias[..., None, :]
    close(weights, alone.softmax(-1))
    assert (weights - attention_weights(query, key)).abs().max() > 0.01


@given(
    seed=st.integers(0, 1000),
    p=st.floats(1.01, 30.0),
    exponent=st.integers(-120, 120),
    dim=st.integers(1, 9),
)
def test_magnitudes_are_homogeneous_and_stay_in_range(seed, p, exponent, dim):
    """Powers of p would leave the range of numbers long before; equal entries weigh as at two."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, dim, generator=generator, dtype=torch.float64)
    size = 10.0**exponent
    equal = torch.full((1, dim), -1.7, dtype=torch.float64)
    at_one, at_size, of_equal = (
        RBFMagnitude(p)(part, part).diagonal() for part in (rows, size * rows, equal)
    )
    # Of a vector with itself a logit is its magnitude alone.
    close(at_size / size**2, at_one, rtol=1e-9, atol=1e-12)
    close(of_equal, torch.tensor([1.7**2 * dim**0.5], dtype=torch.float64))


@pytest.mark.parametrize("p", [1.2, 2.0, 4.0])
def test_gradients(p, generator):
    """At zeros too: of an entry, and of a whole key."""
    query, key = (torch.randn(1, 2, 3, 2, generator=generator) for _ in range(2))
    query.requires_grad_()
    key.requires_grad_()
    logits = RBFMagnitude(p, num_heads=2)
    assert torch.autograd.gradcheck(
        lambda q, k, raw: torch.func.functional_call(logits, {"magnitude.log_excess": raw}, (q, k)),
        (query, key, logits.magnitude.log_excess),
    )
    with torch.no_grad():
        key[0, 0, 0, 0] = 0
        key[0, 1, 1] = 0
    parts = [query, key, logits.magnitude.log_excess]
    grown = torch.autograd.grad(logits(query, key).sin().sum(), parts, create_graph=True)
    assert all(part.isfinite().all() for part in grown)
    # Learned p is no power of a tensor, whose second derivatives at zero are not numbers.
    again = torch.autograd.grad(sum(part.sin().sum() for part in grown), parts)
    assert all(part.isfinite().all() for part in again)


def test_a_layer_learns_p_for_each_head(seeded_layers, generator):
    layer = MultiheadAttention(12, HEADS, batch_first=True, logits=RBFMagnitude(num_heads=HEADS))
    tokens = torch.randn(2, 7, 12, generator=generator)
    plain = MultiheadAttention.from_torch(layer, logits=DotProduct())
    close(layer(tokens, tokens, tokens)[0], plain(tokens, tokens, tokens)[0])
    layer(tokens, tokens, tokens)[0].square().sum().backward()
    assert layer.logits.magnitude.log_excess.grad.abs().min() > 0
    assert layer.logits.p.tolist() == [2.0] * HEADS
    assert "logits.magnitude.log_excess" in layer.state_dict()
    with pytest.raises(ValueError, match="logits: expected num_heads=3"):
        MultiheadAttention(12, HEADS, logits=RBFMagnitude(num_heads=2))
    half = layer.bfloat16()
    found = half(*(tokens.bfloat16(),) * 3)[0]
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p": 0.9}, "p must be at least one, got 0.9"),
        ({"p": float("inf")}, "p must be a positive number, got inf"),
        ({"p": 1, "num_heads": 2}, "p must be above one where it is learned, got 1"),
        ({"num_heads": 0}, "num_heads must be a whole number, at least 1, got 0"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        RBFMagnitude(**settings)


def test_a_trained_model_goes_on_from_its_softmax(seeded_layers, generator):
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(12, HEADS, 16, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    tokens = torch.randn(2, 7, 12, generator=generator)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    expected = encoder(tokens, src_key_padding_mask=padding)[~padding]
    model, _ = convert(encoder, logits=RBFMagnitude(num_heads=HEADS), copy=True)
    close(model(tokens, src_key_padding_mask=padding)[~padding], expected)
    first, second = (layer.self_attn.logits for layer in model.layers)
    assert first.magnitude is not second.magnitude
