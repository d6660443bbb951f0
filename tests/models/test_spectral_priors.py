"""Priors of kernels: correlations of heads, closed forms and their rates, and symmetries."""

import math

import pyro
import pyro.poutine as poutine
import pytest
import torch
from scipy import stats

from bayesattn.logits.characteristic_functions import mixture_characteristic
from bayesattn.models import FrequencyMixture, FrequencyPairs, MagnitudePrior, RandomFrequencies
from bayesattn.models.spectral_mixtures import effective_number, stick_shares
from bayesattn.models.spectral_priors import feature_kernel

HEADS, DIM, POINTS, CONTEXT, FREQUENCIES = 3, 2, 5, 7, 11
close = torch.testing.assert_close

PRIORS = {
    "one set": RandomFrequencies(FREQUENCIES),
    "pairs": FrequencyPairs(FREQUENCIES),
    "mixture": FrequencyMixture(4),
}
every_prior = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)


def draw(prior, generator, *, heads=HEADS, dim=DIM, values=None):
    """A prior's kernels, drawn, and the values of its sites."""
    inputs = torch.zeros(1, dim)

    def program():
        return prior.sample(pyro.plate("head", heads), inputs)

    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        trace = poutine.trace(poutine.condition(program, values or {})).get_trace()
    sites = {n: node["value"] for n, node in trace.nodes.items() if node["type"] == "sample"}
    return trace.nodes["_RETURN"]["value"], sites


@every_prior
def test_kernels_are_positive_definite_and_one_where_inputs_are_equal(prior, generator):
    """Mutants: features of queries and keys by other frequencies, shares that sum to no one."""
    kernel, sites = draw(prior, generator)
    x = torch.randn(13, DIM, generator=generator)
    gram = kernel(x, x)
    assert gram.shape == (HEADS, 13, 13)
    close(gram, gram.mT)
    assert torch.linalg.eigvalsh(gram).min() > -1e-12
    if "normal_frequency" not in sites or sites["normal_frequency"].ndim == 3:
        close(gram.diagonal(dim1=-2, dim2=-1), torch.ones(HEADS, 13))
    origin = torch.zeros(1, DIM)
    close(kernel(origin, origin), torch.ones(HEADS, 1, 1))


@every_prior
def test_all_series_and_heads_have_kernels_of_their_own_place(prior, generator):
    """Mutants: heads and series mixed up; one kernel for all heads."""
    kernel, _ = draw(prior, generator)
    x = torch.randn(2, POINTS, DIM, generator=generator)
    y = torch.randn(2, CONTEXT, DIM, generator=generator)
    together = kernel(x, y)
    assert together.shape == (2, HEADS, POINTS, CONTEXT)
    for series in range(2):
        for i in range(POINTS):
            pair = kernel(x[series, i : i + 1], y[series])
            close(together[series, :, i : i + 1], pair)
    assert (together[:, 0] - together[:, 1]).abs().max() > 1e-3


def test_kernels_follow_the_lkj_law_of_correlations(generator):
    """(R + 1) / 2 of two heads is Beta(η + (H - 2) / 2, same); mutants: another η, no coupling."""
    prior = RandomFrequencies(2, correlation_shape=4.0)
    drawn = [draw(prior, generator)[1]["head_correlation"] for _ in range(150)]
    shape = 4.0 + (HEADS - 2) / 2
    for i, j in ((0, 1), (0, 2), (1, 2)):
        halves = torch.stack([(one[i, j] + 1) / 2 for one in drawn])
        # A false alarm in a thousand runs.
        assert stats.kstest(halves.numpy(), stats.beta(shape, shape).cdf).pvalue > 3e-4


def test_heads_correlate_by_coordinates_of_one_frequency(generator):
    """Mutants: products with row sums or the transposed factor, mixing over frequencies."""
    many = RandomFrequencies(20_000, scale_spread=0.1)
    factor = torch.linalg.cholesky(torch.tensor([[1, 0.9, 0.2], [0.9, 1, 0.5], [0.2, 0.5, 1]]))
    _, sites = draw(many, generator, dim=1, values={"head_factor": factor})
    close(sites["head_correlation"], factor @ factor.mT)
    frequencies = sites["scaled_frequency"][..., 0]
    found = torch.corrcoef(frequencies)
    close(found, factor @ factor.mT, rtol=0.0, atol=5 / 20_000**0.5)
    close(frequencies.std(-1), sites["frequency_scale"], rtol=5 * (0.5 / 20_000) ** 0.5, atol=0)
    swapped = torch.corrcoef(torch.stack([frequencies[0], frequencies[1].roll(1)]))
    assert swapped[0, 1].abs() < 0.05


