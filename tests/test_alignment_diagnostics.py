"""How far queries and keys are apart, beside what became of attention, under changes of gauge."""

import pytest
import torch
from torch import nn

import bayesattn as ba
from bayesattn import alignment_diagnostics
from bayesattn.alignment_diagnostics import AlignmentStatistics
from bayesattn.divergences import MMD, Energy, permutation_test
from bayesattn.networks import AttentionCall, attention_calls
from tests.heads import Classifier

pytestmark = pytest.mark.usefixtures("seeded_layers")

EMBED, HEADS, TOKENS, SENTENCES = 12, 3, 7, 5
WIDTH = EMBED // HEADS


@pytest.fixture
def padding():
    return torch.arange(TOKENS) >= torch.tensor([TOKENS, 3, 5, 1, 6])[:, None]


def projected(layer, tokens):
    """Queries and keys by PyTorch's own weights, "sentence head token dim"."""
    weights, biases = layer.in_proj_weight.detach(), layer.in_proj_bias.detach()
    parts = (tokens @ weights.mT + biases).chunk(3, -1)
    return [part.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in parts[:2]]


def test_figures_are_means_over_sentences_without_padding(generator, padding):
    """Sentence by sentence, from the layer's weights; mutants: padding counted, in any figure."""
    layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    nn.init.normal_(layer.in_proj_bias)
    tokens = torch.randn(SENTENCES, TOKENS, EMBED, generator=generator)
    tokens = torch.where(padding[..., None], 50.0, tokens)
    with ba.alignment_statistics(layer) as statistics:
        layer(tokens, tokens, tokens, key_padding_mask=padding)
    found = statistics[""]
    assert isinstance(found, AlignmentStatistics)
    query, key = projected(layer, tokens)
    mmd, energy, entropies = [], [], []
    for row, is_padding in enumerate(padding):
        clouds = query[row][:, ~is_padding], key[row][:, ~is_padding]
        mmd.append(MMD()(*clouds))
        energy.append(Energy()(*clouds))
        weights = (clouds[0] @ clouds[1].mT / WIDTH**0.5).softmax(-1)
        entropies.append(torch.special.entr(weights).sum(-1))
    torch.testing.assert_close(found.squared_mmd, torch.stack(mmd).mean(0))
    torch.testing.assert_close(found.energy_distance, torch.stack(energy).mean(0))
    torch.testing.assert_close(found.entropy, torch.cat(entropies, 1).mean(1))
    assert found.num_sentences.tolist() == [SENTENCES] * HEADS


def test_the_test_is_that_of_the_mean_over_sentences(generator):
    layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    with torch.no_grad():
        # The second head's keys are its queries, the third's are far from them.
        query, key, _ = layer.in_proj_weight.view(3, HEADS, WIDTH, EMBED)
        key[1] = query[1]
        layer.in_proj_bias.view(3, HEADS, WIDTH)[1, 2] = 3.0
    tokens = torch.randn(SENTENCES, TOKENS, EMBED, generator=generator)
    with ba.alignment_statistics(layer, num_permutations=400) as statistics:
        layer(tokens, tokens, tokens)
    found = statistics[""]
    expected = permutation_test(*projected(layer, tokens), num_permutations=4000).mean(0)
    torch.testing.assert_close(found.chance, expected.null.mean(0), rtol=0.1, atol=0.0)
    torch.testing.assert_close(found.p_value, expected.p_value, rtol=0.0, atol=0.1)
    assert found.p_value[1] == 1
    assert found.p_value[2] == 1 / 401
    assert found.squared_mmd[2] > 3 * found.chance[2]


