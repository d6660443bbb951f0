"""Tests of bayesattn.fused and of what it stands on: blocks, folding, and operators."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from bayesattn import blockwise, fused
from bayesattn.folding import folded_attention, folded_logsumexp
from bayesattn.fused import (
    attention_logsumexp,
    attention_with_key_bias,
    doubly_normalized_attention,
)
from tests.compilation import in_one_graph


def operands(generator, num_queries=5, num_keys=7, dim=3, value_dim=2, batch=(2, 3)):
    shapes = ((num_queries, dim), (num_keys, dim), (num_keys, value_dim), (num_keys,))
    return [torch.randn(*batch, *shape, generator=generator) for shape in shapes]


def dense_sum(query, key, bias, scale):
    return (scale * query @ key.mT + bias[..., None, :]).logsumexp(-1)


def dense(query, key, value, bias, scale):
    return (scale * query @ key.mT + bias[..., None, :]).softmax(-1) @ value


def dense_doubly(query, key, value, bias, scale):
    logits = scale * query @ key.mT
    total = (logits + bias[..., None]).logsumexp(-2, keepdim=True)
    return (logits - total).softmax(-1) @ value


@given(
    seed=st.integers(0, 2**16),
    num_queries=st.integers(1, 5),
    num_keys=st.integers(1, 5),
    value_dim=st.integers(1, 4),
    entries=st.sampled_from([1, 6, 1000]),
    magnitude=st.sampled_from([1.0, 100.0]),
)
def test_equals_dense_with_any_blocks(seed, num_queries, num_keys, value_dim, entries, magnitude):
    """Values and gradients, with blocks of one row up to all rows of several problems."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value, bias = operands(generator, num_queries, num_keys, 3, value_dim)
    prior = torch.randn(2, 3, num_queries, generator=generator)
    inputs = [(magnitude * query), key, value, bias, prior]
    inputs = [part.requires_grad_() for part in inputs]
    query, key, value, bias, prior = inputs
    pairs = [
        (attention_logsumexp(query, key, bias, scale=0.7), dense_sum(query, key, bias, 0.7)),
        (
            attention_with_key_bias(query, key, value, bias, scale=0.7),
            dense(query, key, value, bias, 0.7),
        ),
        (
            doubly_normalized_attention(query, key, value, prior, scale=0.7),
            dense_doubly(query, key, value, prior, 0.7),
        ),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_BLOCK_ENTRIES", entries)
        patch.setattr(blockwise, "_FEWEST_ROWS", 1)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
            slopes = [
                torch.autograd.grad(result.sin().sum(), inputs, allow_unused=True)
                for result in (ours, theirs)
            ]
            for one, other in zip(*slopes, strict=True):
                if other is not None:
                    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10 * magnitude)


def test_gradients(generator):
    query, key, value, bias = (x.requires_grad_() for x in operands(generator, 3, 4, 2, 2, (2,)))
    prior = torch.randn(2, 3, generator=generator, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(attention_logsumexp, (query, key, bias))
    assert check(attention_logsumexp, (query, key))
    assert check(attention_with_key_bias, (query, key, value, bias))
    assert check(doubly_normalized_attention, (query, key, value, prior))
    assert check(doubly_normalized_attention, (query, key, value))


def test_forbidden_keys(generator):
    """A forbidden key is as good as absent; where all are, zero and no gradient."""
    query, key, value, bias = operands(generator)
    with_hole = bias.clone()
    with_hole[..., 2] = -torch.inf
    with_hole[0, 0] = -torch.inf
    kept = [0, 1, 3, 4, 5, 6]
    query.requires_grad_()
    output = attention_with_key_bias(query, key, value, with_hole)
    total = attention_logsumexp(query, key, with_hole)
    less = [part[..., kept, :] for part in (key, value)]
    without = attention_with_key_bias(query, *less, bias[..., kept])
    torch.testing.assert_close(output[1], without[1])
    torch.testing.assert_close(total[1], attention_logsumexp(query, less[0], bias[..., kept])[1])
    assert (output[0, 0] == 0).all()
    assert (total[0, 0] == -torch.inf).all()
    with torch.autograd.set_detect_anomaly(True):
        slopes = torch.autograd.grad(output.sum() + total[1].sum(), query)[0]
    assert slopes.isfinite().all()
    assert (slopes[0, 0] == 0).all()
    doubly = doubly_normalized_attention(query, key, value, None, with_hole)
    again = doubly_normalized_attention(query, *less)
    torch.testing.assert_close(doubly[1], again[1])
    assert (doubly[0, 0] == 0).all()


def test_nothing_to_see(generator):
    query, key, value, _ = operands(generator, 5, 0)
    assert torch.equal(attention_with_key_bias(query, key, value), torch.zeros(2, 3, 5, 2))
    assert torch.equal(doubly_normalized_attention(query, key, value), torch.zeros(2, 3, 5, 2))
    assert (attention_logsumexp(query, key) == -torch.inf).all()


def test_leading_axes_broadcast(generator):
    query, key, value, bias = operands(generator)
    shared = key[:1, :1], value[:, :1], bias[0, 0]
    full = [part.expand(2, 3, *part.shape[2:]) for part in shared[:2]] + [
        bias[0, 0].expand(2, 3, 7)
    ]
    torch.testing.assert_close(
        attention_with_key_bias(query, *shared), attention_with_key_bias(query, *full)
    )
    torch.testing.assert_close(
        attention_logsumexp(query, shared[0], shared[2]),
        attention_logsumexp(query, full[0], full[2]),
    )


def loss(query, key, value, bias):
    output = attention_with_key_bias(query, key, value, bias)
    doubly = doubly_normalized_attention(query, key, value)
    return output.sin().sum() + doubly.sin().sum() + attention_logsumexp(query, key, bias).sum()


def test_vmap_equals_a_loop_and_its_graph_does_not_grow(generator):
    def mapped(num_particles):
        query, key, value, bias = operands(generator, batch=(num_particles, 2, 3))
        return [query, key[0], value, bias[0]]

    function = vmap(grad_and_value(loss, argnums=(0, 1, 2, 3)), (0, None, 0, None))
    query, key, value, bias = mapped(11)
    slopes, values = function(query, key, value, bias)
    for i in range(11):
        single = grad_and_value(loss, argnums=(0, 1, 2, 3))(query[i], key, value[i], bias)
        torch.testing.assert_close(tree_map(lambda x, i=i: x[i], (slopes, values)), single)
    graphs = [make_fx(function, tracing_mode="fake")(*mapped(size)) for size in (2, 11)]
    assert len(graphs[0].graph.nodes) == len(graphs[1].graph.nodes)
    torch.testing.assert_close(graphs[1](query, key, value, bias), (slopes, values))


def test_second_derivatives_are_refused(generator):
    query, key, value, bias = operands(generator)
    query.requires_grad_()
    for result in (
        attention_with_key_bias(query, key, value, bias),
        attention_logsumexp(query, key, bias),
        doubly_normalized_attention(query, key, value),
    ):
        slope = torch.autograd.grad(result.square().sum(), query, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"no second derivatives.*route='dense'"):
            slope.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1.0, 30.0])
