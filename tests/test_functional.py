"""Tests of bayesattn.functional and of the masks that it takes (bayesattn.masking)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bayesattn import contraction
from bayesattn.functional import attention, attention_weights
from bayesattn.logits import DotProduct
from tests import reference
from tests.compilation import in_one_graph

ROUTES = ["auto", "dense", "fused"]
SIZES = [(5, 7, 3, 2), (7, 5, 2, 3), (1, 1, 1, 1), (1, 5, 3, 1), (5, 1, 1, 2)]
SEEDS = st.integers(0, 2**16)


def operands(generator, sizes=(5, 7, 3, 2), batch=(2, 3), dtype=None):
    num_queries, num_keys, dim, value_dim = sizes
    shapes = ((num_queries, dim), (num_keys, dim), (num_keys, value_dim))
    return [torch.randn(*batch, *shape, generator=generator).to(dtype) for shape in shapes]


def coin(generator, *shape):
    return torch.rand(*shape, generator=generator) > 0.4


def all_masks(generator, num_queries, num_keys, batch=(2, 3)):
    """Every kind of mask, some of them leaving queries without a key."""
    bias = torch.randn(num_queries, num_keys, generator=generator)
    forbidding = bias.masked_fill(~coin(generator, num_queries, num_keys), -torch.inf)
    boolean = coin(generator, *batch, num_queries, num_keys)
    padding = {
        "query_mask": coin(generator, batch[0], num_queries),
        "key_mask": coin(generator, batch[0], num_keys),
    }
    padding["key_mask"][0] = False
    return {
        "none": {},
        "bias": {"attn_mask": bias},
        "boolean": {"attn_mask": boolean},
        "forbidding": {"attn_mask": forbidding},
        "key": {"key_mask": padding["key_mask"]},
        "query": {"query_mask": padding["query_mask"]},
        "causal": {"is_causal": True},
        "causal and query": {"is_causal": True, "query_mask": padding["query_mask"]},
        "all": {"attn_mask": boolean, "is_causal": True, **padding},
        "all with bias": {"attn_mask": forbidding, "is_causal": True, **padding},
    }


KINDS = list(all_masks(torch.Generator(), 2, 2))


def allowed_and_bias(masks, batch, num_queries, num_keys):
    """The masks spelled out pair by pair."""
    shape = (*batch, num_queries, num_keys)
    allowed, bias = np.ones(shape, dtype=bool), np.zeros(shape)
    attn_mask = masks.get("attn_mask")
    for index in np.ndindex(*shape):
        sentence, i, j = index[0], index[-2], index[-1]
        if attn_mask is not None:
            entry = attn_mask.expand(shape)[index]
            allowed[index] &= bool(entry) if entry.dtype == torch.bool else entry.item() > -math.inf
            bias[index] = 0 if entry.dtype == torch.bool else entry
        allowed[index] &= bool(masks["key_mask"][sentence, j]) if "key_mask" in masks else True
        allowed[index] &= bool(masks["query_mask"][sentence, i]) if "query_mask" in masks else True
        allowed[index] &= j <= i if "is_causal" in masks else True
    return allowed, bias


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 1e3])
def test_every_route_equals_loops(kind, sizes, magnitude, generator):
    query, key, value = operands(generator, sizes)
    query = magnitude * query
    masks = all_masks(generator, *sizes[:2])[kind]
    allowed, bias = allowed_and_bias(masks, (2, 3), *sizes[:2])
    weights = attention_weights(query, key, **masks)
    results = [attention(query, key, value, route=route, **masks) for route in ROUTES]
    for b in np.ndindex(2, 3):
        inputs = (part[b].numpy() for part in (query, key, value))
        output, expected = reference.attention(*inputs, sizes[2] ** -0.5, bias[b], allowed[b])
        # Rounding of the logits, which large ones have more of, ends up in the weights.
        tolerance = {"rtol": 1e-12 * magnitude, "atol": 1e-13 * magnitude}
        np.testing.assert_allclose(weights[b], expected, **tolerance)
        for result in results:
            np.testing.assert_allclose(result[b], output, **tolerance)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("route", ROUTES)
def test_equals_pytorch(is_causal, scale, route, generator):
    query, key, value = operands(generator)
    ours = attention(query, key, value, is_causal=is_causal, scale=scale, route=route)
    settings = {"is_causal": is_causal, "scale": scale}
    theirs = F.scaled_dot_product_attention(query, key, value, **settings)
    torch.testing.assert_close(ours, theirs)
    weights = attention_weights(query, key, **settings)
    torch.testing.assert_close(weights @ value, theirs)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("batch", [(), (2,), (2, 5)])
def test_grouped_heads_are_repeated_in_runs(route, batch, generator):
    query, _, _ = operands(generator, batch=(*batch, 6))
    _, key, value = operands(generator, batch=(*batch, 2))
    ours = attention(query, key, value, enable_gqa=True, route=route)
    key, value = key.repeat_interleave(3, -3), value.repeat_interleave(3, -3)
    torch.testing.assert_close(ours, attention(query, key, value, route="dense"))
    weights = attention_weights(query, key[..., ::3, :, :], enable_gqa=True)
    torch.testing.assert_close(weights, attention_weights(query, key))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 3), (7, 3), (7, 2)],
        [(2, 5, 3), (7, 3), (7, 2)],
        [(4, 1, 1, 5, 3), (2, 1, 7, 3), (3, 7, 2)],
        [(3, 1, 3), (2, 1, 7, 3), (2, 1, 7, 2)],
        [(5, 3), (7, 3), (2, 3, 7, 2)],
    ],
    ids=str,
)
def test_leading_axes_broadcast(route, shapes, generator):
    parts = [torch.randn(shape, generator=generator) for shape in shapes]
    batch = torch.broadcast_shapes(*(shape[:-2] for shape in shapes))
    expanded = [part.expand(*batch, *part.shape[-2:]) for part in parts]
    ours, full = attention(*parts, route=route), attention(*expanded, route=route)
    assert ours.shape == (*batch, shapes[0][-2], shapes[2][-1])
    torch.testing.assert_close(ours, full)


@pytest.mark.parametrize("route", ROUTES)
def test_masks_broadcast(route, generator):
    """Attention masks may even bring axes; padding masks have no head axis."""
    query, key, value = operands(generator)
    attn_mask, key_mask = coin(generator, 4, 1, 1, 5, 1), coin(generator, 2, 7)
    ours = attention(query, key, value, attn_mask=attn_mask, key_mask=key_mask, route=route)
    both = attn_mask & key_mask[:, None, None]
    expected = attention(
        *(part.expand(4, -1, -1, -1, -1) for part in (query, key, value)), attn_mask=both
    )
    torch.testing.assert_close(ours, expected)
    single = attention(query[0, 0], key[0, 0], value[0, 0], key_mask=key_mask[0], route=route)
    torch.testing.assert_close(single, attention(query, key, value, key_mask=key_mask)[0, 0])


@given(
    seed=SEEDS,
    num_queries=st.integers(1, 4),
    num_keys=st.integers(1, 4),
    num_heads=st.integers(1, 3),
    padding=st.integers(1, 3),
    content=st.sampled_from([0.0, 1e8, -1e30]),
    is_causal=st.booleans(),
)
def test_padding_never_matters(seed, num_queries, num_keys, num_heads, padding, content, is_causal):
    """Neither its content nor its length changes an output, a weight or a gradient."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (num_queries, num_keys, 3, 2)
    parts = [part.requires_grad_() for part in operands(generator, sizes, (2, num_heads))]
    masks = {
        "query_mask": coin(generator, 2, num_queries),
        "key_mask": coin(generator, 2, num_keys),
    }

    def padded(part):
        return F.pad(part, (0, 0, 0, padding), value=content)

    longer = {name: F.pad(mask, (0, padding), value=False) for name, mask in masks.items()}
    weights = attention_weights(*parts[:2], **masks, is_causal=is_causal)
    long_weights = attention_weights(*map(padded, parts[:2]), **longer, is_causal=is_causal)
    torch.testing.assert_close(F.pad(weights, (0, padding, 0, padding)), long_weights)
    for route in ROUTES:
        settings = {"route": route, "is_causal": is_causal}
        short = attention(*parts, **masks, **settings)
        long = attention(*map(padded, parts), **longer, **settings)
        torch.testing.assert_close(F.pad(short, (0, 0, 0, padding)), long)
        slopes = (torch.autograd.grad(result.square().sum(), parts) for result in (short, long))
        for short_slope, long_slope in zip(*slopes, strict=True):
            torch.testing.assert_close(short_slope, long_slope)


