"""Heads that share projections: concatenated heads as a special case, loops, masks, decoding."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bayesattn.decoding_cache import KeyValueCache
from bayesattn.encoder import TransformerEncoder, TransformerEncoderLayer
from bayesattn.logits import DotProduct, GaussianLogits
from bayesattn.multihead import MultiheadAttention
from bayesattn.networks import attention_calls, attention_layers
from bayesattn.normalizations import DoublyNormalized
from bayesattn.shared_projections import Collaborative, SharedProjections, block_mixing
from tests.compilation import in_one_graph

BATCH, HEADS, QUERIES, KEYS, WIDTH, SHARED = 2, 3, 5, 7, 6, 11
CROSS = {"kdim": 13, "vdim": 17, "batch_first": True}


@pytest.fixture
def make(seeded_layers):
    """Layers whose parameters are all random, biases and content too."""

    def build(width=SHARED, **settings):
        layer = MultiheadAttention(WIDTH, HEADS, projections=Collaborative(width), **settings)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_()
        return layer

    return build


def side_by_side(theirs, **settings):
    """A collaborative layer that mixes each component into one head, from PyTorch's weights."""
    ours = MultiheadAttention(
        theirs.embed_dim,
        theirs.num_heads,
        kdim=theirs.kdim,
        vdim=theirs.vdim,
        batch_first=theirs.batch_first,
        projections=Collaborative(theirs.embed_dim),
        **settings,
    )
    if theirs.in_proj_weight is None:
        weights = (theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight)
    else:
        weights = theirs.in_proj_weight.chunk(3)
    query_bias, key_bias, value_bias = theirs.in_proj_bias.chunk(3)
    heads, shared = theirs.num_heads, ours.projections
    with torch.no_grad():
        shared.query_weight.copy_(weights[0])
        shared.key_weight.copy_(weights[1])
        shared.mixing.copy_(block_mixing(heads, theirs.head_dim))
        by_head = [weight.unflatten(0, (heads, -1)) for weight in weights[:2]]
        shared.key_content.copy_(
            torch.einsum("hd,hdf->hf", query_bias.unflatten(0, (heads, -1)), by_head[1])
        )
        if shared.query_content is not None:
            shared.query_content.copy_(
                torch.einsum("hd,hdf->hf", key_bias.unflatten(0, (heads, -1)), by_head[0])
            )
        ours.v_proj_weight.copy_(weights[2])
        ours.v_proj_bias.copy_(value_bias)
    ours.out_proj.load_state_dict(theirs.out_proj.state_dict())
    return ours


@pytest.fixture
def theirs(seeded_layers):
    """PyTorch's layer with biases that count."""

    def build(**settings):
        layer = nn.MultiheadAttention(WIDTH, HEADS, **settings)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
        return layer

    return build


def inputs(generator, settings):
    widths = (WIDTH, settings.get("kdim", WIDTH), settings.get("vdim", WIDTH))
    sizes = (QUERIES, KEYS, KEYS)
    shapes = [(BATCH, size, width) for size, width in zip(sizes, widths, strict=True)]
    tensors = [torch.randn(*shape, generator=generator) for shape in shapes]
    return tensors if settings.get("batch_first") else [part.transpose(0, 1) for part in tensors]


@pytest.mark.parametrize("settings", [{}, CROSS])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_heads_side_by_side_are_a_special_case(theirs, generator, settings, masked, need_weights):
    """Biases too: the queries' live on as content, and the keys' drop out of the softmax."""
    layer = theirs(**settings)
    ours, tokens = side_by_side(layer), inputs(generator, settings)
    masks = {}
    if masked:
        padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
        padding[1, 4:] = True
        pairs = torch.randn(BATCH * HEADS, QUERIES, KEYS, generator=generator)
        masks = {"key_padding_mask": padding, "attn_mask": pairs.masked_fill(pairs > 1, -math.inf)}
        padding = torch.zeros(BATCH, KEYS).masked_fill(padding, -math.inf)
        masks["key_padding_mask"] = padding
    masks |= {"need_weights": need_weights, "average_attn_weights": False}
    expected, found = layer(*tokens, **masks), ours(*tokens, **masks)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_bias_of_keys_counts_where_the_normalization_runs_over_queries(theirs, generator):
    layer = theirs(batch_first=True)
    separate = MultiheadAttention.from_torch(layer, normalization=DoublyNormalized())
    shared = side_by_side(layer, normalization=DoublyNormalized())
    tokens = inputs(generator, {"batch_first": True})
    expected = separate(*tokens, need_weights=False)[0]
    torch.testing.assert_close(shared(*tokens, need_weights=False)[0], expected)
    with torch.no_grad():
        shared.projections.query_content.zero_()
    assert (shared(*tokens)[0] - expected).abs().max() > 1e-3


