"""Tests of bayesattn.encoder."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bayesattn.encoder import TransformerEncoder, TransformerEncoderLayer
from bayesattn.functional import attention_weights
from bayesattn.layer_masks import is_causal_mask
from bayesattn.multihead import MultiheadAttention
from bayesattn.normalizations import DoublyNormalized
from tests.compilation import in_one_graph

BATCH, LENGTH, WIDTH, HEADS, HIDDEN = 2, 5, 6, 3, 11
LATER = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
VARIANTS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "first": {"norm_first": True, "activation": "gelu"},
    "no bias": {"bias": False, "batch_first": True, "activation": torch.tanh},
}


class Columns(nn.Module):
    """Doubly normalized weights at a learned temperature, written out."""

    mixes_queries = True

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, logits, mask):
        logits = logits / self.temperature
        if mask is not None:
            logits = logits.masked_fill(~mask, -1e300)
        columns = logits.softmax(-2)
        columns = columns if mask is None else columns * mask
        return columns / columns.sum(-1, keepdim=True).clamp(min=1e-300)


def seeded(cls, *sizes, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return cls(*sizes, **settings)


def layer_of(cls, variant="batch first", **more):
    settings = {"dropout": 0.0} | VARIANTS[variant] | more
    return seeded(cls, WIDTH, HEADS, HIDDEN, **settings)


def sequences(generator, layer, is_batched=True):
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=generator)
    if not is_batched:
        return x[0]
    return x if layer.self_attn.batch_first else x.transpose(0, 1)


def layer_masks(generator, is_batched=True):
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, 3:] = True
    padding = padding if is_batched else padding[0]
    pairs = (torch.rand(LENGTH, LENGTH, generator=generator) > 0.6).fill_diagonal_(False)
    pairs[:, 0] = False
    return {
        "none": {},
        "padding": {"src_key_padding_mask": padding},
        "pairs": {"src_mask": pairs},
        "causal": {"src_mask": LATER, "is_causal": True},
        "float causal": {"src_mask": torch.zeros(LATER.shape).masked_fill(LATER, -torch.inf)},
        "both": {"src_mask": pairs, "src_key_padding_mask": padding},
    }


MASKS = list(layer_masks(torch.Generator()))


@pytest.mark.parametrize("is_batched", [True, False])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_equals_pytorch(variant, kind, is_batched, generator):
    theirs, ours = (
        layer_of(cls, variant) for cls in (nn.TransformerEncoderLayer, TransformerEncoderLayer)
    )
    x = sequences(generator, ours, is_batched)
    masks = layer_masks(generator, is_batched)[kind]
    results = [layer(x, **masks) for layer in (ours, theirs)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("evaluates", [True, False])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("variant", ["plain", "batch first"])
def test_encoder_equals_pytorch(variant, kind, evaluates, generator):
    """At valid positions: in evaluation PyTorch's shortcut leaves the others out."""
    norm = nn.LayerNorm(WIDTH)
    theirs = nn.TransformerEncoder(
        layer_of(nn.TransformerEncoderLayer, variant), 2, norm, enable_nested_tensor=False
    )
    ours = TransformerEncoder(layer_of(TransformerEncoderLayer, variant), 2, norm)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = sequences(generator, ours.layers[0])
    masks = layer_masks(generator)[kind]
    masks["mask"] = masks.pop("src_mask", None)
    with torch.set_grad_enabled(not evaluates):
        results = [stack.train(not evaluates)(x, **masks) for stack in (ours, theirs)]
    if variant == "plain":
        results = [result.transpose(0, 1) for result in results]
    padding = masks.get("src_key_padding_mask", torch.zeros(BATCH, LENGTH, dtype=torch.bool))
    torch.testing.assert_close(*(result[~padding] for result in results), rtol=1e-12, atol=1e-12)