@given(seed=SEEDS, num_queries=st.integers(1, 4), num_keys=st.integers(1, 4))
def test_order_of_keys_does_not_matter_and_that_of_queries_carries_over(
    seed, num_queries, num_keys
):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = operands(generator, (num_queries, num_keys, 3, 2))
    mask = coin(generator, num_queries, num_keys)
    keys = torch.randperm(num_keys, generator=generator)
    queries = torch.randperm(num_queries, generator=generator)
    for route in ROUTES:
        result = attention(query, key, value, attn_mask=mask, route=route)
        moved = attention(
            query[..., queries, :],
            key[..., keys, :],
            value[..., keys, :],
            attn_mask=mask[queries][:, keys],
            route=route,
        )
        torch.testing.assert_close(moved, result[..., queries, :])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_weights_sum_to_one_or_zero(kind, generator):
    query, key, _ = operands(generator)
    masks = all_masks(generator, 5, 7)[kind]
    allowed, _ = allowed_and_bias(masks, (2, 3), 5, 7)
    weights = attention_weights(query, key, **masks)
    torch.testing.assert_close(weights.sum(-1), torch.tensor(allowed.any(-1)).double())
    assert (weights[~torch.tensor(allowed)] == 0).all()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["boolean", "forbidding", "key", "query", "all with bias"])
