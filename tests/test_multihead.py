"""Tests of bayesattn.multihead and of the modules that it is made of."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bayesattn.attention_choices import own_choice
from bayesattn.functional import attention, attention_weights
from bayesattn.logits import GaussianLogits
from bayesattn.masking import masked_softmax
from bayesattn.multihead import MultiheadAttention
from bayesattn.normalizations import DoublyNormalized, HybridNormalized
from tests.compilation import in_one_graph, undone_compilation

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 5, 7, 6
VARIANTS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "widths": {"kdim": 11, "vdim": 13, "batch_first": True},
    "widths, no bias": {"kdim": 11, "vdim": 13, "bias": False},
    "learned key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True, "batch_first": True},
    "all appended": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 11},
}
MASKS = ["none", "pairs", "pairs per head", "padding", "both", "bias", "float padding", "all float"]


class Columns(nn.Module):
    """Doubly normalized weights at a learned temperature, written out."""

    mixes_queries = True

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, logits, mask):
        logits = logits / self.temperature
        if mask is None:
            columns = logits.softmax(-2)
        else:
            columns = masked_softmax(logits.mT, mask.expand(logits.shape).mT).mT
        return columns / columns.sum(-1, keepdim=True).clamp(min=1e-300)


class Distances(nn.Module):
    """Minus squared distances, with a learned factor."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, query, key):
        return -self.factor * (query.unsqueeze(-2) - key.unsqueeze(-3)).square().sum(-1)


