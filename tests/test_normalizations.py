"""Tests of bayesattn.normalizations, by both routes of bayesattn.attention."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bayesattn.functional import attention, attention_weights
from bayesattn.fused_route import FusedAttention
from bayesattn.logits import DotProduct, GaussianLogits
from bayesattn.normalizations import (
    CausalDoublyNormalized,
    DoublyNormalized,
    HybridNormalized,
    InterpolatedNormalized,
    Sinkhorn,
    Softmax,
    doubly_normalized,
)
from tests import reference
from tests.compilation import in_one_graph

SEEDS = st.integers(0, 2**16)
HEADS = 3


def learned(module, generator):
    """Parameters off their symmetric start."""
    for parameter in module.parameters():
        parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator)
    return module.double()


CHOICES = {
    "softmax": lambda _: Softmax(),
    "doubly": lambda _: DoublyNormalized(),
    "doubly with prior": lambda size: DoublyNormalized(HEADS, size),
    "interpolated": lambda _: InterpolatedNormalized(HEADS),
    "hybrid": lambda _: HybridNormalized(HEADS),
    "sinkhorn": lambda _: Sinkhorn(3),
}


def operands(generator, num_queries=5, num_keys=7, dim=4, value_dim=2, dtype=None):
    shapes = ((num_queries, dim), (num_keys, dim), (num_keys, value_dim))
    return [torch.randn(2, HEADS, *shape, generator=generator).to(dtype) for shape in shapes]


def padding(generator, num_queries=5, num_keys=7):
    """Masks that leave at least one query and one key."""
    masks = {
        "query_mask": torch.rand(2, num_queries, generator=generator) > 0.4,
        "key_mask": torch.rand(2, num_keys, generator=generator) > 0.4,
    }
    for mask in masks.values():
        mask[:, 0] = True
    return masks


def expected_weights(name, module, logits, mask):
    """By loops, for one sentence and one head; ``module`` holds that head's parameters."""
    doubly = reference.column_then_row(logits, mask)
    softmax = reference.column_then_row(logits, mask, strength=0.0)
    if name == "sinkhorn":
        rows, columns = mask.any(1), mask.any(0)
        plan = np.zeros_like(logits)
        inner = np.ix_(rows, columns)
        plan[inner] = reference.sinkhorn(logits[inner], mask[inner], 3)
        return plan
    if name == "doubly with prior":
        return reference.column_then_row(logits, mask, module)
    if name == "interpolated":
        return reference.column_then_row(logits, mask, strength=1 / (1 + math.exp(-module)))
    if name == "hybrid":
        share = 1 / (1 + math.exp(-module))
        return share * doubly + (1 - share) * softmax
    return softmax if name == "softmax" else doubly


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("magnitude", [1.0, 30.0])
@pytest.mark.parametrize("sizes", [(5, 7), (7, 5), (2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("name", CHOICES)
def test_both_routes_equal_loops(name, sizes, magnitude, masked, generator):
    query, key, value = operands(generator, *sizes)
    query = magnitude * query
    choice = learned(CHOICES[name](sizes[0]), generator)
    masks = padding(generator, *sizes) if masked else {}
    settings = {"normalization": choice, **masks}
    weights = attention_weights(query, key, **settings)
    outputs = [attention(query, key, value, route=r, **settings) for r in ("dense", "fused")]
    ones = torch.ones(2, sizes[0], dtype=torch.bool), torch.ones(2, sizes[1], dtype=torch.bool)
    rows, columns = masks.get("query_mask", ones[0]), masks.get("key_mask", ones[1])
    parameter = next(choice.parameters(), None)
    for sentence, head in np.ndindex(2, HEADS):
        logits = (query[sentence, head] @ key[sentence, head].mT / 2.0).numpy()
        mask = (rows[sentence, :, None] & columns[sentence]).numpy()
        own = None if parameter is None else parameter[head].detach().numpy()
        expected = expected_weights(name, own, logits, mask)
        tolerance = {"rtol": 1e-12 * magnitude, "atol": 1e-13 * magnitude}
        np.testing.assert_allclose(weights[sentence, head].detach(), expected, **tolerance)
        for output in outputs:
            average = expected @ value[sentence, head].numpy()
            np.testing.assert_allclose(output[sentence, head].detach(), average, **tolerance)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CHOICES)
def test_gradients_of_both_routes(name, masked, generator):
    parts = [part[:, :, :, :2].requires_grad_() for part in operands(generator, 3, 4)]
    choice = learned(CHOICES[name](3), generator)
    masks = padding(generator, 3, 4) if masked else {}

    def function(*inputs):
        return attention(*inputs[:3], normalization=choice, route="fused", **masks)

    parameters = list(choice.parameters())
    assert torch.autograd.gradcheck(function, (*parts, *parameters))
    slopes = [
        torch.autograd.grad(
            attention(*parts, normalization=choice, route=route, **masks).sin().sum(),
            [*parts, *parameters],
        )
        for route in ("dense", "fused")
    ]
    for dense, fused in zip(*slopes, strict=True):
        torch.testing.assert_close(dense, fused, rtol=1e-10, atol=1e-12)


@given(
    seed=SEEDS,
    num_queries=st.integers(2, 6),
    num_keys=st.integers(1, 6),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
)
def test_no_key_is_explained_away(seed, num_queries, num_keys, spread):
    """A key's mass is at least one over the most keys that a query may see; and Jensen's chain."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(num_queries, num_keys, generator=generator)
    mask = torch.rand(num_queries, num_keys, generator=generator) > 0.3
    mass = doubly_normalized(logits, mask).sum(-2)
    asked = mask.any(-2)
    assert (mass[asked] >= 1 / mask.sum(-1).max() - 1e-12).all()
    assert (mass[~asked] == 0).all()
    shares = logits.softmax(-2)
    rows = shares.sum(-1)
    mass = doubly_normalized(logits).sum(-2)
    jensen = 1 / (shares * rows[:, None]).sum(-2)
    assert (mass >= jensen - 1e-12).all()
    assert (jensen >= 1 / rows.max() - 1e-12).all()
    assert rows.max() <= num_keys + 1e-12


def test_softmax_does_explain_keys_away(generator):
    """So that the bound above says something."""
    logits = 3 * torch.randn(64, 64, generator=generator)
    logits = logits + 5 * torch.randn(64, generator=generator)
    assert logits.softmax(-1).sum(-2).min() < 1e-4
    assert doubly_normalized(logits).sum(-2).min() > 1 / 64


def test_invariances(generator):
    """Doubly normalized does not see what a key's logits share; softmax not what a query's do."""
    logits = torch.randn(5, 7, generator=generator)
    of_key, of_query = torch.randn(7, generator=generator), torch.randn(5, 1, generator=generator)
    weights = doubly_normalized(logits)
    torch.testing.assert_close(doubly_normalized(logits + of_key), weights)
    assert (doubly_normalized(logits + of_query) - weights).abs().max() > 0.01
    torch.testing.assert_close(Softmax()(logits + of_query), Softmax()(logits))
    assert (Softmax()(logits + of_key) - Softmax()(logits)).abs().max() > 0.01


def test_limits(generator):
    """Of many sweeps the columns are equal; the amount leads from softmax to doubly normalized."""
    logits = torch.randn(HEADS, 5, 7, generator=generator)
    torch.testing.assert_close(Sinkhorn(1)(logits), doubly_normalized(logits))
    many = Sinkhorn(200)(logits)
    torch.testing.assert_close(many.sum(-2), torch.full((HEADS, 7), 5 / 7))
    torch.testing.assert_close(many.sum(-1), torch.ones(HEADS, 5))
    between = InterpolatedNormalized(HEADS).double()
    for logit, limit in ((50.0, doubly_normalized(logits)), (-50.0, logits.softmax(-1))):
        between.amount_logit.data.fill_(logit)
        torch.testing.assert_close(between(logits), limit)
    assert HybridNormalized(2, retrofit=True).share_logit.sigmoid().max() < 0.12


def test_prefix_equals_loops_and_does_not_see_the_future(generator):
    query, key, value = operands(generator, 5, 5)
    choice = CausalDoublyNormalized()
    weights = attention_weights(query, key, normalization=choice)
    expected = reference.prefix_column_then_row((query[1, 2] @ key[1, 2].mT / 2).numpy())
    np.testing.assert_allclose(weights[1, 2], expected, rtol=1e-12, atol=1e-14)
    shorter = attention(*(part[..., :3, :] for part in (query, key, value)), normalization=choice)
    longer = attention(query, key, value, normalization=choice, is_causal=True)
    torch.testing.assert_close(longer[..., :3, :], shorter)
    diagonal = weights.diagonal(dim1=-2, dim2=-1)
    assert (diagonal >= 1 / torch.arange(1, 6) - 1e-12).all()
    mask = padding(generator, 5)["query_mask"]
    assert torch.autograd.gradcheck(
        lambda *p: attention(*p, normalization=choice, query_mask=mask),
        [part.requires_grad_() for part in (query, key, value)],
    )
    with pytest.raises(ValueError, match="as many keys as queries, got 5 queries and 7 keys"):
        attention_weights(*operands(generator)[:2], normalization=choice)


@given(
    seed=SEEDS,
    padded=st.integers(1, 3),
    content=st.sampled_from([0.0, 1e4, -1e8]),
    key=st.booleans(),
)
def test_padding_never_matters(seed, padded, content, key):
    generator = torch.Generator().manual_seed(seed)
    parts = operands(generator, 3, 4)
    masks = padding(generator, 3, 4)
    longer = {name: F.pad(mask, (0, padded), value=False) for name, mask in masks.items()}
    grown = [F.pad(part, (0, 0, 0, padded), value=content) for part in parts]
    for name, make in CHOICES.items():
        if "prior" in name:
            continue
        choice = learned(make(3), generator)
        for route in ("dense", "fused"):
            settings = {"normalization": choice, "route": route}
            short = attention(*parts, **masks, **settings)
            long = attention(*grown, **longer, **settings)
            torch.testing.assert_close(F.pad(short, (0, 0, 0, padded)), long)


# PyTorch scripts its own decompositions where forward mode is used first.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_forward_mode_takes_the_dense_route(generator):
    """At a size where the fused one would serve."""
    query, key, value = (part[:1, :1] for part in operands(generator, 400, 400))
    choice, tangent = DoublyNormalized(), torch.randn(query.shape, generator=generator)

    def function(route):
        return lambda q: attention(q, key, value, normalization=choice, route=route)

    results = [torch.func.jvp(function(route), (query,), (tangent,)) for route in ("auto", "dense")]
    torch.testing.assert_close(*results)
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(function("fused"), (query,), (tangent,))


def test_auto_is_fused_for_many_and_dense_for_few(generator, monkeypatch):
    taken = []
    fused = FusedAttention.attend_doubly_normalized
    monkeypatch.setattr(
        FusedAttention,
        "attend_doubly_normalized",
        lambda self, *args: taken.append(self.logits.query.shape[-2]) or fused(self, *args),
    )
    settings = {"normalization": DoublyNormalized()}
    for size in (5, 400):
        parts = [part[:1, :1] for part in operands(generator, size, size)]
        attention(*parts, **settings)
        attention(*parts, **settings, attn_mask=torch.ones(size, size, dtype=torch.bool))
        attention(*parts, **settings, logits=lambda q, k: q @ k.mT)
    assert taken == [400]


def test_grouped_heads(generator):
    query, _, _ = operands(generator)
    query = torch.cat([query, query.flip(1)], 1)
    _, key, value = operands(generator)
    settings = {"normalization": DoublyNormalized(), "enable_gqa": True}
    for route in ("dense", "fused"):
        ours = attention(query, key, value, route=route, **settings)
        for head in range(2 * HEADS):
            weights = doubly_normalized(query[:, head] @ key[:, head // 2].mT / 2)
            torch.testing.assert_close(ours[:, head], weights @ value[:, head // 2])


def test_a_mask_of_keys_alone_may_be_a_bias(generator):
    """A float mask without a query axis is a bias of keys, and takes the fused route."""
    query, key, value = operands(generator)
    bias = torch.randn(2, 1, 1, 7, generator=generator)
    bias[0, ..., 3] = -torch.inf
    for name, make in CHOICES.items():
        choice = learned(make(5), generator)
        outputs = [
            attention(query, key, value, attn_mask=bias, normalization=choice, route=route)
            for route in ("dense", "fused")
        ]
        torch.testing.assert_close(*outputs, msg=name)


def test_gaussian_logits_are_log_densities(generator):
    """Up to what the exponents add; and at their start they are the scaled dot product."""
    query, key, value = operands(generator)
    start = GaussianLogits(HEADS, 4).double()
    torch.testing.assert_close(start(query, key), DotProduct()(query, key))
    logits = learned(start, generator)
    exponents = logits.query_exponent, logits.key_exponent
    variance = logits.log_variance.exp()[:, None, None]
    distances = torch.cdist(query, key).square()
    squares = query.square().sum(-1)[..., None], key.square().sum(-1)[..., None, :]
    priors = (e[:, None, None] * square for e, square in zip(exponents, squares, strict=True))
    expected = (sum(priors) - distances) / (2 * variance)
    torch.testing.assert_close(logits(query, key), expected)
    masks = padding(generator)
    for name, make in CHOICES.items():
        settings = {"logits": logits, "normalization": learned(make(5), generator), **masks}
        dense, fused = (
            attention(query, key, value, route=r, **settings) for r in ("dense", "fused")
        )
        torch.testing.assert_close(dense, fused, msg=name)
    slopes = torch.autograd.grad(fused.sin().sum(), list(logits.parameters()))
    again = torch.autograd.grad(dense.sin().sum(), list(logits.parameters()))
    for one, other in zip(slopes, again, strict=True):
        torch.testing.assert_close(one, other)


def causal(kind, size):
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    if kind == "hint":
        return {"is_causal": True}
    if kind == "boolean":
        return {"attn_mask": seen}
    if kind == "window":
        return {"attn_mask": seen.triu(-2)}
    if kind == "strict":
        return {"attn_mask": seen.tril(-1)}
    if kind == "one head":
        return {"attn_mask": torch.stack([seen] + [torch.ones_like(seen)] * (HEADS - 1))}
    if kind == "low":
        return {"attn_mask": torch.zeros(size, size).masked_fill(~seen, -1e9)}
    return {"attn_mask": torch.zeros(size, size).masked_fill(~seen, -torch.inf)}


@pytest.mark.parametrize(
    "kind", ["hint", "boolean", "float", "window", "strict", "one head", "low"]
)
@pytest.mark.parametrize("name", [name for name in CHOICES if name != "softmax"])
def test_leaks_are_refused(name, kind, generator):
    query, key, value = operands(generator, 5, 5)
    settings = {"normalization": CHOICES[name](5), **causal(kind, 5)}
    for function, parts in ((attention, (query, key, value)), (attention_weights, (query, key))):
        with pytest.raises(
            ValueError, match=r"later ones; expected CausalDoublyNormalized or Soft"
        ):
            function(*parts, **settings)
    attention(query, key, value, normalization=Softmax(), **causal(kind, 5))


def test_the_function_is_refused_like_the_module(generator):
    parts = operands(generator, 5, 5)
    with pytest.raises(ValueError, match="doubly_normalized normalizes over queries"):
        attention(*parts, normalization=doubly_normalized, is_causal=True)


def test_masks_that_leak_nothing_are_taken(generator):
    """A prefix that all see, and rows of one key each, in which there is nothing to tell."""
    parts = operands(generator, 5, 5)
    prefix = torch.ones(5, 5, dtype=torch.bool).tril()
    prefix[:, :2] = True
    first = torch.zeros(5, 5, dtype=torch.bool)
    first[:, 0] = True
    for mask in (prefix, first, torch.eye(5).bool()):
        attention(*parts, normalization=DoublyNormalized(), attn_mask=mask)


def test_what_stands_for_minus_infinity_forbids(generator):
    """Mutant: taken as a bias, which cancels in a softmax over queries."""
    query, key, value = operands(generator)
    seen = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    seen[0, ..., 4:] = False
    for route in ("dense", "fused"):
        settings = {"normalization": DoublyNormalized(), "route": route}
        expected = attention(query, key, value, attn_mask=seen, **settings)
        low = torch.zeros(seen.shape).masked_fill(~seen, -1e9)
        torch.testing.assert_close(
            attention(query, key, value, attn_mask=low, **settings), expected
        )


@pytest.mark.parametrize("name", CHOICES)
def test_gradients_under_activation_checkpoints(name, generator):
    """Mutant: a saved tensor that backward reads twice."""
    choice = learned(CHOICES[name](5), generator)
    parts = [part.requires_grad_() for part in operands(generator)]

    def function(*p):
        return attention(*p, normalization=choice, route="fused").sin().sum()

    kept = torch.autograd.grad(function(*parts), parts)
    again = torch.autograd.grad(checkpoint(function, *parts, use_reentrant=False), parts)
    for one, other in zip(kept, again, strict=True):
        torch.testing.assert_close(one, other)


def test_forward_mode_by_values_and_parameters_goes_the_dense_way(generator):
    query, key, value = (part[:1] for part in operands(generator, 400, 400))
    logits = GaussianLogits(HEADS, 4).double()

    def by_value(v):
        return attention(query, key, v, normalization=DoublyNormalized())

    _, slope = torch.func.jvp(by_value, (value,), (value,))
    torch.testing.assert_close(slope, by_value(value))

    def by_parameter(log_variance):
        parameters = {"log_variance": log_variance}
        with torch.nn.utils.stateless._reparametrize_module(logits, parameters):
            return attention(query, key, value, logits=logits)

    start = logits.log_variance.detach()
    torch.func.jvp(by_parameter, (start,), (torch.ones_like(start),))


@pytest.mark.compile
def test_leaks_are_refused_in_compiled_code(generator):
    parts = operands(generator, 5, 5)

    def function(mask, *p):
        return attention(*p, normalization=DoublyNormalized(), attn_mask=mask)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    mask = torch.ones(5, 5, dtype=torch.bool)
    torch.testing.assert_close(compiled(mask, *parts), function(mask, *parts))
    with pytest.raises(RuntimeError, match="later ones; expected CausalDoublyNormalized"):
        compiled(mask.tril(), *parts)


def test_a_single_query_warns(generator):
    query, key, value = operands(generator, 1)
    with pytest.warns(UserWarning, match="of a single one all weights are alike"):
        output = attention(query, key, value, normalization=DoublyNormalized())
    torch.testing.assert_close(output, value.mean(-2, keepdim=True))
    attention(query, key, value, normalization=Softmax())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DoublyNormalized(3), "num_heads and num_queries go together"),
        (lambda: Sinkhorn(0), "num_sweeps: expected at least 1, got 0"),
        (lambda: HybridNormalized(0), "num_heads: expected at least 1, got 0"),
        (lambda: InterpolatedNormalized(2, 1.0), r"between 0 and 1, got 1\.0"),
        (lambda: GaussianLogits(0, 3), "must be positive, got num_heads=0, dim=3"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CHOICES)
def test_lower_precision(name, dtype, generator):
    parts = operands(generator)
    choice = learned(CHOICES[name](5), generator)
    masks = padding(generator)
    exact = attention(*(part.to(dtype).double() for part in parts), normalization=choice, **masks)
    bound = 8 * torch.finfo(dtype).eps
    for route in ("dense", "fused"):
        low = [part.to(dtype).requires_grad_() for part in parts]
        ours = attention(*low, normalization=choice.to(dtype), route=route, **masks)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=bound, atol=2 * bound)
        ours.sum().backward()
        assert all(part.grad is not None and part.grad.isfinite().all() for part in low)


@pytest.mark.parametrize("name", CHOICES)
def test_autocast(name, generator):
    parts = operands(generator, dtype=torch.float32)
    choice = CHOICES[name](5)
    expected = attention(*parts, normalization=choice)
    with torch.autocast("cpu", torch.bfloat16):
        for route in ("dense", "fused"):
            ours = attention(*parts, normalization=choice, route=route)
            assert ours.dtype == torch.bfloat16
            torch.testing.assert_close(ours.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.compile
@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("name", CHOICES)
def test_compiles_in_one_graph(name, route, generator):
    parts, masks = operands(generator), padding(generator)
    choice = learned(CHOICES[name](5), generator)

    def function(*p):
        return attention(*p, normalization=choice, route=route, **masks)

    torch.testing.assert_close(in_one_graph(function, *parts), function(*parts))
