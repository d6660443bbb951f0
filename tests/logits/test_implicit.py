"""Implicit densities: laws of sequences, coupled heads, symmetric spectra, all divergences."""

import copy
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence
from torch.utils.checkpoint import checkpoint

from bayesattn.attention_changes import attention_change, attention_snapshot
from bayesattn.attention_diagnostics import layer_statistics
from bayesattn.decoding_cache import KeyValueCache
from bayesattn.encoder import TransformerEncoder, TransformerEncoderLayer
from bayesattn.functional import attention
from bayesattn.implicit_densities import (
    density_draws,
    density_terms,
    sampled_outputs,
    warm_up,
)
from bayesattn.logits import ImplicitSpectralLogits
from bayesattn.logits.latent_laws import LatentLaw
from bayesattn.multihead import MultiheadAttention
from bayesattn.networks import attention_calls

HEADS, DIM, BATCH, TOKENS = 4, 3, 2, 5
close = torch.testing.assert_close


def moved(amount=0.5, **settings):
    """As after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = ImplicitSpectralLogits(HEADS, DIM, 6, hidden_dim=4, **settings)
        with torch.no_grad():
            for parameter in logits.parameters():
                parameter += amount * torch.randn_like(parameter)
    return logits.eval()


@pytest.fixture
def clouds(generator):
    return [torch.randn(BATCH, HEADS, n, DIM, generator=generator) for n in (TOKENS, 7, 7)]


@pytest.fixture
def model(seeded_layers):
    """Two layers whose densities differ."""
    layer = TransformerEncoderLayer(
        HEADS * DIM, HEADS, 16, dropout=0.0, batch_first=True, logits=moved()
    )
    model = TransformerEncoder(layer, 2)
    with torch.no_grad():
        model.layers[1].self_attn.logits.law.output_bias += 0.3
    return model.eval()


@pytest.fixture
def tokens(generator):
    return torch.randn(BATCH, TOKENS, HEADS * DIM, generator=generator)


def test_draws_have_the_law(generator):
    """Mutants: a variance for a standard deviation, sums of rows of L, one draw for all heads."""
    law = LatentLaw(
        torch.randn(HEADS, 2, generator=generator),
        torch.rand(HEADS, 2, generator=generator) + 0.2,
        torch.ones(HEADS),
    )
    noise = torch.randn(HEADS, 100_000, 2, generator=generator)
    drawn = law.latents(law.correlated(noise))
    close(drawn.mean(1), law.mean, rtol=0, atol=0.02)
    close(drawn.std(1), law.scale, rtol=0.02, atol=0)
    correlations = drawn[..., 0].corrcoef()
    assert correlations[2, 3].item() == pytest.approx(0.866, abs=0.01)
    covariance = torch.stack([drawn[..., coordinate].cov() for coordinate in range(2)])
    exact = MultivariateNormal(law.mean.T, covariance)
    standard = MultivariateNormal(torch.zeros(2, HEADS), torch.eye(HEADS).expand(2, -1, -1))
    close(law.divergence(), kl_divergence(exact, standard).sum(), rtol=0.02, atol=0)


def test_heads_of_frequencies_correlate_as_their_latents(generator):
    """From the layer itself: .87 between the last two of four heads, and none if not coupled."""
    query = torch.randn(1, HEADS, 2, DIM, generator=generator)
    found = {}
    for couples in (True, False):
        with torch.random.fork_rng(devices=[]):
            logits = ImplicitSpectralLogits(HEADS, DIM, 20_000, couples_heads=couples)
        with torch.no_grad():
            logits.law.output_bias[:, -1] = 1.0
            logits.log_width += 1.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            frequencies = logits.train().given(query, query).kernel.frequencies.first[0]
        found[couples] = frequencies[..., 0].corrcoef()[2, 3].item()
    assert found[True] == pytest.approx(0.866, abs=0.02)
    assert abs(found[False]) < 0.03


def test_each_sequence_has_frequencies_of_its_own(clouds):
    """Mutants: one draw, or one law, for a batch; a mean over the batch."""
    logits = moved().train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kernel = logits.given(*clouds[:2]).kernel
    first = kernel.frequencies.first
    assert first.shape == (BATCH, HEADS, 6, DIM)
    assert (first[0] - first[1]).abs().min() > 0
    law = logits.law(*clouds[:2])
    alone = logits.law(*(part[1:] for part in clouds[:2]))
    close(law.mean[1:], alone.mean)
    assert (law.mean[0] - law.mean[1]).abs().max() > 1e-3
    shared = moved(pool="none").train()
    with torch.random.fork_rng(devices=[]):
        assert shared.given(*clouds[:2]).kernel.frequencies.first.shape == (HEADS, 6, DIM)


def test_the_generator_is_odd_and_the_kernel_sees_no_sign(clouds, generator):
    logits = moved()
    latents = torch.randn(BATCH, HEADS, 6, DIM, generator=generator)
    generated = logits._generated(latents)
    close(logits._generated(-latents), -generated)
    assert (generated / latents).std() > 1e-3
    kernel = logits.given(*clouds[:2]).kernel
    flipped = type(kernel)(
        kernel.frequencies._replace(first=-kernel.frequencies.first),
        kernel.anchor._replace(first=-kernel.anchor.first),
        kernel.square,
        kernel.floor,
    )
    close(flipped.log_kernel(*clouds[:2]), kernel.log_kernel(*clouds[:2]))


def test_training_draws_and_evaluation_does_not(clouds):
    logits = moved()
    first, second = (attention(*clouds, logits=logits) for _ in range(2))
    close(first, second, rtol=0, atol=0)
    for context in (logits.train(), None):
        with torch.random.fork_rng(devices=[]):
            if context is None:
                logits.eval()
                with density_draws(logits):
                    first, second = (attention(*clouds, logits=logits) for _ in range(2))
            else:
                first, second = (attention(*clouds, logits=logits) for _ in range(2))
        assert (first - second).abs().max() > 1e-4
    assert not logits.draws_in_evaluation


def test_queries_and_keys_of_a_call_have_one_draw(clouds, generator):
    """A sequence with itself: the kernel is one on the diagonal, which two draws would not give."""
    logits = moved(square="plain", magnitude=False).train()
    query = clouds[0]
    with torch.random.fork_rng(devices=[]):
        values = logits(query, query).diagonal(dim1=-2, dim2=-1)
    close(values, torch.full_like(values, math.log(1 + 1e-5)))


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_gradients_through_a_draw(pool, generator):
    query, key = (
        torch.randn(HEADS, 2, DIM, generator=generator).requires_grad_() for _ in range(2)
    )
    logits = moved(0.3, pool=pool)
    terms = []
    logits.listeners.append(
        type("Ear", (), {"hear": lambda _, layer, divergence: terms.append(divergence)})()
    )

    def loss(query, key, weight, bias):
        values = {"law.input_weight": weight, "law.output_bias": bias}
        weights = torch.func.functional_call(logits, values, (query, key)).softmax(-1)
        return weights, terms[-1]

    inputs = (query, key, logits.law.input_weight, logits.law.output_bias)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_divergences_of_all_layers_are_collected(model, tokens):
    """Mutants: the last layer alone, the sum over the batch, one frequency."""
    expected = 0.0
    with attention_calls(model) as calls, density_terms(model) as terms:
        model(tokens)
    for name, layer in zip(calls, model.layers, strict=True):
        law = layer.self_attn.logits.law(*calls[name][0][:2])
        for sequence in range(BATCH):
            scale = torch.diag_embed(law.scale[sequence].mT)
            factor = torch.eye(HEADS) + torch.outer(
                law.coupling[sequence], law.coupling[sequence]
            ).tril(-1)
            covariance = factor @ factor.T
            root = covariance.diagonal().rsqrt().diag()
            full = scale @ (root @ covariance @ root) @ scale
            exact = MultivariateNormal(law.mean[sequence].mT, full)
            standard = MultivariateNormal(torch.zeros(DIM, HEADS), torch.eye(HEADS))
            expected = expected + 6 * kl_divergence(exact, standard).sum() / BATCH
    close(terms.total(), expected)
    terms.total().backward()
    for layer in model.layers:
        assert layer.self_attn.logits.law.output_bias.grad.abs().max() > 0
        assert not layer.self_attn.logits.listeners


def test_latents_that_all_sequences_share_count_once(clouds):
    logits = moved(pool="none")
    with density_terms(logits) as terms:
        logits(*clouds[:2])
    whole = 6 * logits.law(*clouds[:2]).divergence()
    close(terms.total(num_sequences=1), whole)
    close(terms.total(num_sequences=10), whole / 10)
    with pytest.raises(ValueError, match="num_sequences: expected the number of sequences"):
        terms.total()


def test_draws_at_test_time(model, tokens):
    with torch.no_grad():
        outputs = sampled_outputs(model, lambda: model(tokens), num_draws=3, seed=1)
        again = sampled_outputs(model, lambda: model(tokens), num_draws=3, seed=1)
    assert outputs.shape == (3, *tokens.shape)
    close(outputs, again, rtol=0, atol=0)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4


def test_warm_up_rises_to_one():
    assert [warm_up(step, 4) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    with pytest.raises(ValueError, match="num_steps must be a whole number, at least 1, got 0"):
        warm_up(1, 0)


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_a_cache_is_refused_where_logits_pool_over_tokens(pool, tokens, seeded_layers):
    layer = MultiheadAttention(HEADS * DIM, HEADS, batch_first=True, logits=moved(pool=pool))
    with pytest.raises(ValueError, match="cache: expected a normalization over keys alone, logits"):
        layer(tokens, tokens, tokens, cache=KeyValueCache())


def test_a_law_of_the_first_token_reads_the_first_that_is_no_padding(clouds):
    logits = moved(pool="first")
    query, key = clouds[:2]
    mask = torch.tensor([[False, True, True, True, True], [True] * TOKENS])[:, None]
    expected = logits.law(query[:1, :, 1:], key[:1])
    close(logits.law(query, key, mask).mean[0], expected.mean[0])


@pytest.mark.parametrize("name", ["query_mask", "key_mask", "attn_mask"])
def test_a_mask_that_hides_nothing_changes_nothing(name, clouds):
    """Mutants: a mean over the rows of a mask that stands for all of them."""
    masks = {
        "query_mask": torch.ones(BATCH, TOKENS, dtype=torch.bool),
        "key_mask": torch.ones(BATCH, 7, dtype=torch.bool),
        "attn_mask": torch.zeros(1, 7),
    }
    for pool in ("mean", "first"):
        logits = moved(pool=pool)
        expected = attention(*clouds, logits=logits)
        close(attention(*clouds, logits=logits, **{name: masks[name]}), expected)


def test_what_a_finite_mask_hides_is_not_pooled(clouds):
    """Minus 1e9 hides as minus infinity does."""
    query, key, value = clouds
    hidden = torch.arange(7) >= 4
    mask = torch.where(hidden, -1e9, 0.0)[None]
    logits = moved()
    expected = attention(query, key, value, logits=logits, attn_mask=mask)
    other = torch.where(hidden[:, None], 5.0, key)
    close(attention(query, other, value, logits=logits, attn_mask=mask), expected)


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_left_padding_of_a_layer_is_not_pooled(pool, tokens, seeded_layers):
    layer = MultiheadAttention(HEADS * DIM, HEADS, batch_first=True, logits=moved(pool=pool))
    padding = torch.arange(TOKENS) < torch.tensor([[2], [0]])
    other = torch.where(padding[..., None], 3.0, tokens)
    first, second = (
        layer.eval()(part, part, part, key_padding_mask=padding)[0] for part in (tokens, other)
    )
    close(second[~padding], first[~padding])


def test_diagnostics_see_the_draw_of_the_call_and_count_nothing_twice(model, tokens):
    """Mutant: a draw of their own."""
    model.train()
    with torch.random.fork_rng(devices=[]), density_terms(model) as terms:
        with layer_statistics(model) as statistics, attention_calls(model) as calls:
            model(tokens)
        with attention_snapshot(model) as before:
            model(tokens)
    assert len(terms.local) == 4
    for name, (call,) in calls.items():
        close(call.weights() @ call.value, call.head_outputs)
        close(statistics[name].column_mass, call.weights().sum(-2))
    for change in attention_change(before, before).values():
        assert change.total_variation.max() == 0


def test_copies_have_no_listeners(model, tokens):
    """Made within a context, after a call, whose graph cannot be copied."""
    with density_terms(model) as terms:
        model(tokens)
        copied = copy.deepcopy(model)
        copied(tokens)
    assert len(terms.local) == 2


def test_checkpointed_activations_have_the_same_divergence(model, tokens):
    """Backward may come after the context has ended."""
    layer = model.layers[0].train()
    slopes = []
    for checkpointed in (False, True):
        model.zero_grad()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            with density_terms(layer) as terms:
                output = (
                    checkpoint(layer, tokens, use_reentrant=False)
                    if checkpointed
                    else layer(tokens)
                )
            (output.square().sum() + terms.total()).backward()
        slopes.append(layer.self_attn.logits.law.output_bias.grad.clone())
    close(*slopes)


def test_an_error_within_a_context_leaves_nothing(model):
    logits = model.layers[0].self_attn.logits
    for context in (density_terms, density_draws):
        with pytest.raises(KeyError), context(model):
            raise KeyError
    assert not logits.listeners
    assert not logits.draws_in_evaluation


def test_sequences_without_a_token(clouds):
    query, key, value = clouds
    for pool in ("mean", "first"):
        logits = moved(pool=pool)
        with density_terms(logits) as terms:
            assert (
                attention(query, key[..., :0, :], value[..., :0, :], logits=logits).abs().max() == 0
            )
            assert attention(query[..., :0, :], key, value, logits=logits).shape[-2] == 0
        assert terms.total().isfinite()


@pytest.mark.usefixtures("unchecked_types")
def test_refusals(clouds, seeded_layers):
    plain = MultiheadAttention(HEADS * DIM, HEADS)
    for ask in (density_terms, density_draws):
        with (
            pytest.raises(ValueError, match="expected a layer with logits=ImplicitSpectral"),
            ask(plain),
        ):
            pass
    logits = moved()
    with density_terms(logits) as terms:
        pass
    with pytest.raises(ValueError, match="density_terms: expected a call of the model, got none"):
        terms.total()
    with pytest.raises(ValueError, match="num_draws must be a whole number"):
        sampled_outputs(logits, lambda: torch.zeros(()), num_draws=0)
    with pytest.raises(ValueError, match="pool must be one of 'mean', 'first', 'none', got 'last'"):
        ImplicitSpectralLogits(2, 3, pool="last")
    with pytest.raises(ValueError, match="hidden_dim must be a whole number"):
        ImplicitSpectralLogits(2, 3, hidden_dim=0)
