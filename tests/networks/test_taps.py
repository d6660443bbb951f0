"""Tests of bayesattn.networks.taps on PyTorch's layers, ours and those of one's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesattn.attention_diagnostics import layer_statistics
from bayesattn.functional import attention
from bayesattn.multihead import MultiheadAttention
from bayesattn.networks import (
    AttentionCall,
    HeadLayout,
    HeadSlice,
    ProjectionSlices,
    attention_calls,
    recognition,
    register_attention_layer,
    watch_attention,
)
from bayesattn.normalizations import DoublyNormalized
from bayesattn.structured_pooling import StructuredSelfAttention
from tests.compilation import undone_compilation
from tests.networks.perturbation import (
    assert_output_particles_are_heads,
    assert_particles_are_heads,
)

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 5, 7, 15
LAYERS = {"torch's": nn.MultiheadAttention, "ours": MultiheadAttention}
VARIANTS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "widths": {"kdim": 11, "vdim": 13, "batch_first": True},
    "learned key": {"add_bias_kv": True},
    "all appended": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 11},
}
MASKS = ["none", "padding", "pairs", "bias", "padding and pairs", "causal hint"]


def drawn(cls, **settings):
    """A layer all of whose parameters count."""
    layer = cls(WIDTH, HEADS, **settings)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def inputs(layer, generator, *, is_batched=True, num_queries=QUERIES):
    sizes = (num_queries, KEYS, KEYS)
    widths = (WIDTH, layer.kdim, layer.vdim)
    parts = []
    for size, width in zip(sizes, widths, strict=True):
        shape = (BATCH, size, width) if layer.batch_first else (size, BATCH, width)
        shape = shape if is_batched else (size, width)
        parts.append(torch.randn(shape, generator=generator))
    return parts


def masks(kind, generator):
    padding = torch.arange(KEYS) >= torch.tensor([[KEYS], [4]])
    pairs = torch.rand(QUERIES, KEYS, generator=generator) > 0.6
    pairs[:, 0] = False
    per_head = torch.randn(BATCH * HEADS, QUERIES, KEYS, generator=generator)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "pairs": {"attn_mask": pairs},
        "bias": {"attn_mask": per_head},
        "padding and pairs": {"key_padding_mask": padding, "attn_mask": pairs},
        "causal hint": {
            "attn_mask": torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1),
            "is_causal": True,
        },
    }[kind]


def batch_first(layer, part):
    return part if layer.batch_first or part.ndim == 2 else part.transpose(0, 1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_calls_are_what_happened(kind, variant, mask, generator):
    """Weights are those returned; they and the values make the outputs; projected, the layer's."""
    layer = drawn(LAYERS[kind], **VARIANTS[variant])
    parts, given = inputs(layer, generator), masks(mask, generator)
    with attention_calls(layer) as calls:
        output, weights = layer(*parts, **given, average_attn_weights=False)
        unasked, _ = layer(*parts, **given, need_weights=False)
    assert list(calls) == [""]
    for call, result in zip(calls[""], (output, unasked), strict=True):
        projections = list(expected_projections(layer, parts))
        assert call.query.shape == (BATCH, HEADS, QUERIES, WIDTH // HEADS)
        torch.testing.assert_close(call.query, projections[0])
        torch.testing.assert_close(call.key[..., :KEYS, :], projections[1])
        torch.testing.assert_close(call.value[..., :KEYS, :], projections[2])
        torch.testing.assert_close(call.weights() @ call.value, call.head_outputs)
        together = call.head_outputs.transpose(1, 2).flatten(2)
        torch.testing.assert_close(layer.out_proj(together), batch_first(layer, result))
    torch.testing.assert_close(calls[""][0].weights(), weights)


def expected_projections(layer, parts):
    weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    if layer.in_proj_weight is not None:
        weights = layer.in_proj_weight.chunk(3)
    biases = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    for part, weight, bias in zip(parts, weights, biases, strict=True):
        features = F.linear(batch_first(layer, part), weight, bias)
        yield features.unflatten(-1, (HEADS, -1)).transpose(1, 2)


@pytest.mark.parametrize("kind", LAYERS)
def test_without_batch_axis(kind, generator):
    layer = drawn(LAYERS[kind])
    parts = inputs(layer, generator, is_batched=False)
    padding = torch.arange(KEYS) >= 4
    with attention_calls(layer) as calls:
        output, weights = layer(*parts, key_padding_mask=padding, average_attn_weights=False)
    (call,) = calls[""]
    torch.testing.assert_close(call.weights()[0], weights)
    merged = call.head_outputs[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.out_proj(merged), output)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("variant", ["batch first", "widths", "no bias"])
def test_particles_are_heads(kind, variant, generator):
    layer = drawn(LAYERS[kind], **VARIANTS[variant])
    parts = inputs(layer, generator)
    assert_particles_are_heads(layer, lambda model: model(*parts), generator)
    if layer.batch_first:
        assert_output_particles_are_heads(layer, lambda model: model(*parts), generator)


def test_particles_of_pooling_are_heads(generator):
    layer = StructuredSelfAttention(7, 5, HEADS)
    tokens = torch.randn(BATCH, KEYS, 7, generator=generator)
    assert_particles_are_heads(layer, lambda model: model(tokens), generator)


@pytest.mark.parametrize("by_name", [True, False])
def test_calls_of_pooling(by_name, generator):
    layer = StructuredSelfAttention(7, 5, HEADS)
    tokens = torch.randn(BATCH, KEYS, 7, generator=generator)
    mask = torch.arange(KEYS) < torch.tensor([[KEYS], [4]])
    with attention_calls(layer) as calls:
        pooled, weights = layer(tokens=tokens, mask=mask) if by_name else layer(tokens, mask)
    (call,) = calls[""]
    torch.testing.assert_close(call.weights()[:, :, 0], weights)
    assert torch.equal(call.head_outputs[:, :, 0], pooled)
    torch.testing.assert_close(call.weights() @ call.value, call.head_outputs)
    torch.testing.assert_close(call.query[1, :, 0], layer.query_weight)
    torch.testing.assert_close(call.key[:, 0], torch.tanh(tokens @ layer.key_weight.mT))


@pytest.mark.parametrize("kind", LAYERS)
def test_watching_changes_nothing(kind, generator):
    """Also where dropout draws, of which the head's outputs tell."""
    layer = drawn(LAYERS[kind], dropout=0.4)
    parts = inputs(layer, generator)
    for need_weights in (True, False):
        torch.manual_seed(5)
        expected = layer(*parts, need_weights=need_weights)
        torch.manual_seed(5)
        with attention_calls(layer) as calls:
            found = layer(*parts, need_weights=need_weights)
        assert torch.equal(found[0], expected[0])
        assert not need_weights or torch.equal(found[1], expected[1])
        (call,) = calls[""]
        together = call.head_outputs.transpose(1, 2).flatten(2)
        torch.testing.assert_close(layer.out_proj(together).transpose(0, 1), found[0])
        assert not torch.allclose(call.weights() @ call.value, call.head_outputs)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_pass_through_calls(kind, generator):
    layer = drawn(LAYERS[kind])
    parts = inputs(layer, generator)
    with attention_calls(layer) as calls:
        layer(*parts)
    (call,) = calls[""]
    call.weights().square().sum().backward(retain_graph=True)
    assert layer.in_proj_weight.grad[: 2 * WIDTH].abs().min() > 0
    assert not layer.in_proj_weight.grad[2 * WIDTH :].any()
    call.head_outputs.sum().backward()
    assert layer.in_proj_weight.grad.abs().min() > 0
    assert layer.out_proj.weight.grad is None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [True, False])