def seeded(cls, *sizes, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return cls(*sizes, **settings)


def pair(variant="plain", **more):
    """PyTorch's layer and ours, biases not zero so that they count."""
    settings = VARIANTS[variant] | more
    theirs = seeded(nn.MultiheadAttention, WIDTH, HEADS, **settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    ours = seeded(MultiheadAttention, WIDTH, HEADS, **settings)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(generator, layer, is_batched=True, dtype=None):
    widths = ((QUERIES, layer.embed_dim), (KEYS, layer.kdim), (KEYS, layer.vdim))
    parts = [torch.randn(BATCH, *shape, generator=generator).to(dtype) for shape in widths]
    if not is_batched:
        return [part[0] for part in parts]
    return parts if layer.batch_first else [part.transpose(0, 1).contiguous() for part in parts]


def layer_masks(generator, kind, is_batched=True):
    """Masks as PyTorch takes them, which leave every query a key."""
    rows = BATCH * HEADS if is_batched else HEADS
    pairs = torch.rand(rows, QUERIES, KEYS, generator=generator) > 0.6
    pairs[..., 0] = False
    padding = torch.rand(BATCH, KEYS, generator=generator) > 0.6
    padding[:, 0] = False
    bias = torch.randn(pairs.shape, generator=generator).masked_fill(pairs, -torch.inf)
    float_padding = torch.randn(padding.shape, generator=generator)
    float_padding = float_padding.masked_fill(padding, -torch.inf)
    if not is_batched:
        padding, float_padding = padding[0], float_padding[0]
    return {
        "none": {},
        "pairs": {"attn_mask": pairs[0]},
        "pairs per head": {"attn_mask": pairs},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": pairs, "key_padding_mask": padding},
        "bias": {"attn_mask": bias[0]},
        "float padding": {"key_padding_mask": float_padding},
        "all float": {"attn_mask": bias, "key_padding_mask": float_padding},
    }[kind]


@pytest.mark.parametrize("is_batched", [True, False])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_pytorch(variant, kind, is_batched, generator):
    theirs, ours = pair(variant)
    parts = inputs(generator, ours, is_batched)
    masks = layer_masks(generator, kind, is_batched)
    for settings in ({}, {"average_attn_weights": False}, {"need_weights": False}):
        expected = theirs(*parts, **masks, **settings)
        result = ours(*parts, **masks, **settings)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    slopes = [
        torch.autograd.grad(layer(*parts, **masks)[0].square().sum(), layer.parameters())
        for layer in (ours, theirs)
    ]
    torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_with_padding_equals_pytorch_at_padding_too(batch_first, generator):
    theirs, ours = pair(batch_first=batch_first)
    shape = (BATCH, KEYS, WIDTH) if batch_first else (KEYS, BATCH, WIDTH)
    x = torch.randn(shape, generator=generator)
    padding = layer_masks(generator, "padding")["key_padding_mask"]
    result, expected = (layer(x, x, x, padding) for layer in (ours, theirs))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert padding.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_equals_pytorch(variant, generator):
    theirs, ours = (layer.float() for layer in pair(variant))
    parts = inputs(generator, ours, dtype=torch.float32)
    torch.testing.assert_close(ours(*parts), theirs(*parts), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need_weights", [True, False])
def test_half_precision_stays_near_pytorch(dtype, need_weights, generator):
    theirs, ours = (layer.to(dtype) for layer in pair("batch first"))
    x = torch.randn(BATCH, KEYS, WIDTH, generator=generator).to(dtype)
    padding = layer_masks(generator, "float padding")["key_padding_mask"].to(dtype)
    result, expected = (layer(x, x, x, padding, need_weights)[0] for layer in (ours, theirs))
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant, generator):
    theirs, ours = (layer.float() for layer in pair(variant))
    parts = inputs(generator, ours, dtype=torch.float32)
    for need_weights in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            results = [layer(*parts, need_weights=need_weights)[0] for layer in (ours, theirs)]
        assert results[0].dtype == torch.bfloat16
        torch.testing.assert_close(*results, rtol=0.03, atol=0.03)
        results[0].float().sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_as_pytorch_does_in_training_only(need_weights, generator):
    theirs, ours = pair("batch first", dropout=0.4)
    parts = inputs(generator, ours)
    results = []
    for layer in (ours, theirs):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            results.append(layer(*parts, need_weights=need_weights))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    whole = ours.eval()(*parts, need_weights=need_weights)
    torch.testing.assert_close(whole, theirs.eval()(*parts, need_weights=need_weights))
    assert not torch.allclose(whole[0], results[0][0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_seed_gives_pytorchs_parameters(variant):
    theirs, ours = (
        seeded(cls, WIDTH, HEADS, **VARIANTS[variant])
        for cls in (nn.MultiheadAttention, MultiheadAttention)
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for _ in range(2):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, other)
        for layer in (ours, theirs):
            with torch.random.fork_rng():
                torch.manual_seed(7)
                layer._reset_parameters()


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_load_both_ways(variant):
    theirs, ours = pair(variant)
    other = seeded(nn.MultiheadAttention, WIDTH, HEADS, **VARIANTS[variant])
    other.load_state_dict(ours.state_dict())
    for mine, loaded in zip(theirs.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, loaded)


def test_only_choices_with_parameters_add_to_the_state():
    plain = set(seeded(MultiheadAttention, WIDTH, HEADS).state_dict())
    layer = seeded(MultiheadAttention, WIDTH, HEADS, normalization=Columns(), logits=Distances())
    assert set(layer.state_dict()) - plain == {"normalization.temperature", "logits.factor"}


class Calls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("need_weights", [True, False])
def test_weights_are_formed_only_on_request(need_weights, generator):
    _, ours = pair()
    parts = inputs(generator, ours)
    with Calls() as calls:
        ours(*parts, need_weights=need_weights)
    assert ("softmax" in calls.names) == need_weights
    assert ("scaled_dot_product_attention" in calls.names) != need_weights


@pytest.mark.parametrize("variant", ["plain", "widths", "all appended"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_needs_no_mask(variant, need_weights, generator):
    """Appended keys are for everyone, and a hint that is wrong leaves the mask in force."""
    theirs, ours = pair(variant)
    parts = inputs(generator, ours)
    later = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
    expected = theirs(*parts, attn_mask=later)[0]
    for mask in (None, later, torch.zeros(QUERIES, KEYS).masked_fill(later, -torch.inf)):
        settings = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
        torch.testing.assert_close(ours(*parts, **settings)[0], expected)
    more = later.clone()
    more[3, 1] = True
    settings = {"attn_mask": more, "is_causal": True, "need_weights": need_weights}
    torch.testing.assert_close(ours(*parts, **settings)[0], theirs(*parts, attn_mask=more)[0])


@pytest.mark.parametrize("need_weights", [True, False])
def test_queries_without_a_key_get_the_outputs_bias(need_weights, generator):
    theirs, ours = pair("batch first")
    parts = inputs(generator, ours)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1] = True
    assert theirs(*parts, padding)[0][1].isnan().all()
    output, weights = ours(*parts, padding, need_weights)
    torch.testing.assert_close(output[1], ours.out_proj.bias.expand(QUERIES, -1))
    torch.testing.assert_close(output[0], theirs(*parts, padding)[0][0])
    assert weights is None or (weights[1] == 0).all()
    slopes = torch.autograd.grad(output.sum(), ours.parameters())
    assert all(slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize("need_weights", [True, False])
def test_choices_reach_the_function(need_weights, generator):
    layer = seeded(MultiheadAttention, WIDTH, HEADS, normalization=Columns(), logits=Distances())
    parts = inputs(generator, layer)
    weights = layer.in_proj_weight.chunk(3)
    heads = [
        (part @ weight.T).reshape(-1, BATCH, HEADS, WIDTH // HEADS).permute(1, 2, 0, 3)
        for part, weight in zip(parts, weights, strict=True)
    ]
    expected = attention(*heads, normalization=Columns(), logits=Distances())
    expected = expected.permute(2, 0, 1, 3).flatten(2) @ layer.out_proj.weight.T
    output, returned = layer(*parts, need_weights=need_weights, average_attn_weights=False)
    torch.testing.assert_close(output, expected)
    if need_weights:
        whole = attention_weights(*heads[:2], normalization=Columns(), logits=Distances())
        torch.testing.assert_close(returned, whole)


@given(
    seed=st.integers(0, 2**16),
    length=st.integers(2, 5),
    padding=st.integers(1, 3),
    content=st.sampled_from([0.0, 1e4, -1e8]),
    is_float=st.booleans(),
    batch_first=st.booleans(),
    normalization=st.sampled_from(
        [
            None,
            Columns,
            DoublyNormalized,
            lambda: HybridNormalized(HEADS),
            lambda: Columns().forward,
        ]
    ),
    variant=st.sampled_from(["plain", "learned key"]),
)
def test_padding_never_matters_in_self_attention(
    seed, length, padding, content, is_float, batch_first, normalization, variant
):
    """Neither its length nor its content, also where queries are normalized over."""
    generator = torch.Generator().manual_seed(seed)
    settings = VARIANTS[variant] | {"batch_first": batch_first}
    choice = normalization and normalization()
    layer = seeded(MultiheadAttention, WIDTH, HEADS, **settings, normalization=choice)
    short = torch.randn(1, length, WIDTH, generator=generator)
    long = F.pad(short, (0, 0, 0, padding), value=content)
    mask = torch.arange(length + padding)[None] >= length
    mask = torch.zeros(mask.shape).masked_fill(mask, -torch.inf) if is_float else mask
    if not batch_first:
        short, long = short.transpose(0, 1), long.transpose(0, 1)
    for need_weights in (True, False):
        expected = layer(short, short, short, need_weights=need_weights)[0]
        result = layer(long, long, long, mask, need_weights=need_weights)[0]
        kept = result[:, :length] if batch_first else result[:length]
        torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("is_float", [True, False])
def test_query_padding_is_told_in_cross_attention(is_float, generator):
    layer = seeded(MultiheadAttention, WIDTH, HEADS, batch_first=True, normalization=Columns())
    query, key, value = inputs(generator, layer)
    mask = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    mask[:, 3:] = True
    expected = layer(query[:, :3], key, value)[0]
    mask = torch.zeros(mask.shape).masked_fill(mask, -torch.inf) if is_float else mask
    result = layer(query, key, value, query_padding_mask=mask)[0]
    torch.testing.assert_close(result[:, :3], expected)
    torch.testing.assert_close(result[:, 3:], layer.out_proj.bias.expand(BATCH, 2, -1))
    assert not torch.allclose(layer(query, key, value)[0][:, :3], expected)


@pytest.mark.filterwarnings("ignore:query_padding_mask")
def test_padded_keys_are_no_padded_queries_in_cross_attention(generator):
    layer = seeded(MultiheadAttention, WIDTH, HEADS, batch_first=True, normalization=Columns())
    query, x = torch.randn(2, BATCH, KEYS, WIDTH, generator=generator)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[:, 3:] = True
    expected = layer(query, x[:, :3], x[:, :3])[0]
    torch.testing.assert_close(layer(query, x, x, padding)[0], expected)


def test_appended_keys_are_no_padding(generator):
    layer = seeded(
        MultiheadAttention,
        WIDTH,
        HEADS,
        batch_first=True,
        add_bias_kv=True,
        add_zero_attn=True,
        normalization=Columns(),
    )
    x = torch.randn(BATCH, KEYS, WIDTH, generator=generator)
    padding = torch.ones(BATCH, KEYS, dtype=torch.bool)
    padding[:, :2] = False
    _, weights = layer(x, x, x, padding, average_attn_weights=False)
    assert weights.shape == (BATCH, HEADS, KEYS, KEYS + 2)
    assert (weights[:, :, :2, -2:] > 0).all()
    assert (weights[..., 2:-2] == 0).all()
    torch.testing.assert_close(weights[:, :, :2].sum(-1), torch.ones(BATCH, HEADS, 2))
    with pytest.raises(ValueError, match="is_causal: expected no keys appended"):
        layer(x, x, x, is_causal=True)


@pytest.mark.parametrize("num_heads", [2, 3])
def test_pytorchs_encoder_does_not_pass_the_normalization_by(num_heads, generator):
    """In evaluation without gradients it computes softmax attention by itself where it may."""
    encoder = seeded(nn.TransformerEncoderLayer, WIDTH, num_heads, 11, batch_first=True).eval()
    x = torch.randn(BATCH, KEYS, WIDTH, generator=generator)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[:, 5:] = True
    with torch.no_grad():
        softmax = encoder(x, src_key_padding_mask=padding)
        attn = MultiheadAttention.from_torch(encoder.self_attn, normalization=Columns())
        encoder.self_attn = attn
        result = encoder(x, src_key_padding_mask=padding)
        middle = encoder.norm1(x + attn(x, x, x, padding)[0])
        widened = encoder.linear2(encoder.linear1(middle).relu())
    torch.testing.assert_close(result, encoder.norm2(middle + widened))
    assert (result - softmax)[:, :5].abs().max() > 1e-3
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
        stack = nn.TransformerEncoder(encoder, 2).eval()
    with torch.no_grad():
        again = stack(x, src_key_padding_mask=padding)
        twice = encoder(result, src_key_padding_mask=padding)
    torch.testing.assert_close(again, twice)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_are_refused(generator):
    """PyTorch's encoder makes them if the layer came in after it was built."""
    x = torch.randn(BATCH, KEYS, WIDTH, generator=generator)
    layer = seeded(nn.TransformerEncoderLayer, WIDTH, 2, 11, batch_first=True)
    stack = nn.TransformerEncoder(layer, 1).eval()
    for block in stack.layers:
        block.self_attn = MultiheadAttention.from_torch(block.self_attn)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[:, 5:] = True
    with torch.no_grad(), pytest.raises(ValueError, match="use_nested_tensor = False"):
        stack(x, src_key_padding_mask=padding)


@pytest.mark.parametrize("variant", VARIANTS)
def test_conversion_keeps_parameters_themselves(variant, generator):
    theirs, _ = pair(variant, dropout=0.3)
    theirs = theirs.float().eval()
    theirs.out_proj.weight.requires_grad_(False)
    choices = {"normalization": Columns(), "logits": Distances()}
    ours = MultiheadAttention.from_torch(theirs, **choices)
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert mine.pop(name) is parameter
    assert {name: p.dtype for name, p in mine.items()} == {
        "normalization.temperature": torch.float32,
        "logits.factor": torch.float32,
    }
    assert not any(module.training for module in ours.modules())
    assert ours.dropout == 0.3
    parts = inputs(generator, ours, dtype=torch.float32)
    back = MultiheadAttention.from_torch(ours)
    torch.testing.assert_close(back(*parts), theirs(*parts), rtol=1e-6, atol=1e-6)


def test_conversion_refuses_what_it_would_change():
    class Other(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return args[0], None

    with pytest.raises(ValueError, match="Other with a forward of its own"):
        MultiheadAttention.from_torch(seeded(Other, WIDTH, HEADS))
    layer, _ = pair()
    nn.utils.parametrizations.orthogonal(layer.out_proj, orthogonal_map="householder")
    with pytest.raises(ValueError, match="parametrized"):
        MultiheadAttention.from_torch(layer)


def test_layers_share_no_choice():
    choice = Columns()
    settings = {"normalization": choice, "dtype": torch.float32}
    layers = [seeded(MultiheadAttention, WIDTH, HEADS, **settings) for _ in range(2)]
    layers.append(MultiheadAttention.from_torch(layers[0], normalization=choice))
    temperatures = [choice.temperature, *(layer.normalization.temperature for layer in layers)]
    assert len({id(temperature) for temperature in temperatures}) == 4
    assert choice.temperature.dtype == torch.float64
    assert all(temperature.dtype == torch.float32 for temperature in temperatures[1:])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_every_parameter_gets_a_gradient(variant, need_weights, generator):
    choices = {"normalization": Columns(), "logits": Distances()}
    layer = seeded(MultiheadAttention, WIDTH, HEADS, **VARIANTS[variant], **choices)
    parts = inputs(generator, layer)
    layer(*parts, need_weights=need_weights)[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_copies_and_files(generator):
    layer = seeded(MultiheadAttention, WIDTH, HEADS, normalization=Columns(), add_bias_kv=True)
    parts = inputs(generator, layer)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = seeded(MultiheadAttention, WIDTH, HEADS, normalization=Columns(), add_bias_kv=True)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.load_state_dict(torch.load(file))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        torch.testing.assert_close(other(*parts), layer(*parts), rtol=0, atol=0)
        other.normalization.temperature.data.fill_(3.0)
        assert not torch.allclose(other(*parts)[0], layer(*parts)[0])


def test_a_hook_sees_what_attention_got(generator):
    layer = seeded(MultiheadAttention, WIDTH, HEADS, normalization=Columns(), batch_first=True)
    seen = []
    layer.register_forward_hook(
        lambda layer, args, kwargs, _: seen.append(layer.attention_inputs(*args, **kwargs)),
        with_kwargs=True,
    )
    x = torch.randn(BATCH, KEYS, WIDTH, generator=generator)
    padding = layer_masks(generator, "padding")["key_padding_mask"]
    _, weights = layer(x, x, x, padding, average_attn_weights=False)
    query, key, value, settings = seen[0]
    assert value.shape == (BATCH, HEADS, KEYS, WIDTH // HEADS)
    torch.testing.assert_close(attention_weights(query, key, **settings), weights)


def test_representation():
    layer = seeded(MultiheadAttention, WIDTH, HEADS, normalization=Columns(), logits=torch.matmul)
    text = repr(layer)
    assert "embed_dim=6, num_heads=3, dropout=0.0, batch_first=False, logits=matmul" in text
    assert "(normalization): Columns()" in text


@pytest.mark.parametrize("need_weights", [True, False])
def test_low_numbers_are_padding_to_a_normalization_over_queries(need_weights, generator):
    layer = seeded(
        MultiheadAttention, WIDTH, HEADS, batch_first=True, normalization=DoublyNormalized()
    )
    x = torch.randn(BATCH, KEYS, WIDTH, generator=generator)
    padding = layer_masks(generator, "padding")["key_padding_mask"]
    low = torch.zeros(padding.shape).masked_fill(padding, -1e9)
    ours, _ = layer(x, x, x, low, need_weights)
    expected, _ = layer(x, x, x, padding, need_weights)
    torch.testing.assert_close(ours, expected)


def test_queries_whose_padding_is_not_told_warn(generator):
    layer = seeded(
        MultiheadAttention, WIDTH, HEADS, batch_first=True, normalization=DoublyNormalized()
    )
    x = torch.randn(BATCH, KEYS, WIDTH, generator=generator)
    padding = layer_masks(generator, "padding")["key_padding_mask"]
    expected, _ = layer(x, x, x, padding)
    with pytest.warns(UserWarning, match="query_padding_mask: normalization or logits look at all"):
        layer(x.clone(), x, x, padding)
    ours, _ = layer(x.clone(), x, x, padding, query_padding_mask=padding)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"logits": GaussianLogits(HEADS, WIDTH)}, "logits: expected dim=2 for a layer of 3 heads"),
        ({"logits": GaussianLogits(5, 2)}, "logits: expected num_heads=3"),
        ({"normalization": HybridNormalized(5)}, "normalization: expected num_heads=3"),
        ({"normalization": DoublyNormalized}, r"expected an object, such as DoublyNormalized\(\)"),
    ],
)
def test_choices_for_other_layers_are_refused(choices, message):
    with torch.random.fork_rng(devices=[]), pytest.raises(ValueError, match=message):
        MultiheadAttention(WIDTH, HEADS, **choices)
    plain = seeded(nn.MultiheadAttention, WIDTH, HEADS)
    with torch.random.fork_rng(devices=[]), pytest.raises(ValueError, match=message):
        MultiheadAttention.from_torch(plain, **choices)


def test_names_of_what_is_not_ours_are_not_sizes(generator):
    """Mutant: an axis that is taken for a width."""

    class OwnSoftmax(nn.Softmax):
        def forward(self, logits, mask):
            return masked_softmax(logits, mask)

    layer = seeded(MultiheadAttention, WIDTH, HEADS, normalization=OwnSoftmax(dim=-1))
    plain = seeded(MultiheadAttention, WIDTH, HEADS)
    x = torch.randn(KEYS, BATCH, WIDTH, generator=generator)
    torch.testing.assert_close(layer(x, x, x), plain(x, x, x))


@pytest.mark.compile
def test_compiles_for_any_length(generator):
    """Mutant: a message made of sizes before there is an error."""
    layer = seeded(MultiheadAttention, WIDTH, HEADS, batch_first=True, normalization=Columns())
    with undone_compilation():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        for length in (7, 5, 11):
            x = torch.randn(BATCH, length, WIDTH, generator=generator)
            torch.testing.assert_close(compiled(x, x, x), layer(x, x, x))


@pytest.mark.compile
@pytest.mark.parametrize("normalization", [None, Columns])
@pytest.mark.parametrize("need_weights", [True, False])
def test_compiles_into_one_graph(normalization, need_weights, generator):
    choice = normalization and normalization()
    layer = seeded(MultiheadAttention, WIDTH, HEADS, batch_first=True, normalization=choice)
    x = torch.randn(BATCH, KEYS, WIDTH, generator=generator)
    padding = layer_masks(generator, "padding")["key_padding_mask"]

    def call(x):
        return layer(x, x, x, padding, need_weights)[0]

    torch.testing.assert_close(in_one_graph(call, x), call(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embed_dim": 7}, "embed_dim: expected a positive multiple of num_heads, got 7 for 3"),
        ({"num_heads": 0}, "embed_dim: expected a positive multiple"),
        ({"dropout": 1.5}, "dropout: expected a probability, got 1.5"),
    ],
)
def test_construction_errors(settings, message):
    sizes = {"embed_dim": WIDTH, "num_heads": HEADS}
    with pytest.raises(ValueError, match=message):
        MultiheadAttention(**sizes | settings)


def test_a_choice_must_be_something_to_call():
    with pytest.raises(ValueError, match=r"normalization: expected something to call.*'softmax'"):
        own_choice("normalization", "softmax", None, None, HEADS, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 5, 5)}, "query: expected 2 or 3 axes as all, the last 6"),
        ({"query": torch.zeros(5, 6)}, "key: expected 2 or 3 axes as all"),
        ({"key": torch.zeros(3, 7, 6)}, "key: expected query's batch"),
        ({"value": torch.zeros(2, 8, 6)}, r"a value for each key, got .* value \(2, 8, 6\)"),
        ({"attn_mask": torch.zeros(5, 5)}, r"attn_mask: expected 'query key' \(5, 7\)"),
        ({"attn_mask": torch.zeros(2, 5, 7)}, r"'batch·head query key' \(6, 5, 7\)"),
        ({"attn_mask": torch.zeros(5, 7).int()}, "attn_mask: expected bool.*int32"),
        ({"key_padding_mask": torch.zeros(7)}, r"key_padding_mask: expected shape \(2, 7\)"),
        ({"query_padding_mask": torch.zeros(2, 7)}, r"query_padding_mask: expected shape \(2, 5\)"),
        ({"key_padding_mask": torch.zeros(2, 7).int()}, "key_padding_mask: expected bool.*int32"),
    ],
)
def test_call_errors(changes, message):
    layer = seeded(MultiheadAttention, WIDTH, HEADS, batch_first=True)
    parts = {
        "query": torch.zeros(BATCH, QUERIES, WIDTH),
        "key": torch.zeros(BATCH, KEYS, WIDTH),
        "value": torch.zeros(BATCH, KEYS, WIDTH),
    }
    with pytest.raises(ValueError, match=message):
        layer(**parts | changes)
