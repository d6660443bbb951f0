"""Components with mixing integrated out: against covariances of dense products, and widths."""

import pyro
import pyro.poutine as poutine
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from bayesattn.inference import NUTS, SVI, CoordinateAscent, LogDensity, compare
from bayesattn.models import (
    AutomaticRelevance,
    ComponentScalesAlone,
    GammaProcess,
    Horseshoe,
    MarginalComponents,
    SharedComponents,
)
from tests.models.component_cases import shared_heads, units

HEADS, DIM, QUERY, KEY, COMPONENTS = 3, 2, 5, 7, 4
TOLERANCE = 0.4
QUIET = {"seed": 0, "progress": False}
close = torch.testing.assert_close


@pytest.fixture
def heads(generator):
    return (
        torch.randn(HEADS, DIM, QUERY, generator=generator),
        torch.randn(HEADS, DIM, KEY, generator=generator),
    )


@pytest.fixture
def values(generator):
    return {
        "query_direction": torch.randn(COMPONENTS, QUERY, generator=generator),
        "key_direction": torch.randn(COMPONENTS, KEY, generator=generator),
        "precision": torch.rand(COMPONENTS, generator=generator) * 3 + 0.1,
    }


def nodes_of(model, *args, **values):
    """Sites of the program at given values."""
    with torch.random.fork_rng():
        return poutine.trace(pyro.condition(model, data=values)).get_trace(*args).nodes


def by_hand(heads, sides, precision):
    """Density of the dense products, and moments of mixing by its normal law."""
    rows = [torch.outer(a, b).flatten() for a, b in zip(*sides, strict=True)]
    outer, target = torch.stack(rows, 1), units(*heads).flatten(1)
    covariance = TOLERANCE**2 * torch.eye(QUERY * KEY) + outer / precision @ outer.mT
    law = MultivariateNormal(torch.zeros(QUERY * KEY), covariance)
    inverse = outer.mT @ outer / TOLERANCE**2 + torch.diag(precision)
    covariance = torch.linalg.inv(inverse)
    means = covariance @ outer.mT @ target.mT / TOLERANCE**2
    second = means @ means.mT + HEADS * covariance
    energy = outer.norm(dim=0) * second.diagonal().sqrt()
    left = (target.mT - outer @ means).square().sum() + HEADS * (
        outer.mT @ outer * covariance
    ).sum()
    return {
        "products": law.log_prob(target).sum(),
        "energy": energy.sort(descending=True).values,
        "relative_error": (left / target.square().sum()).sqrt(),
        "means": means,
    }


def check(nodes, expected):
    close(nodes["products"]["fn"].log_factor, expected["products"])
    for name in ("energy", "relative_error"):
        close(nodes[name]["value"], expected[name])


def test_mixing_is_integrated_out(heads, values, generator):
    """Mutants: a determinant of one head, a variance of mixing left out of the energy."""
    tokens = torch.randn(11, QUERY, generator=generator), torch.randn(13, KEY, generator=generator)
    model = MarginalComponents(COMPONENTS, tolerance=TOLERANCE)
    nodes = nodes_of(model, *heads, *tokens, **values)
    scale = values["precision"].rsqrt()[:, None]
    sides = scale * values["query_direction"], scale * values["key_direction"]
    expected = by_hand(heads, sides, values["precision"])
    check(nodes, expected)
    mean = torch.einsum(
        "rh,nr,mr->hnm", expected["means"], *(t @ s.mT for t, s in zip(tokens, sides, strict=True))
    )
    unit = torch.einsum("hdq,hdk->hqk", *heads).square().mean().sqrt()
    close(nodes["logits"]["value"], mean * unit / DIM**0.5)


def test_the_density_is_that_of_shared_components_integrated(heads, values, generator):
    """Over mixing, by importance: the mean of the joint density over the law of mixing."""
    model = MarginalComponents(COMPONENTS, tolerance=TOLERANCE)
    scale = values["precision"].rsqrt()[:, None]
    sides = {
        "query_component": scale * values["query_direction"],
        "key_component": scale * values["key_direction"],
    }
    expected = by_hand(heads, list(sides.values()), values["precision"])
    joint = SharedComponents(COMPONENTS, tolerance=TOLERANCE)
    told = sides | {"precision": values["precision"], "mixing": expected["means"]}
    nodes = nodes_of(joint, *heads, **told)
    outer = torch.einsum("rq,rk->rqk", *sides.values()).flatten(1)
    inverse = outer @ outer.mT / TOLERANCE**2 + torch.diag(values["precision"])
    law = MultivariateNormal(expected["means"].mT, precision_matrix=inverse)
    prior = Normal(0.0, scale).log_prob(expected["means"]).sum()
    at_means = nodes["products"]["fn"].log_factor + prior
    evidence = at_means - law.log_prob(expected["means"].mT).sum()
    close(nodes_of(model, *heads, **values)["products"]["fn"].log_factor, evidence)