@pytest.mark.parametrize(("shape", "heads"), [(None, HEADS), (1.0, 1)])
def test_heads_are_apart_where_nothing_couples_them(shape, heads, generator):
    _, sites = draw(RandomFrequencies(3, correlation_shape=shape), generator, heads=heads)
    assert "head_factor" not in sites
    scaled = sites["frequency_scale"][:, None, None] * sites["normal_frequency"]
    close(sites["scaled_frequency"], scaled)


def test_scales_are_log_normal_around_the_median(generator):
    """Mutants: the mean in the place of the median, a spread left out."""
    scale, spread = 3.0, 0.5
    prior = RandomFrequencies(1, scale=scale, scale_spread=spread, correlation_shape=None)
    logs = draw(prior, generator, heads=2000)[1]["frequency_scale"].log()
    assert stats.kstest(logs.numpy(), stats.norm(math.log(scale), spread).cdf).pvalue > 1e-3


def expected_kernel(name, scale, x, y):
    """Mean kernel of frequencies of one scale."""

    def kappa(difference):
        return torch.exp(-2 * math.pi**2 * scale**2 * difference.square().sum(-1))

    of_difference = kappa(x[:, None] - y)
    if name == "one set":
        return of_difference
    return (of_difference + kappa(x)[:, None] * kappa(y)) / 2


@pytest.mark.parametrize("name", ["one set", "pairs"])
def test_kernels_meet_their_closed_form_at_the_rate_of_sampling(name, generator):
    """Errors fall by the root of the number; mutants: a factor of two, members of one law apart."""
    kind, scale = type(PRIORS[name]), 0.3
    x = torch.randn(POINTS, DIM, generator=generator)
    y = torch.randn(CONTEXT, DIM, generator=generator)
    heads = 50
    given = {"frequency_scale": torch.full((heads,), scale)}
    sizes, errors = (50, 200, 800, 3200), []
    for size in sizes:
        prior = kind(size, correlation_shape=None)
        kernel, _ = draw(prior, generator, heads=heads, values=given)
        difference = kernel(x, y) - expected_kernel(name, scale, x, y)
        errors.append(difference.square().mean().sqrt())
        assert difference.mean(0).abs().max() < 5 / (heads * size) ** 0.5
    logs = [torch.tensor(row, dtype=torch.float64).log() for row in (sizes, errors)]
    slope = torch.linalg.lstsq(torch.stack([logs[0], torch.ones(4)], -1), logs[1][:, None])
    assert slope.solution[0].item() == pytest.approx(-0.5, abs=0.07)


@pytest.mark.parametrize("name", ["one set", "pairs"])
def test_order_and_signs_of_frequencies_do_not_matter(name, generator):
    """Nor, in pairs, which member is which; a pair whose members part is another kernel."""
    shape = (HEADS, 2, FREQUENCIES, DIM) if name == "pairs" else (HEADS, FREQUENCIES, DIM)
    frequencies = torch.randn(shape, generator=generator)
    x = torch.randn(POINTS, DIM, generator=generator)
    order = torch.randperm(FREQUENCIES, generator=generator)
    signs = torch.randint(2, (FREQUENCIES, 1), generator=generator) * 2.0 - 1

    def kernel(given):
        return feature_kernel(x, x, *(given.unbind(1) if name == "pairs" else (given,)))

    before = kernel(frequencies)
    close(kernel((signs * frequencies)[..., order, :]), before)
    if name == "pairs":
        close(kernel(frequencies.flip(1)), before)
        alone = frequencies * torch.stack([torch.ones_like(signs), signs])
        assert (kernel(alone) - before).abs().max() > 1e-3


