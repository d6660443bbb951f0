"""Mixtures of Gaussian kernels: the formula, copies of keys, components that part."""

import math

import pytest
import torch

from bayesattn.functional import attention
from bayesattn.logits import Magnitude, SchoenbergMixture
from tests.logits.cases import DIM, HEADS, fitted_excess

close = torch.testing.assert_close


def test_logits_are_those_of_the_formula(generator):
    """Mutants: shares that do not sum to one, a rate for twice the square, no pace."""
    logits = SchoenbergMixture(HEADS, DIM, 3, magnitude=Magnitude(3.0, num_heads=HEADS))
    query, key = (torch.randn(2, HEADS, n, DIM, generator=generator) for n in (4, 6))
    with torch.no_grad():
        logits.magnitude.log_excess.copy_(torch.tensor([-1.0, 0.0, 1.0]))
        logits.raw_rate.copy_(torch.randn(HEADS, 3, DIM, generator=generator))
        logits.log_share.copy_(torch.randn(HEADS, 3, generator=generator))
    found = logits(query, key)
    for head, i, j in ((0, 0, 0), (1, 3, 4), (2, 2, 5)):
        total = 0.0
        exponentials = logits.log_share[head].exp().tolist()
        for m, share in enumerate(exponentials):
            quadratic = 0.0
            for d in range(DIM):
                pace = 0.5 + (m + 0.5) / 3
                rate = math.exp(pace * logits.raw_rate[head, m, d].item()) / math.sqrt(DIM)
                quadratic += rate * (query[1, head, i, d] - key[1, head, j, d]).item() ** 2
            total += share / sum(exponentials) * math.exp(-quadratic / 2)
        magnitudes = [logits.magnitude(part[1])[head] for part in (query, key)]
        expected = math.log(total) + magnitudes[0][i].item() + magnitudes[1][j].item()
        assert found[1, head, i, j].item() == pytest.approx(expected, rel=1e-10)


def test_it_is_positive_definite_and_has_no_floor(generator):
    points = 3 * torch.randn(HEADS, 20, DIM, generator=generator)
    logits = SchoenbergMixture(HEADS, DIM, 4, spread=2.0, magnitude=False)
    gram = logits(points, points).exp()
    assert torch.linalg.eigvalsh(gram).min() > -1e-12
    far = logits(points[:, :1] + 100, points[:, 1:2])
    assert (far < -1000).all()
    assert far.isfinite().all()


def test_the_spread_of_rates_at_the_start():
    rates = SchoenbergMixture(1, 4, 2, spread=2.0).rate[0, :, 0]
    close(rates, torch.tensor([math.exp(-1.0) / 2, math.exp(1.0) / 2]))


def test_components_part_from_an_equal_start():
    """Mutant: one pace for all, under which components stay one forever."""
    points = torch.linspace(-4, 4, 60)[None, :, None]
    distances = torch.cdist(points, points).square()
    kernel = 0.3 * (-0.05 * distances).exp() + 0.7 * (-10.0 * distances).exp()
    logits = SchoenbergMixture(1, 1, 2, magnitude=False)
    # One Gaussian alone leaves .07.
    assert fitted_excess(logits, points, kernel / kernel.sum(-1, keepdim=True), 350) < 0.01
    assert logits.rate.max() > 20 * logits.rate.min()


def test_the_fused_route_forms_no_weights(generator):
    """Sixteen times the tokens take sixteen times the memory, not its square."""
    logits = SchoenbergMixture(1, 2, 2)
    sizes = []
    for tokens in (64, 1024):
        parts = [torch.randn(1, tokens, 2, generator=generator, requires_grad=True) for _ in "qkv"]
        saved = 0

        def pack(tensor):
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attention(*parts, logits=logits, route="fused")
        sizes.append(saved)
    assert sizes[1] < 20 * sizes[0]


def test_dropout_takes_the_dense_route(generator):
    """Of a sum over copies, fused attention would drop copies, not weights."""
    parts = [torch.randn(1, 8, 2, generator=generator) for _ in "qkv"]
    with pytest.raises(ValueError, match="route: expected 'dense' with dropout_p= of weights that"):
        attention(*parts, logits=SchoenbergMixture(1, 2, 2), dropout_p=0.5, route="fused")


def test_bfloat16_stays_near_where_queries_are_long(generator):
    """Mutant: squares of queries rounded before their products."""
    query = 10 * torch.randn(1, 30, 64, generator=generator)
    key = 0.1 * torch.randn(1, 30, 64, generator=generator)
    logits = SchoenbergMixture(1, 64, 2, spread=0.5)
    exact = logits(query.bfloat16().double(), key.bfloat16().double()).softmax(-1)
    found = logits(query.bfloat16(), key.bfloat16()).double().softmax(-1)
    assert (found - exact).abs().sum(-1).mean() / 2 < 0.1


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_components": 0}, "num_components must be a whole number, at least 1, got 0"),
        ({"spread": -1.0}, "spread must be a number, not negative, got -1.0"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        SchoenbergMixture(2, 3, **settings)
