"""Variational Bayes of shared components: dense posteriors, quadrature, and known widths."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Gamma, MultivariateNormal, Normal

from bayesattn.inference import CoordinateAscent
from bayesattn.models import AutomaticRelevance, Horseshoe, SharedComponents
from bayesattn.models.component_laws import SIDES, MeanFieldComponents
from bayesattn.models.head_products import scaled_products
from bayesattn.models.matrix_normal import MatrixNormal
from tests.models.component_cases import random_sides, shared_heads, units

HEADS, DIM, QUERY, KEY, COMPONENTS = 3, 2, 5, 7, 4
QUIET = {"seed": 0, "progress": False}
close = torch.testing.assert_close


def make_laws(generator, *, tolerance=0.3, prior=None, sizes=(HEADS, DIM, QUERY, KEY, COMPONENTS)):
    """Mean-field laws of random heads, and a state that is no special one."""
    heads, dim, query, key, components = sizes
    products = scaled_products(
        torch.randn(heads, dim, query, generator=generator),
        torch.randn(heads, dim, key, generator=generator),
    )
    family = MeanFieldComponents(products, prior or AutomaticRelevance(1.5, 0.2), tolerance)
    values = random_sides(generator, components, query, key, heads)
    values["precision"] = torch.rand(components, generator=generator) + 0.5
    state = family.around(values)
    for name in SIDES:
        noise = torch.randn(components, components + 1, generator=generator)
        state[f"{name}_covariance"] = 0.1 * noise @ noise.mT
    return family, state


def dense(products):
    return torch.einsum("hdq,hdk->hqk", products.query, products.key)


def test_a_side_has_its_posterior_given_the_others(generator):
    """Where the others are known the law is a linear regression's, put together densely."""
    family, state = make_laws(generator)
    target, precision = dense(family.products), state["precision_shape"] / state["precision_rate"]
    subscripts = {"query_component": "rk,rh->hkr", "key_component": "rq,rh->hqr"}
    subscripts["mixing"] = "rq,rk->qkr"
    order = {"query_component": (0, 2, 1), "key_component": (0, 1, 2), "mixing": (1, 2, 0)}
    for name in SIDES:
        others = [side for side in SIDES if side != name]
        known = state | {
            f"{side}_covariance": torch.zeros(COMPONENTS, COMPONENTS) for side in others
        }
        design = torch.einsum(subscripts[name], *(state[side] for side in others)).flatten(0, 1)
        rows = target.permute(order[name]).flatten(0, 1)
        covariance = torch.linalg.inv(design.mT @ design / 0.09 + precision.diag())
        found = family.renewed_side(known, name)
        close(found[f"{name}_covariance"], covariance)
        close(found[name], covariance @ design.mT @ rows / 0.09)


def test_the_bound_is_its_definition_by_quadrature(generator):
    """Polynomials by Gauss and Hermite, logarithms of precisions on a fine grid: exact to rounding.

    One head of one feature and two components, so that the sides have six entries.
    """
    prior, tolerance = AutomaticRelevance(1.5, 0.2), 0.3
    family, state = make_laws(generator, tolerance=tolerance, prior=prior, sizes=(1, 1, 1, 1, 2))
    laws = {name: MatrixNormal(state[name], state[f"{name}_covariance"]) for name in SIDES}
    points, weights = [-(3**0.5), 0.0, 3**0.5], [1 / 6, 2 / 3, 1 / 6]
    grid = torch.tensor(list(itertools.product(points, repeat=6)))
    mass = torch.tensor(list(itertools.product(weights, repeat=6))).prod(-1)
    draws = {
        name: laws[name].loc + torch.linalg.cholesky(laws[name].row_covariance) @ part[..., None]
        for name, part in zip(SIDES, grid.split(2, -1), strict=True)
    }
    made = (draws["query_component"] * draws["key_component"] * draws["mixing"]).sum((-2, -1))
    likelihood = Normal(made, tolerance).log_prob(dense(family.products).squeeze())
    log_q = sum(laws[name].log_prob(draws[name]) for name in SIDES)
    expected = (mass * (likelihood - log_q)).sum()
    squares = sum((mass[:, None] * draws[name].square().sum(-1)).sum(0) for name in SIDES)
    log_precision = torch.linspace(-30, 8, 200_001)
    for component in range(2):
        law = Gamma(state["precision_shape"][component], state["precision_rate"][component])
        precision = log_precision.exp()
        density = (law.log_prob(precision) + log_precision).exp()
        log_prior = Gamma(prior.shape, prior.rate).log_prob(precision)
        sides = 1.5 * (log_precision - math.log(2 * math.pi)) - precision * squares[component] / 2
        inside = density * (log_prior + sides - law.log_prob(precision))
        expected = expected + torch.trapezoid(inside, log_precision)
    close(family.elbo(state), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=25)
