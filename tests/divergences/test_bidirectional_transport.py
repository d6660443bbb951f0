"""Tests of conditional transport: its formula, both routes, its limits, and who descends."""

import numpy as np
import pytest
import torch

from bayesattn.divergences import ConditionalTransport, conditional_transport
from bayesattn.divergences.transport_costs import unit_vectors
from tests import reference
from tests.compilation import in_one_graph

pytestmark = pytest.mark.usefixtures("seeded_layers")

HEADS, DIM = 3, 5


def squared(x, y):
    return float(((x - y) ** 2).sum())


def cosine(x, y):
    return float(1 - x @ y / np.sqrt((x @ x) * (y @ y)))


COSTS = {"squared": squared, "cosine": cosine}


def clouds(generator, num_queries=7, num_keys=11):
    """Clouds of heads, with masks that leave out some points of each."""
    query = torch.randn(2, HEADS, num_queries, DIM, generator=generator)
    key = 0.3 + torch.randn(2, HEADS, num_keys, DIM, generator=generator)
    masks = [torch.rand(2, 1, x.shape[-2], generator=generator) > 0.3 for x in (query, key)]
    for mask in masks:
        mask[..., 2] = True
    return query, key, *masks


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("route", ["dense", "fused"])
def test_is_that_of_loops(cost, route, generator):
    """Mutants: no weights in a plan, one direction twice, the temperature squared."""
    query, key = torch.randn(4, DIM, generator=generator), torch.randn(6, DIM, generator=generator)
    a, b = torch.rand(4, generator=generator), torch.rand(6, generator=generator)
    price, temperature = COSTS[cost], 0.7
    found = conditional_transport(
        query, key, weights=(a, b), cost=cost, temperature=temperature, route=route
    )
    expected = reference.conditional_transport(
        lambda x, y: -price(x, y) / temperature, price, *(v.numpy() for v in (query, key, a, b))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("route", ["dense", "fused"])
def test_learned_plans_and_costs_are_those_of_loops(route, generator):
    query, key, *_ = clouds(generator)
    transport = ConditionalTransport.learned(HEADS, DIM, route=route)
    found = transport(query, key)
    guides, judged = (
        [network(x).detach().numpy() for x in (query, key)]
        for network in (transport.navigator, transport.critic)
    )
    for i in range(2):
        for h in range(HEADS):
            # Points are known by their numbers, for which there are features of two kinds.
            value = reference.conditional_transport(
                lambda x, y, i=i, h=h: guides[0][i, h, x] @ guides[1][i, h, y],
                lambda x, y, i=i, h=h: cosine(judged[0][i, h, x], judged[1][i, h, y]),
                range(7),
                range(11),
                np.ones(7),
                np.ones(11),
            )
            np.testing.assert_allclose(found[i, h].item(), value, rtol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConditionalTransport(),
        lambda: ConditionalTransport(cost="squared", temperature=1.3, debiased=True),
        lambda: ConditionalTransport.learned(HEADS, DIM, debiased=True),
        lambda: ConditionalTransport.learned(HEADS, DIM, cost="squared"),
    ],
)
def test_routes_agree_with_their_gradients(make, generator):
    query, key, *masks = clouds(generator)
    transport = make()
    leaves = [query.requires_grad_(), key.requires_grad_(), *transport.parameters()]
    results = []
    for route in ("dense", "fused"):
        transport.route = route
        value = transport(query, key, *masks)
        results.append([value, *torch.autograd.grad(value.sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for gradient, mask in zip(results[1][1:3], masks, strict=True):
        assert (gradient[~mask.expand(gradient.shape[:-1])] == 0).all()


def test_large_clouds_take_the_fused_route(generator):
    """It has no second derivatives, which tells the routes apart."""
    query, key = torch.randn(2, 300, 2, generator=generator)
    for size, is_fused in ((40, False), (300, True)):
        x = query[:size].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            conditional_transport(x, key[:size]), x, create_graph=True
        )
        if is_fused:
            with pytest.raises(RuntimeError, match="second derivatives"):
                torch.autograd.grad(gradient.sum(), x)
        else:
            torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("debiased", [False, True])
def test_gradcheck(route, cost, debiased, generator):
    query, key, *masks = (x[:1, :1] for x in clouds(generator))
    transport = ConditionalTransport(cost=cost, temperature=0.9, debiased=debiased, route=route)
    leaves = [query.requires_grad_(), key.requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, y: transport(x, y, *masks), leaves)


def test_debiased_is_zero_at_equality_and_plain_is_not(generator):
    """Mutant: half of one self-cost only."""
    query, _, mask, _ = clouds(generator)
    for cost in COSTS:
        plain, debiased = (
            ConditionalTransport(cost=cost, temperature=2.0, debiased=is_debiased)
            for is_debiased in (False, True)
        )
        torch.testing.assert_close(
            debiased(query, query, mask, mask), torch.zeros(2, HEADS), rtol=0, atol=1e-13
        )
        assert plain(query, query, mask, mask).min() > 1e-3


@pytest.mark.parametrize("route", ["dense", "fused"])
def test_debiased_is_no_metric(route):
    """Negative for three points of two clusters, where random clouds never are."""
    x = torch.tensor([[0.1], [2.0], [2.0]])
    y = torch.tensor([[0.0], [0.2], [2.0]])
    settings = {"cost": "squared", "temperature": 0.1, "debiased": True, "route": route}
    found = conditional_transport(x, y, **settings)
    torch.testing.assert_close(found, torch.tensor(-3.508e-4), rtol=1e-3, atol=0.0)


def test_plain_rescales_a_cloud_beside_itself_and_debiased_does_not(generator):
    query = torch.randn(9, DIM, generator=generator)
    slopes = []
    for debiased in (False, True):
        scale = torch.ones((), requires_grad=True)
        value = conditional_transport(
            scale * query, scale * query, cost="squared", temperature=2.0, debiased=debiased
        )
        slopes.append(torch.autograd.grad(value, scale)[0])
    assert abs(slopes[0]) > 0.1
    torch.testing.assert_close(slopes[1], torch.zeros(()), rtol=0, atol=1e-12)


def test_hot_plans_compare_means(generator):
    """At high temperature all pairs are alike. Mutant: a factor of the debiased terms."""
    query, key = torch.randn(8, DIM, generator=generator), torch.randn(6, DIM, generator=generator)
    found = {
        cost: conditional_transport(query, key, cost=cost, temperature=1e9, debiased=True)
        for cost in COSTS
    }
    torch.testing.assert_close(found["squared"], (query.mean(0) - key.mean(0)).square().sum())
    means = unit_vectors(query).mean(0) - unit_vectors(key).mean(0)
    torch.testing.assert_close(found["cosine"], 0.5 * means.square().sum())


def test_cold_plans_go_to_the_nearest(generator):
    query, key = torch.randn(8, DIM, generator=generator), torch.randn(6, DIM, generator=generator)
    found = conditional_transport(query, key, cost="squared", temperature=1e-4)
    apart = torch.cdist(query, key).square()
    torch.testing.assert_close(found, 0.5 * (apart.amin(1).mean() + apart.amin(0).mean()))


def test_navigator_descends_and_critic_ascends(generator):
    """One backward pass: each small step along its own way. Mutants: neither, or both reversed."""
    query, key, *masks = clouds(generator)
    transport = ConditionalTransport.learned(HEADS, DIM)
    query.requires_grad_()
    for part, sign in ((transport.navigator, -1), (transport.critic, 1), (query, -1)):
        parameters = [part] if part is query else list(part.parameters())
        before = transport(query, key, *masks).sum()
        gradients = torch.autograd.grad(before, parameters)
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 1e-3 * gradient
            after = transport(query, key, *masks).sum()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter += 1e-3 * gradient
        assert sign * (after - before) > 0


def test_a_navigator_that_descends_sharpens_its_plan(generator):
    """The published code lets it ascend, between unit vectors, so that plans stay even."""
    query, key = torch.randn(2, HEADS, 12, DIM, generator=generator)
    transport = ConditionalTransport.learned(HEADS, DIM)
    optimizer = torch.optim.Adam(transport.navigator.parameters(), lr=0.02)

    def evenness():
        with torch.no_grad():
            logits = transport.navigator(query) @ transport.navigator(key).mT
        return torch.special.entr(logits.softmax(-1)).sum(-1).mean() / np.log(12)

    assert evenness() > 0.95
    for _ in range(150):
        optimizer.zero_grad()
        transport(query, key).sum().backward()
        optimizer.step()
    assert evenness() < 0.7


def test_tokens_are_matched_within_a_head_and_not_across(generator):
    """Mutant: clouds of all heads at one token, as in the published code."""
    query = torch.randn(HEADS, 6, DIM, generator=generator)
    key = query[:, torch.randperm(6, generator=generator)]
    value = conditional_transport(query, key, temperature=1e-3)
    torch.testing.assert_close(value, torch.zeros(HEADS), rtol=0, atol=1e-9)
    assert conditional_transport(query, key[[1, 2, 0]], temperature=1e-3).min() > 0.05


def test_alike_clouds_far_from_the_origin_keep_their_digits(generator):
    """A spread of .05 at 300, of which float32 squares leave nothing. Mutant: no center."""
    query, key = (300 + 0.05 * torch.randn(2, 40, 8, generator=generator)).float()
    for route in ("dense", "fused"):
        settings = {"cost": "squared", "temperature": 0.01, "route": route}
        exact = conditional_transport(query.double(), key.double(), **settings)
        found = conditional_transport(query, key, **settings)
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)


def test_a_zero_vector_has_finite_gradients():
    query = torch.zeros(2, 3, requires_grad=True)
    key = torch.eye(3)
    value = conditional_transport(query, key)
    value.backward()
    torch.testing.assert_close(value, torch.tensor(0.5))
    assert (query.grad == 0).all()


@pytest.mark.compile
@pytest.mark.parametrize("route", ["dense", "fused"])
def test_compiles_in_one_graph(route, generator):
    query, key, *masks = clouds(generator)
    for transport in (
        ConditionalTransport(route=route, debiased=True),
        ConditionalTransport.learned(HEADS, DIM, route=route),
    ):
        expected = transport(query, key, *masks)
        torch.testing.assert_close(in_one_graph(transport, query, key, *masks), expected)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cost": "euclidean"}, "cost: expected 'cosine' or 'squared', got 'euclidean'"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"temperature": float("nan")}, "temperature: expected a positive number, got nan"),
        ({"route": "fast"}, "route: expected 'auto', 'dense' or 'fused', got 'fast'"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        ConditionalTransport(**settings)


@pytest.mark.usefixtures("unchecked_types")
def test_learned_parts_refuse_other_heads():
    transport = ConditionalTransport.learned(HEADS, DIM)
    for shape in ((HEADS + 1, 4, DIM), (HEADS, 4, DIM + 1), (4, DIM)):
        with pytest.raises(ValueError, match=rf"points: expected '\*batch {HEADS} point {DIM}'"):
            transport(torch.zeros(shape), torch.zeros(shape))