def test_queries_without_keys_give_zeros_and_no_gradient(route, kind, generator):
    parts = [part.requires_grad_() for part in operands(generator)]
    masks = all_masks(generator, 5, 7)[kind]
    if kind in ("boolean", "forbidding"):
        masks["attn_mask"][..., 2, :] = False if kind == "boolean" else -torch.inf
    allowed, _ = allowed_and_bias(masks, (2, 3), 5, 7)
    dead = torch.tensor(~allowed.any(-1))
    output = attention(*parts, **masks, route=route)
    assert dead.any()
    assert (output[dead] == 0).all()
    with torch.autograd.set_detect_anomaly(True):  # no step of backward may meet a NaN
        slopes = torch.autograd.grad(output.sum(), parts)
    assert all(slope.isfinite().all() for slope in slopes)
    assert (slopes[0][dead] == 0).all()


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(route, kind, generator):
    parts = [part.requires_grad_() for part in operands(generator, (3, 4, 2, 2), (2, 1))]
    masks = all_masks(generator, 3, 4, (2, 1))[kind]
    assert torch.autograd.gradcheck(lambda *p: attention(*p, **masks, route=route), parts)


def test_a_bias_gets_its_gradient(generator):
    parts = operands(generator)
    bias = torch.randn(3, 5, 7, generator=generator)
    bias[:, 2] = bias[:, 3, 1] = -torch.inf
    bias.requires_grad_()
    slopes = [
        torch.autograd.grad(attention(*parts, attn_mask=bias, route=route).square().sum(), bias)[0]
        for route in ("dense", "fused")
    ]
    torch.testing.assert_close(*slopes)
    assert slopes[0].isfinite().all()
    assert (slopes[0][:, 2] == 0).all()
    assert (slopes[0][:, 4] != 0).any()


