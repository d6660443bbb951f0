"""Components that heads share: densities against dense tensors, and the width that is inferred."""

import math

import pyro
import pyro.poutine as poutine
import pytest
import torch
from torch.distributions import Normal

from bayesattn.factorization import factorize
from bayesattn.inference import SVI, LogDensity
from bayesattn.models import (
    AutomaticRelevance,
    GammaProcess,
    Horseshoe,
    MultiplicativeGamma,
    SharedComponents,
)
from bayesattn.models.head_products import scaled_products

HEADS, DIM, QUERY, KEY, COMPONENTS = 3, 2, 5, 7, 4
SCALES = [AutomaticRelevance(), Horseshoe(), GammaProcess(), MultiplicativeGamma()]


@pytest.fixture
def heads(generator):
    return (
        torch.randn(HEADS, DIM, QUERY, generator=generator),
        torch.randn(HEADS, DIM, KEY, generator=generator),
    )


@pytest.fixture
def shareable(generator):
    """Six heads that each mix two of four components, and a little noise."""
    pools = [torch.randn(4, size, generator=generator) for size in (11, 13)]
    sides = [[], []]
    for _ in range(6):
        chosen = torch.randperm(4, generator=generator)[:2]
        sizes = torch.randn(2, 1, generator=generator)
        for side, pool, factor in zip(sides, pools, (sizes, 1.0), strict=True):
            side.append(factor * pool[chosen])
    return [
        torch.stack(side) + 0.02 * torch.randn(6, 2, size, generator=generator)
        for side, size in zip(sides, (11, 13), strict=True)
    ]


def units(query, key):
    """Products, dense, in units of their root mean square."""
    dense = torch.einsum("hdq,hdk->hqk", query, key)
    return dense / dense.square().mean().sqrt()


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
    sizes = {"query_component": QUERY, "key_component": KEY, "mixing": HEADS}
    values = {
        name: torch.randn(COMPONENTS, size, generator=generator) for name, size in sizes.items()
    }
    model = SharedComponents(COMPONENTS, tolerance=0.3)
    found, nodes = factor_of(model, *heads, **values)
    query, key, mixing = values.values()
    mean = torch.einsum("rq,rh,rk->hqk", query, mixing, key)
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


def test_the_width_of_shared_heads_is_inferred(shareable):
    """Four of nine by a factorized normal law; the factorization itself uses all nine."""
    model = SharedComponents(9)
    posterior = SVI(model, guide="normal").run(*shareable, num_steps=1500, seed=0, progress=False)
    found = posterior.predict(*shareable, sites=["width", "energy"])
    assert found["width"].mode().values.unique().tolist() == [4.0]
    energy = found["energy"].mean((0, 1)).sort(descending=True).values
    assert energy[4] < 0.02 * energy[3]
    fitted = factorize(*shareable, 9)
    sizes = fitted.query_weight.norm(dim=1) * fitted.key_weight.norm(dim=1)
    assert (sizes > 0.01 * sizes[0]).sum() == 9


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
