"""Figures of heads' diversity, held against single sentences and weights by the layers' own."""

import math

import numpy as np
import pytest
import torch

from examples.reproduce.head_diversity import DIVERSITY, head_diversity
from examples.reproduce.pooling_classifier import PoolingClassifier
from tests.examples.test_training import classifier, labeled


def pooling(num_heads):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return PoolingClassifier(7, 3, num_heads, dim=10, hidden_dim=5)


def divergence(p, q):
    """Jensen-Shannon's, of two rows of positive numbers."""
    middle = (p + q) / 2
    return float((p * (p / middle).log() + q * (q / middle).log()).sum() / 2)


@torch.no_grad()
def test_divergence_is_that_of_single_sentences(generator):
    """Mutants: padded queries that are counted; means over batches of unequal size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = classifier()
    model.layers[0].self_attn.in_proj_weight *= 5.0
    sentences, by_hand = labeled(generator, 29), []
    for tokens, mask in zip(sentences.tokens, sentences.mask, strict=True):
        hidden = (model.words(tokens) + model.positions[: len(tokens)])[mask]
        _, weights = model.layers[0].self_attn(
            hidden, hidden, hidden, need_weights=True, average_attn_weights=False
        )
        by_hand.append(np.mean([divergence(p, q) for p, q in zip(*weights, strict=True)]))
    found = head_diversity(model, sentences)
    assert tuple(found) == DIVERSITY
    expected = float(np.mean(by_hand))
    assert found["map divergence"] == pytest.approx(expected, rel=1e-4)
    # Eigenvalues of two heads are (1 ± s) / 2.
    parts = np.array([0.5, -0.5]) * (1 - expected / math.log(2)) + 0.5
    assert found["effective heads"] == pytest.approx(np.exp(-(parts * np.log(parts)).sum()))
    rows = [part.reshape(2, -1) for part in model.layers[0].self_attn.in_proj_weight.split(8)]
    cosines = [torch.cosine_similarity(*part, dim=0).item() for part in rows]
    assert found["head cosine"] == pytest.approx(np.mean(cosines), rel=1e-4)


@torch.no_grad()
def test_pooling_heads(generator):
    """Mutant: the mask of words taken for one of pooling's queries."""
    sentences, model = labeled(generator, 29), pooling(3)
    model.pooling.query_weight[:] = model.pooling.query_weight[0].clone()
    alike = head_diversity(model, sentences)
    assert alike["head cosine"] == pytest.approx(1.0)
    assert alike["map divergence"] == pytest.approx(0.0, abs=1e-6)
    assert alike["effective heads"] == pytest.approx(1.0, abs=1e-4)
    model.pooling.query_weight[1] *= -20.0
    apart = head_diversity(model, sentences)
    assert apart["head cosine"] == pytest.approx((1 - 1 - 1) / 3)
    assert apart["map divergence"] > 0.01


def test_one_head_has_no_pairs(generator):
    found = head_diversity(pooling(1), labeled(generator, 5))
    assert found == {"head cosine": None, "map divergence": None, "effective heads": 1.0}
