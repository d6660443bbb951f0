"""Squared random Fourier features: their mean, rate, bias, sign, floor, and the control variate."""

import math

import pytest
import torch

from bayesattn.functional import attention_weights
from bayesattn.logits import SpectralLogits
from bayesattn.logits.frequencies import FREQUENCY_DRAWS, normal_frequencies
from bayesattn.logits.spectral_features import (
    fourier_features,
    log_of_square,
    square_features,
    unbiased_square,
)
from bayesattn.logits.spectral_kernel import softmax_frequency_scale

HEADS, DIM = 3, 4
close = torch.testing.assert_close


def softmax_kernel(query, key):
    """The root of the softmax's kernel, whose features these are."""
    return (-torch.cdist(query, key).square() / (4 * query.shape[-1] ** 0.5)).exp()


@pytest.fixture
def clouds(generator):
    return [torch.randn(HEADS, n, DIM, generator=generator) for n in (6, 9)]


@pytest.mark.parametrize("is_stationary", [True, False])
def test_features_are_those_of_the_formula(clouds, generator, is_stationary):
    """Mutants: no 2 π, the mean of sums in place of the sum over 4 M, sines left out."""
    query, key = clouds
    first, second = (torch.randn(HEADS, 5, DIM, generator=generator) for _ in range(2))
    second = None if is_stationary else second
    found = fourier_features(query, first, second) @ fourier_features(key, first, second).mT
    for head, i, j in ((0, 0, 0), (2, 5, 8)):
        total = 0.0
        for m in range(5):
            pair = [first[head, m], first[head, m] if is_stationary else second[head, m]]
            turns = [
                [2 * math.pi * float(w @ x) for w in pair] for x in (query[head, i], key[head, j])
            ]
            cosines, sines = ([sum(map(f, part)) for part in turns] for f in (math.cos, math.sin))
            total += cosines[0] * cosines[1] + sines[0] * sines[1]
        assert found[head, i, j].item() == pytest.approx(total / 20, rel=1e-10)


def test_two_frequencies_give_the_kernel_of_yaglom(generator):
    """k(x, y) = κ(x - y) / 2 + κ(x) κ(y) / 2 in the mean."""
    query, key = (torch.randn(1, n, 2, generator=generator) for n in (4, 5))
    first, second = (0.2 * torch.randn(1, 400_000, 2, generator=generator) for _ in range(2))
    found = fourier_features(query, first, second) @ fourier_features(key, first, second).mT

    def kappa(difference):
        return (-2 * math.pi**2 * 0.04 * difference.square().sum(-1)).exp()

    stationary = kappa(query[..., :, None, :] - key[..., None, :, :])
    expected = stationary / 2 + kappa(query)[..., :, None] * kappa(key)[..., None, :] / 2
    assert (found - expected).abs().max() < 5 * 400_000**-0.5


@pytest.mark.parametrize("draw", FREQUENCY_DRAWS)
def test_features_near_the_kernel_at_the_rate_of_their_number(draw, generator):
    """Mutants: a scale of frequencies by any factor; rate M^(-1/2), faster where quasi-random."""
    query, key = (torch.randn(1, n, DIM, generator=generator) for n in (20, 20))
    exact = softmax_kernel(query, key)
    sizes, errors = (32, 512), []
    for size in sizes:
        drawn = normal_frequencies(40, size, DIM, draw=draw, generator=generator)
        frequencies = softmax_frequency_scale(DIM) * drawn
        found = fourier_features(query, frequencies) @ fourier_features(key, frequencies).mT
        errors.append((found - exact).square().mean().sqrt().item())
    slope = math.log(errors[1] / errors[0]) / math.log(sizes[1] / sizes[0])
    if draw == "quasi":
        assert slope < -0.6
    else:
        assert slope == pytest.approx(-0.5, abs=0.06)
    assert errors[0] < 0.13


