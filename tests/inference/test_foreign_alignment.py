"""Tests of Alignment on Hugging Face's models, built small and at random."""

import pytest
import torch

from bayesattn.divergences import MMD, Adversarial, ConditionalTransport, energy_distance
from bayesattn.inference import Alignment
from bayesattn.kernels import RBF
from bayesattn.networks import attention_calls
from tests.networks.test_huggingface import BATCH, LAYERS, MODELS, build, inputs

# Importing transformers takes some seconds.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("seeded_layers")]
LENGTHS = (7, 4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MODELS)
def test_clouds_are_those_of_words(kind, implementation, generator):
    """In all of them padding takes no part. Mutants: padded queries, keys of too few heads."""
    model, names = build(kind, implementation)
    given = inputs(kind, generator)
    lengths = (5, 5) if kind == "vit" else LENGTHS
    alignment = Alignment(model, energy_distance, 0.5)
    with torch.no_grad(), alignment.observe(), attention_calls(model) as calls:
        model(**given)
    total = alignment.loss()
    places = 1 if kind != "albert" else LAYERS
    expected = 0.0
    for name in dict.fromkeys(names):
        assert len(calls[name]) == places
        for call in calls[name]:
            repeats = call.query.shape[1] // call.key.shape[1]
            key = call.key.repeat_interleave(repeats, 1)
            for i, length in enumerate(lengths):
                apart = energy_distance(call.query[i, :, :length], key[i, :, :length])
                expected = expected + apart.sum() / BATCH
    torch.testing.assert_close(total, 0.5 * expected)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "albert"])
def test_words_at_padding_never_matter(kind, generator):
    model, _ = build(kind, "sdpa")
    given = inputs(kind, generator)
    gradients = []
    for shift in (0, 1):
        words = given["input_ids"]
        words = torch.where(given["attention_mask"].bool(), words, words % 7 + shift)
        alignment = Alignment(model, MMD(RBF(1.0)), 1.0)
        model.zero_grad()
        with alignment.observe():
            model(words, attention_mask=given["attention_mask"])
        alignment.loss().backward()
        # Of words that stand at padding only, an embedding's gradient may be zero or none.
        gradients.append({n: p.grad for n, p in model.named_parameters() if "embed" not in n})
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(
    "divergence", [ConditionalTransport(), Adversarial], ids=["fixed", "learned"]
)
def test_gradient_checkpointing_changes_nothing(kind, divergence, generator):
    model, _ = build(kind, "sdpa")
    given = inputs(kind, generator)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0

    def gradients():
        alignment = Alignment(model, divergence, 1.0)
        model.zero_grad()
        with alignment.observe():
            output = model(**given).last_hidden_state
        (output.square().sum() + alignment.loss()).backward()
        parameters = [*model.parameters(), *alignment.parameters()]
        return [p.grad.clone() for p in parameters if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    torch.testing.assert_close(gradients(), plain)


def test_queries_of_a_decoder_meet_an_encoder_s_words(generator):
    """Nothing tells which queries are padding there, and what no query sees is no key."""
    model, _ = build("bert", "sdpa", is_decoder=True, add_cross_attention=True)
    states = torch.randn(BATCH, 5, 15, generator=generator)
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    alignment = Alignment(model, energy_distance, 1.0)
    with torch.no_grad(), alignment.observe(), attention_calls(model) as calls:
        model(
            **inputs("bert", generator),
            encoder_hidden_states=states,
            encoder_attention_mask=mask.long(),
        )
    alignment.loss()
    name = "encoder.layer.0.crossattention"
    (call,) = calls[name]
    values = [energy_distance(call.query[i], call.key[i][:, mask[i]]) for i in range(BATCH)]
    torch.testing.assert_close(alignment.head_divergences[name], sum(values) / BATCH)
    assert not call.is_self_attention
    assert calls["encoder.layer.0.attention"][0].is_self_attention


def test_albert_s_layer_has_an_adversary_for_each_place(generator):
    """The published code has one for all twelve. Mutant: places are not told apart."""
    model, (name, *_) = build("albert", "sdpa")
    alignment = Alignment(model, Adversarial, 1.0, places=LAYERS)
    with alignment.observe():
        model(**inputs("albert", generator))
    alignment.loss().backward()
    assert list(alignment.head_divergences) == [name, f"{name}[1]"]
    assert len(alignment.adversaries) == LAYERS
    assert all(value.grad.abs().max() > 0 for value in alignment.parameters())
