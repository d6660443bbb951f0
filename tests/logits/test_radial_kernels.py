"""Rational quadratic and Matérn logits: formulas, positive definiteness, the edge at zero."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesattn.logits import Magnitude, Matern, RationalQuadratic
from bayesattn.logits.kernel_logits import at_least_zero
from tests.logits.cases import fitted_excess

HEADS, DIM = 2, 3
close = torch.testing.assert_close
CHOICES = {
    "rational_quadratic": lambda: RationalQuadratic(HEADS, DIM, tail=0.7, magnitude=False),
    "matern_1/2": lambda: Matern(HEADS, DIM, smoothness="1/2", share=0.6, magnitude=False),
    "matern_3/2": lambda: Matern(HEADS, DIM, smoothness="3/2", share=0.6, magnitude=False),
    "matern_5/2": lambda: Matern(HEADS, DIM, smoothness="5/2", share=0.6, magnitude=False),
}


def by_hand(name, difference, rates):
    """The logarithm of one kernel value, as the formulas say."""
    squared = sum(rate * x**2 for rate, x in zip(rates, difference, strict=True))
    r = math.sqrt(squared)
    if name == "rational_quadratic":
        return -math.log(1 + 0.7 * squared / 2) / 0.7
    matern = {
        "matern_1/2": math.exp(-r),
        "matern_3/2": (1 + math.sqrt(3) * r) * math.exp(-math.sqrt(3) * r),
        "matern_5/2": (1 + math.sqrt(5) * r + 5 * squared / 3) * math.exp(-math.sqrt(5) * r),
    }[name]
    return -0.4 * squared / 2 + 0.6 * math.log(matern)


@pytest.mark.parametrize("name", CHOICES)
def test_logits_are_those_of_the_formula(name, generator):
    """Mutants: a root too many, one rate for all coordinates, the share of the other kernel."""
    logits = CHOICES[name]()
    query, key = (torch.randn(HEADS, n, DIM, generator=generator) for n in (4, 5))
    with torch.no_grad():
        logits.log_rate.copy_(torch.randn(HEADS, DIM, generator=generator))
    found = logits(query, key)
    for head, i, j in ((0, 0, 0), (1, 3, 4), (0, 2, 1)):
        difference = (query[head, i] - key[head, j]).tolist()
        rates = (logits.log_rate[head].exp() / DIM**0.5).tolist()
        expected = by_hand(name, difference, rates)
        assert found[head, i, j].item() == pytest.approx(expected, rel=1e-9)


@given(
    seed=st.integers(0, 1000),
    amount=st.floats(0.0, 1.0),
    spread=st.floats(0.1, 5.0),
    size=st.integers(1, 12),
)
@pytest.mark.parametrize("name", CHOICES)
def test_kernels_are_positive_definite(name, seed, amount, spread, size):
    """Powers in shares too; a Gram matrix of one point is one."""
    generator = torch.Generator().manual_seed(seed)
    points = spread * torch.randn(HEADS, size, DIM, generator=generator, dtype=torch.float64)
    logits = CHOICES[name]()
    with torch.no_grad():
        (logits.raw_tail if "rational" in name else logits.raw_share).fill_(amount)
    gram = logits(points, points).exp()
    close(gram.diagonal(dim1=-2, dim2=-1), torch.ones(HEADS, size, dtype=torch.float64))
    assert torch.linalg.eigvalsh(gram).min() > -1e-10


def test_tails_are_heavier_than_a_gaussian_s():
    far = torch.full((HEADS, 1, DIM), 10.0)
    near = torch.zeros(HEADS, 1, DIM)
    gaussian = RationalQuadratic(HEADS, DIM, magnitude=False)(far, near)
    for make in CHOICES.values():
        assert (make()(far, near) > 0.6 * gaussian).all()


@pytest.mark.parametrize("tail", [1e-12, 1e-7, 6e-6, 8e-6, 1e-3])
def test_a_small_tail_loses_no_digits(tail):
    """Mutants: a term of the series."""
    x, y = torch.full((1, 1, 1), 1.3), torch.zeros(1, 1, 1)
    logits = RationalQuadratic(1, 1, tail=tail, magnitude=False)
    half = 1.3**2 / 2
    exact = -math.log1p(tail * half) / tail
    assert logits(x, y).item() == pytest.approx(exact, rel=1e-14)
    slope = torch.autograd.grad(logits(x, y).sum(), logits.raw_tail)[0].item()
    assert slope == pytest.approx(half**2 / 2, rel=0.01)


def test_gradients_where_a_query_is_its_key():
    """The root of zero has no slope; nothing may become NaN."""
    points = torch.ones(HEADS, 2, DIM, requires_grad=True)
    for make in CHOICES.values():
        (slope,) = torch.autograd.grad(make()(points, points.detach()).sum(), points)
        close(slope, torch.zeros_like(slope))


def test_numbers_come_back_from_below_zero():
    """Mutant: a clamp, whose slope is zero there."""
    raw = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    values = at_least_zero(raw)
    assert values.tolist() == [0.0, 0.0, 3.0]
    values.sum().backward()
    assert raw.grad.tolist() == [1.0, 1.0, 1.0]
    logits = Matern(1, 1)
    with torch.no_grad():
        logits.raw_share.fill_(1.5)
    assert logits.share.item() == 1


def test_training_finds_a_heavy_tail():
    """From the softmax's start, to weights that a Gaussian cannot have."""
    points = torch.linspace(-4, 4, 60)[None, :, None]
    truth = RationalQuadratic(1, 1, tail=2.0, magnitude=False)
    with torch.no_grad():
        truth.log_rate += 3
    logits = RationalQuadratic(1, 1, magnitude=False)
    excess = fitted_excess(logits, points, truth(points, points).softmax(-1).detach(), 250)
    # A Gaussian leaves some .07.
    assert excess < 0.01
    assert logits.tail.item() == pytest.approx(2.0, rel=0.25)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RationalQuadratic(0, 3), "num_heads must be a whole number, at least 1, got 0"),
        (lambda: RationalQuadratic(2, 3, tail=-1), "tail must be a number, not negative, got -1"),
        (lambda: Matern(2, 3, smoothness="7/2"), "smoothness must be one of '1/2', '3/2', '5/2'"),
        (lambda: Matern(2, 3, share=1.2), "share must be a number from zero to one, got 1.2"),
        (lambda: Matern(2, 3, magnitude=Magnitude(num_heads=3)), "magnitude: expected num_heads=2"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