def test_orthogonal_and_quasi_draws_err_less(generator):
    query, key = (torch.randn(1, n, DIM, generator=generator) for n in (20, 20))
    exact, errors = softmax_kernel(query, key), {}
    for draw in FREQUENCY_DRAWS:
        drawn = normal_frequencies(200, 16, DIM, draw=draw, generator=generator)
        frequencies = softmax_frequency_scale(DIM) * drawn
        found = fourier_features(query, frequencies) @ fourier_features(key, frequencies).mT
        errors[draw] = (found - exact).square().mean().item()
        close(found.mean(0), exact[0], atol=0.08, rtol=0)
    assert errors["orthogonal"] < 0.85 * errors["independent"]
    assert errors["quasi"] < 0.5 * errors["independent"]


def test_orthogonal_draws_are_at_right_angles_and_of_normal_lengths(generator):
    drawn = normal_frequencies(2, 10, DIM, generator=generator)
    for first in range(0, 10, DIM):
        rows = drawn[:, first : first + DIM]
        products = rows @ rows.mT
        close(products, torch.diag_embed(products.diagonal(dim1=-2, dim2=-1)))
    many = normal_frequencies(500, 8, DIM, generator=generator)
    close(many.square().sum(-1).mean(), torch.tensor(float(DIM)), rtol=0.05, atol=0)
    close(many.flatten(0, 1).mT.cov(), torch.eye(DIM), rtol=0, atol=0.1)
    # Signs too: in each coordinate as often one as the other.
    assert (many[:, 0, 0] > 0).double().mean().item() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("is_stationary", [True, False])
def test_the_unbiased_square_is_one(generator, is_stationary):
    """And the plain one is too large by the variance, (1 - κ²)² / 2 M where they are stationary."""
    num_draws, size = 4000, 8
    query, key = (torch.randn(1, n, 2, generator=generator) for n in (3, 4))
    first, second = (0.15 * torch.randn(num_draws, size, 2, generator=generator) for _ in range(2))
    second = None if is_stationary else second
    asking, asked = (fourier_features(part, first, second) for part in (query, key))
    similarity = asking @ asked.mT
    squares = square_features(asking) @ square_features(asked).mT
    shares = torch.einsum(
        "bqcm,bkcm->bqkm", asking.unflatten(-1, (2, -1)), asked.unflatten(-1, (2, -1))
    )
    close(squares, shares.square().sum(-1))
    exact = similarity.mean(0).square()
    found = unbiased_square(similarity, squares, size)
    error = (
        found.std(0) / num_draws**0.5
        + 2 * similarity.mean(0).abs() * similarity.std(0) / num_draws**0.5
    )
    assert ((found.mean(0) - exact).abs() < 4.5 * error).all()
    plain = similarity.square().mean(0)
    assert ((plain - exact) > 4.5 * error).any()
    if is_stationary:
        kappa = similarity.mean(0)
        doubled = (-2 * math.pi**2 * 0.15**2 * 4 * torch.cdist(query, key)[0].square()).exp()
        variance = (1 + doubled - 2 * kappa.square()) / (2 * size)
        close(plain - exact, variance, rtol=0.2, atol=0.004)


def test_plain_features_are_often_negative_and_have_a_floor(generator):
    """The faults of the published features, at 64 of them.

    Of frequencies for the softmax's kernel itself, a fifth of the entries is negative at width 8
    and half at width 64. Of those for its root, squares stand 1/128 above similarities of 8e-4.
    """
    negative = {}
    for width in (8, 64):
        query, key = (torch.randn(8, 60, width, generator=generator) for _ in range(2))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            logits = SpectralLogits(8, width, 64, square="plain", draw="independent")
        squared = logits.similarity(query, key).square().mean().item()
        exact = softmax_kernel(query, key).square().mean().item()
        with torch.no_grad():
            logits.first *= 2**0.5
        negative[width] = logits.negative_share(query, key).mean().item()
    assert negative[8] == pytest.approx(0.2, abs=0.05)
    assert negative[64] == pytest.approx(0.49, abs=0.03)
    assert squared - exact == pytest.approx(1 / 128, rel=0.05)
    assert exact < 1e-3


