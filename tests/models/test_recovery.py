"""Posteriors find a planted word: the one that bears a mark, and whose sign alone is the label."""

import math
from typing import NamedTuple

import pytest
import torch
from pyro.infer.autoguide import init_to_sample
from torch import Tensor

from bayesattn.inference import NUTS, SVGD
from bayesattn.models import AttentionPooling, Bernoulli, MultiHeadSelfAttention

QUIET = {"seed": 0, "progress": False}
POOLING = AttentionPooling(1, Bernoulli(), readout_scale=1.0)


class Planted(NamedTuple):
    """Sentences in which one word counts: its arguments of a model, and where it stands."""

    tokens: Tensor
    mask: None
    label: Tensor
    place: Tensor


def plant(generator, num_sentences, num_tokens, mark, *, constant=False):
    """Give each word a sign, and one word of each sentence a mark: its sign is the label."""
    sign = torch.randint(2, (num_sentences, num_tokens), generator=generator) * 2.0 - 1.0
    place = torch.randint(num_tokens, (num_sentences,), generator=generator)
    marks = mark * torch.nn.functional.one_hot(place, num_tokens)
    features = [marks, sign, torch.ones_like(sign)]
    label = (sign.gather(1, place[:, None])[:, 0] > 0).to(sign)
    return Planted(torch.stack(features[: 2 + constant], -1), None, label, place)


def attention_on_planted(posterior, data):
    """Mean over draws and new sentences of what each chain's heads pay to the planted word."""
    attention = posterior.predict(data.tokens, sites=["attention"])["attention"]
    if attention.ndim == 6:
        # Self-attention: what all words of a sentence pay on average.
        attention = attention.mean(-2)
    place = data.place[:, None, None].expand(*attention.shape[2:4], 1)
    return attention.mean(1).take_along_dim(place[None], -1).mean((1, 3))


def at_zero(num_heads):
    """Start values of pooling: even attention. A sharp start may get stuck attending to signs."""
    return {
        "query_weight": torch.zeros(num_heads, 2),
        "readout_weight": torch.zeros(num_heads, 2, 1),
        "readout_bias": torch.zeros(1),
    }


@pytest.mark.slow
def test_pooling_finds_the_planted_word(generator):
    train, new = plant(generator, 101, 5, 3.0), plant(generator, 61, 7, 3.0)
    routine = SVGD(POOLING, num_particles=50)
    start, svgd = (routine.run(*train[:3], num_steps=n, init=at_zero(1), **QUIET) for n in (1, 200))
    nuts = NUTS(POOLING).run(*train[:3], warmup_steps=15, num_samples=25, init=svgd, **QUIET)
    assert attention_on_planted(start, new).item() < 0.5
    assert attention_on_planted(svgd, new).item() > 0.8
    assert attention_on_planted(nuts, new).item() > 0.8


def test_one_head_of_several_finds_the_planted_word(generator):
    train, new = plant(generator, 101, 5, 3.0), plant(generator, 61, 7, 3.0)
    routine = SVGD(AttentionPooling(3, Bernoulli(), readout_scale=1.0), particle_plate="head")
    start, heads = (
        routine.run(*train[:3], num_steps=n, num_runs=5, init=at_zero(3), **QUIET) for n in (1, 300)
    )
    assert (attention_on_planted(start, new).max(-1).values < 0.5).all()
    assert attention_on_planted(heads, new).max(-1).values.mean() > 0.8


@pytest.mark.slow
def test_particles_have_the_mean_and_spread_of_a_markov_chain(generator):
    train, new = plant(generator, 101, 5, 3.0), plant(generator, 61, 7, 3.0)
    length = {"num_steps": 800, "init": at_zero(1)}
    svgd = SVGD(POOLING, num_particles=100).run(*train[:3], **length, **QUIET)
    nuts = NUTS(POOLING).run(*train[:3], warmup_steps=50, num_samples=300, init=svgd, **QUIET)
    for site, mean in nuts.mean().items():
        spread = nuts.std()[site]
        assert ((svgd.mean()[site] - mean).abs() < 0.3 * spread).all()
        assert ((svgd.std()[site] / spread).log().abs() < math.log(1.35)).all()
    by_svgd, by_nuts = (attention_on_planted(posterior, new) for posterior in (svgd, nuts))
    torch.testing.assert_close(by_svgd, by_nuts, rtol=0.0, atol=0.03)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::bayesattn.inference.ConvergenceWarning")
def test_self_attention_finds_the_planted_word(generator):
    train = plant(generator, 503, 3, 3.0, constant=True)
    new = plant(generator, 61, 5, 3.0, constant=True)
    model = MultiHeadSelfAttention(1, 1, Bernoulli(), readout_scale=1.0)
    # From a start as wide as the default, some particles end in modes that attend elsewhere.
    from_prior = {"init": init_to_sample, **QUIET}
    routine = SVGD(model, num_particles=50)
    start, svgd = (routine.run(*train[:3], num_steps=n, **from_prior) for n in (1, 300))
    nuts = NUTS(model).run(*train[:3], warmup_steps=40, num_samples=40, init=svgd, **QUIET)
    assert attention_on_planted(start, new).item() < 0.5
    assert attention_on_planted(svgd, new).item() > 0.8
    assert attention_on_planted(nuts, new).item() > 0.8
