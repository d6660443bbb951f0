"""Components that heads share: densities against dense tensors, and the width that is inferred."""

import math

import pyro
import pyro.poutine as poutine
import pytest
import torch
from torch.distributions import Normal

from bayesattn.factorization import factorize
from bayesattn.inference import SVGD, SVI, CoordinateAscent, LogDensity
from bayesattn.models import (
    AutomaticRelevance,
    GammaProcess,
    Horseshoe,
    MultiplicativeGamma,
    SharedComponents,
)
from bayesattn.models.head_products import scaled_products
from tests.models.component_cases import approximation, random_sides, shared_heads, units

QUIET = {"seed": 0, "progress": False}
HEADS, DIM, QUERY, KEY, COMPONENTS = 3, 2, 5, 7, 4
SCALES = [AutomaticRelevance(), Horseshoe(), GammaProcess(), MultiplicativeGamma()]


@pytest.fixture
def shared(generator):
    return shared_heads(generator, heads=3, dim=2, query=7, key=5, components=3)


@pytest.fixture
def heads(generator):
    return (
        torch.randn(HEADS, DIM, QUERY, generator=generator),
        torch.randn(HEADS, DIM, KEY, generator=generator),
    )


def factor_of(model, *args, **values):
    """The program's factor and its sites, at given values."""
    conditioned = pyro.condition(model, data=values)
    with torch.random.fork_rng():
        trace = poutine.trace(conditioned).get_trace(*args)
    return trace.nodes["products"]["fn"].log_factor, trace.nodes


def test_products_are_in_units_of_their_root_mean_square(heads):
    products = scaled_products(*heads)
    dense = torch.einsum("hdq,hdk->hqk", products.query, products.key)
    torch.testing.assert_close(dense, units(*heads))
    assert products.num_entries == HEADS * QUERY * KEY


def test_the_factor_is_the_density_of_the_dense_products(heads, generator):
    values = random_sides(generator, COMPONENTS, QUERY, KEY, HEADS)
    model = SharedComponents(COMPONENTS, tolerance=0.3)
    found, nodes = factor_of(model, *heads, **values)
    query, key, mixing = values.values()
    mean = approximation(query, key, mixing)
    expected = Normal(mean, 0.3).log_prob(units(*heads)).sum()
    torch.testing.assert_close(found, expected)
    energy = torch.stack(
        [torch.einsum("q,h,k->hqk", *row).norm() for row in zip(query, mixing, key, strict=True)]
    )
    torch.testing.assert_close(nodes["energy"]["value"], energy.sort(descending=True).values)
    error = (units(*heads) - mean).norm() / units(*heads).norm()
    torch.testing.assert_close(nodes["relative_error"]["value"], error)
    assert nodes["width"]["value"] == (energy > 0.01 * energy.max()).sum()


@pytest.mark.parametrize("scales", SCALES)
def test_sites_have_one_scale_for_all_three_sides(heads, scales):
    with torch.random.fork_rng():
        trace = poutine.trace(SharedComponents(COMPONENTS, scales)).get_trace(*heads)
    laws = [
        trace.nodes[name]["fn"].base_dist for name in ("query_component", "key_component", "mixing")
    ]
    for law in laws:
        assert law.scale.shape[0] == COMPONENTS
        torch.testing.assert_close(law.scale, laws[0].scale[:, :1].expand(law.scale.shape))
        assert not law.loc.any()


def test_laws_of_scales(heads):
    values = {"global_scale": torch.tensor(0.2), "local_scale": torch.tensor([0.1, 1.0, 30.0, 1e6])}
    _, nodes = factor_of(SharedComponents(COMPONENTS, Horseshoe(slab=2.0)), *heads, **values)
    scale = nodes["mixing"]["fn"].base_dist.scale[:, 0]
    free = 0.2 * values["local_scale"]
    torch.testing.assert_close(scale, 1 / (1 / free**2 + 1 / 4.0).sqrt())
    precision = torch.tensor([1.0, 4.0, 9.0, 16.0])
    _, nodes = factor_of(SharedComponents(COMPONENTS), *heads, precision=precision)
    torch.testing.assert_close(nodes["mixing"]["fn"].base_dist.scale[:, 0], precision.rsqrt())
    growth = torch.tensor([1.0, 2.0, 3.0, 4.0])
    model = SharedComponents(COMPONENTS, MultiplicativeGamma())
    _, nodes = factor_of(model, *heads, growth=growth)
    expected = torch.tensor([1.0, 2.0, 6.0, 24.0]).rsqrt()
    torch.testing.assert_close(nodes["mixing"]["fn"].base_dist.scale[:, 0], expected)


