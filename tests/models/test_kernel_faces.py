"""One kernel, three faces: the layer's logits, the Pyro program, and draws of a routine."""

import math

import pytest
import torch
from pyro import poutine

from bayesattn.functional import attention_weights
from bayesattn.inference import SVI
from bayesattn.logits import ImplicitSpectralLogits, SpectralLogits
from bayesattn.logits.head_coupling import correlation_tril
from bayesattn.logits.spectral_kernel import Frequencies, SpectralKernel, softmax_frequency_scale
from bayesattn.models import (
    AttentionRegression,
    Categorical,
    FrequencyPairs,
    ImplicitKernelAttention,
    RandomFrequencies,
)
from bayesattn.models.density_guides import SignedNormal

HEADS, FREQUENCIES, POINTS, DIM = 2, 5, 7, 3
close = torch.testing.assert_close


def layer_of(frequencies):
    """Logits of a layer that has these frequencies: "head frequency dim", pairs stacked second."""
    with torch.random.fork_rng(devices=[]):
        logits = SpectralLogits(
            HEADS,
            DIM,
            FREQUENCIES,
            square="plain",
            is_stationary=frequencies.ndim == 3,
            magnitude=False,
        )
    members = (frequencies,) if frequencies.ndim == 3 else frequencies.unbind(1)
    with torch.no_grad():
        for parameter, member in zip(logits.parameters(), members, strict=True):
            parameter.copy_(member / softmax_frequency_scale(DIM))
    return logits


def attended(inputs, frequencies):
    """Attention of each point to all others, by the layer's function."""
    others = ~torch.eye(POINTS, dtype=torch.bool)
    parts = inputs.expand(HEADS, -1, -1)
    return attention_weights(parts, parts, attn_mask=others, logits=layer_of(frequencies))


@pytest.mark.parametrize("kernels", [RandomFrequencies, FrequencyPairs])
def test_the_program_attends_as_the_layer_does(kernels, generator):
    """Mutants: cycles for radians, the square of another, a floor of one face alone."""
    program = AttentionRegression(kernels(FREQUENCIES, scale=0.3), num_heads=HEADS)
    inputs = torch.randn(POINTS, DIM, generator=generator)
    target = torch.randn(POINTS, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trace = poutine.trace(program).get_trace(inputs, target)
    frequencies = trace.nodes["scaled_frequency"]["value"]
    close(trace.nodes["attention"]["value"].movedim(-2, 0), attended(inputs, frequencies))


def test_draws_of_a_routine_attend_as_the_layer_does(generator):
    program = AttentionRegression(RandomFrequencies(FREQUENCIES, scale=0.3), num_heads=HEADS)
    inputs = torch.randn(POINTS, DIM, generator=generator)
    target = torch.randn(POINTS, generator=generator)
    posterior = SVI(program).run(inputs, target, num_steps=5, num_samples=3, seed=0, progress=False)
    found = posterior.predict(inputs, target, sites=["attention", "scaled_frequency"])
    for weights, frequencies in zip(
        found["attention"][0], found["scaled_frequency"][0], strict=True
    ):
        close(weights.movedim(-2, 0), attended(inputs, frequencies))


def test_latents_of_the_program_and_of_the_layer_have_one_law(seeded_layers, generator):
    """The guide of the program and the law of the layer, of the same means, scales, couplings."""
    layer = ImplicitSpectralLogits(HEADS, DIM, FREQUENCIES, pool="none")
    with torch.no_grad():
        layer.law.output_bias.copy_(torch.randn(HEADS, 2 * DIM + 1, generator=generator))
    law = layer.law(*(torch.zeros(HEADS, 1, DIM),) * 2)
    # Where means are large, the other sign has no part.
    law = law._replace(mean=law.mean + 50)
    guide = SignedNormal(*law)
    noise = torch.randn(HEADS, FREQUENCIES, DIM, generator=generator)
    latents = law.latents(law.correlated(noise)).movedim(1, 0)
    # The density of the noise, over what the law stretches it by.
    stretch = law.scale.log().sum() + DIM * correlation_tril(law.coupling).diagonal().log().sum()
    density = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum((0, 2)) - stretch
    close(guide.log_prob(latents), density - math.log(2))


def test_a_sentence_s_frequencies_attend_as_the_layer_s_kernel_does(generator):
    """Of the program with latents for each sentence, at its own frequencies."""
    program = ImplicitKernelAttention(HEADS, DIM, Categorical(2), num_frequencies=FREQUENCIES)
    tokens = torch.randn(3, POINTS, 4, generator=generator)
    mask = torch.arange(POINTS) < torch.tensor([[7], [4], [1]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trace = poutine.trace(program).get_trace(tokens, mask)
    values = {name: node["value"] for name, node in trace.nodes.items() if "value" in node}
    query, key = (
        torch.einsum("std,hdc->shtc", tokens, values[f"{name}_weight"]) for name in ("query", "key")
    )
    kernel = SpectralKernel(Frequencies(values["scaled_frequency"]), None, "plain", 1e-5)
    expected = attention_weights(
        query, key, query_mask=mask, key_mask=mask, logits=kernel.log_kernel
    )
    close(values["attention"], expected)
