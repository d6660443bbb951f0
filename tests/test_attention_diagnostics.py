"""Tests of bayesattn.attention_diagnostics."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesattn import attention_diagnostics
from bayesattn.attention_diagnostics import attention_statistics, layer_statistics
from bayesattn.encoder import TransformerEncoder, TransformerEncoderLayer
from bayesattn.functional import attention_weights
from bayesattn.logits import GaussianLogits
from bayesattn.multihead import MultiheadAttention
from bayesattn.normalizations import (
    CausalDoublyNormalized,
    DoublyNormalized,
    HybridNormalized,
    Sinkhorn,
)

CHOICES = [None, DoublyNormalized(), HybridNormalized(3).double(), Sinkhorn(2)]


@given(
    seed=st.integers(0, 2**16),
    choice=st.sampled_from(CHOICES),
    num_queries=st.integers(2, 5),
    num_keys=st.integers(1, 5),
    kind=st.sampled_from(["none", "padding", "pairs", "bias"]),
    entries=st.sampled_from([1, 2**20]),
)
def test_equals_what_the_weights_say(seed, choice, num_queries, num_keys, kind, entries):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 3, num_queries, 4, generator=generator)
    key = torch.randn(2, 3, num_keys, 4, generator=generator)
    masks = {
        "none": {},
        "padding": {
            "query_mask": torch.rand(2, num_queries, generator=generator) > 0.4,
            "key_mask": torch.rand(2, num_keys, generator=generator) > 0.4,
        },
        "pairs": {"attn_mask": torch.ones(num_queries, num_keys, dtype=torch.bool).triu()},
        "bias": {"attn_mask": torch.randn(2, 1, 1, num_keys, generator=generator)},
    }[kind]
    logits = GaussianLogits(3, 4).double()
    logits.key_exponent.data.fill_(0.3)
    settings = {"normalization": choice, "logits": logits, **masks}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_diagnostics, "_BLOCK_ENTRIES", entries)
        found = attention_statistics(query, key, **settings)
    weights = attention_weights(query, key, **settings)
    torch.testing.assert_close(found.column_mass, weights.sum(-2))
    torch.testing.assert_close(found.entropy, torch.special.entr(weights).sum(-1))
    seen = torch.ones(2, 3, num_queries, num_keys, dtype=torch.bool)
    if kind == "padding":
        seen &= masks["query_mask"][:, None, :, None] & masks["key_mask"][:, None, None]
    if kind == "pairs":
        seen &= masks["attn_mask"]
    assert torch.equal(found.query_mask, seen.any(-1))
    assert torch.equal(found.key_mask, seen.any(-2))


def test_rates_and_effective_numbers():
    """Of one query that sees two of three keys alike, and one that sees a single key."""
    query = torch.tensor([[1.0, 0.0], [0.0, 50.0]])
    key = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-50.0, 50.0]])
    found = attention_statistics(query, key, scale=1.0)
    assert found.column_mass.shape == (1, 3)
    torch.testing.assert_close(found.column_mass[0], torch.tensor([0.5, 0.5, 1.0]))
    torch.testing.assert_close(found.effective_attended_keys(), torch.tensor([1.5]))
    expected = math.exp(-2 * 0.25 * math.log(0.25) - 0.5 * math.log(0.5))
    torch.testing.assert_close(found.effective_keys(), torch.tensor([expected]))
    assert found.explained_away_rate(0.6).item() == pytest.approx(2 / 3)
    assert found.explained_away_rate(0.4).item() == 0.0
    mask = torch.tensor([True, False, True])
    masked = attention_statistics(query, key, scale=1.0, key_mask=mask)
    assert masked.explained_away_rate(1.1).item() == 1.0
    torch.testing.assert_close(masked.effective_attended_keys(), torch.tensor([1.0]))


def test_memory_is_linear(generator):
    """No tensor of queries times keys is made."""
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes() // result.itemsize)
            return result

    query, key = (torch.randn(1, 1200, 4, generator=generator) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(attention_diagnostics, "_BLOCK_ENTRIES", 2**16)
        attention_statistics(query, key, normalization=DoublyNormalized())
    assert 0 < largest <= 2**16


def test_layers_of_an_encoder(generator):
    """Each layer's own statistics, padding left out, and no hook left behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = TransformerEncoderLayer(
            12, 3, 24, batch_first=True, normalization=DoublyNormalized()
        )
        model = TransformerEncoder(layer, 2).double().eval()
    tokens = torch.randn(2, 5, 12, generator=generator)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    with layer_statistics(model) as statistics:
        model(tokens, src_key_padding_mask=padding)
    assert list(statistics) == ["layers.0.self_attn", "layers.1.self_attn"]
    for entry in statistics.values():
        assert entry.column_mass.shape == (2, 3, 5)
        assert torch.equal(entry.key_mask, ~padding[:, None].expand(2, 3, 5))
        torch.testing.assert_close(entry.column_mass.sum(-1), torch.tensor([[5.0] * 3, [3.0] * 3]))
        assert (entry.explained_away_rate(1 / 5 - 1e-9) == 0).all()
    kept = dict(statistics)
    model(tokens)
    assert statistics == kept
    none = pytest.raises(ValueError, match=r"layers of bayesattn.MultiheadAttention, found none")
    with none, layer_statistics(torch.nn.Identity()):
        pass


