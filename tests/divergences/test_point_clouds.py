"""Tests of what all divergences share: masks, weights, batches, gradients and errors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from bayesattn.divergences import (
    MMD,
    ConditionalTransport,
    Divergence,
    Energy,
    SlicedWasserstein,
    weighted_clouds,
)
from bayesattn.kernels import IMQ, RBF

PLAIN = [MMD(), MMD(IMQ()), MMD(RBF(0.7)), Energy(), SlicedWasserstein(num_projections=7)]
UNBIASED = [MMD(unbiased=True), Energy(unbiased=True)]
TRANSPORT = [
    ConditionalTransport(),
    ConditionalTransport(cost="squared", temperature=3.0),
    ConditionalTransport(cost="squared", temperature=3.0, debiased=True),
]
ALL = PLAIN + UNBIASED + TRANSPORT
SEEDS = st.integers(0, 2**16)
SIZES = st.integers(1, 6)


def clouds(seed, num_queries, num_keys, dim, *batch):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(*batch, num_queries, dim, generator=generator)
    return query, 0.5 + 2 * torch.randn(*batch, num_keys, dim, generator=generator)


def uneven(seed, *shape):
    return 0.1 + torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_satisfies_the_protocol(divergence):
    assert isinstance(divergence, Divergence)
    assert hash(divergence) == hash(divergence)


@settings(max_examples=30)
@given(seed=SEEDS, num_queries=SIZES, num_keys=SIZES, dim=st.integers(1, 4))
def test_symmetric_positive_and_zero_at_equality(seed, num_queries, num_keys, dim):
    query, key = clouds(seed, num_queries, num_keys, dim)
    a, b = uneven(seed, num_queries), uneven(seed + 1, num_keys)
    for divergence in PLAIN:
        value = divergence(query, key, weights=(a, b))
        assert value.shape == ()
        assert value > 0
        torch.testing.assert_close(divergence(key, query, weights=(b, a)), value)
        zero = divergence(query, query.clone(), weights=(a, 3 * a))
        assert 0 <= zero < 1e-13


@settings(max_examples=30)
@given(seed=SEEDS, num_queries=SIZES, num_keys=SIZES)
def test_the_order_of_points_does_not_matter(seed, num_queries, num_keys):
    query, key = clouds(seed, num_queries, num_keys, 3)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(num_queries, generator=generator)
    columns = torch.randperm(num_keys, generator=generator)
    a, b = uneven(seed, num_queries), uneven(seed + 1, num_keys)
    for divergence in PLAIN:
        torch.testing.assert_close(
            divergence(query[rows], key[columns], weights=(a[rows], b[columns])),
            divergence(query, key, weights=(a, b)),
        )


@pytest.mark.parametrize("divergence", ALL, ids=repr)
@pytest.mark.parametrize("filling", [0.0, 1e6, torch.nan, torch.inf])
@pytest.mark.parametrize("length", [1, 4])
def test_padding_content_and_length_never_matter(divergence, filling, length, generator):
    query = 100 + torch.randn(2, 5, 3, generator=generator)
    key = 101 + torch.randn(2, 4, 3, generator=generator)
    a, b = torch.rand(2, 5, generator=generator), torch.rand(2, 4, generator=generator)
    padding = torch.full((2, length, 3), filling)
    # Before and after, so that the first point is none of the cloud's.
    padded = [torch.cat([padding, x, padding], 1).requires_grad_() for x in (query, key)]
    masks = [torch.nn.functional.pad(torch.ones_like(w).bool(), (length, length)) for w in (a, b)]
    weights = tuple(torch.nn.functional.pad(w, (length, length), value=filling) for w in (a, b))
    alone = [query.clone().requires_grad_(), key.clone().requires_grad_()]
    value, expected = divergence(*padded, *masks, weights), divergence(*alone, weights=(a, b))
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    expected.sum().backward()
    for ours, mask, wanted in zip(padded, masks, alone, strict=True):
        assert (ours.grad[~mask] == 0).all()
        torch.testing.assert_close(ours.grad[mask].view_as(wanted), wanted.grad)


@pytest.mark.parametrize("divergence", [MMD(RBF(0.7)), Energy(), SlicedWasserstein()], ids=repr)
def test_weights_are_repetitions(divergence, generator):
    query = torch.randn(3, 2, generator=generator)
    key = torch.randn(4, 2, generator=generator)
    counts = torch.tensor([2, 1, 3]), torch.tensor([1, 1, 0, 5])
    repeated = [x.repeat_interleave(n, 0) for x, n in zip((query, key), counts, strict=True)]
    weights = tuple(n.double() for n in counts)
    torch.testing.assert_close(divergence(query, key, weights=weights), divergence(*repeated))


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_weights_need_no_normalization_and_one_side_may_have_none(divergence, generator):
    query, key = clouds(3, 5, 4, 2)
    weights = torch.rand(5, generator=generator)
    ours = divergence(query, key, weights=(weights, None))
    torch.testing.assert_close(divergence(query, key, weights=(9 * weights, torch.ones(4))), ours)
    assert not torch.isclose(divergence(query, key), ours)


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_batch_axes_broadcast_and_equal_a_loop_and_vmap(divergence, generator):
    query, key = (
        torch.randn(2, 1, 5, 3, generator=generator),
        torch.randn(7, 4, 3, generator=generator),
    )
    mask = torch.rand(7, 4, generator=generator) < 0.6
    mask[:, :2] = True
    weights = torch.rand(2, 1, 5, generator=generator)
    values = divergence(query, key, key_mask=mask, weights=(weights, None))
    assert values.shape == (2, 7)
    over_keys = torch.vmap(
        lambda q, w, k, m: divergence(q, k, None, m, (w, None)), in_dims=(None, None, 0, 0)
    )
    mapped = torch.vmap(over_keys, in_dims=(0, 0, None, None))(
        query[:, 0], weights[:, 0], key, mask
    )
    torch.testing.assert_close(mapped, values)
    for i in range(2):
        for j in range(7):
            alone = divergence(query[i, 0], key[j][mask[j]], weights=(weights[i, 0], None))
            torch.testing.assert_close(values[i, j], alone)


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_gradients_of_batches_under_vmap(divergence, generator):
    query, key = clouds(1, 5, 4, 3, 2)
    per_cloud = torch.vmap(torch.func.grad(lambda q, k: divergence(q, k)))(query, key)
    query.requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(divergence(query, key).sum(), query)[0], per_cloud
    )


@pytest.mark.parametrize("divergence", [*ALL[2:], MMD(IMQ(1.3), unbiased=True)], ids=repr)
def test_gradcheck_by_points_and_weights(divergence, generator):
    query, key = clouds(2, 5, 4, 3)
    if isinstance(divergence, MMD):  # the bandwidth "median" is a constant to differentiation
        divergence = MMD(divergence.kernel.frozen(key), divergence.unbiased)
    mask = torch.tensor([True, False, True, True, True])
    weights = torch.rand(5, generator=generator) + 0.1, torch.rand(4, generator=generator) + 0.1
    inputs = [x.requires_grad_() for x in (query, key, *weights)]
    assert torch.autograd.gradcheck(lambda x, y, a, b: divergence(x, y, mask, None, (a, b)), inputs)


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_gradients_are_finite_where_points_coincide(divergence):
    for query, key in (
        (torch.zeros(4, 2), torch.zeros(3, 2)),
        (torch.eye(4)[[0, 0, 1, 2]], torch.eye(4)[[0, 1, 1]]),
    ):
        query, key = query.clone().requires_grad_(), key.clone().requires_grad_()
        divergence(query, key).backward()
        assert query.grad.isfinite().all()
        assert key.grad.isfinite().all()


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_nothing_as_large_as_query_key_dim_is_held(divergence):
    query, key = clouds(8, 23, 19, 37)
    graph = make_fx(torch.func.grad(lambda x, y: divergence(x, y)))(query, key).graph
    sizes = [n.meta["tensor_meta"].shape.numel() for n in graph.nodes if "tensor_meta" in n.meta]
    assert len(sizes) > 5
    assert max(sizes) <= (23 + 19) ** 2


@pytest.mark.parametrize("divergence", PLAIN, ids=repr)
def test_one_point_a_side(divergence):
    query, key = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]])
    assert divergence(query, key) > 0
    assert divergence(query, query.clone()) == 0


@pytest.mark.parametrize("divergence", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_computed_in_float32(divergence, dtype):
    query, key = (x.to(dtype) for x in clouds(5, 20, 17, 3))
    value = divergence(query, key)
    assert value.dtype == torch.float32
    exact = divergence(query.double(), key.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(divergence(query, key), value)
    leaf = query.clone().requires_grad_()
    divergence(leaf, key).backward()
    assert leaf.grad.dtype == dtype


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_float32_keeps_its_digits_far_from_the_origin(divergence):
    query, key = (x.float() for x in clouds(6, 20, 17, 3))
    query, key = query + 1e4, key + 1e4
    exact = divergence(query.double(), key.double())
    torch.testing.assert_close(divergence(query, key).double(), exact, rtol=1e-3, atol=1e-5)


def test_prepared_weights_are_normalized():
    query, key = clouds(7, 3, 4, 2)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    prepared = weighted_clouds(query, key, mask, None, (torch.tensor([1.0, 3.0, 5.0]), None))
    expected = [[0.25, 0.75, 0], [0, 3 / 8, 5 / 8]]
    np.testing.assert_allclose(prepared.query_weights, expected)
    np.testing.assert_allclose(prepared.key_weights, np.full((2, 4), 0.25))
    assert prepared.query.shape == (2, 3, 2)
    assert torch.equal(prepared.query[0, 2], query[0])


X, Y = torch.zeros(3, 2), torch.ones(4, 2)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("divergence", ALL, ids=repr)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, torch.ones(4, 3)), r"of one dim, got \(3, 2\) and \(4, 3\)"),
        ((X[0], Y), r"query and key: expected .* got \(2,\) and"),
        ((X[:0], Y), r"query: expected at least one point, got shape \(0, 2\)"),
        ((X, Y, torch.zeros(3).bool()), "query_mask: expected a point .* got none in 1 of 1"),
        ((X, Y, None, torch.ones(4)), "key_mask: expected bool, True takes part, got"),
        ((X, Y, None, torch.ones(5).bool()), r"key_mask: expected one entry for each of 4 points"),
        ((X, Y, None, None, (torch.ones(2), None)), "query weights: expected one entry for each"),
        ((X, Y, None, None, (None, torch.ones(4).int())), "key weights: expected floating-point"),
        ((X, Y, None, None, (None, torch.zeros(4))), "key weights: expected .* not all zero"),
        ((X, Y, None, None, (None, -torch.ones(4))), "key weights: expected .* not negative"),
        ((X, Y, None, None, (torch.full((3,), torch.inf), None)), "query weights: expected finite"),
        ((X, Y, None, None, (torch.full((3,), torch.nan), None)), "query weights: expected finite"),
    ],
)
def test_refuses(divergence, arguments, message):
    with pytest.raises(ValueError, match=message):
        divergence(*arguments)


@pytest.mark.parametrize("divergence", UNBIASED, ids=repr)
def test_refuses_an_unbiased_estimate_of_one_point(divergence):
    for arguments in ((X[:1], Y), (X, Y, torch.tensor([True, False, False]))):
        with pytest.raises(ValueError, match="query: an unbiased estimate needs two points"):
            divergence(*arguments)


def test_a_cloud_without_weight_is_nan_under_vmap():
    mask = torch.tensor([[True, True, False], [False, False, False]])
    values = torch.vmap(lambda m: Energy()(X, Y, m))(mask)
    assert values.isnan().tolist() == [False, True]
