"""Tests of bayesattn.attention_changes."""

import math

import pytest
import torch
from torch import nn

import bayesattn as ba
from bayesattn import attention_changes
from bayesattn.logits import GaussianLogits
from bayesattn.networks import AttentionCall, attention_calls
from bayesattn.normalizations import HybridNormalized

pytestmark = pytest.mark.usefixtures("seeded_layers")

EMBED, HEADS, TOKENS, SENTENCES = 12, 3, 7, 5
WIDTH = EMBED // HEADS


def call_of(generator, settings, *, is_self_attention=False, num_heads=HEADS, num_keys=TOKENS):
    query = torch.randn(SENTENCES, num_heads, TOKENS, WIDTH, generator=generator)
    key = torch.randn(SENTENCES, HEADS, num_keys, WIDTH, generator=generator)
    return AttentionCall(query, key, key, query, settings, is_self_attention)


def by_loops(before, after, query_mask):
    """Of each head, over the queries that count, from the definitions."""
    figures = []
    for head in range(before.shape[1]):
        variation, divergence, count = 0.0, 0.0, 0
        for row in range(before.shape[0]):
            for query in range(before.shape[2]):
                if query_mask[row, head, query]:
                    a, b = before[row, head, query].tolist(), after[row, head, query].tolist()
                    variation += sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 2
                    middle = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
                    for p in (a, b):
                        terms = zip(p, middle, strict=True)
                        divergence += sum(x * math.log(x / m) for x, m in terms if x > 0) / 2
                    count += 1
        figures.append((variation / count, divergence / count, count))
    return [torch.tensor(column) for column in zip(*figures, strict=True)]