@given(
    st.tuples(*(st.integers(1, 5) for _ in range(5))),
    st.sampled_from([0.03, 0.3, 3.0]),
    st.integers(0, 2**16),
)
def test_no_step_lowers_the_bound(sizes, tolerance, seed):
    """Mutants: a rescaled precision the other way, shrinking without what other components see."""
    generator = torch.Generator().manual_seed(seed)
    family, state = make_laws(generator, tolerance=tolerance, sizes=sizes)
    before = family.elbo(state)
    for _ in range(4):
        state = family.renewed(state)
        after = family.elbo(state)
        assert after.isfinite()
        assert after >= before - 1e-10 * (1 + before.abs())
        before = after


def test_steps_end_where_the_bound_has_no_slope(generator):
    """By all parameters at once, of a prior that keeps all components."""
    family, state = make_laws(generator, tolerance=0.3)
    for _ in range(500):
        state = family.renewed(state)
    state = {name: value.clone().requires_grad_() for name, value in state.items()}
    slopes = torch.autograd.grad(family.elbo(state), list(state.values()))
    for name, slope in zip(state, slopes, strict=True):
        close(slope * state[name].detach().abs().amax(), torch.zeros_like(slope), atol=1e-4, rtol=0)


def test_the_bound_is_below_the_evidence_of_known_sides(generator):
    """And on it where all but mixing is known: the gap is the divergence from the posterior."""
    family, state = make_laws(generator)
    tiny = 1e-12 * torch.eye(COMPONENTS)
    state = state | {f"{name}_covariance": tiny for name in SIDES[:2]}
    state["precision_shape"], state["precision_rate"] = (
        1e12 * torch.ones(COMPONENTS),
        1e12 / torch.rand(COMPONENTS, generator=generator).add(0.5),
    )
    state |= family.renewed_side(state, "mixing")
    outer = torch.einsum("rq,rk->qkr", state["query_component"], state["key_component"])
    outer = outer.flatten(0, 1)
    precision = state["precision_shape"] / state["precision_rate"]
    covariance = 0.09 * torch.eye(len(outer)) + outer / precision @ outer.mT
    law = MultivariateNormal(torch.zeros(len(outer)), covariance)
    evidence = law.log_prob(dense(family.products).flatten(1)).sum()
    laws = family.laws(state)
    known = sum(laws[name].entropy().sum() for name in ("precision", *SIDES[:2]))
    prior = Gamma(1.5, 0.2).log_prob(precision).sum()
    rows = sum(
        Normal(0.0, precision.rsqrt()[:, None]).log_prob(state[name]).sum() for name in SIDES[:2]
    )
    close(family.elbo(state) - known, evidence + prior + rows, rtol=1e-6, atol=1e-4)


def test_matrix_normal_is_normal_of_its_columns(generator):
    noise = torch.randn(3, 5, generator=generator)
    law = MatrixNormal(torch.randn(3, 2, generator=generator), noise @ noise.mT)
    columns = MultivariateNormal(law.loc.mT, law.row_covariance)
    value = torch.randn(11, 3, 2, generator=generator)
    close(law.log_prob(value), columns.log_prob(value.mT).sum(-1))
    close(law.entropy(), columns.entropy().sum())
    close(law.variance, columns.variance.mT)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = law.rsample((20_000,))
    # To five standard errors.
    error = 5 * (law.variance / 20_000).sqrt()
    assert ((drawn.mean(0) - law.loc).abs() < error).all()
    centered = (drawn - law.loc).flatten(1)
    close(
        centered.mT @ centered / 20_000,
        torch.kron(law.row_covariance, torch.eye(2)),
        atol=0.05 * float(law.row_covariance.diagonal().max()),
        rtol=0,
    )