def test_second_derivatives_of_the_dense_route(generator):
    parts = [part.requires_grad_() for part in operands(generator, (3, 4, 2, 2), (2, 1))]
    masks = all_masks(generator, 3, 4, (2, 1))["all with bias"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        assert torch.autograd.gradgradcheck(lambda *p: attention(*p, **masks, route="dense"), parts)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_equals_a_loop(kind, generator):
    parts = operands(generator, batch=(4, 2, 3))
    masks = all_masks(generator, 5, 7)[kind]
    ours = vmap(lambda q, k, v: attention(q, k, v, **masks), (0, None, 0))(
        parts[0], parts[1][0], parts[2]
    )
    for i in range(4):
        single = attention(parts[0][i], parts[1][0], parts[2][i], **masks)
        torch.testing.assert_close(ours[i], single)


class Calls(TorchFunctionMode):
    """What is called of PyTorch."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.add(function)
        return function(*args, **(kwargs or {}))


def uses_fused(function, *inputs):
    with Calls() as calls:
        function(*inputs)
    return F.scaled_dot_product_attention in calls.seen


def test_auto_takes_the_fused_route_where_it_serves(generator):
    query, key, value = operands(generator)
    masks = all_masks(generator, 5, 7)["all"]
    assert uses_fused(attention, query, key, value)
    assert uses_fused(lambda *p: attention(*p, **masks), query, key, value)
    assert not uses_fused(lambda *p: attention(*p, route="dense"), query, key, value)
    assert not uses_fused(vmap(attention), query, key, value)
    assert not uses_fused(lambda *p: attention(*p, logits=negative_distance), query, key, value)
    # One query, or some, against keys that all heads share: of those, only one is cheaper dense.
    assert not uses_fused(attention, query[:, :, :1], key[:, :1], value[:, :1])
    assert uses_fused(attention, query, key[:, :1], value[:, :1])
    causal = {"route": "fused", "is_causal": True}
    assert uses_fused(vmap(lambda *p: attention(*p, **causal)), query, key, value)


@pytest.mark.parametrize("route", ROUTES)
def test_the_recorded_graph_does_not_grow_with_the_particles(route, generator):
    def nodes(num_particles):
        parts = operands(generator, batch=(num_particles, 2))
        function = vmap(grad(lambda *p: attention(*p, route=route).sum()))
        return len(make_fx(function)(*parts).graph.nodes)

    assert nodes(2) == nodes(11)


def negative_distance(query, key):
    return -torch.cdist(query, key)


def column_first(logits, mask):
    """Normalize over queries, then over keys, of those that take part."""
    masked = logits if mask is None else logits.masked_fill(~mask, -1e30)
    return torch.log_softmax(masked, -2).softmax(-1)


@pytest.mark.parametrize("route", ["auto", "dense"])
def test_logits_and_normalization_of_ones_own(route, generator):
    query, key, value = operands(generator)
    key_mask = coin(generator, 2, 7)
    own = {"logits": negative_distance, "normalization": column_first}
    logits = -torch.cdist(query, key)
    expected = logits.softmax(-1)
    torch.testing.assert_close(attention_weights(query, key, logits=negative_distance), expected)
    ours = attention(query, key, value, logits=negative_distance, route=route)
    torch.testing.assert_close(ours, expected @ value)
    mask = key_mask[:, None, None]
    expected = torch.where(mask, column_first(logits, mask), 0.0)
    weights = attention_weights(query, key, key_mask=key_mask, **own)
    torch.testing.assert_close(weights, expected)
    ours = attention(query, key, value, key_mask=key_mask, route=route, **own)
    torch.testing.assert_close(ours, expected @ value)


def test_a_normalization_may_widen_the_type(generator):
    parts = operands(generator, dtype=torch.bfloat16)
    ours = attention(*parts, normalization=lambda logits, _: logits.float().softmax(-1))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, attention(*parts), rtol=0.05, atol=0.05)


def test_a_normalization_sees_which_queries_are_padding(generator):
    """So that column sums, unlike a softmax's rows, can leave them out."""
    query, key, _ = operands(generator)
    query_mask = torch.tensor([True, True, True, False, False])
    weights = attention_weights(
        query, key, query_mask=query_mask.expand(2, 5), normalization=column_first
    )
    shorter = attention_weights(query[..., :3, :], key, normalization=column_first)
    torch.testing.assert_close(weights[..., :3, :], shorter)
    assert (weights[..., 3:, :] == 0).all()


@pytest.mark.parametrize("route", ["dense", "fused"])
def test_dropout_acts_whenever_positive(route, generator):
    """Each weight is dropped or doubled; the mean over many queries is what it was."""
    num_queries = 4000
    query = torch.randn(3, generator=generator).expand(num_queries, 3)
    key, value = torch.randn(4, 3, generator=generator), torch.eye(4)
    weights = attention_weights(query[:1], key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        kept = attention(query, key, value, dropout_p=0.5, route=route)
        none = attention(query, key, value, dropout_p=1, route=route)
    dropped = kept == 0
    torch.testing.assert_close(kept, torch.where(dropped, 0.0, 2 * weights))
    # Four binomial counts, five standard deviations: fails once in some 400 000 seeds.
    assert (dropped.double().mean(0) - 0.5).abs().max() < 5 * 0.5 / num_queries**0.5
    assert (none == 0).all()
    torch.testing.assert_close(
        attention(query, key, value, dropout_p=0, route=route), weights.expand(num_queries, 4)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "bias", "all with bias"])
def test_lower_precision(dtype, kind, generator):
    parts, masks = operands(generator), all_masks(generator, 5, 7)[kind]
    expected = attention(*parts, **masks)
    low = [part.to(dtype) for part in parts]
    tolerance = 40 * torch.finfo(dtype).eps
    for route in ROUTES:
        ours = attention(*low, **masks, route=route)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)
    weights = attention_weights(*low[:2], **masks)
    assert weights.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, generator):
    parts = operands(generator, dtype=torch.float32)
    masks = {
        name: mask.float() if torch.is_tensor(mask) and mask.is_floating_point() else mask
        for name, mask in all_masks(generator, 5, 7)[kind].items()
    }
    expected = attention(*parts, **masks)
    with torch.autocast("cpu", torch.bfloat16):
        results = [attention(*parts, **masks, route=route) for route in ROUTES]
        results.append(vmap(lambda *p: attention(*p, **masks))(*(p[None] for p in parts))[0])
        attention(parts[0], parts[1].bfloat16(), parts[2])
    for result in results:
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.compile
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["none", "causal", "all with bias"])
def test_compiles_in_one_graph(route, kind, generator):
    parts, masks = operands(generator), all_masks(generator, 5, 7)[kind]

    def function(*p):
        return attention(*p, **masks, route=route)

    torch.testing.assert_close(in_one_graph(function, *parts), function(*parts))