def test_dropout_draws_as_pytorch_does(generator):
    results = []
    for cls in (nn.TransformerEncoderLayer, TransformerEncoderLayer):
        layer = layer_of(cls, "plain", dropout=0.3)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            results.append(layer(sequences(generator.manual_seed(1), layer)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("is_causal", [True, None])
def test_causal_encoder_sees_no_later_position(has_mask, is_causal, generator):
    encoder = TransformerEncoder(layer_of(TransformerEncoderLayer), 2)
    x = sequences(generator, encoder.layers[0])
    settings = {"mask": LATER if has_mask else None, "is_causal": is_causal}
    changed = torch.cat([x[:, :3], x[:, 3:] + 1], 1)
    short, long = encoder(x, **settings), encoder(changed, **settings)
    assert torch.equal(short[:, :3], long[:, :3]) == bool(has_mask or is_causal)


def test_a_causal_mask_is_known_for_what_it_is(generator):
    """So that attention need not read it, and can refuse it."""
    encoder = TransformerEncoder(layer_of(TransformerEncoderLayer), 1)
    x, calls = sequences(generator, encoder.layers[0]), []
    encoder.layers[0].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((kwargs["attn_mask"], kwargs["is_causal"])),
        with_kwargs=True,
    )
    encoder(x, mask=LATER)
    encoder(x, mask=LATER, is_causal=False)
    assert calls == [(None, True), (LATER, False)]
    assert not is_causal_mask(LATER, LENGTH + 1)
    assert not is_causal_mask(LATER.T, LENGTH)
    assert not is_causal_mask(LATER[None].expand(6, -1, -1), LENGTH)
    float_mask = torch.zeros(LENGTH, LENGTH).masked_fill(LATER, -torch.inf)
    assert is_causal_mask(float_mask, LENGTH)
    float_mask[3, 1] = 0.5
    assert not is_causal_mask(float_mask, LENGTH)


@given(
    seed=st.integers(0, 2**16),
    length=st.integers(2, 5),
    padding=st.integers(1, 3),
    content=st.sampled_from([0.0, 1e3, -1e6]),
    norm_first=st.booleans(),
    normalization=st.sampled_from([None, Columns, DoublyNormalized]),
)
def test_padding_never_matters(seed, length, padding, content, norm_first, normalization):
    generator = torch.Generator().manual_seed(seed)
    choice = normalization and normalization()
    layer = layer_of(TransformerEncoderLayer, norm_first=norm_first, normalization=choice)
    encoder = TransformerEncoder(layer, 2)
    short = torch.randn(1, length, WIDTH, generator=generator)
    long = F.pad(short, (0, 0, 0, padding), value=content)
    mask = torch.arange(length + padding)[None] >= length
    result = encoder(long, src_key_padding_mask=mask)[:, :length]
    torch.testing.assert_close(result, encoder(short))


@pytest.mark.parametrize("num_heads", [2, 3])
def test_normalization_counts_also_in_evaluation(num_heads, generator):
    layer = seeded(TransformerEncoderLayer, WIDTH, num_heads, HIDDEN, batch_first=True)
    other = copy.deepcopy(layer)
    other.self_attn = MultiheadAttention.from_torch(layer.self_attn, normalization=Columns())
    x = sequences(generator, layer)
    for encoder in (layer.eval(), other.eval()):
        with_gradients = encoder(x)
        with torch.no_grad():
            torch.testing.assert_close(encoder(x), with_gradients)
    assert (layer(x) - other(x)).abs().max() > 1e-3


def test_copies_have_parameters_of_their_own(generator):
    choice = Columns()
    layer = layer_of(TransformerEncoderLayer, normalization=choice)
    encoder = TransformerEncoder(layer, 3)
    encoder(sequences(generator, layer)).square().sum().backward()
    temperatures = [block.self_attn.normalization.temperature for block in encoder.layers]
    everyone = [*temperatures, choice.temperature, layer.self_attn.normalization.temperature]
    assert len({id(temperature) for temperature in everyone}) == 5
    assert len({temperature.grad.item() for temperature in temperatures}) == 3
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_hooks_see_each_layers_attention(generator):
    layer = layer_of(TransformerEncoderLayer, normalization=Columns())
    encoder, seen = TransformerEncoder(layer, 2).eval(), []
    for block in encoder.layers:
        block.self_attn.register_forward_hook(
            lambda attn, args, kwargs, _: seen.append(attn.attention_inputs(*args, **kwargs)),
            with_kwargs=True,
        )
    padding = layer_masks(generator)["padding"]["src_key_padding_mask"]
    with torch.no_grad():
        encoder(sequences(generator, layer), src_key_padding_mask=padding)
    maps = [attention_weights(query, key, **settings) for query, key, _, settings in seen]
    assert len(maps) == 2
    for weights in maps:
        assert weights.shape == (BATCH, HEADS, LENGTH, LENGTH)
        assert (weights[0, :, :, 3:] == 0).all()
        assert (weights[0].sum(-2)[:, :3] >= 1 / 3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype, generator):
    layer = layer_of(TransformerEncoderLayer, dtype=dtype, normalization=Columns())
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert layer(sequences(generator, layer).to(dtype)).dtype == dtype


@pytest.mark.compile
@pytest.mark.parametrize("normalization", [None, Columns])
def test_compiles_into_one_graph(normalization, generator):
    choice = normalization and normalization()
    encoder = TransformerEncoder(layer_of(TransformerEncoderLayer, normalization=choice), 2)
    x = sequences(generator, encoder.layers[0])
    padding = layer_masks(generator)["padding"]["src_key_padding_mask"]

    def call(x):
        return encoder(x, src_key_padding_mask=padding)

    torch.testing.assert_close(in_one_graph(call, x), call(x))


def test_errors():
    with pytest.raises(ValueError, match="d_model: expected a positive multiple of nhead, got 7"):
        TransformerEncoderLayer(7, 3)
    with pytest.raises(ValueError, match="num_layers: expected at least 1, got 0"):
        TransformerEncoder(layer_of(TransformerEncoderLayer), 0)
    layer = layer_of(TransformerEncoderLayer)
    with pytest.raises(ValueError, match="attn_mask: expected 'query key'"):
        layer(torch.zeros(BATCH, LENGTH, WIDTH), src_mask=torch.zeros(3, 3))


@pytest.mark.parametrize("kind", ["hint", "mask"])
def test_causal_masks_with_a_normalization_over_queries_are_refused(kind, generator):
    layer = layer_of(TransformerEncoderLayer, normalization=DoublyNormalized(), batch_first=True)
    encoder = TransformerEncoder(layer, 2)
    tokens = torch.randn(BATCH, LENGTH, WIDTH, generator=generator)
    masks = {"is_causal": True} if kind == "hint" else {"mask": LATER}
    with pytest.raises(ValueError, match="expected CausalDoublyNormalized or Softmax"):
        encoder(tokens, **masks)
