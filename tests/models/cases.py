"""The models and likelihoods that tests go over, and small data of distinct prime sizes."""

from typing import NamedTuple

import pyro.poutine as poutine
import torch
from torch import Tensor

from bayesattn.divergences import Energy
from bayesattn.models import (
    AlignmentFactor,
    AttentionPooling,
    Bernoulli,
    Categorical,
    MultiHeadSelfAttention,
    Normal,
)

NUM_SENTENCES, NUM_TOKENS, DIM, NUM_HEADS, WIDTH, NUM_CLASSES = 7, 5, 3, 2, 11, 13
PLATES = ("head", "sentence", "unlabeled")
ALIGNMENT = 0.7

MODELS = {
    "pooling": (AttentionPooling, {}),
    "hidden": (AttentionPooling, {"hidden_dim": WIDTH}),
    "self_attention": (MultiHeadSelfAttention, {"head_dim": WIDTH}),
    "aligned": (
        MultiHeadSelfAttention,
        {"head_dim": WIDTH, "alignment": AlignmentFactor(Energy(), ALIGNMENT)},
    ),
}
LIKELIHOODS = {
    "categorical": Categorical(NUM_CLASSES),
    "bernoulli": Bernoulli(),
    "normal": Normal(noise_prior_scale=0.7),
}
HEAD_SITES = ("query_weight", "key_weight", "value_weight", "readout_weight")


def make_model(name, likelihood="categorical", **settings):
    """One of the models, with one of the likelihoods."""
    program, own = MODELS[name]
    defaults = {"num_heads": NUM_HEADS, "likelihood": LIKELIHOODS[likelihood], **own}
    return program(**defaults | settings)


class Data(NamedTuple):
    """Arguments of a model."""

    tokens: Tensor
    mask: Tensor | None
    target: Tensor | None


def make_data(
    generator, likelihood="categorical", *, padded=True, num_sentences=NUM_SENTENCES, dtype=None
):
    """Random data; where padded, the first sentences have no word, one word, and all words."""
    shape = (num_sentences, NUM_TOKENS, DIM)
    tokens = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    lengths = torch.randint(1, NUM_TOKENS + 1, (num_sentences,), generator=generator)
    lengths[:3] = torch.tensor([0, 1, NUM_TOKENS])[:num_sentences]
    mask = torch.arange(NUM_TOKENS) < lengths[:, None]
    target = {
        "categorical": torch.randint(NUM_CLASSES, (num_sentences,), generator=generator),
        "bernoulli": torch.randint(2, (num_sentences,), generator=generator).to(tokens),
        "normal": torch.randn(num_sentences, generator=generator).to(tokens),
    }[likelihood]
    return Data(tokens, mask if padded else None, target)


def draw_values(model, data, generator):
    """Values of all latent sites, drawn from the prior: site to tensor."""
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        trace = poutine.trace(model).get_trace(*data)
    return {
        name: trace.nodes[name]["value"] for name in trace.stochastic_nodes if name not in PLATES
    }


def run(model, data, values):
    """Run the plain Pyro program at given values: each site's value, and the log joint density."""
    trace = poutine.trace(poutine.condition(model, values)).get_trace(*data)
    sites = {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "sample"}
    named = {name: value for name, value in sites.items() if name not in PLATES}
    return named, trace.log_prob_sum()