@pytest.mark.parametrize("scales", SCALES)
def test_densities_have_scores(heads, scales, generator):
    density = LogDensity(SharedComponents(COMPONENTS, scales), *heads)
    rows = 0.3 * torch.randn(2, density.dim, generator=generator)
    value, score = density.value_and_score(rows)
    assert value.isfinite().all()
    shift = 1e-5 * torch.randn(density.dim, generator=generator)
    ahead, behind = (density.value_and_score(rows + sign * shift)[0] for sign in (1, -1))
    torch.testing.assert_close((ahead - behind) / 2, score @ shift, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_the_width_of_shared_heads_is_inferred(shared):
    """Three of five by a factorized normal law; the factorization itself uses all five."""
    model, fitted = SharedComponents(5), factorize(*shared, 5)
    routine = SVI(model, guide="normal", init_scale=0.01)
    posterior = routine.run(*shared, num_steps=600, init=model.initial_state(*shared), **QUIET)
    found = posterior.predict(sites=["width", "energy"])
    assert found["width"].mode().values.unique().tolist() == [3.0]
    energy = found["energy"].mean((0, 1))
    assert energy[3] < 0.05 * energy[2]
    sizes = fitted.query_weight.norm(dim=1) * fitted.key_weight.norm(dim=1)
    assert (sizes > 0.01 * sizes[0]).sum() == 5


@pytest.mark.slow
def test_the_width_of_a_larger_layer_is_inferred_by_other_priors_and_not_by_modes(generator):
    """Eight of twenty by factorized normal laws; a mode under the horseshoe keeps many more."""
    data = shared_heads(generator, heads=4, dim=5, query=23, key=29, components=8)
    init = SharedComponents(20).initial_state(*data)
    posterior = SVI(SharedComponents(20), guide="normal", init_scale=0.01).run(
        *data, num_steps=2000, init=init, **QUIET
    )
    width = posterior.predict(sites=["width"])["width"]
    assert width.mode().values.unique().tolist() == [8.0]
    point = SVI(SharedComponents(20, Horseshoe()), guide="delta").run(
        *data, num_steps=1000, **QUIET
    )
    assert point.predict(sites=["width"])["width"] > 10


@pytest.mark.slow
def test_particles_stay_with_what_they_are_given(shared):
    """From variational laws; a random start of as many steps keeps components that none needs."""
    model = SharedComponents(5)
    laws = CoordinateAscent(model).run(*shared, num_steps=300, tolerance=1e-3, **QUIET)
    routine = SVGD(model, num_particles=30)
    found = {
        name: routine.run(*shared, num_steps=200, init=init, **QUIET).predict(
            sites=["width", "relative_error"]
        )
        for name, init in (("warm", laws), ("cold", None))
    }
    assert (found["warm"]["width"] == 3).all()
    assert found["warm"]["relative_error"].max() < 0.1
    assert found["cold"]["relative_error"].mean() > 3 * found["warm"]["relative_error"].mean()


def test_logits_are_scaled_by_the_width_that_heads_had(heads, generator):
    """At components that are the heads' own, whatever their number: no colder, and no hotter."""
    query_tokens = torch.randn(11, QUERY, generator=generator)
    key_tokens = torch.randn(13, KEY, generator=generator)
    model = SharedComponents(HEADS * DIM)
    start = model.initial_state(*heads)
    nodes = factor_of(model, *heads, query_tokens, key_tokens, **start)[1]
    queries, keys = query_tokens @ heads[0].mT, key_tokens @ heads[1].mT
    expected = queries @ keys.mT / DIM**0.5
    torch.testing.assert_close(nodes["logits"]["value"], expected)
    assert nodes["relative_error"]["value"] < 1e-6
    with pytest.raises(ValueError, match="logits need query_tokens and key_tokens, got no key_t"):
        factor_of(model, *heads, query_tokens, **start)


def test_what_is_told_does_not_hang_on_order_and_signs(heads, generator):
    tokens = torch.randn(11, QUERY, generator=generator), torch.randn(13, KEY, generator=generator)
    values = random_sides(generator, COMPONENTS, QUERY, KEY, HEADS)
    precision = torch.rand(COMPONENTS, generator=generator)
    order = torch.tensor([2, 0, 3, 1])
    signs = torch.tensor([[-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0], [1.0, 1.0, 1.0], [1.0, -1.0, -1.0]])
    turned = {
        name: (value * sign[:, None])[order]
        for (name, value), sign in zip(values.items(), signs.unbind(1), strict=True)
    }
    model = SharedComponents(COMPONENTS)
    before, one = factor_of(model, *heads, *tokens, precision=precision, **values)
    after, other = factor_of(model, *heads, *tokens, precision=precision[order], **turned)
    torch.testing.assert_close(before, after)
    for name in ("energy", "width", "relative_error", "logits"):
        torch.testing.assert_close(one[name]["value"], other[name]["value"])


def test_axes_have_names(heads):
    model = SharedComponents(COMPONENTS)
    posterior = CoordinateAscent(model, compile="none").run(
        *heads, num_steps=5, num_samples=3, **QUIET
    )
    exported = posterior.to_arviz()
    sides = {"query_component": "query_feature", "key_component": "key_feature", "mixing": "head"}
    for site, axis in sides.items():
        assert exported.posterior[site].dims == ("chain", "draw", "component", axis)
    assert exported.posterior["energy"].dims == ("chain", "draw", "component")
    assert exported.posterior["width"].dims == ("chain", "draw")
    assert exported.constant_data["query_weight"].dims == ("head", "dim", "query_feature")


@pytest.mark.usefixtures("unchecked_types")
def test_refuses(heads):
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        SharedComponents(3, tolerance=0)
    with pytest.raises(ValueError, match="num_components must be positive, got -1"):
        SharedComponents(-1)
    with pytest.raises(ValueError, match="slab must be positive"):
        Horseshoe(slab=-1)
    with pytest.raises(ValueError, match="expected 'head dim feature' of the same heads"):
        scaled_products(heads[0], heads[1][:1])
    assert math.isclose(SharedComponents(3).tolerance, 0.1)