def test_encoder_in_evaluation(nested, generator):
    """Its shortcut would pass the layers by."""
    encoder_layer = nn.TransformerEncoderLayer(WIDTH + 1, 2, 24, batch_first=True)
    model = nn.TransformerEncoder(encoder_layer, 2, enable_nested_tensor=nested).eval()
    tokens = torch.randn(BATCH, KEYS, WIDTH + 1, generator=generator)
    padding = torch.arange(KEYS) >= torch.tensor([[KEYS], [4]])
    for settings in ({}, {"src_key_padding_mask": padding}):
        with torch.no_grad(), attention_calls(model) as calls:
            found = model(tokens, **settings)
            model(tokens, **settings)
        assert [len(calls[f"layers.{place}.self_attn"]) for place in (0, 1)] == [2, 2]
        assert torch.backends.mha.get_fastpath_enabled()
        with torch.no_grad():
            expected = model(tokens, **settings)
        seen = ~padding if settings else torch.ones_like(padding)
        torch.testing.assert_close(found[seen], expected[seen])
    with torch.no_grad(), layer_statistics(model) as statistics:
        model(tokens, src_key_padding_mask=padding)
    entry = statistics["layers.1.self_attn"]
    assert torch.equal(entry.key_mask, ~padding[:, None].expand(BATCH, 2, KEYS))
    torch.testing.assert_close(entry.column_mass.sum(-1), torch.full((BATCH, 2), float(KEYS)))