@pytest.mark.compile
@pytest.mark.parametrize("is_traceable", [True, False])
def test_compiles_inside_transforms(is_traceable, generator, monkeypatch):
    """Also by a compiler that cannot tell of transforms, as those before PyTorch 2.13."""
    monkeypatch.setattr(contraction, "_IS_TRACEABLE", is_traceable)
    parts = operands(generator, batch=(4, 2, 3))
    slope = vmap(grad(lambda *p: attention(*p).square().sum()))
    torch.testing.assert_close(in_one_graph(slope, *parts), slope(*parts))


def test_nothing_to_ask_or_see(generator):
    for route in ROUTES:
        query, key, value = operands(generator, (5, 0, 3, 2))
        assert torch.equal(attention(query, key, value, route=route), torch.zeros(2, 3, 5, 2))
        query, key, value = operands(generator, (0, 5, 3, 2))
        assert attention(query, key, value, route=route).shape == (2, 3, 0, 2)


Q, K, V = (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 2)


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        ((Q, (2, 3, 7, 5), V), {}, r"one width, got query \(2, 3, 5, 4\), key \(2, 3, 7, 5\)"),
        (((2, 5, 0), (2, 7, 0), (2, 7, 2)), {}, "one width, got query"),
        ((Q, K, (2, 3, 6, 2)), {}, r"its value, got .*key \(2, 3, 7, 4\), value \(2, 3, 6, 2\)"),
        (
            (Q, (2, 4, 7, 4), (2, 4, 7, 2)),
            {},
            r"must broadcast, got query \(2, 3, 5, 4\), key \(2, 4",
        ),
        ((Q, K, (2, 2, 7, 2)), {}, r"must broadcast, got .*value \(2, 2, 7, 2\)"),
        (((2, 5, 5, 4), K, V), {"enable_gqa": True}, "must be a multiple of the heads"),
        (((2, 6, 5, 4), K, (2, 2, 7, 2)), {"enable_gqa": True}, "must be a multiple of the heads"),
        (((5, 4), (7, 4), (7, 2)), {"enable_gqa": True}, r"at least 3 axes, got query \(5, 4\)"),
        ((Q, K, V), {"route": "flash"}, "route: expected 'auto', 'dense' or 'fused', got 'flash'"),
        ((Q, K, V), {"dropout_p": 1.5}, "dropout_p: expected a probability, got 1.5"),
        ((Q, K, V), {"dropout_p": -0.1}, "dropout_p: expected a probability"),
    ],
)
def test_refuses(shapes, settings, message, generator):
    parts = [torch.randn(shape, generator=generator) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        attention(*parts, **settings)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            {"attn_mask": torch.ones(5, 7, dtype=torch.long)},
            "attn_mask: expected bool or float, got torch.int64",
        ),
        (
            {"attn_mask": torch.ones(5, 6)},
            r"broadcasts to the logits' \(2, 3, 5, 7\), got \(5, 6\)",
        ),
        ({"attn_mask": torch.ones(4, 5, 7)}, r"attn_mask: .* got \(4, 5, 7\)"),
        (
            {"key_mask": torch.ones(2, 7)},
            "key_mask: expected bool, True takes part, got torch.float",
        ),
        (
            {"key_mask": torch.ones(2, 6) > 0},
            r"key_mask: expected .* broadcast to \(2, 7\), got \(2, 6\)",
        ),
        ({"key_mask": torch.ones(2, 1) > 0}, r"key_mask: .* got \(2, 1\)"),
        ({"key_mask": torch.ones(2, 3, 7) > 0}, r"without the head axis.* got \(2, 3, 7\)"),
        (
            {"query_mask": torch.ones(2, 7) > 0},
            r"query_mask: .* broadcast to \(2, 5\), got \(2, 7\)",
        ),
        ({"query_mask": torch.ones(5)}, "query_mask: expected bool"),
    ],
)
def test_refuses_masks(mask, message, generator):
    query, key, value = operands(generator, (5, 7, 4, 2))
    with pytest.raises(ValueError, match=message):
        attention(query, key, value, **mask)
    with pytest.raises(ValueError, match=message):
        attention_weights(query, key, **mask)