def find_width(data, num_components, tolerance, *, num_runs=3, num_steps=400):
    """Widths and bounds from heads apart and from two random starts, and the first of all."""
    model = SharedComponents(num_components, tolerance=tolerance)
    routine = CoordinateAscent(model, compile="none")
    posterior = routine.run(
        *data,
        num_steps=num_steps,
        num_samples=20,
        num_runs=num_runs,
        tolerance=1e-3,
        **QUIET,
    )
    start = model.initial_state(*data)
    energy = torch.stack([start[name].norm(dim=1) for name in SIDES]).prod(0)
    width = posterior.predict(sites=["width"])["width"]
    return posterior, width, int((energy > 0.01 * energy.max()).sum())


def test_the_width_is_found_from_all_starts(generator):
    """Three of eight; the start has all that it may have."""
    data = shared_heads(generator, heads=4, dim=2, query=11, key=13, components=3)
    posterior, width, first = find_width(data, 8, 0.1)
    assert (width == 3).all()
    assert first == 8
    # All starts come to one optimum, or a warning would be raised.
    assert posterior.optimization["elbo"][:, -1].diff().abs().max() < 1


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [0.1, 0.2, 0.3])
@pytest.mark.parametrize("sizes", [(4, 5, 23, 29, 8, 20), (12, 16, 64, 64, 32, 96)], ids=str)
def test_the_width_of_larger_layers_is_found(sizes, tolerance, generator):
    """Eight of twenty and 32 of 96, from heads apart and from chance, at 2 % noise."""
    heads, dim, query, key, components, most = sizes
    data = shared_heads(
        generator, heads=heads, dim=dim, query=query, key=key, components=components
    )
    _, width, first = find_width(data, most, tolerance, num_steps=2000)
    assert (width == components).all()
    assert first > 1.5 * components


def test_a_random_layer_needs_all_of_its_width(generator):
    """Mutant: a prior that prunes whatever there is. Nothing is shared by independent heads."""
    data = shared_heads(generator, heads=2, dim=3, query=11, key=13, components=6, noise=0.0)
    _, width, _ = find_width(data, 6, 0.05, num_runs=1, num_steps=100)
    assert (width == 6).all()


def test_single_precision_weights_have_the_same_laws(generator):
    data = shared_heads(generator, heads=4, dim=2, query=11, key=13, components=3)
    exact, _, _ = find_width(data, 8, 0.1, num_runs=1)
    ours, width, _ = find_width(tuple(side.float() for side in data), 8, 0.1, num_runs=1)
    assert ours.draws["mixing"].dtype == torch.float32
    assert (width == 3).all()
    curves = [posterior.optimization["elbo"][0, -1].double() for posterior in (ours, exact)]
    close(*curves, rtol=1e-4, atol=0.1)


def test_units_of_the_weights_do_not_matter(generator):
    query, key = shared_heads(generator, heads=4, dim=2, query=11, key=13, components=3)
    one, _, _ = find_width((query, key), 5, 0.1, num_runs=1)
    other, _, _ = find_width((100 * query, 0.03 * key), 5, 0.1, num_runs=1)
    close(one.optimization["elbo"][0, -1], other.optimization["elbo"][0, -1], rtol=1e-6, atol=1e-4)
    close(units(100 * query, key), units(query, key))


def test_only_precisions_have_closed_forms(generator):
    data = shared_heads(generator, heads=3, dim=2, query=5, key=7, components=3)
    with pytest.raises(ValueError, match=r"closed forms need scales=AutomaticRelevance\(\)"):
        CoordinateAscent(SharedComponents(4, Horseshoe())).run(*data, num_steps=3, **QUIET)
