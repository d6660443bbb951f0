"""Gaussian kernels with oscillations: the formula, positivity, the law of the frequencies."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesattn.logits import SpectralMixture
from bayesattn.logits.characteristic_functions import mixture_characteristic
from tests.logits.cases import fitted_excess

HEADS, DIM, COMPONENTS = 2, 3, 2
close = torch.testing.assert_close


def trained(seed, strength=3.0):
    """Far from the start, with frequencies that oscillate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        logits = SpectralMixture(HEADS, DIM, COMPONENTS, magnitude=False).double()
    with torch.no_grad():
        for parameter in logits.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        logits.raw_strength.copy_(strength * torch.rand(HEADS, COMPONENTS, generator=generator))
        logits.log_scale -= 3.0
    return logits


def test_logits_are_those_of_the_formula(generator):
    """Mutants: no square of a scale, a cosine without 2 π, the mean of components."""
    logits = trained(0)
    query, key = (torch.randn(HEADS, n, DIM, generator=generator) for n in (4, 6))
    found = logits(query, key)
    for head, i, j in ((0, 0, 0), (1, 3, 4), (0, 2, 5)):
        delta = (query[head, i] - key[head, j]).tolist()
        rates = (logits.log_rate[head].exp() / DIM**0.5).tolist()
        expected = -sum(rate * x**2 for rate, x in zip(rates, delta, strict=True)) / 2
        for c in range(COMPONENTS):
            turn = sum(m * x for m, x in zip(logits.means[head, c].tolist(), delta, strict=True))
            scales = logits.log_scale[head, c].exp().tolist()
            spread = sum((s * x) ** 2 for s, x in zip(scales, delta, strict=True))
            value = math.exp(-2 * math.pi**2 * spread) * math.cos(2 * math.pi * turn)
            expected += logits.strength[head, c].item() * (value - 1)
        assert found[head, i, j].item() == pytest.approx(expected, rel=1e-9)


@given(seed=st.integers(0, 1000), size=st.integers(1, 12), strength=st.floats(0.0, 20.0))
def test_it_is_positive_definite_and_one_at_zero(seed, size, strength):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(HEADS, size, DIM, generator=generator, dtype=torch.float64)
    gram = trained(seed, strength)(points, points).exp()
    assert (gram > 0).all()
    close(gram.diagonal(dim1=-2, dim2=-1), torch.ones(HEADS, size, dtype=torch.float64))
    assert torch.linalg.eigvalsh(gram).min() > -1e-10


def test_it_is_the_characteristic_function_of_its_law(generator):
    """Frequencies of a normal part and a Poisson number of jumps, by drawing them."""
    logits = trained(3, strength=1.0)
    num_draws = 200_000
    root = logits.rate[0].sqrt() / (2 * math.pi)
    frequency = root * torch.randn(num_draws, DIM, generator=generator)
    for c in range(COMPONENTS):
        rate = logits.strength[0, c].expand(num_draws)
        counts = torch.poisson(rate.detach(), generator=generator)
        for jump in range(int(counts.max())):
            sign = torch.randint(2, (num_draws, 1), generator=generator) * 2 - 1
            normal = torch.randn(num_draws, DIM, generator=generator)
            drawn = sign * logits.means[0, c] + logits.log_scale[0, c].exp() * normal
            frequency = frequency + torch.where(counts[:, None] > jump, drawn, 0.0)
    delta = 0.4 * torch.randn(5, DIM, generator=generator)
    cosines = torch.cos(2 * math.pi * delta @ frequency.T)
    expected = logits(delta.expand(HEADS, -1, -1), torch.zeros(HEADS, 1, DIM))[0, :, 0].exp()
    error = cosines.std(-1) / num_draws**0.5
    assert ((cosines.mean(-1) - expected).abs() < 4.5 * error).all()
    assert expected.max() - expected.min() > 0.1


def test_a_mixture_s_characteristic_function_by_drawing(generator):
    means = torch.randn(2, 2, DIM, generator=generator)
    scales = 0.3 * torch.rand(2, 2, DIM, generator=generator)
    shares = torch.tensor([[0.3, 0.7], [0.9, 0.1]])
    delta = 0.3 * torch.randn(2, 4, DIM, generator=generator)
    found = mixture_characteristic(delta, shares, means, scales)
    num_draws = 100_000
    component = (torch.rand(num_draws, generator=generator) > shares[0, 0]).long()
    sign = torch.randint(2, (num_draws, 1), generator=generator) * 2 - 1
    normal = torch.randn(num_draws, DIM, generator=generator)
    frequency = sign * means[0][component] + scales[0][component] * normal
    cosines = torch.cos(2 * math.pi * delta[0] @ frequency.T)
    error = cosines.std(-1) / num_draws**0.5
    assert ((cosines.mean(-1) - found[0]).abs() < 4.5 * error).all()


def test_training_finds_a_frequency(seeded_layers):
    """From the softmax's start, weights that oscillate, which no Gaussian has."""
    points = torch.linspace(0, 6, 50)[None, :, None]
    delta = points - points.mT
    target = (3 * torch.cos(2 * math.pi * 0.5 * delta) - 0.05 * delta**2).softmax(-1)
    logits = SpectralMixture(1, 1, 6, magnitude=False)
    assert fitted_excess(logits, points, target, 0) > 1.0
    assert fitted_excess(logits, points, target, 250) < 0.02
