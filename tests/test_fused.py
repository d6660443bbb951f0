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
    parts = [part.requires_grad_() for part in (query, key, value, with_hole)]
    output = attention_with_key_bias(query, key, value, with_hole)
    total = attention_logsumexp(query, key, with_hole)
    less = [part[..., kept, :] for part in (key, value)]
    without = attention_with_key_bias(query, *less, bias[..., kept])
    torch.testing.assert_close(output[1], without[1])
    torch.testing.assert_close(total[1], attention_logsumexp(query, less[0], bias[..., kept])[1])
    assert (output[0, 0] == 0).all()
    assert (total[0, 0] == -torch.inf).all()
    with torch.autograd.set_detect_anomaly(True):
        slopes = torch.autograd.grad(output.sin().sum() + total[1].sum(), parts)
    assert all(slope.isfinite().all() for slope in slopes)
    assert all((slope[0, 0] == 0).all() for slope in slopes)
    doubly = doubly_normalized_attention(query, key, value, None, with_hole.detach())
    slopes = torch.autograd.grad(doubly.sin().sum(), parts[:3])
    assert all((slope[0, 0] == 0).all() for slope in slopes)
    again = doubly_normalized_attention(query, *less)
    torch.testing.assert_close(doubly[1], again[1])
    assert (doubly[0, 0] == 0).all()


@pytest.mark.parametrize("lowest", [-1e30, -1e38, torch.finfo(torch.float32).min])
def test_finite_biases_forbid_nothing_by_themselves(lowest, generator):
    """All keys as low as can be are all alike, as a softmax has it; one of them is all there is."""
    query, key, value, bias = (part.float() for part in operands(generator))
    query.requires_grad_()
    alike = attention_with_key_bias(query, key, value, torch.full_like(bias, lowest))
    torch.testing.assert_close(alike, value.mean(-2, keepdim=True).expand_as(alike))
    alone = torch.full_like(bias, -torch.inf)
    alone[..., 3] = lowest
    found = attention_with_key_bias(query, key, value, alone)
    torch.testing.assert_close(found, value[..., 3:4, :].expand_as(found))
    # Dropped weights are of a key that is there, or of none.
    without = attention_with_key_bias(query, key, value, torch.full_like(bias, -torch.inf))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dropped = attention_with_key_bias(
            query, key, value, torch.full_like(bias, -torch.inf), dropout_p=0.5
        )
    assert (torch.stack([without, dropped]) == 0).all()


def test_parts_may_lie_in_memory_as_they_please(generator):
    """Mutant: a kernel that takes what stands beside a number in memory for the next of its row."""
    *parts, bias = operands(generator)
    expected = attention_with_key_bias(*parts, bias)
    turned = [part.mT.contiguous().mT for part in parts]
    torch.testing.assert_close(attention_with_key_bias(*turned, bias), expected)
    wide = [part.repeat_interleave(2, -1)[..., ::2] for part in parts]
    torch.testing.assert_close(attention_with_key_bias(*wide, bias), expected)
    doubly = [doubly_normalized_attention(*some) for some in (parts, turned, wide)]
    torch.testing.assert_close(doubly[1:], doubly[:1] * 2)


@pytest.mark.parametrize("function", [attention_with_key_bias, doubly_normalized_attention])
def test_a_gradient_under_autocast_loses_no_digits(function, generator):
    """Where the forward pass was not under it."""
    parts = [part.float().requires_grad_() for part in operands(generator)[:3]]
    biased = parts[0] if function is doubly_normalized_attention else parts[1]
    parts.append(biased.detach()[..., 0].requires_grad_())
    loss = function(*parts).sin().sum()
    expected = torch.autograd.grad(loss, parts, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, parts)
    torch.testing.assert_close(found, expected)


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


@pytest.mark.parametrize("is_row_major", [True, False])
def test_operators_keep_their_contract(is_row_major, generator):
    """Schemas, fake tensors and tracing, by PyTorch's own check. Mutant: strides of the inputs."""
    query, key, value, bias = (part[0] for part in operands(generator))
    if not is_row_major:
        query, key, value = (part.mT.contiguous().mT for part in (query, key, value))
    from bayesattn import fused_operators as operators

    with torch.no_grad():
        output, total = operators.biased_attention_operator(query, key, value, bias, 0.5)
        parts = (output.cos(), query, key, value, bias, output, total)
        for prior in (None, total.sin()):
            inputs = (*parts, prior, prior is not None, 0.5)
            torch.library.opcheck(operators.attention_gradient_operator, inputs)
        inputs = (total.cos(), query, key, bias, total, 0.5)
        torch.library.opcheck(operators.logsumexp_gradient_operator, inputs)
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