def matched(layer, tokens):
    """The layer with other queries and keys of like mean and covariance, and the same attention."""
    moved = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    moved.load_state_dict(layer.state_dict())
    weights = moved.in_proj_weight.data.view(3, HEADS, WIDTH, EMBED)
    biases = moved.in_proj_bias.data.view(3, HEADS, WIDTH)
    for head in range(HEADS):
        query, key = (part[:, head].flatten(0, 1) for part in projected(layer, tokens))
        root = power(key.T.cov(), 0.5)
        middle = power(root @ query.T.cov() @ root, 0.5)
        squared = torch.linalg.inv(root) @ middle @ torch.linalg.inv(root)
        shift = torch.linalg.solve(squared, query.mean(0)) - key.mean(0)
        # A^T A = squared takes the keys' covariance to the queries'.
        turn = power(squared, 0.5)
        biases[1, head] += shift
        for place, matrix in enumerate((torch.linalg.inv(turn).T, turn)):
            weights[place, head] = matrix @ weights[place, head]
            biases[place, head] = matrix @ biases[place, head]
    return moved


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def test_under_a_change_of_gauge_distances_fall_and_attention_stays(generator):
    layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    nn.init.normal_(layer.in_proj_weight)
    nn.init.normal_(layer.in_proj_bias, std=3.0)
    tokens = torch.randn(3, 50, EMBED, generator=generator)
    padding = torch.arange(50) >= torch.tensor([50, 40, 45])[:, None]
    moved = matched(layer, tokens)
    statistics, calls = [], []
    for one in (layer, moved):
        with ba.alignment_statistics(one) as found, ba.attention_snapshot(one) as call:
            one(tokens, tokens, tokens, key_padding_mask=padding)
        statistics.append(found[""])
        calls.append(call)
    before, after = statistics
    assert (after.energy_distance < 0.2 * before.energy_distance).all()
    assert (after.squared_mmd < 0.3 * before.squared_mmd).all()
    assert (before.p_value < 0.05).all()
    assert (after.p_value > 0.05).all()
    change = ba.attention_change(*calls)[""]
    assert change.total_variation.max() < 1e-12
    assert change.jensen_shannon.max() < 1e-12
    torch.testing.assert_close(after.entropy, before.entropy)
    # A change of another kind, such as of the keys alone, is seen.
    with torch.no_grad():
        layer.in_proj_weight[EMBED : 2 * EMBED] *= 1.5
    with ba.attention_snapshot(layer) as other:
        layer(tokens, tokens, tokens, key_padding_mask=padding)
    assert ba.attention_change(calls[0], other)[""].total_variation.min() > 0.01


def test_layers_of_a_model_and_its_last_call(generator):
    model = Classifier(EMBED, HEADS)
    first, last = torch.randn(2, SENTENCES, TOKENS, EMBED, generator=generator)
    with ba.alignment_statistics(model) as statistics:
        model(first)
        model(last)
    assert list(statistics) == ["layers.0", "layers.1"]
    kept = dict(statistics)
    with ba.alignment_statistics(model) as statistics:
        model(last)
    for name, entry in statistics.items():
        torch.testing.assert_close(entry, kept[name])
        assert not entry.squared_mmd.requires_grad
    found = dict(statistics)
    model(first)
    assert all(statistics[name] is entry for name, entry in found.items())


def test_seeds(generator):
    layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    tokens = torch.randn(2, TOKENS, EMBED, generator=generator)

    def chance(seed):
        with ba.alignment_statistics(layer, num_permutations=9, seed=seed) as statistics:
            layer(tokens, tokens, tokens)
        return statistics[""].chance

    assert torch.equal(chance(3), chance(3))
    assert not torch.equal(chance(3), chance(4))
    assert not torch.equal(chance(generator), chance(generator))


def test_pieces_make_the_whole(generator, monkeypatch):
    """Memory is that of some Gram matrices at a time; figures but the draws are the same."""
    layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    tokens = torch.randn(SENTENCES, TOKENS, EMBED, generator=generator)
    found, sizes = [], []

    def watched(query, *args, **kwargs):
        sizes.append(len(query) * (2 * TOKENS) ** 2)
        return permutation_test(query, *args, **kwargs)

    monkeypatch.setattr(alignment_diagnostics, "permutation_test", watched)
    for entries in (2**22, 1000, 1):
        monkeypatch.setattr(alignment_diagnostics, "_ENTRIES", entries)
        with ba.alignment_statistics(layer, num_permutations=2000) as statistics:
            layer(tokens, tokens, tokens)
        found.append(statistics[""])
    assert sizes == [15 * 196] + [5 * 196] * 3 + [196] * 15
    for other in found[1:]:
        torch.testing.assert_close(other.squared_mmd, found[0].squared_mmd)
        torch.testing.assert_close(other.energy_distance, found[0].energy_distance)
        torch.testing.assert_close(other.chance, found[0].chance, rtol=0.05, atol=0.0)
        torch.testing.assert_close(other.p_value, found[0].p_value, rtol=0.0, atol=0.05)