def test_logits_are_those_of_loops(make, generator):
    layer = make(batch_first=True)
    tokens = inputs(generator, {"batch_first": True})
    weights = layer(*tokens, average_attn_weights=False)[1].detach()
    shared = layer.projections.requires_grad_(False)
    for b in range(BATCH):
        for h in range(HEADS):
            for i in range(QUERIES):
                logits = []
                for j in range(KEYS):
                    x, y = tokens[0][b, i], tokens[1][b, j]
                    total = sum(
                        float(shared.mixing[h, r])
                        * float(shared.query_weight[r] @ x)
                        * float(shared.key_weight[r] @ y)
                        for r in range(SHARED)
                    )
                    logits.append((total + float(shared.key_content[h] @ y)) / math.sqrt(2))
                expected = torch.tensor(logits).softmax(0)
                torch.testing.assert_close(weights[b, h, i], expected)


def test_the_scale_is_that_of_the_original_width_and_is_stored(make):
    for width in (4, 31):
        layer = make(width)
        assert float(layer.projections.scale) == pytest.approx((WIDTH / HEADS) ** -0.5)
        assert "projections.scale" in layer.state_dict()
    scaled = make(logits=DotProduct(0.7))
    assert float(scaled.projections.scale) == pytest.approx(0.7)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 160, "vdim": 96}])
def test_initial_logits_are_as_large_as_those_of_heads_side_by_side(
    generator, seeded_layers, sizes
):
    """Over many layers, to a few percent; mixing of ones would be off by more than twice."""
    tokens = torch.randn(1, 50, 128, generator=generator)
    keys = torch.randn(1, 50, sizes.get("kdim", 128), generator=generator)

    def spread(projections):
        squares = []
        for _ in range(8):
            layer = MultiheadAttention(128, 8, batch_first=True, projections=projections, **sizes)
            values = torch.zeros(1, 50, sizes.get("vdim", 128))
            given = layer.attention_inputs(tokens, keys, values)
            scale = given.settings.get("scale", 16**-0.5)
            squares.append(((given.query @ given.key.mT) * scale).square().mean())
        return torch.stack(squares).mean().sqrt().item()

    assert spread(Collaborative(37)) / spread(None) == pytest.approx(1.0, abs=0.06)


def test_other_logits_see_mixed_queries_and_shared_keys(make, generator):
    layer = make(batch_first=True, logits=GaussianLogits(HEADS, SHARED))
    assert layer.projections.key_content is None
    tokens = inputs(generator, {"batch_first": True})
    weights = layer(*tokens, average_attn_weights=False)[1]
    shared = layer.projections
    query = torch.einsum("hr,rf,bif->bhir", shared.mixing, shared.query_weight, tokens[0])
    key = (tokens[1] @ shared.key_weight.mT)[:, None].expand(-1, HEADS, -1, -1)
    # As wide as they are they have the scale of a head: what that is more, both sides share.
    root = ((WIDTH / HEADS) ** -0.5 * SHARED**0.5) ** 0.5
    expected = layer.logits(root * query, root * key).softmax(-1)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("normalization", [None, DoublyNormalized()])
def test_padding_does_not_matter(make, generator, normalization):
    layer = make(batch_first=True, normalization=normalization)
    tokens = torch.randn(BATCH, KEYS, WIDTH, generator=generator)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[0, 5:] = True
    first = layer(tokens, tokens, tokens, key_padding_mask=padding, need_weights=False)[0]
    other = torch.where(padding[..., None], 1e3, tokens)
    second = layer(other, other, other, key_padding_mask=padding, need_weights=False)[0]
    torch.testing.assert_close(second[~padding], first[~padding])


class _StockCalls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.shapes.append((args[1].shape, args[1].stride(), kwargs))
        return func(*args, **(kwargs or {}))