def test_dense_only_normalizations(generator):
    query, key = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(2))
    choice = CausalDoublyNormalized()
    found = attention_statistics(query, key, normalization=choice)
    weights = attention_weights(query, key, normalization=choice)
    torch.testing.assert_close(found.column_mass, weights.sum(-2))


def test_grouped_heads_and_shared_keys(generator):
    query = torch.randn(2, 6, 5, 4, generator=generator)
    key = torch.randn(2, 2, 7, 4, generator=generator)
    grouped = attention_statistics(query, key, enable_gqa=True)
    whole = attention_statistics(query, key.repeat_interleave(3, 1))
    torch.testing.assert_close(grouped.column_mass, whole.column_mass)
    shared = attention_statistics(query, key[:, :1])
    assert shared.column_mass.shape == (2, 6, 7)


def test_padded_queries_attend_to_nothing(generator):
    """Mutant: their exp(0) counted as one key each."""
    query, key = torch.randn(2, 2, 3, 5, 4, generator=generator)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    found = attention_statistics(query, key, query_mask=mask)
    entropy = torch.special.entr(attention_weights(query, key)).sum(-1)
    expected = torch.stack([entropy[0, :, :3].exp().mean(-1), entropy[1].exp().mean(-1)])
    torch.testing.assert_close(found.effective_attended_keys(), expected)


def test_rates_of_what_is_no_number_are_none(generator):
    query, key = torch.randn(2, 2, 3, 5, 4, generator=generator)
    query[0, 0, 0, 0] = torch.nan
    rate = attention_statistics(query, key).explained_away_rate(0.1)
    assert rate.isnan().tolist() == [[True, False, False], [False, False, False]]
    for threshold in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="threshold: expected a positive number"):
            attention_statistics(query, key).explained_away_rate(threshold)


@pytest.mark.parametrize("choice", [None, DoublyNormalized()])
def test_a_mask_may_add_axes(choice, generator):
    query, key = torch.randn(2, 2, 5, 4, generator=generator)
    mask = torch.rand(3, 1, 1, 5, generator=generator) > 0.3
    mask[..., 0] = True
    settings = {"attn_mask": mask, "normalization": choice}
    weights = attention_weights(query, key, **settings)
    found = attention_statistics(query, key, **settings)
    torch.testing.assert_close(found.column_mass, weights.sum(-2).expand(3, 2, 5))


def test_layers_that_are_not_called_warn():
    with torch.random.fork_rng(devices=[]):
        layer = MultiheadAttention(6, 3)
    with (
        pytest.warns(UserWarning, match="no attention layer of the model was called"),
        layer_statistics(layer),
    ):
        pass