def test_folding_equals_dense_at_any_logits(dtype, magnitude, generator):
    """The way of other devices, with a bias far from zero and a forbidden key."""
    query, key, value, bias = operands(generator, 53, 71, 16, 6)
    query, key, value = ((magnitude**0.5 * part).to(dtype) for part in (query, key, value))
    bias = (3 * bias + 20).to(torch.promote_types(dtype, torch.float32))
    bias[..., 2] = -torch.inf
    exact = [part.double() for part in (query, key, value, bias)]
    bound = 8 * torch.finfo(dtype).eps
    total = folded_logsumexp(query, key, bias, 0.25)
    scale = {"rtol": bound if dtype.itemsize > 2 else bound / 64, "atol": bound}
    torch.testing.assert_close(total.double(), dense_sum(*exact[:2], exact[3], 0.25), **scale)
    output = folded_attention(query, key, value, bias, 0.25)
    # Logits of some hundreds are known to some ten roundings.
    bound = bound * (1 + magnitude) if dtype.itemsize > 2 else bound
    torch.testing.assert_close(output.double(), dense(*exact, 0.25), rtol=bound, atol=bound * 6)


def test_folding_has_the_same_gradients(generator):
    parts = [part.requires_grad_() for part in operands(generator, 3, 4, 2, 2)]
    query, key, _, bias = parts
    pairs = [
        (folded_attention(*parts, 0.7), dense(*parts, 0.7)),
        (folded_logsumexp(query, key, bias, 0.7), dense_sum(query, key, bias, 0.7)),
    ]
    for ours, theirs in pairs:
        slopes = [
            torch.autograd.grad(result.sin().sum(), parts, allow_unused=True)
            for result in (ours, theirs)
        ]
        for one, other in zip(*slopes, strict=True):
            if other is not None:
                torch.testing.assert_close(one, other)


def test_dropout_drops_weights(generator):
    """Each weight is dropped or doubled."""
    query, key = torch.zeros(2000, 3), torch.zeros(4, 3)
    bias = torch.randn(4, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        kept = attention_with_key_bias(query, key, torch.eye(4), bias, dropout_p=0.5)
    dropped = kept == 0
    torch.testing.assert_close(kept, torch.where(dropped, 0.0, 2 * bias.softmax(-1)))
    # Four binomial counts, five standard deviations.
    assert (dropped.double().mean(0) - 0.5).abs().max() < 5 * 0.5 / 2000**0.5


def test_operators_keep_their_contract(generator):
    """Schemas, fake tensors and tracing, by PyTorch's own check."""
    query, key, value, bias = (part[0] for part in operands(generator))
    from bayesattn import fused_operators as operators

    with torch.no_grad():
        torch.library.opcheck(operators.logsumexp_operator, (query, key, bias, 0.5))
        torch.library.opcheck(operators.biased_attention_operator, (query, key, value, bias, 0.5))
        torch.library.opcheck(
            operators.doubly_normalized_operator, (query, key, value, None, bias, 0.5)
        )


@pytest.mark.compile
@pytest.mark.parametrize("name", fused.__all__)
def test_compiles_in_one_graph_with_its_gradient(name, generator):
    query, key, value, _ = operands(generator)
    parts = (query, key) if "logsumexp" in name else (query, key, value)
    parts = [part.requires_grad_() for part in parts]
    function = getattr(fused, name)
    torch.testing.assert_close(in_one_graph(function, *parts), function(*parts))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    slopes = [torch.autograd.grad(f(*parts).sin().sum(), parts) for f in (compiled, function)]
    torch.testing.assert_close(*slopes)