def test_causal_attention_goes_to_the_fused_kernel_and_keys_are_not_copied_for_heads(
    make, generator
):
    layer = make(batch_first=True)
    tokens = torch.randn(BATCH, 64, WIDTH, generator=generator)
    with _StockCalls() as calls:
        layer(tokens, tokens, tokens, need_weights=False, is_causal=True)
    ((shape, stride, settings),) = calls.shapes
    assert shape == (BATCH, HEADS, 64, SHARED + HEADS)
    assert stride[1] == 0
    assert settings["is_causal"]
    assert settings["attn_mask"] is None


def test_gradients_reach_all_parameters(make, generator):
    for normalization in (None, DoublyNormalized()):
        layer = make(batch_first=True, normalization=normalization)
        tokens = inputs(generator, {"batch_first": True})
        layer(*tokens, need_weights=False)[0].square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()), name


def test_state_is_kept_and_copies_stand_alone(make, generator):
    layer, other = make(batch_first=True), make(batch_first=True)
    tokens = inputs(generator, {"batch_first": True})
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(*tokens), layer(*tokens))
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.projections.mixing.zero_()
    assert bool(layer.projections.mixing.any())
    names = {name for name, _ in layer.named_parameters()}
    assert not {"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight"} & names


@pytest.mark.parametrize("projections", [None, Collaborative(SHARED)])
@pytest.mark.parametrize("step", [1, 3])
def test_decoding_with_a_cache_is_causal_attention(seeded_layers, generator, projections, step):
    layer = MultiheadAttention(WIDTH, HEADS, batch_first=True, projections=projections)
    tokens = torch.randn(BATCH, 13, WIDTH, generator=generator)
    expected = layer(tokens, tokens, tokens, is_causal=True, need_weights=False)[0]
    for grad in (False, True):
        cache = KeyValueCache()
        settings = {"is_causal": True, "need_weights": False, "cache": cache}
        with torch.set_grad_enabled(grad):
            found = [layer(part, part, part, **settings)[0] for part in tokens.split(step, 1)]
        torch.testing.assert_close(torch.cat(found, 1), expected)
    assert cache.length == 13
    features = WIDTH if projections is None else SHARED + HEADS
    assert cache.num_floats == BATCH * 13 * (features + WIDTH)


def test_a_cache_is_cropped_reordered_and_refuses_strangers(make, generator):
    layer = make(batch_first=True)
    tokens = torch.randn(BATCH, 9, WIDTH, generator=generator)
    cache = KeyValueCache()
    assert cache.key is None
    with torch.no_grad():
        layer(tokens, tokens, tokens, cache=cache, is_causal=True)
        cache.crop(4)
        cache.select(torch.tensor([1, 1, 0]))
        rows = tokens[[1, 1, 0], 4:5]
        found = layer(rows, rows, rows, cache=cache)[0]
        before = tokens[[1, 1, 0], :5]
        expected = layer(rows, before, before)[0]
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="length: expected 0 to 5, got 6"):
        cache.crop(6)
    with pytest.raises(ValueError, match="cache: expected a key of batch, heads and width"):
        make(SHARED + 1, batch_first=True)(rows, rows, rows, cache=cache)
    doubly = make(batch_first=True, normalization=DoublyNormalized())
    with pytest.raises(ValueError, match="cache: expected a normalization over keys alone"):
        doubly(tokens, tokens, tokens, cache=KeyValueCache())


def test_a_cache_is_emptied_for_another_batch_and_goes_on_outside_of_inference_mode(
    make, generator
):
    layer = make(batch_first=True)
    tokens = torch.randn(BATCH, 9, WIDTH, generator=generator)
    settings = {"cache": KeyValueCache(), "is_causal": True}
    with torch.inference_mode():
        layer(tokens[:, :4], tokens[:, :4], tokens[:, :4], **settings)
    with torch.no_grad():
        found = layer(tokens[:, 4:], tokens[:, 4:], tokens[:, 4:], **settings)[0]
        whole = layer(tokens, tokens, tokens, is_causal=True)[0]
        torch.testing.assert_close(found, whole[:, 4:])
        settings["cache"].crop(0)
        one = tokens[:1]
        torch.testing.assert_close(layer(one, one, one, **settings)[0], whole[:1])
        with pytest.raises(ValueError, match=r"in torch.float64, got .* in torch.float32"):
            layer.float()(one.float(), one.float(), one.float(), **settings)