def traces(model):
    """What a tap may leave on modules."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return [
        (sorted(vars(part)), [dict(getattr(part, name)) for name in hooks], part.forward)
        for part in model.modules()
    ]


class Broken(nn.Module):
    def forward(self, *args):
        raise RuntimeError("broken")


def test_nothing_is_left_behind(generator):
    model = nn.ModuleList([drawn(cls) for cls in LAYERS.values()])
    model.append(StructuredSelfAttention(WIDTH, 5, HEADS))
    before = traces(model)
    tokens = torch.randn(KEYS, BATCH, WIDTH, generator=generator)
    with attention_calls(model) as calls:
        assert traces(model) != before
        for layer in model[:2]:
            layer(tokens, tokens, tokens)
        model[2](tokens)
    assert traces(model) == before
    kept = {name: list(some) for name, some in calls.items()}
    assert [len(some) for some in kept.values()] == [1, 1, 1]
    for layer in model[:2]:
        layer(tokens, tokens, tokens)
    assert {name: list(some) for name, some in calls.items()} == kept
    with pytest.raises(KeyboardInterrupt), attention_calls(model):
        raise KeyboardInterrupt
    assert traces(model) == before
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("kind", LAYERS)
def test_calls_that_fail(kind, generator):
    """An error inside a call leaves nothing, and the next call is seen."""
    layer = drawn(LAYERS[kind])
    tokens = torch.randn(KEYS, BATCH, WIDTH, generator=generator)
    with attention_calls(layer) as calls:
        for _ in range(2):
            with pytest.raises((ValueError, AssertionError, RuntimeError)):
                layer(tokens, tokens[:-1], tokens)
        assert torch.overrides._get_current_function_mode_stack() == []
        layer(tokens, tokens, tokens)
    assert len(calls[""]) == 1


@pytest.mark.parametrize("kind", LAYERS)
def test_contexts_within_contexts(kind, generator):
    layer = drawn(LAYERS[kind])
    tokens = torch.randn(KEYS, BATCH, WIDTH, generator=generator)
    before = traces(layer)
    with attention_calls(layer) as outer:
        layer(tokens, tokens, tokens)
        with attention_calls(layer) as inner:
            expected = layer(tokens, tokens, tokens)
        assert torch.equal(layer(tokens, tokens, tokens)[0], expected[0])
    assert (len(outer[""]), len(inner[""])) == (3, 1)
    assert traces(layer) == before
    torch.testing.assert_close(inner[""][0].head_outputs, outer[""][1].head_outputs)


def test_layers_with_a_forward_of_their_own(generator):
    """What they hand to PyTorch's function counts, and hooks of others see what they return."""

    class Gated(nn.MultiheadAttention):
        def forward(self, tokens):
            output, _ = super().forward(tokens, tokens, tokens, need_weights=False)
            return output * tokens.sigmoid()

    layer = drawn(Gated)
    seen = []
    hook = layer.register_forward_hook(lambda *call: seen.append(call[-1]))
    tokens = torch.randn(KEYS, BATCH, WIDTH, generator=generator)
    with attention_calls(layer) as calls:
        found = layer(tokens)
    hook.remove()
    (call,) = calls[""]
    assert call.head_outputs.shape == (BATCH, HEADS, KEYS, WIDTH // HEADS)
    assert torch.equal(found, layer(tokens))
    assert torch.equal(found, seen[0])


def test_normalizations_of_ours(generator):
    layer = drawn(MultiheadAttention, normalization=DoublyNormalized(), batch_first=True)
    tokens = torch.randn(BATCH, KEYS, WIDTH, generator=generator)
    padding = torch.arange(KEYS) >= torch.tensor([[KEYS], [4]])
    with attention_calls(layer) as calls:
        _, weights = layer(
            tokens, tokens, tokens, key_padding_mask=padding, average_attn_weights=False
        )
    (call,) = calls[""]
    torch.testing.assert_close(call.weights(), weights)
    torch.testing.assert_close(attention(*call[:3], **call.settings), call.head_outputs)


class Own(nn.Module):
    """Heads that pool under queries of their own."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(HEADS, WIDTH))

    def forward(self, tokens, *, factor=1.0):
        return (self.queries @ tokens.mT * factor).softmax(-1) @ tokens


def observe_own(layer, args, kwargs, output):
    (tokens,) = args
    query = layer.queries[None, :, None].expand(len(tokens), -1, -1, -1)
    shared = tokens[:, None]
    settings = {"scale": kwargs.get("factor", 1.0)}
    return AttentionCall(query, shared, shared, output[:, :, None], settings)


def test_own_layers(generator, monkeypatch):
    monkeypatch.setattr(recognition, "_registered", {})
    slices = ProjectionSlices(HeadSlice("queries", 0, 0, 1, HEADS))
    register_attention_layer(Own, lambda layer: HeadLayout(query=slices), observe_own)
    model = nn.ModuleDict({"pool": Own()})
    tokens = torch.randn(BATCH, KEYS, WIDTH, generator=generator)
    seen = []
    with watch_attention(model, lambda name, call: seen.append((name, call))) as layers:
        pooled = model["pool"](tokens, factor=0.3)
    assert list(layers) == ["pool"]
    ((name, call),) = seen
    assert name == "pool"
    torch.testing.assert_close((call.weights() @ call.value)[:, :, 0], pooled)
    assert_particles_are_heads(model, lambda model: model["pool"](tokens), generator)
    register_attention_layer(Own, lambda layer: HeadLayout(query=slices))
    with attention_calls(model) as calls:
        model["pool"](tokens)
    assert calls == {"pool": []}


def test_hooks_that_change_outputs_come_after(generator):
    """What is recorded is what the layer itself gave, whatever others make of it."""
    layer = StructuredSelfAttention(7, 5, HEADS)
    tokens = torch.randn(BATCH, KEYS, 7, generator=generator)
    pooled, _ = layer(tokens)
    hook = layer.register_forward_hook(lambda _, args, output: (output[0] + 1, output[1]))
    with attention_calls(layer) as calls:
        changed, _ = layer(tokens)
    hook.remove()
    assert torch.equal(calls[""][0].head_outputs[:, :, 0], pooled)
    assert torch.equal(changed, pooled + 1)


def test_models_without_layers():
    with attention_calls(nn.Linear(2, 3)) as calls:
        pass
    assert calls == {}


@pytest.mark.compile
def test_compiled_models_run_as_written(generator):
    """Also where they were compiled before, and would not ask for hooks again."""
    layer = drawn(nn.MultiheadAttention)
    tokens = torch.randn(KEYS, BATCH, WIDTH, generator=generator)
    with undone_compilation():
        model = torch.compile(layer, backend="eager")
        expected = model(tokens, tokens, tokens)[0]
        with attention_calls(model) as calls:
            found = model(tokens, tokens, tokens)[0]
        assert len(calls["_orig_mod"]) == 1
        torch.testing.assert_close(found, expected)
        with torch.compiler.set_stance("fail_on_recompile"):
            model(tokens, tokens, tokens)
        assert len(calls["_orig_mod"]) == 1


def test_heads_that_share_keys_get_each_their_own(generator):
    """Four heads on two of keys: the first two share the first. Mutant: heads dealt in turn."""
    query, key = (torch.randn(2, heads, 5, 3, generator=generator) for heads in (4, 2))
    call = AttentionCall(query, key, key, query, {"enable_gqa": True})
    found = call.key_of_each_head()
    for head in range(4):
        assert torch.equal(found[:, head], key[:, head // 2])
