"""Tests of the kernel Stein discrepancy and its bootstraps: calibration, power and errors."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesattn.inference import Posterior, ksd
from bayesattn.inference.bootstrap import (
    bootstrap_p_value,
    multinomial_multipliers,
    sign_multipliers,
)
from bayesattn.inference.stein_statistics import squared_stein_discrepancy, stein_discrepancy
from bayesattn.kernels import IMQ, RBF

DIM = 3
MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
SCALE = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)


def normal(location, spread):
    pyro.sample("x", dist.Normal(location, spread).to_event(1))


def posterior_of(draws, kind="iid_guide", **changes):
    """Draws (chain, draw, dim) as a posterior of the normal program."""
    fields = {"model": normal, "args": (MEAN, SCALE), "unconstrained": draws} | changes
    return Posterior({"x": draws}, method="test", draws_are=kind, **fields)


def exact(generator, num_chains=1, num_draws=500):
    return MEAN + SCALE * torch.randn(num_chains, num_draws, DIM, generator=generator)


def chain(generator, num_chains, num_draws, dim, memory):
    """Draws of a standard normal by an autoregression."""
    draws = torch.randn(num_chains, num_draws, dim, generator=generator)
    for t in range(1, num_draws):
        draws[:, t] = memory * draws[:, t - 1] + math.sqrt(1 - memory**2) * draws[:, t]
    return draws


def test_of_two_particles_is_that_of_the_formula():
    """RBF with h = 1 at 0 and 2, scores -x: u(x, y) = k (xy - (x - y)^2 + 1 - (x - y)^2)."""
    x = torch.tensor([[0.0], [2.0]])
    between = math.exp(-2) * (0 - 4 + 1 - 4)
    squared = (1 + (1 + 4) + 2 * between) / 4
    np.testing.assert_allclose(stein_discrepancy(x, -x, RBF(1.0)), math.sqrt(squared))
    np.testing.assert_allclose(squared_stein_discrepancy(x, -x, RBF(1.0)), between)


def test_of_normals_is_the_closed_form(generator):
    """Of N(m, 1) for the target N(0, 1), RBF with h = 1: m^2 E k(x, x') = m^2 / sqrt 3."""
    shift = 0.7
    x = shift + torch.randn(20000, 5, 1, generator=generator)
    values = squared_stein_discrepancy(x, -x, RBF(1.0))
    error = (values.mean() - shift**2 / math.sqrt(3)) / (values.std() / 20000**0.5)
    assert abs(error) < 4


@pytest.mark.parametrize("kernel", [RBF(1.0), IMQ(2.0)], ids=repr)
def test_stein_kernel_has_mean_zero_under_the_target(kernel):
    """By quadrature over x, at any y; and not under another law."""
    grid = torch.linspace(-12, 12, 2001)[:, None]
    weights = torch.exp(-grid[:, 0].square() / 2)
    weights = weights / weights.sum()
    gram = kernel.stein_gram(grid, -grid)
    np.testing.assert_allclose((gram @ weights)[500:1500], 0, atol=1e-12)
    assert (kernel.stein_gram(grid, 1 - grid) @ weights).abs().max() > 0.1


@settings(max_examples=30)
@given(seed=st.integers(0, 2**16), num_particles=st.integers(1, 8), dim=st.integers(1, 4))
def test_order_does_not_matter_and_one_particle_has_a_discrepancy(seed, num_particles, dim):
    generator = torch.Generator().manual_seed(seed)
    x, scores = torch.randn(2, num_particles, dim, generator=generator)
    order = torch.randperm(num_particles, generator=generator)
    value = stein_discrepancy(x, scores)
    assert value.isfinite()
    assert value >= 0
    torch.testing.assert_close(stein_discrepancy(x[order], scores[order]), value)


def test_duplicates_are_finite():
    x = torch.ones(5, 2)
    assert stein_discrepancy(x, -x).isfinite()
    np.testing.assert_allclose(
        stein_discrepancy(x, -x, IMQ(1.0)), stein_discrepancy(x[:1], -x[:1], IMQ(1.0))
    )


def test_batches_equal_a_loop(generator):
    x = torch.randn(2, 3, 7, 4, generator=generator)
    for function in (stein_discrepancy, squared_stein_discrepancy):
        expected = [[function(x[i, j], -x[i, j]) for j in range(3)] for i in range(2)]
        np.testing.assert_allclose(function(x, -x), expected)


def test_multipliers_have_mean_zero_and_variance_one(generator):
    many = 40000
    independent = multinomial_multipliers(many, 50, generator)
    assert (independent.sum(1) == 0).all()
    np.testing.assert_allclose(independent.square().mean(), 1 - 1 / 50, rtol=0.02)
    signs = sign_multipliers(many, 2, 5, generator, change_probability=0.1)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    products = signs.T @ signs / many
    lags = (torch.arange(5)[:, None] - torch.arange(5)).abs()
    within = 0.8**lags  # each step keeps the sign's expectation up to 1 - 2 a
    np.testing.assert_allclose(products, torch.block_diag(within, within), atol=0.025)
    np.testing.assert_allclose(signs.mean(0), 0, atol=0.025)


def test_p_value_counts_replicates_without_the_diagonal():
    gram = torch.tensor([[5.0, 1.0], [1.0, 7.0]])
    multipliers = torch.tensor([[1.0, 1.0], [1.0, -1.0], [3.0, 0.0]])  # 2, -2, 0 against 2
    assert bootstrap_p_value(gram, multipliers) == 2 / 4


def p_values(make_draws, make_multipliers, num_tests):
    """Of draws (chain, draw, dim) tested as standard normal ones."""
    values = []
    for _ in range(num_tests):
        draws = make_draws()
        rows = draws.flatten(0, 1)
        gram = IMQ((2 * draws.shape[-1]) ** 0.5).stein_gram(rows, -rows)
        values.append(bootstrap_p_value(gram, make_multipliers(*draws.shape[:2])))
    return torch.stack(values)


BOOTSTRAPS = {
    "multinomial": (0.0, lambda g: lambda c, n: multinomial_multipliers(200, c * n, g)),
    "wild": (1 / 3, lambda g: lambda c, n: sign_multipliers(200, c, n, g, change_probability=0.05)),
}


@pytest.mark.parametrize("name", BOOTSTRAPS)
@pytest.mark.parametrize("dim", [1, 5])
def test_p_values_are_calibrated_and_have_power(name, dim, generator):
    """Of 100 tests at level 0.1, fewer than 22 reject exact draws: 4 standard errors."""
    memory, multipliers = BOOTSTRAPS[name]
    make = lambda: chain(generator, 4, 40, dim, memory)  # noqa: E731
    values = p_values(make, multipliers(generator), 100)
    assert (values <= 0.1).double().mean() < 0.22
    assert 0.38 < values.mean() < 0.72
    for wrong in (lambda: make() + 0.7, lambda: 0.5 * make()):
        assert (p_values(wrong, multipliers(generator), 10) <= 0.05).double().mean() >= 0.9


def test_signs_without_memory_reject_good_chains(generator):
    """Why the wild bootstrap is there: chains that remember are no independent draws."""
    make = lambda: chain(generator, 4, 40, 5, 0.6)  # noqa: E731
    signs = lambda c, n: sign_multipliers(200, c, n, generator, change_probability=0.5)  # noqa: E731
    assert (p_values(make, signs, 30) <= 0.1).double().mean() > 0.4


@pytest.mark.parametrize("kind", ["iid_guide", "markov"])
def test_tells_exact_draws_from_shifted_and_narrowed_ones(kind, generator):
    draws = exact(generator, num_chains=2, num_draws=300)
    good = ksd(posterior_of(draws, kind))
    assert good.p_value > 0.05
    for wrong in (draws + 0.3 * SCALE, MEAN + 0.7 * (draws - MEAN)):
        found = ksd(posterior_of(wrong, kind))
        assert found.p_value < 0.02
        assert found.ksd > 1.5 * good.ksd
        assert found.squared > 10 * abs(good.squared)


def test_is_that_of_the_pure_functions_in_units_of_the_scale(generator):
    draws = exact(generator, num_draws=60)
    rows = draws[0]
    scores = (MEAN - rows) / SCALE**2
    for scale in (None, torch.tensor([0.2, 1.0, 20.0])):
        unit = rows.std(0) if scale is None else scale
        ours = ksd(posterior_of(draws), scale=scale, kernel=IMQ(1.5, exponent=0.3))
        arguments = rows / unit, scores * unit, IMQ(1.5, exponent=0.3)
        np.testing.assert_allclose(ours.ksd, stein_discrepancy(*arguments))
        np.testing.assert_allclose(ours.squared, squared_stein_discrepancy(*arguments))
    default = ksd(posterior_of(draws), kernel=IMQ(6**0.5))
    assert ksd(posterior_of(draws)) == default


def test_units_of_the_program_do_not_matter(generator):
    draws = exact(generator, num_draws=60)
    units = torch.tensor([10.0, 0.3, 7.0])
    other = posterior_of(draws * units, args=(MEAN * units, SCALE * units))
    np.testing.assert_allclose(ksd(other), ksd(posterior_of(draws)), rtol=1e-9)


def test_a_common_scale_tells_a_collapsed_posterior(generator):
    draws = exact(generator, num_draws=60)
    unit = draws.flatten(0, 1).std(0)
    good = ksd(posterior_of(draws), scale=unit)
    collapsed = ksd(posterior_of(MEAN + 0.01 * (draws - MEAN), "particles"), scale=unit)
    assert collapsed.ksd > 3 * good.ksd


def test_chains_are_thinned_to_what_they_are_worth(generator):
    """A slow chain of the target is not refused, as it is where its memory is overlooked."""
    slow = MEAN + SCALE * chain(generator, 4, 400, DIM, 0.95)
    assert ksd(posterior_of(slow, "markov")).p_value > 0.05
    assert ksd(posterior_of(slow, "iid_guide")).p_value < 0.01


def test_particles_and_too_few_draws_have_no_p_value(generator):
    draws = exact(generator, num_draws=60)
    assert math.isnan(ksd(posterior_of(draws, "particles")).p_value)
    assert math.isnan(ksd(posterior_of(draws[:, :10], "markov")).p_value)
    single = ksd(posterior_of(draws[:, :1], "point"), scale=SCALE)
    assert math.isnan(single.p_value)
    assert math.isnan(single.squared)
    assert single.ksd > 0


def test_uses_so_many_draws_and_is_reproducible(generator):
    draws = exact(generator, num_chains=2, num_draws=101)
    whole = posterior_of(draws)
    thin = ksd(whole, num_draws=42, scale=SCALE)
    assert thin == ksd(whole.thin(21), scale=SCALE) == ksd(whole, num_draws=42, scale=SCALE)
    chunked = ksd(whole, num_draws=42, scale=SCALE, chunk_size=10)
    np.testing.assert_allclose(chunked, thin)
    other = ksd(whole, num_draws=42, scale=SCALE, seed=1)
    assert other.ksd == thin.ksd
    assert other.p_value != thin.p_value


def test_is_measured_on_the_real_line(generator):
    """Draws of a constrained site, whose unconstrained values are not kept."""

    def positive():
        pyro.sample("s", dist.LogNormal(0.3, 0.5))

    line = 0.3 + 0.5 * torch.randn(1, 200, 1, generator=generator)
    fields = {"method": "test", "draws_are": "iid_guide", "model": positive}
    ours = ksd(Posterior({"s": line.exp()[..., 0]}, **fields))
    assert ours.p_value > 0.05
    rows, unit = line[0], line[0].std(0)
    expected = stein_discrepancy(rows / unit, (0.3 - rows) / 0.25 * unit, IMQ(2**0.5))
    np.testing.assert_allclose(ours.ksd, expected)


def subsampled(data):
    x = pyro.sample("x", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
    with pyro.plate("word", len(data), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=data[index])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"model": None}, {}, "this posterior has no model, so its score is not known"),
        ({"model": subsampled, "args": (torch.zeros(5),)}, {}, r"plates \['word'\] are subsampled"),
        ({"point_estimates": {"width": torch.ones(1)}}, {}, r"parameters \['width'\] were learned"),
        (
            {"unconstrained": torch.ones(1, 4, DIM)},
            {},
            "scale is not known where .* scale=: x",
        ),
        ({"unconstrained": torch.ones(1, 4, 2)}, {}, "the program has 3 unconstrained coordinates"),
        ({}, {"scale": torch.ones(2)}, "scale: expected one for each of 3 coordinates, got"),
        ({}, {"scale": torch.zeros(DIM)}, "scale is not positive: x"),
        ({}, {"num_draws": 0}, "num_draws must be at least one, got 0"),
        ({}, {"num_bootstrap": 0}, "num_bootstrap must be at least one, got 0"),
        ({}, {"change_probability": 0.7}, "change_probability must be above zero and at most"),
    ],
)
def test_refuses(changes, options, message, generator):
    posterior = posterior_of(exact(generator, num_draws=4), **changes)
    with pytest.raises(ValueError, match=message):
        ksd(posterior, **options)


def test_refuses_draws_at_which_the_score_is_not_finite(generator):
    draws = exact(generator, num_draws=4)
    draws[0, 1] = torch.inf
    with pytest.raises(ValueError, match=r"not finite at 1 of 4 draws, at sites \['x'\]"):
        ksd(posterior_of(draws), scale=SCALE)


def test_refuses_heads(generator):
    attrs = {"particle_plate": "head", "particle_plate_axes": {"x": 0}}
    heads = posterior_of(exact(generator), "heads", attrs=attrs)
    with pytest.raises(ValueError, match="the heads of one network: no single one is a draw"):
        ksd(heads)


def test_pure_functions_refuse_too_little():
    with pytest.raises(ValueError, match=r"needs two particles, got shape \(1, 2\)"):
        squared_stein_discrepancy(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="needs two draws and one replicate, got 1 and 3"):
        bootstrap_p_value(torch.zeros(1, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="at least one particle, got none"):
        stein_discrepancy(torch.zeros(0, 2), torch.zeros(0, 2))