@pytest.mark.usefixtures("unchecked_types")
def test_what_is_no_cache_is_refused(make, generator):
    tokens = torch.randn(BATCH, 3, WIDTH, generator=generator)
    with pytest.raises(TypeError, match=r"cache must be of type KeyValueCache, got \{\}"):
        make(batch_first=True)(tokens, tokens, tokens, cache={})
    with pytest.raises(ValueError, match=r"length must be a whole number, at least 0, got 1\.5"):
        KeyValueCache().crop(1.5)


def test_calls_are_recorded_with_their_weights(make, generator):
    layer = make(batch_first=True)
    tokens = inputs(generator, {"batch_first": True})
    with attention_calls(layer) as calls:
        weights = layer(*tokens, average_attn_weights=False)[1]
    torch.testing.assert_close(calls[""][-1].weights(), weights)


def test_heads_are_rows_of_the_mixing_matrix(make):
    (layer,) = attention_layers(make()).values()
    assert (layer.num_heads, layer.query_dim) == (HEADS, SHARED)
    query, value = layer.partitions(("query", "key", "value"))
    torch.testing.assert_close(query.particles(), layer.module.projections.mixing.detach())
    assert value.dim == WIDTH // HEADS * WIDTH


def test_an_encoder_has_them_in_every_layer(seeded_layers, generator):
    layer = TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True, projections=Collaborative(5))
    encoder = TransformerEncoder(layer, 2).eval()
    tokens = torch.randn(BATCH, KEYS, WIDTH, generator=generator)
    widths = [part.self_attn.projections.width for part in encoder.layers]
    assert widths == [5, 5]
    first = encoder.layers[0].self_attn.projections.mixing
    assert first is not encoder.layers[1].self_attn.projections.mixing
    assert encoder(tokens).shape == tokens.shape


def test_from_torch_goes_on_with_shared_projections(make, generator):
    layer = make(batch_first=True)
    tokens = inputs(generator, {"batch_first": True})
    again = MultiheadAttention.from_torch(layer)
    assert again.projections is layer.projections
    torch.testing.assert_close(again(*tokens), layer(*tokens))
    with pytest.raises(ValueError, match="logits: expected None for heads that share"):
        MultiheadAttention.from_torch(layer, logits=GaussianLogits(HEADS, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_and_autocast(seeded_layers, generator, dtype):
    layer = MultiheadAttention(
        32, 4, batch_first=True, projections=Collaborative(24), dtype=torch.float32
    )
    tokens = torch.randn(BATCH, KEYS, 32, generator=generator, dtype=torch.float32)
    expected = layer(tokens, tokens, tokens)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = layer(tokens, tokens, tokens, need_weights=False)[0]
    torch.testing.assert_close(found.float(), expected, rtol=5e-2, atol=2e-2)
    whole = copy.deepcopy(layer).to(dtype)
    given = tokens.to(dtype)
    assert whole(given, given, given)[0].dtype == dtype


@pytest.mark.compile
def test_compiles_as_one_graph(make, generator):
    layer = make(batch_first=True)
    tokens = torch.randn(BATCH, KEYS, WIDTH, generator=generator)
    found = in_one_graph(lambda x: layer(x, x, x, need_weights=False)[0], tokens)
    torch.testing.assert_close(found, layer(tokens, tokens, tokens)[0])


def test_refusals():
    with pytest.raises(ValueError, match="width must be a whole number, at least 1, got 0"):
        Collaborative(0)
    with pytest.raises(ValueError, match="add_bias_kv: expected False"):
        MultiheadAttention(6, 3, add_bias_kv=True, projections=Collaborative(4))
    with pytest.raises(ValueError, match="head_dim must be a whole number, at least 1, got 0"):
        SharedProjections(3, 4, 0, 6)


def test_a_fresh_layer_without_bias_has_no_content(seeded_layers):
    layer = MultiheadAttention(6, 3, bias=False, projections=Collaborative(4))
    assert layer.projections.key_content is None
    assert layer.v_proj_bias is None
    assert layer.projections.key_features == 4
