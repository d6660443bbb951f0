"""What the models refuse, and that they say the argument, what was expected, and what came."""

import inspect

import pytest
import torch

from bayesattn.models import AttentionPooling, Bernoulli, MultiHeadSelfAttention
from bayesattn.models.checks import check_sentences
from tests.models.cases import DIM, MODELS, NUM_TOKENS, make_data, make_model

WRONG_DATA = [
    (
        {"tokens": torch.ones(NUM_TOKENS, DIM)},
        r"tokens must be floating point vectors of shape \(sentence, token, dim\), got .* \(5, 3\)",
    ),
    ({"tokens": torch.ones(7, 5, 3).long()}, r"tokens must be .* got torch\.int64 .* \(7, 5, 3\)"),
    (
        {"mask": torch.ones(5, 7) > 0},
        r"mask must be boolean, .* = \(7, 5\), got torch\.bool of shape \(5, 7\)",
    ),
    ({"mask": torch.ones(7, 5, 1) > 0}, r"mask must .* got torch\.bool of shape \(7, 5, 1\)"),
    ({"mask": torch.ones(7, 5)}, r"mask must be boolean, True where .* got torch\.float"),
    (
        {"target": torch.zeros(5).long()},
        r"target must have one entry a sentence, shape \(7,\), got shape \(5,\)",
    ),
    ({"target": torch.zeros(7, 1).long()}, r"target must have one entry .* got shape \(7, 1\)"),
    ({"target": torch.zeros(7)}, r"target must hold whole numbers for Categorical\(.* got torch"),
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("wrong", "message"), WRONG_DATA)
def test_refuses_data(name, wrong, message, generator):
    model, data = make_model(name), make_data(generator)._replace(**wrong)
    # Past the shape checks of the test run, which users do not have.
    program = inspect.unwrap(type(model).__call__)
    with torch.random.fork_rng(), pytest.raises(ValueError, match=message):
        program(model, *data)


def test_takes_data_that_fit(generator):
    tokens, mask, target = make_data(generator)
    for given in (mask, None):
        for observed in (target, None):
            check_sentences(tokens, given, observed)


@pytest.mark.parametrize(
    ("program", "settings", "message"),
    [
        (AttentionPooling, {"num_heads": 0}, "num_heads must be positive, got 0"),
        (AttentionPooling, {"hidden_dim": 0}, "hidden_dim must be positive, got 0"),
        (AttentionPooling, {"query_scale": -1.0}, r"query_scale must be positive, got -1\.0"),
        (AttentionPooling, {"readout_scale": 0.0}, r"readout_scale must be positive, got 0\.0"),
        (AttentionPooling, {"batch_size": 0}, "batch_size must be positive, got 0"),
        (MultiHeadSelfAttention, {"num_heads": -2}, "num_heads must be positive, got -2"),
        (MultiHeadSelfAttention, {"head_dim": 0}, "head_dim must be positive, got 0"),
        (
            MultiHeadSelfAttention,
            {"projection_scale": float("nan")},
            "projection_scale must be positive, got nan",
        ),
        (MultiHeadSelfAttention, {"batch_size": -1}, "batch_size must be positive, got -1"),
    ],
)
def test_refuses_settings(program, settings, message):
    sizes = {"num_heads": 2, "likelihood": Bernoulli()}
    if program is MultiHeadSelfAttention:
        sizes["head_dim"] = 3
    with pytest.raises(ValueError, match=message):
        program(**sizes | settings)