def test_anchored_features_have_neither_at_the_start(generator):
    """Total variation from the softmax at width 64, where plain ones are .5 off."""
    query, key = (torch.randn(8, 60, 64, generator=generator) for _ in range(2))
    exact = attention_weights(query, key)
    far = {}
    for square in ("anchored", "plain", "unbiased"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            logits = SpectralLogits(8, 64, 64, square=square)
        weights = attention_weights(query, key, logits=logits)
        far[square] = ((weights - exact).abs().sum(-1) / 2).mean().item()
        if square == "anchored":
            assert logits.negative_share(query, key).max() == 0
    assert far["anchored"] < 1e-10
    assert far["plain"] > 0.4
    assert far["unbiased"] > 0.4


def test_the_control_variate_takes_errors_of_features_away(generator):
    """Frequencies a little wider than the start's: their kernel is known, its features err less."""
    query, key = (torch.randn(100, 12, DIM, generator=generator) for _ in range(2))
    errors = {}
    for square in ("anchored", "plain"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            logits = SpectralLogits(100, DIM, 16, square=square, draw="independent")
        with torch.no_grad():
            logits.first *= 1.1
        found = logits.similarity(query, key)
        exact = softmax_kernel(1.1 * query, 1.1 * key)
        errors[square] = (found - exact).square().mean().sqrt().item()
    assert errors["anchored"] < 0.35 * errors["plain"]


def test_the_floor_bounds_slope_and_change(clouds):
    """As published: the slope of log(k² + 1e-5) in k is at most 1 / sqrt(1e-5) = 316."""
    similarity = torch.linspace(-1, 1, 20001).requires_grad_()
    (slope,) = torch.autograd.grad(log_of_square(similarity.square()).sum(), similarity)
    assert slope.max().item() == pytest.approx(316, rel=0.01)
    assert log_of_square(torch.tensor(-1.0)).item() == pytest.approx(math.log(1e-5))
    query, key = (20 * part for part in clouds)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = SpectralLogits(HEADS, DIM, 8, floor=1e-3)
    start = logits(query, key)
    with torch.no_grad():
        logits.first.mul_(-3.0).add_(0.5)
    change = logits(query, key) - start
    assert change.abs().max() <= math.log(4 / 1e-3 + 1)
    assert change.abs().max() > 1


def test_order_and_sign_of_frequencies_do_not_matter(clouds, generator):
    with torch.random.fork_rng(devices=[]):
        logits = SpectralLogits(HEADS, DIM, 8, square="plain", is_stationary=False)
    before = logits(*clouds)
    order = torch.randperm(8, generator=generator)
    sign = torch.randint(2, (8, 1), generator=generator) * 2 - 1
    with torch.no_grad():
        for part in (logits.first, logits.second):
            part.copy_(sign * part[:, order])
    close(logits(*clouds), before)


def test_a_seed_means_the_same_frequencies_everywhere(generator):
    for draw in FREQUENCY_DRAWS:
        one, other = (
            normal_frequencies(
                2, 5, 3, draw=draw, generator=torch.Generator().manual_seed(7), dtype=dtype
            )
            for dtype in (torch.float64, torch.float32)
        )
        close(one.float(), other)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frequencies": 0}, "num_frequencies must be a whole number, at least 1, got 0"),
        (
            {"num_frequencies": 1, "square": "unbiased"},
            "num_frequencies must be a whole number, at least 2",
        ),
        (
            {"square": "rooted"},
            "square must be one of 'anchored', 'plain', 'unbiased', got 'rooted'",
        ),
        ({"draw": "halton"}, "draw must be one of 'independent', 'orthogonal', 'quasi'"),
        (
            {"square": "unbiased", "draw": "orthogonal"},
            "draw must be 'independent' for an unbiased square, got 'orthogonal'",
        ),
        ({"floor": 0.0}, "floor must be a positive number, got 0.0"),
        ({"magnitude": "yes"}, "magnitude must be of type Magnitude or bool, got 'yes'"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SpectralLogits(2, 3, **settings)
