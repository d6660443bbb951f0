"""Tests of bayesattn.inference.matching."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesattn.inference.matching import match_heads
from bayesattn.inference.posterior import Posterior


def shuffled(values, generator):
    """Values in which the heads (axis 2) of each draw come in an order of their own."""
    order = torch.rand(values.shape[:3], generator=generator).argsort(-1)
    order[0, 0] = torch.arange(values.shape[2])
    index = order.reshape(*order.shape, *[1] * (values.ndim - 3))
    return values.take_along_dim(index, 2), order


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    chains=st.integers(1, 3),
    draws=st.integers(1, 7),
    heads=st.integers(1, 5),
    features=st.integers(1, 3),
)
def test_shuffled_heads_are_recovered(seed, chains, draws, heads, features):
    generator = torch.Generator().manual_seed(seed)
    centers = 10 * torch.arange(heads)[:, None] + torch.randn(heads, features, generator=generator)
    noise = torch.randn(chains, draws, heads, features, generator=generator)
    values, order = shuffled(centers + 0.1 * noise, generator)
    found = match_heads(values)
    assert torch.equal(order.gather(-1, found), torch.arange(heads).expand(chains, draws, heads))
    again = values.take_along_dim(found[..., None], 2)
    assert torch.equal(match_heads(again), torch.arange(heads).expand(chains, draws, heads))


def test_order_of_two_draws_is_the_best_of_all(generator):
    values = torch.randn(1, 2, 4, 3, generator=generator)
    first, second = values[0]
    cost = {p: (first - second[list(p)]).square().sum() for p in itertools.permutations(range(4))}
    assert tuple(match_heads(values)[0, 1].tolist()) == min(cost, key=cost.get)
    assert match_heads(values)[0, 0].tolist() == [0, 1, 2, 3]


def test_features_are_not_changed(generator):
    values = torch.randn(2, 3, 4, 5, generator=generator)
    before = values.clone()
    match_heads(values)
    assert torch.equal(values, before)


def network(tokens, label=None):
    with pyro.plate("layer", 2, dim=-2), pyro.plate("head", 3, dim=-1):
        query = pyro.sample("query_weight", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        gain = pyro.sample("gain", dist.Gamma(2.0, 2.0))
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
    readout = pyro.sample("readout", dist.Normal(0.0, 1.0).expand([7, 6]).to_event(2))
    mean = torch.einsum("nd,lhd,lh->nhl", tokens, query, gain).flatten(1) @ readout.T + bias
    pyro.deterministic("mean", mean)


@pytest.fixture
def posterior(generator):
    centers = 10 * torch.arange(3.0)[:, None] + torch.randn(3, 5, generator=generator)
    noise = torch.randn(2, 11, 2, 3, 5, generator=generator)
    return Posterior(
        {
            "query_weight": centers + 0.1 * noise,
            "gain": torch.rand(2, 11, 2, 3, generator=generator),
            "bias": torch.randn(2, 11, generator=generator),
            "readout": torch.randn(2, 11, 7, 6, generator=generator),
        },
        method="NUTS",
        draws_are="markov",
        model=network,
        args=(torch.randn(4, 5, generator=generator),),
        sample_stats={"lp": torch.zeros(2, 11)},
        unconstrained=torch.zeros(2, 11, 2),
    )


def shuffle(posterior, generator):
    """The same networks, whose heads come in other orders; the readout follows."""
    moved, order = shuffled(posterior["query_weight"].movedim(3, 2), generator)
    blocks = posterior["readout"].unflatten(-1, (3, 2)).movedim(3, 2)
    blocks = blocks.take_along_dim(order[..., None, None], 2).movedim(2, 3).flatten(3)
    draws = {
        "query_weight": moved.movedim(2, 3),
        "gain": posterior["gain"].take_along_dim(order[:, :, None], 3),
        "readout": blocks,
    }
    return posterior.replace(draws={**posterior.draws, **draws}), order


def test_all_that_belongs_to_a_head_moves_along(posterior, generator):
    mixed, order = shuffle(posterior, generator)
    torch.testing.assert_close(mixed.predict(), posterior.predict())
    matched = mixed.match("head", by=["query_weight"], blocks={"readout": -1})
    for name, value in posterior.draws.items():
        assert torch.equal(matched[name], value), name
    torch.testing.assert_close(matched.predict(), posterior.predict())
    permutation = matched.sample_stats["head_permutation"]
    assert torch.equal(order.gather(-1, permutation), torch.arange(3).expand(2, 11, 3))
    assert matched.unconstrained is None
    assert matched.to_arviz()["sample_stats"]["head_permutation"].dims == ("chain", "draw", "head")


def test_permutations_of_two_matchings_compose(posterior, generator):
    mixed, order = shuffle(posterior, generator)
    once = mixed.match("head", by=["query_weight"], blocks={"readout": 1})
    again, second = shuffle(once, generator)
    again = again.replace(
        sample_stats={"head_permutation": once.sample_stats["head_permutation"].gather(-1, second)}
    ).match("head", by=["query_weight"], blocks={"readout": 1})
    assert torch.equal(again["readout"], posterior["readout"])
    total = again.sample_stats["head_permutation"]
    assert torch.equal(order.gather(-1, total), torch.arange(3).expand(2, 11, 3))


def test_sites_count_alike_whatever_their_units(posterior, generator):
    """By default all sites decide: the query's separation wins over noise, however it is scaled."""
    mixed, _ = shuffle(posterior, generator)
    large = mixed.replace(draws={**mixed.draws, "gain": 1e6 * mixed["gain"]})
    permutations = [
        p.match("head", blocks={"readout": 1}).sample_stats["head_permutation"]
        for p in (mixed, large)
    ]
    assert torch.equal(*permutations)