KEY_MASK = torch.arange(TOKENS) < torch.tensor([TOKENS, 3, 5, 0, 6])[:, None]
SETTINGS = {
    "plain": {},
    "padding": {"key_mask": KEY_MASK},
    "padding of queries": {"query_mask": KEY_MASK},
    "one mask for all": {"key_mask": KEY_MASK[:1]},
    "pairs": {"attn_mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()},
    "pairs by sentence": {"attn_mask": KEY_MASK[:, None, None].expand(-1, 1, TOKENS, -1)},
    "bias": {
        "attn_mask": torch.linspace(-3, 3, TOKENS, dtype=torch.float64).expand(
            1, HEADS, TOKENS, TOKENS
        )
    },
    "causal": {"is_causal": True, "scale": 0.7},
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("entries", [2**22, 300, 1])
def test_is_that_of_loops(kind, entries, generator, monkeypatch):
    """Some sentences at a time; mutants: masks of other sentences, padding counted, other logs."""
    monkeypatch.setattr(attention_changes, "_ENTRIES", entries)
    is_self = kind == "padding"
    calls = [call_of(generator, SETTINGS[kind], is_self_attention=is_self) for _ in range(2)]
    query_mask = torch.ones(SENTENCES, HEADS, TOKENS, dtype=torch.bool)
    if "padding" in kind or "sentence" in kind:
        query_mask = KEY_MASK[:, None].expand_as(query_mask)
    if kind == "pairs by sentence":
        query_mask = KEY_MASK.any(-1)[:, None, None].expand_as(query_mask)
    expected = by_loops(*(call.weights() for call in calls), query_mask)
    found = ba.attention_change({"a": [calls[0]]}, {"a": [calls[1]]})["a"]
    for figure, value in zip(found, expected, strict=True):
        torch.testing.assert_close(figure, value)


def test_several_calls_count_as_one(generator):
    pairs = [[call_of(generator, {}) for _ in range(2)] for _ in range(3)]
    found = ba.attention_change(*({"a": [pair[i] for pair in pairs]} for i in range(2)))["a"]
    single = [ba.attention_change({"a": [one]}, {"a": [other]})["a"] for one, other in pairs]
    for place in range(2):
        torch.testing.assert_close(found[place], torch.stack([s[place] for s in single]).mean(0))
    assert found.num_queries.tolist() == [3 * SENTENCES * TOKENS] * HEADS


def test_bounds_are_reached():
    """Attention that goes to another key, and attention that stays."""
    query = torch.eye(2)[None, None]
    one, other = 1e3 * torch.eye(2)[None, None], 1e3 * torch.eye(2).flip(0)[None, None]
    calls = [AttentionCall(query.clone(), key, key, query, {}) for key in (one, other)]
    found = ba.attention_change({"": calls[:1]}, {"": calls[1:]})[""]
    torch.testing.assert_close(found.total_variation, torch.ones(1))
    torch.testing.assert_close(found.jensen_shannon, torch.tensor([math.log(2)]))
    same = ba.attention_change({"": calls}, {"": calls})[""]
    assert same.total_variation == same.jensen_shannon == 0


def test_shared_keys_and_half_precision(generator):
    calls = [call_of(generator, {"enable_gqa": True}, num_heads=6) for _ in range(2)]
    query_mask = torch.ones(SENTENCES, 6, TOKENS, dtype=torch.bool)
    found = ba.attention_change({"": calls[:1]}, {"": calls[1:]})[""]
    expected = by_loops(*(call.weights() for call in calls), query_mask)
    torch.testing.assert_close(found.total_variation, expected[0])
    calls = [call._replace(query=call.query.bfloat16(), key=call.key.bfloat16()) for call in calls]
    half = ba.attention_change({"": calls[:1]}, {"": calls[1:]})[""]
    assert half.total_variation.dtype == torch.float32
    expected = by_loops(*(call.weights().double() for call in calls), query_mask)
    torch.testing.assert_close(half.total_variation.double(), expected[0], rtol=1e-5, atol=0.0)


def test_sentences_without_tokens_do_not_count(generator):
    mask = torch.tensor([True, False, True, True, False])[:, None].expand(SENTENCES, TOKENS)
    calls = [call_of(generator, {"key_mask": mask}) for _ in range(2)]
    found = ba.attention_change({"": calls[:1]}, {"": calls[1:]})[""]
    kept = [
        c._replace(query=c.query[mask[:, 0]], key=c.key[mask[:, 0]], settings={}) for c in calls
    ]
    expected = ba.attention_change({"": kept[:1]}, {"": kept[1:]})[""]
    torch.testing.assert_close(found, expected)


def test_snapshots_of_a_model_over_a_training_step(generator):
    """Of every kind of learned part; mutants: anything that is not copied."""
    model = nn.ModuleDict(
        {
            "plain": nn.MultiheadAttention(EMBED, HEADS, batch_first=True),
            "learned": ba.MultiheadAttention(
                EMBED,
                HEADS,
                batch_first=True,
                logits=GaussianLogits(HEADS, WIDTH),
                normalization=HybridNormalized(HEADS),
            ),
            "pooling": ba.StructuredSelfAttention(EMBED, WIDTH, HEADS),
        }
    ).double()
    tokens = torch.randn(SENTENCES, TOKENS, EMBED, generator=generator)

    def run():
        model["plain"](tokens, tokens, tokens)
        model["learned"](tokens, tokens, tokens)
        model["pooling"](tokens)

    with ba.attention_snapshot(model) as before, attention_calls(model) as live:
        run()
    expected = {name: calls[0].weights().detach() for name, calls in live.items()}
    assert list(before) == ["plain", "learned", "pooling"]
    for calls in before.values():
        assert not calls[0].query.requires_grad
        assert calls[0].value.untyped_storage().nbytes() == 0
        assert calls[0].head_outputs.untyped_storage().nbytes() == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)
    for name, calls in before.items():
        torch.testing.assert_close(calls[0].weights(), expected[name])
    with ba.attention_snapshot(model) as after:
        run()
    change = ba.attention_change(before, after)
    assert list(change) == ["plain", "learned", "pooling"]
    for name, entry in change.items():
        weights = after[name][0].weights()
        expect = (weights - expected[name]).abs().sum(-1).mean((0, 2)) / 2
        torch.testing.assert_close(entry.total_variation, expect)
        assert not entry.total_variation.requires_grad


def calls_around_training(layer, run):
    with attention_calls(layer) as before:
        run()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1
    with attention_calls(layer) as after:
        run()
    return before, after


def test_calls_that_training_changed_are_refused(generator):
    """What they say of the time before is not so any more."""
    tokens = torch.randn(2, TOKENS, EMBED, generator=generator)
    pooling = ba.StructuredSelfAttention(EMBED, WIDTH, HEADS)
    learned = [
        ba.MultiheadAttention(EMBED, HEADS, batch_first=True, **choice).double()
        for choice in (
            {"logits": GaussianLogits(HEADS, WIDTH)},
            {"normalization": HybridNormalized(HEADS)},
        )
    ]
    runs = [(pooling, lambda: pooling(tokens))]
    runs += [(layer, lambda layer=layer: layer(tokens, tokens, tokens)) for layer in learned]
    for layer, run in runs:
        with pytest.raises(ValueError, match=r"share learned parts .* with attention_snapshot"):
            ba.attention_change(*calls_around_training(layer, run))
    plain = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    calls = calls_around_training(plain, lambda: plain(tokens, tokens, tokens))
    assert ba.attention_change(*calls)[""].total_variation.min() > 0


def test_graphs(generator):
    layer = ba.GraphAttention(EMBED, WIDTH, HEADS).double()
    nodes = torch.randn(6, EMBED, generator=generator)
    edges = torch.tensor([[0, 1, 2, 3, 0, 1, 1], [1, 1, 1, 2, 2, 3, 3]])
    with ba.attention_snapshot(layer) as before:
        layer(nodes, edges)
    expected = before[""][0].weights()
    with torch.no_grad():
        layer.query_weight *= -2
    with ba.attention_snapshot(layer) as after:
        layer(nodes, edges)
    found = ba.attention_change(before, after)[""]
    rows = (after[""][0].weights() - expected).abs().sum(-1)[0, :, 1:4] / 2
    torch.testing.assert_close(found.total_variation, rows.mean(-1))
    assert found.num_queries.tolist() == [3] * HEADS


def test_refuses(generator):
    one, other = call_of(generator, {}), call_of(generator, {})
    for before, after, message in (
        ({"a": [one]}, {"b": [other]}, r"same layers, got \['a'\] and \['b'\]"),
        ({"a": [one]}, {"a": [other] * 2}, "a: expected as many calls after as before, got 2 and"),
        ({"a": []}, {"a": []}, "expected a call of an attention layer, got none"),
        ({}, {}, "expected a call of an attention layer, got none"),
        (
            {"": [one]},
            {"": [call_of(generator, {}, num_keys=2)]},
            r"the layer: expected weights of one shape .* \(5, 3, 7, 7\) and \(5, 3, 7, 2\)",
        ),
        (
            {"a": [one]},
            {"a": [other._replace(settings={"key_mask": KEY_MASK})]},
            "a: expected the same padding",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ba.attention_change(before, after)
    assert list(ba.attention_change({"a": [one], "b": []}, {"a": [other], "b": []})) == ["a"]