def test_heads_that_share_keys_meet_them_all(generator):
    query = torch.randn(2, 6, TOKENS, WIDTH, generator=generator)
    key = torch.randn(2, 2, TOKENS, WIDTH, generator=generator)
    whole = key.repeat_interleave(3, 1)
    few = AttentionCall(query, key, key, query, {"enable_gqa": True})
    many = AttentionCall(query, whole, whole, query, {})
    found = [
        alignment_diagnostics._statistics(call, 20, torch.Generator().manual_seed(0))
        for call in (few, many)
    ]
    torch.testing.assert_close(found[0], found[1])


def test_sentences_without_tokens_do_not_count(generator):
    query, key = torch.randn(2, 3, HEADS, TOKENS, WIDTH, generator=generator)
    mask = torch.tensor([True, False, True])[:, None].expand(3, TOKENS)
    call = AttentionCall(query, key, key, query, {"key_mask": mask}, is_self_attention=True)
    found = alignment_diagnostics._statistics(call, 20, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.squared_mmd, MMD()(query[::2], key[::2]).mean(0))
    assert found.num_sentences.tolist() == [2] * HEADS
    # Nor one in which a query sees a key, but none of those that are seen.
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    later[:-1] = False
    later[:, -1] = False
    call = call._replace(settings={"attn_mask": later})
    found = alignment_diagnostics._statistics(call, 20, torch.Generator().manual_seed(0))
    assert found.num_sentences.tolist() == [0] * HEADS
    assert all(figure.isnan().all() for figure in found[:-1])


def test_pooling_and_half_precision(generator):
    """One query of each head against keys that all share; figures are in float32."""
    pooling = ba.StructuredSelfAttention(EMBED, WIDTH, HEADS)
    tokens = torch.randn(SENTENCES, TOKENS, EMBED, generator=generator)
    mask = torch.arange(TOKENS) < torch.tensor([TOKENS, 3, 5, 1, 6])[:, None]
    with ba.alignment_statistics(pooling) as statistics:
        pooling(tokens, mask)
    keys, queries = pooling.keys(tokens), pooling.query_weight.detach()
    expected = [
        MMD()(queries[:, None], row[kept].expand(HEADS, -1, -1))
        for row, kept in zip(keys, mask, strict=True)
    ]
    torch.testing.assert_close(statistics[""].squared_mmd, torch.stack(expected).mean(0))
    layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.bfloat16)
    half = tokens.bfloat16()
    with ba.alignment_statistics(layer) as statistics, ba.attention_snapshot(layer) as calls:
        layer(half, half, half)
    found = statistics[""]
    (call,) = calls[""]
    torch.testing.assert_close(found.squared_mmd, MMD()(call.query, call.key).mean(0))
    assert found.squared_mmd.dtype == found.p_value.dtype == found.entropy.dtype == torch.float32


def test_models_without_attention_are_refused_and_idle_contexts_warned_of():
    with (
        pytest.raises(ValueError, match="expected attention layers"),
        ba.alignment_statistics(nn.Linear(2, 2)),
    ):
        pass
    with (
        pytest.warns(UserWarning, match="alignment_statistics: no attention layer"),
        ba.alignment_statistics(Classifier(EMBED, HEADS)),
    ):
        pass


@pytest.mark.slow
def test_a_model_of_hugging_face(generator):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=31,
        hidden_size=EMBED,
        num_attention_heads=HEADS,
        num_hidden_layers=2,
        intermediate_size=11,
        max_position_embeddings=TOKENS,
    )
    model = transformers.BertModel(config).double().eval()
    words = torch.randint(31, (2, TOKENS), generator=generator)
    mask = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [4]])).long()
    with (
        torch.no_grad(),
        ba.alignment_statistics(model) as statistics,
        attention_calls(model) as calls,
    ):
        model(words, attention_mask=mask)
    name = "encoder.layer.1.attention"
    (call,) = calls[name]
    live = mask.bool()[:, None].expand(2, HEADS, TOKENS)
    expected = MMD()(call.query, call.key, live, live).mean(0)
    torch.testing.assert_close(statistics[name].squared_mmd, expected)