def test_refuses_masks_that_would_grow_the_result(generator):
    query, key, value = operands(generator, batch=(2,))
    with pytest.raises(ValueError, match=r"without the head axis, to broadcast to \(7,\)"):
        attention(query, key, value, key_mask=torch.ones(2, 7) > 0)
    with pytest.raises(ValueError, match=r"logits' \(2, 1, 7\), got \(5, 7\)"):
        attention(query[:, :1], key, value, attn_mask=torch.ones(5, 7) > 0)


def test_refuses_what_does_not_go_together(generator):
    query, key, value = operands(generator)
    with pytest.raises(ValueError, match="route: expected 'dense' with logits= that do not"):
        attention(query, key, value, logits=negative_distance, route="fused")
    with pytest.raises(ValueError, match="route: expected 'dense' with normalization= that has no"):
        attention(query, key, value, normalization=column_first, route="fused")
    with pytest.raises(ValueError, match=r"an object, such as DotProduct\(\), got the class"):
        attention(query, key, value, logits=DotProduct)
    with pytest.raises(ValueError, match=r"scale: with logits= it belongs to those, got 2\.0"):
        attention_weights(query, key, logits=negative_distance, scale=2.0)
    with pytest.raises(ValueError, match=r"one type, got query torch\.float32, key torch\.float64"):
        attention(query.float(), key, value)