def test_scales_alone_are_those_of_directions_that_are_given(heads, values):
    """Rows of any length count as rows of the length of standard normal ones."""
    given = 3.0 * values["query_direction"], values["key_direction"]
    model = ComponentScalesAlone(AutomaticRelevance(), tolerance=TOLERANCE)
    nodes = nodes_of(model, *heads, *given, precision=values["precision"])
    usual = [row * row.shape[1] ** 0.5 / row.norm(dim=1, keepdim=True) for row in given]
    sides = [values["precision"].rsqrt()[:, None] * row for row in usual]
    check(nodes, by_hand(heads, sides, values["precision"]))
    whole = MarginalComponents(COMPONENTS, tolerance=TOLERANCE)
    told = {"query_direction": usual[0], "key_direction": usual[1]}
    same = nodes_of(whole, *heads, precision=values["precision"], **told)
    close(same["products"]["fn"].log_factor, nodes["products"]["fn"].log_factor)


def test_scales_may_be_next_to_nothing(heads, values):
    model = MarginalComponents(COMPONENTS)
    nodes = nodes_of(model, *heads, **values | {"precision": torch.full((COMPONENTS,), 1e30)})
    expected = Normal(0.0, 0.1).log_prob(units(*heads)).sum()
    close(nodes["products"]["fn"].log_factor, expected)


@pytest.mark.parametrize("scales", [AutomaticRelevance(), Horseshoe(), GammaProcess()], ids=repr)
def test_densities_have_scores(heads, scales, generator):
    density = LogDensity(MarginalComponents(COMPONENTS, scales), *heads)
    rows = 0.3 * torch.randn(2, density.dim, generator=generator)
    value, score = density.value_and_score(rows)
    assert value.isfinite().all()
    shift = 1e-5 * torch.randn(density.dim, generator=generator)
    ahead, behind = (density.value_and_score(rows + sign * shift)[0] for sign in (1, -1))
    close((ahead - behind) / 2, score @ shift, rtol=1e-4, atol=1e-7)


def fit_laws(data):
    """Variational laws of three components in five, and their directions."""
    routine = CoordinateAscent(SharedComponents(5), compile="none")
    laws = routine.run(*data, num_steps=300, tolerance=1e-3, num_samples=300, **QUIET)
    return laws, [laws[name].mean((0, 1)) for name in ("query_component", "key_component")]


def test_a_chain_over_directions_starts_where_laws_are(generator):
    """Which no random place comes near."""
    data = shared_heads(generator, heads=3, dim=2, query=7, key=5, components=3)
    laws, _ = fit_laws(data)
    start = MarginalComponents(5).start({name: laws[name][0, 0] for name in laws.draws})
    density = LogDensity(MarginalComponents(5), *data)
    values = {name: value[None] for name, value in start.items()}
    there = density.value_and_score(density.unconstrain(values))[0]
    anywhere = density.value_and_score(torch.randn(20, density.dim, generator=generator))[0]
    assert there.item() > anywhere.max()


@pytest.mark.slow
def test_routines_agree_on_the_width_of_a_known_layer(generator):
    """A chain given directions as reference: laws of all sides have its energies, but wider."""
    data = shared_heads(generator, heads=3, dim=2, query=7, key=5, components=3)
    laws, directions = fit_laws(data)
    model = SharedComponents(5)
    routine = NUTS(ComponentScalesAlone(AutomaticRelevance()), target_accept_prob=0.9)
    nuts = routine.run(*data, *directions, warmup_steps=100, num_samples=150, **QUIET)
    svi = SVI(model, guide="normal", init_scale=0.01).run(
        *data, num_steps=1500, num_samples=300, init=model.initial_state(*data), **QUIET
    )
    found = {"laws": laws, "svi": svi}
    for posterior in (nuts, *found.values()):
        width = posterior.predict(sites=["width"])["width"]
        assert (width == 3).double().mean() > 0.9
    exported = nuts.to_arviz()
    assert exported.posterior["precision"].dims == ("chain", "draw", "component")
    assert exported.posterior["energy"].dims == ("chain", "draw", "component")
    sites = ["energy", "relative_error"]
    table = compare(nuts, sites=sites, num_null=20, **found).sites
    assert set(table.index.get_level_values("posterior")) == {"laws", "svi"}
    energies = [
        posterior.predict(sites=["energy"])["energy"][..., :3].flatten(0, 1)
        for posterior in (nuts, laws, svi)
    ]
    for energy in energies[1:]:
        assert ((energy.mean(0) - energies[0].mean(0)).abs() < 3 * energy.std(0)).all()
        assert (energy.std(0) > energies[0].std(0)).all()


@pytest.mark.usefixtures("unchecked_types")
def test_rows_of_zeros_take_no_part(heads, values):
    """As factors of a larger width than there is have them."""
    model = ComponentScalesAlone(AutomaticRelevance(), tolerance=TOLERANCE)
    given = values["query_direction"].clone(), values["key_direction"].clone()
    given[0][3] = given[1][3] = 0
    whole = nodes_of(model, *heads, *given, precision=values["precision"])
    part = nodes_of(model, *heads, *(rows[:3] for rows in given), precision=values["precision"][:3])
    close(whole["products"]["fn"].log_factor, part["products"]["fn"].log_factor)
    assert whole["energy"]["value"][3] == 0
    with pytest.raises(ValueError, match="query_component, key_component: expected as many rows"):
        nodes_of(model, *heads, given[0][:, 1:], given[1])