def test_axes_come_from_names_without_a_model(posterior, generator):
    mixed, _ = shuffle(posterior, generator)
    bare = mixed.replace(
        model=None, site_dims={"query_weight": ("head", "feature"), "gain": ("layer", "head")}
    )
    matched = bare.match("head", by=["query_weight"], blocks={"readout": 1})
    assert torch.equal(matched["gain"], posterior["gain"])


def test_heads_that_are_draws(generator):
    centers = 10 * torch.arange(3.0)[:, None] + torch.randn(3, 5, generator=generator)
    values = (centers + 0.1 * torch.randn(4, 3, 5, generator=generator))[:, None]
    mixed, order = shuffled(values, generator)
    order[0] = torch.arange(3)
    mixed[0] = values[0]
    readout = torch.randn(4, 6, 2, generator=generator)
    blocks = (
        readout.unflatten(1, (3, 2)).take_along_dim(order[:, 0, :, None, None], 1).flatten(1, 2)
    )
    posterior = Posterior(
        {"query_weight": mixed[:, 0]},
        method="SVGD",
        draws_are="heads",
        unconstrained=mixed[:, 0],
        sample_stats={"stein_norm": mixed[:, 0, :, 0]},
        point_estimates={"readout": blocks},
        attrs={"particle_plate": "head", "particle_plate_axes": {"query_weight": 0}},
    )
    matched = posterior.match("head", blocks={"readout": 0})
    assert torch.equal(matched["query_weight"], values[:, 0])
    assert torch.equal(matched.unconstrained, values[:, 0])
    assert torch.equal(matched.sample_stats["stein_norm"], values[:, 0, :, 0])
    assert torch.equal(matched.point_estimates["readout"], readout)
    permutation = matched.sample_stats["head_permutation"]
    assert torch.equal(order[:, 0].gather(-1, permutation), torch.arange(3).expand(4, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plate": "heads"}, "no site is in a plate 'heads'; sites:"),
        ({"plate": "head", "by": ["bias"]}, "by must name sites in the plate 'head', of"),
        ({"plate": "head", "by": []}, "by must name sites in the plate 'head', of"),
        (
            {"plate": "head", "blocks": {"readout": 0}},
            r"axis of \(7, 6\) that divides into 3 blocks",
        ),
        (
            {"plate": "head", "blocks": {"readout": 2}},
            r"axis of \(7, 6\) that divides into 3 blocks",
        ),
        ({"plate": "head", "blocks": {"gain": 0}}, "must name sites outside of the plate"),
    ],
)
def test_bad_requests_are_refused(posterior, options, message):
    with pytest.raises(ValueError, match=message):
        posterior.match(**options)
