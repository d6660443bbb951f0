"""Tests of entropic transport: values, gradients, both routes, limits, and how far it converges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch.fx.experimental.proxy_tensor import make_fx

from bayesattn.divergences import (
    Divergence,
    EntropicTransport,
    SinkhornDivergence,
    entropic_duals,
    entropic_transport,
    sinkhorn_divergence,
)
from bayesattn.divergences.transport_costs import unit_vectors
from tests.compilation import in_one_graph

LOSSES = [EntropicTransport, SinkhornDivergence]
ROUTES = ["dense", "fused"]
# Cost, an ε for clouds of unit spread, and as many iterations as it takes to converge.
CASES = [("cosine", 0.1, 400), ("squared", 1.5, 400)]


def clouds(generator, num_queries=7, num_keys=5, dim=3, batch=(2,)):
    """Clouds with masks that leave out some points of each, and weights."""
    query = torch.randn(*batch, num_queries, dim, generator=generator)
    key = 0.4 + torch.randn(*batch, num_keys, dim, generator=generator)
    masks = [torch.rand(x.shape[:-1], generator=generator) > 0.3 for x in (query, key)]
    for mask in masks:
        mask[..., 2:4] = True
    weights = [0.2 + torch.rand(x.shape[:-1], generator=generator) for x in (query, key)]
    return query, key, *masks, tuple(weights)


def costs(query, key, cost):
    if cost == "squared":
        return (query[:, None] - key).square().sum(-1)
    return 1 - torch.cosine_similarity(query[:, None], key, dim=-1)


def plan_of_loops(matrix, a, b, epsilon, count=4000):
    """Plan and minimum by plain alternation; differentiable, step by step."""
    g = torch.zeros_like(b)
    for _ in range(count):
        f = -epsilon * torch.logsumexp((g - matrix) / epsilon + b.log(), 1)
        g = -epsilon * torch.logsumexp((f[:, None] - matrix) / epsilon + a.log()[:, None], 0)
    plan = a[:, None] * b * ((f[:, None] + g - matrix) / epsilon).exp()
    return plan, (a * f).sum() + (b * g).sum()


def minimum_of_loops(points, weights, cost, epsilon, count=200):
    """Between a cloud and itself, where alternation is slow and halfway steps are not."""
    matrix, f = costs(points, points, cost), torch.zeros_like(weights)
    for _ in range(count):
        f = 0.5 * (f - epsilon * torch.logsumexp((f - matrix) / epsilon + weights.log(), 1))
    return 2 * (weights * f).sum()


def loss_of_loops(loss, query, key, a, b, cost, epsilon, count=4000):
    a, b = a / a.sum(), b / b.sum()
    matrix = costs(query, key, cost)
    plan, minimum = plan_of_loops(matrix, a, b, epsilon, count)
    if loss is EntropicTransport:
        return (plan * matrix).sum()
    alone = [minimum_of_loops(x, w, cost, epsilon) for x, w in ((query, a), (key, b))]
    return minimum - 0.5 * alone[0] - 0.5 * alone[1]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("cost", "epsilon", "count"), CASES)
@pytest.mark.parametrize("loss", LOSSES)
def test_is_that_of_loops_under_masks_and_weights(loss, cost, epsilon, count, route, generator):
    """Mutants: half of ε, no log weight, a half for a whole of what a cloud costs by itself."""
    query, key, query_mask, key_mask, weights = clouds(generator)
    found = loss(cost, epsilon, count, route)(query, key, query_mask, key_mask, weights)
    for i in range(2):
        rows, columns = query_mask[i], key_mask[i]
        a, b = weights[0][i, rows], weights[1][i, columns]
        expected = loss_of_loops(loss, query[i, rows], key[i, columns], a, b, cost, epsilon)
        np.testing.assert_allclose(found[i], expected, rtol=1e-9)


@pytest.mark.parametrize(("cost", "epsilon", "count"), CASES)
@pytest.mark.parametrize("loss", LOSSES)
def test_routes_agree_with_their_gradients(loss, cost, epsilon, count, generator):
    query, key, *masks, weights = clouds(generator, 23, 17, 4, (2, 3))
    leaves = [x.requires_grad_() for x in (query, key, *weights)]
    results = []
    for route in ROUTES:
        value = loss(cost, epsilon, count, route)(query, key, *masks, weights)
        results.append([value, *torch.autograd.grad(value.sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    for gradient, mask in zip(results[1][1:3], masks, strict=True):
        assert gradient[mask].abs().amin(0).max() > 0
        assert (gradient[~mask] == 0).all()


def test_routes_go_through_the_same_iterates(generator):
    """Also where they are far from the end. Mutants: another ε, another relaxation in one."""
    query, key, *masks, weights = clouds(generator, 23, 17, 4)
    for count in (1, 4, 13, 40):
        duals = [
            entropic_duals(
                query, key, *masks, weights, epsilon=0.1, num_iterations=count, route=route
            )
            for route in ROUTES
        ]
        for one, other in zip(*duals, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        assert (duals[0].marginal_error > 1e-9).all()


@pytest.mark.parametrize(("cost", "epsilon", "count"), CASES)
@pytest.mark.parametrize("loss", LOSSES)
def test_first_and_second_derivatives_by_points_and_weights(loss, cost, epsilon, count, generator):
    """By differences. Mutants: multipliers of the wrong sign; half the gain of moving duals."""
    query, key, *masks, weights = clouds(generator, 4, 4, 2, ())
    divergence = loss(cost, epsilon, count, "dense")
    inputs = [x.requires_grad_() for x in (query, key, *weights)]

    def value(x, y, a, b):
        return divergence(x, y, *masks, (a, b))

    assert torch.autograd.gradcheck(value, inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert torch.autograd.gradgradcheck(value, inputs)


@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivatives_under_transforms_are_those_of_autograd(loss, generator):
    query, key = (torch.randn(n, 2, generator=generator) for n in (4, 5))
    divergence = loss("cosine", 0.2, 100)
    found = torch.func.jacrev(torch.func.jacrev(lambda x: divergence(x, key)))(query)
    expected = torch.autograd.functional.hessian(lambda x: divergence(x, key), query)
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0.01


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_that_of_differentiating_every_iteration(loss, route, generator):
    query, key = (torch.randn(n, 3, generator=generator).requires_grad_() for n in (6, 5))
    a, b = (0.2 + torch.rand(n, generator=generator) for n in (6, 5))
    leaves, epsilon = (query, key), 0.1
    value = loss("cosine", epsilon, 400, route)(query, key, weights=(a, b))
    unrolled = loss_of_loops(loss, query, key, a, b, "cosine", epsilon, 2000)
    found, expected = (torch.autograd.grad(x, leaves) for x in (value, unrolled))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_debiased_is_positive_symmetric_and_zero_at_equality(seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(n, 3, generator=generator) for n in sizes)
    a, b = (0.2 + torch.rand(n, generator=generator) for n in sizes)
    divergence = SinkhornDivergence("squared", 2.0, 200)
    value = divergence(query, key, weights=(a, b))
    assert value > 0
    torch.testing.assert_close(divergence(key, query, weights=(b, a)), value)
    order = torch.randperm(len(query), generator=generator)
    assert divergence(query, query[order], weights=(a, 3 * a[order])) < 1e-12


def test_sharp_pulls_a_cloud_upon_itself_and_debiased_does_not(generator):
    query = torch.randn(9, 3, generator=generator)
    slopes = []
    for loss in LOSSES:
        scale = torch.ones((), requires_grad=True)
        value = loss("squared", 3.0, 300)(scale * query, scale * query)
        slopes.append(torch.autograd.grad(value, scale)[0])
    assert slopes[0] > 0.1
    torch.testing.assert_close(slopes[1], torch.zeros(()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("route", ROUTES)
def test_a_shift_costs_its_squared_length(route, generator):
    """At any ε, and however few iterations. Mutant: the means left out of either side."""
    query, shift = torch.randn(9, 3, generator=generator), torch.tensor([3.0, -1.0, 0.5])
    for epsilon in (0.01, 1.0, 100.0):
        divergence = SinkhornDivergence("squared", epsilon, 300, route)
        found = divergence(query, query + shift)
        torch.testing.assert_close(found, shift.square().sum(), rtol=1e-8, atol=0)
    shift.requires_grad_()
    value = SinkhornDivergence("squared", 0.01, 2, route)(query, 1.1 * query + shift)
    (gradient,) = torch.autograd.grad(value, shift)
    torch.testing.assert_close(gradient, 2 * (0.1 * query.mean(0) + shift))


def test_hot_plans_compare_means(generator):
    query, key = torch.randn(8, 3, generator=generator), torch.randn(6, 3, generator=generator)
    apart = query.mean(0) - key.mean(0)
    turned = unit_vectors(query).mean(0) - unit_vectors(key).mean(0)
    for route in ROUTES:
        hot = {"epsilon": 1e5, "route": route}
        found = sinkhorn_divergence(query, key, cost="squared", **hot)
        torch.testing.assert_close(found, apart.square().sum(), rtol=1e-4, atol=0)
        found = sinkhorn_divergence(query, key, **hot)
        torch.testing.assert_close(found, 0.5 * turned.square().sum(), rtol=1e-4, atol=0)
        # The plan is that of independent points.
        found = entropic_transport(query, key, **hot)
        torch.testing.assert_close(found, costs(query, key, "cosine").mean(), rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("cost", ["cosine", "squared"])
def test_cold_plans_are_assignments(cost, generator):
    query, key = torch.randn(2, 12, 3, generator=generator)
    matrix = costs(query, key, cost)
    rows, columns = linear_sum_assignment(matrix)
    expected = matrix[rows, columns].mean()
    for route in ROUTES:
        found = entropic_transport(
            query, key, cost=cost, epsilon=2e-4, num_iterations=1000, route=route
        )
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)
    assert matrix.min(1).values.mean() < 0.9 * expected


def test_one_point_a_side():
    query = torch.tensor([[1.0, 2.0]], requires_grad=True)
    key = torch.tensor([[1.0, 5.0]])
    for loss in LOSSES:
        for route in ROUTES:
            value = loss("squared", 0.3, 5, route)(query, key)
            torch.testing.assert_close(value, torch.tensor(9.0))
            (gradient,) = torch.autograd.grad(value, query)
            torch.testing.assert_close(gradient, torch.tensor([[0.0, -6.0]]))


def test_one_query_goes_to_all_keys(generator):
    query, key = torch.randn(1, 3, generator=generator), torch.randn(5, 3, generator=generator)
    b = torch.rand(5, generator=generator)
    for route in ROUTES:
        found = entropic_transport(query, key, weights=(None, b), route=route)
        torch.testing.assert_close(found, (b / b.sum() * costs(query, key, "cosine")[0]).sum())


def test_duals_are_those_of_loops(generator):
    query, key = torch.randn(6, 3, generator=generator), 1 + torch.randn(5, 3, generator=generator)
    a, b = torch.full((6,), 1 / 6), torch.rand(5, generator=generator)
    b = b / b.sum()
    matrix = costs(query, key, "squared")
    plan, minimum = plan_of_loops(matrix, a, b, 2.0)
    duals = entropic_duals(
        query, key, weights=(None, b), cost="squared", epsilon=2.0, num_iterations=300
    )
    exponent = (duals.dual_f[:, None] + duals.dual_g - matrix) / 2.0
    torch.testing.assert_close(a[:, None] * b * exponent.exp(), plan)
    torch.testing.assert_close((a * duals.dual_f).sum() + (b * duals.dual_g).sum(), minimum)
    assert duals.marginal_error < 1e-12


def test_marginal_error_is_that_of_the_plan_and_falls(generator):
    """Mutant: relaxation in the last iterations too, or none at all."""
    query, key = (torch.randn(n, 8, generator=generator) for n in (50, 64))
    matrix, errors = costs(query, key, "cosine"), []
    for count in (20, 100, 200):
        duals = entropic_duals(query, key, num_iterations=count)
        exponent = (duals.dual_f[:, None] + duals.dual_g - matrix) / 0.01
        plan = exponent.exp() / (50 * 64)
        torch.testing.assert_close(plan.sum(1), torch.full((50,), 1 / 50))
        torch.testing.assert_close((plan.sum(0) - 1 / 64).abs().sum(), duals.marginal_error)
        errors.append(duals.marginal_error)
    # Where alternation alone is quick it is not held up by relaxation.
    assert entropic_duals(query, key, epsilon=2.0, num_iterations=4).marginal_error < 1e-6
    assert errors[0] < 0.2
    assert errors[1] < 1e-3
    assert errors[2] < 1e-4


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("loss", LOSSES)
def test_padding_may_hold_anything(loss, route, generator):
    query, key, *masks, weights = clouds(generator)
    clean = loss(route=route)(query, key, *masks, weights)
    leaves = []
    for points, mask in zip((query, key), masks, strict=True):
        filling = torch.where(torch.arange(3) == 1, torch.nan, torch.inf)
        leaves.append(torch.where(mask[..., None], points, filling).requires_grad_())
    value = loss(route=route)(*leaves, *masks, weights)
    torch.testing.assert_close(value, clean)
    for gradient, mask in zip(torch.autograd.grad(value.sum(), leaves), masks, strict=True):
        assert (gradient[~mask] == 0).all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_finite_at_zero_vectors_and_where_points_coincide(loss, route):
    for query in (torch.zeros(4, 3), torch.eye(3)[[0, 0, 1]], torch.ones(2, 3)):
        for key in (torch.eye(3), torch.zeros(2, 3)):
            leaves = [query.clone().requires_grad_(), key.clone().requires_grad_()]
            for gradient in torch.autograd.grad(loss(route=route)(*leaves), leaves):
                assert gradient.isfinite().all()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("loss", LOSSES)
def test_vmap_equals_a_batch(loss, route, generator):
    query, key, query_mask, key_mask, _ = clouds(generator, batch=(3,))
    divergence = loss("cosine", 0.05, 60, route)

    def alone(x, y, u, v):
        return divergence(x, y, u, v)

    mapped = torch.vmap(torch.func.grad(alone))(query, key, query_mask, key_mask)
    leaf = query.clone().requires_grad_()
    value = divergence(leaf, key, query_mask, key_mask)
    torch.testing.assert_close(torch.vmap(alone)(query, key, query_mask, key_mask), value)
    torch.testing.assert_close(mapped, torch.autograd.grad(value.sum(), leaf)[0])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("loss", LOSSES)
def test_recorded_graphs_are_small_and_serve_other_points(loss, route, generator):
    """However many iterations; without a matrix of pairs in the fused one."""
    first, second = (torch.randn(2, 4, 61, 3, generator=generator) for _ in range(2))
    divergence = loss("cosine", 0.05, 100, route)
    function = torch.vmap(torch.func.grad_and_value(lambda x, y: divergence(x, y)))
    recorded = make_fx(function)(*first)
    for found, expected in zip(recorded(*second), function(*second), strict=True):
        torch.testing.assert_close(found, expected)
    nodes = [node for node in recorded.graph.nodes if "tensor_meta" in node.meta]
    assert len(nodes) < 1000
    if route == "fused":
        # The pairs of 4 clouds of 61 points would be 14884 numbers.
        assert max(node.meta["tensor_meta"].shape.numel() for node in nodes) <= 4 * 61 * 8


@pytest.mark.parametrize("loss", LOSSES)
def test_large_clouds_take_the_fused_route(loss, generator):
    """It has no second derivatives, which tells the routes apart."""
    query, key = torch.randn(2, 520, 2, generator=generator)
    for size, is_fused in ((60, False), (520, True)):
        x = query[:size].clone().requires_grad_()
        value = loss(epsilon=0.5, num_iterations=2)(x, key[:size])
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        if is_fused:
            with pytest.raises(RuntimeError, match="second derivatives"):
                torch.autograd.grad(gradient.sum(), x)
        else:
            torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_computed_in_float32(loss, route, dtype, generator):
    query, key = (x.to(dtype) for x in clouds(generator, 30, 20, 8)[:2])
    divergence = loss(route=route)
    leaves = [query.requires_grad_(), key.requires_grad_()]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        value = divergence(*leaves)
    assert value.dtype == torch.float32
    exact = divergence(*wide)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    gradients = zip(
        torch.autograd.grad(value.sum(), leaves),
        torch.autograd.grad(exact.sum(), wide),
        strict=True,
    )
    bound = 1e-3 if dtype == torch.float32 else 5e-3
    for found, expected in gradients:
        assert found.dtype == dtype
        assert (found.double() - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("route", ROUTES)
def test_alike_clouds_far_from_the_origin_keep_their_digits(route, generator):
    """A spread of .05 at 300, of which float32 squares leave nothing. Mutant: no means apart."""
    query, key = (300 + 0.05 * torch.randn(2, 40, 8, generator=generator)).float()
    for loss in LOSSES:
        divergence = loss("squared", 0.01, route=route)
        exact = divergence(query.double(), key.double())
        torch.testing.assert_close(divergence(query, key).double(), exact, rtol=1e-4, atol=0)


@pytest.mark.compile
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_in_one_graph_with_its_gradient(loss, route, generator):
    query, key, *masks, _ = clouds(generator)
    divergence = loss(route=route)
    leaf, other = query.clone().requires_grad_(), query.clone().requires_grad_()
    found, expected = (
        in_one_graph(divergence, leaf, key, *masks),
        divergence(other, key, *masks),
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), leaf), torch.autograd.grad(expected.sum(), other)
    )


def test_functions_are_the_classes(generator):
    query, key, *masks, weights = clouds(generator)
    choices = {"cost": "squared", "epsilon": 0.7, "num_iterations": 30, "route": "fused"}
    for function, loss in zip((entropic_transport, sinkhorn_divergence), LOSSES, strict=True):
        divergence = loss(*choices.values())
        assert isinstance(divergence, Divergence)
        assert divergence == loss(**choices)
        assert hash(divergence) == hash(loss(**choices))
        found = function(query, key, *masks, weights, **choices)
        assert torch.equal(found, divergence(query, key, *masks, weights))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"cost": "euclidean"}, "cost: expected 'cosine' or 'squared', got 'euclidean'"),
        ({"epsilon": 0}, "epsilon: expected a positive number, got 0"),
        ({"epsilon": float("nan")}, "epsilon: expected a positive number, got nan"),
        ({"epsilon": float("inf")}, "epsilon: expected a positive number, got inf"),
        ({"num_iterations": 0}, "num_iterations: expected at least one, got 0"),
        ({"route": "quick"}, "route: expected 'auto', 'dense' or 'fused', got 'quick'"),
    ],
)
def test_refuses(loss, choices, message):
    with pytest.raises(ValueError, match=message):
        loss(**choices)
