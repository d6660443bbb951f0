"""Hugging Face's models on an accelerator: projections are shared there, exactly at full width."""

import pytest
import torch

from bayesattn.conversion import convert
from bayesattn.networks import attention_calls
from bayesattn.projection_conversion import CollaborativeFit
from tests.networks.test_huggingface import build, inputs

pytestmark = pytest.mark.slow  # Importing transformers takes some seconds.


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_models_convert_where_they_are(kind, generator, device):
    model, names = build(kind, "sdpa")
    given = {n: v.to(device) for n, v in inputs(kind, generator, padded=False).items()}
    model = model.to(device)
    expected = model(**given).last_hidden_state
    fit = CollaborativeFit(15, start="heads", num_iterations=1)
    shared, _ = convert(model, projections=fit, copy=True)
    with attention_calls(shared) as calls:
        found = shared(**given).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert list(calls) == names
    assert found.device.type == torch.device(device).type