def test_mixtures_are_means_over_frequencies_drawn(generator):
    """Beside a Monte Carlo mean of cosines; mutants: a variance for a scale, one sign alone."""
    kernel, sites = draw(PRIORS["mixture"], generator)
    x = torch.randn(POINTS, DIM, generator=generator)
    y = torch.randn(CONTEXT, DIM, generator=generator)
    size = 20_000
    for head in range(HEADS):
        chosen = torch.multinomial(sites["shares"][head], size, True, generator=generator)
        noise = torch.randn(size, DIM, generator=generator)
        mean, scale = sites["component_mean"][head], sites["component_scale"][head]
        signs = torch.randint(2, (size, 1), generator=generator) * 2.0 - 1
        frequencies = signs * mean[chosen] + scale[chosen] * noise
        turns = torch.einsum("ijd,fd->ijf", x[:, None] - y, frequencies)
        expected = (2 * math.pi * turns).cos().mean(-1)
        close(kernel(x, y)[head], expected, rtol=0.0, atol=5 / size**0.5)
    shares, mean, scale = (sites[name] for name in ("shares", "component_mean", "component_scale"))
    order = [2, 0, 3, 1]
    turned = shares[:, order], -mean[:, order], scale[:, order]
    lag = torch.randn(1, POINTS, DIM, generator=generator)
    close(mixture_characteristic(lag, *turned), mixture_characteristic(lag, shares, mean, scale))


def test_shares_are_what_is_broken_off(generator):
    sticks = torch.rand(HEADS, 4, generator=generator)
    for row, found in zip(sticks.tolist(), stick_shares(sticks), strict=True):
        left = 1.0
        for part, share in zip([*row, 1.0], found.tolist(), strict=True):
            assert share == pytest.approx(part * left, rel=1e-12)
            left -= share
    close(stick_shares(sticks).sum(-1), torch.ones(HEADS))
    assert torch.autograd.gradcheck(stick_shares, sticks.requires_grad_())


def test_effective_number_counts_equal_shares():
    shares = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]])
    close(effective_number(shares), torch.tensor([4.0, 2.0, 1.0]))


def test_the_concentration_says_how_many_components_are_in_effect(generator):
    """Sticks have the mean 1 / (1 + α); mutants: its arguments swapped."""
    few, many = (FrequencyMixture(20, concentration=a) for a in (0.5, 5.0))
    drawn = [draw(prior, generator, heads=500)[1] for prior in (few, many)]
    for sites, mean in zip(drawn, (1 / 1.5, 1 / 6), strict=True):
        sticks = sites["stick"]
        error = 5 * sticks.std() / sticks.numel() ** 0.5
        assert abs(sticks.mean() - mean) < error
        close(sites["effective_components"], effective_number(sites["shares"]))
    assert drawn[0]["effective_components"].mean() + 2 < drawn[1]["effective_components"].mean()


def test_magnitudes_are_half_a_power_norm_over_the_temperature(generator):
    keys = torch.randn(2, CONTEXT, DIM, generator=generator)
    values = {
        "temperature": torch.tensor([0.5, 1.0, 2.0]),
        "power_excess": torch.tensor([0.5, 1.0, 2.0]),
    }

    def program():
        return MagnitudePrior().sample(pyro.plate("head", HEADS), keys)

    trace = poutine.trace(poutine.condition(program, values)).get_trace()
    found = trace.nodes["_RETURN"]["value"]
    close(trace.nodes["power"]["value"], torch.tensor([1.5, 2.0, 3.0]))
    for head, (p, temperature) in enumerate([(1.5, 0.5), (2.0, 1.0), (3.0, 2.0)]):
        for key in range(CONTEXT):
            total = sum(abs(x) ** p for x in keys[1, key].tolist())
            norm = DIM ** (1 - 2 / p) * total ** (2 / p)
            expected = norm / (2 * temperature * DIM**0.5)
            assert found[1, head, key].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomFrequencies(0), "num_frequencies must be positive, got 0"),
        (lambda: RandomFrequencies(3, scale=-1.0), "scale must be positive, got -1.0"),
        (lambda: FrequencyMixture(1), "num_components must be at least two, got 1"),
        (lambda: MagnitudePrior(power_spread=0), "power_spread must be positive, got 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
