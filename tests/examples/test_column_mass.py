"""Column masses of a trained encoder, held against weights that the layers return themselves."""

import numpy as np
import pytest
import torch

from examples.reproduce.column_mass import EDGES, profile, summarize
from tests.examples.test_training import classifier, labeled


def masses_by_hand(model, sentences):
    """Give the column masses "word head" of the first layer, one sentence at a time."""
    masses, attended = [], []
    for tokens, mask in zip(sentences.tokens, sentences.mask, strict=True):
        hidden = (model.words(tokens) + model.positions[: len(tokens)])[mask]
        _, weights = model.layers[0].self_attn(
            hidden, hidden, hidden, need_weights=True, average_attn_weights=False
        )
        masses.append(weights.sum(-2).mT)
        attended.append((-(weights * weights.log()).sum(-1)).exp().mT)
    return torch.cat(masses), torch.cat(attended)


@torch.no_grad()
def test_profile_is_that_of_single_sentences(generator):
    """Mutants: padded queries that are counted; heads and words exchanged; dropout left on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = classifier(layers=2).train()
    model.layers[0].self_attn.in_proj_weight *= 5.0
    sentences = labeled(generator, 29)
    first, second = profile(model, sentences, batch_size=8)
    masses, attended = masses_by_hand(model, sentences)
    expected = summarize(masses, attended)
    assert first["histogram"] == expected["histogram"]
    assert sum(second["histogram"]) == 2 * sentences.mask.sum()
    for name in ("attended", "lowest"):
        assert first[name] == pytest.approx(expected[name])
    assert first["rates"] == expected["rates"]
    assert 0 < first["rates"]["0.1"][0] < 1
    assert second["attended"] != pytest.approx(first["attended"], rel=1e-3)


def test_summary_against_numpy(generator):
    """Mutants: "or" in place of "and" over heads; a histogram whose ends are lost."""
    mass = torch.exp(4 * torch.randn(301, 3, generator=generator) - 3)
    mass[0, 0], mass[1, 0] = 0.0, 1e9
    found = summarize(mass, mass)
    below = mass.numpy() < 0.01
    assert found["rates"]["0.01"] == pytest.approx(below.mean(0))
    assert found["in_all_heads"]["0.01"] == pytest.approx(below.all(1).mean())
    assert 0 < found["in_all_heads"]["0.01"] < below.mean()
    edges = EDGES.numpy()
    with np.errstate(divide="ignore"):
        logarithms = np.log10(mass.numpy()).clip(edges[0], edges[-1])
    assert found["histogram"] == np.histogram(logarithms, edges)[0].tolist()
    assert sum(found["histogram"]) == mass.numel()
    assert found["lowest"] == 0.0
