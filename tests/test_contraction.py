"""Tests of bayesattn.contraction."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, grad_and_value, hessian, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from bayesattn.contraction import inner_products, inside_transform, weighted_sums

SHAPES = [
    ((7, 3), (5, 3)),
    ((2, 7, 3), (5, 3)),
    ((2, 1, 7, 3), (11, 5, 3)),
    ((4, 1, 3), (11, 1, 5, 3)),
    ((1, 1, 7, 3), (1, 5, 3)),
    ((2, 11, 1, 1), (2, 11, 1, 1)),
    ((2, 11, 7, 3), (2, 1, 5, 3)),
]

# PyTorch's own, at the first use of forward mode in a process.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_products_are_those_of_matmul(left, right, generator):
    query, key = torch.randn(left, generator=generator), torch.randn(right, generator=generator)
    logits = inner_products(query, key)
    torch.testing.assert_close(logits, query @ key.mT)
    torch.testing.assert_close(weighted_sums(logits, key), logits @ key)


@pytest.mark.parametrize(("left", "right"), SHAPES)
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 1), (-1, 0)])
def test_vmap_equals_a_loop(left, right, in_dims, generator):
    """With the mapped axis anywhere, and again under a second vmap."""
    operands, singles = [], []
    for shape, dim in zip((left, right), in_dims, strict=True):
        single = torch.randn(6, *shape, generator=generator)
        singles.append(single if dim is not None else single[:1].expand_as(single))
        operands.append(single.movedim(0, dim) if dim is not None else single[0])
    ours = vmap(inner_products, in_dims)(*operands)
    loop = torch.stack([q @ k.mT for q, k in zip(*singles, strict=True)])
    torch.testing.assert_close(ours, loop)
    pair = [torch.stack([operand, 2 * operand]) for operand in operands]
    torch.testing.assert_close(vmap(vmap(inner_products, in_dims))(*pair)[1], 4 * loop)


@given(
    batch=st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.booleans()), max_size=3),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)
def test_any_broadcast_equals_matmul(batch, sizes):
    num_queries, num_keys, dim = sizes
    left = [1 if shared else size for size, shared, _ in batch]
    right = [1 if shared else size for size, _, shared in batch]
    generator = torch.Generator().manual_seed(7)
    query = torch.randn(*left, num_queries, dim, generator=generator)
    key = torch.randn(*right, num_keys, dim, generator=generator)
    torch.testing.assert_close(inner_products(query, key), query @ key.mT)


def ours(query, tokens, mask):
    logits = torch.where(mask, inner_products(query, tokens), -1e9)
    return weighted_sums(logits.softmax(-1), tokens).square().sum()


def plain(query, tokens, mask):
    return (torch.where(mask, query @ tokens.mT, -1e9).softmax(-1) @ tokens).square().sum()


def pooling(generator, particle=5, sentence=7, head=3, token=11, dim=13):
    query = torch.randn(particle, head, 1, dim, generator=generator)
    tokens = torch.randn(sentence, 1, token, dim, generator=generator)
    mask = torch.rand(sentence, 1, 1, token, generator=generator) > 0.2
    return query, tokens, mask


@forward_mode
@pytest.mark.parametrize("transform", [grad, hessian, lambda f: hessian(f, argnums=1)])
def test_derivatives_under_vmap_are_those_of_matmul(transform, generator):
    inputs = pooling(generator, 2, 3, 2, 5, 3)
    expected = vmap(transform(plain), (0, None, None))(*inputs)
    torch.testing.assert_close(vmap(transform(ours), (0, None, None))(*inputs), expected)


def test_reverse_mode_twice(generator):
    query = torch.randn(2, 1, 3, 2, generator=generator, requires_grad=True)
    key = torch.randn(3, 4, 2, generator=generator, requires_grad=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        assert torch.autograd.gradgradcheck(inner_products, (query, key))


@forward_mode
def test_forward_mode_by_either_operand_and_both(generator):
    query, dq = torch.randn(2, 2, 1, 3, 2, generator=generator)
    key, dk = torch.randn(2, 3, 4, 2, generator=generator)
    by_query, by_key = dq @ key.mT, query @ dk.mT
    for expected, function, at, along in (
        (by_query + by_key, inner_products, (query, key), (dq, dk)),
        (by_query, lambda q: inner_products(q, key), (query,), (dq,)),
        (by_key, lambda k: inner_products(query, k), (key,), (dk,)),
    ):
        torch.testing.assert_close(jvp(function, at, along)[1], expected)


def recorded(function, inputs, argnums=0):
    return make_fx(vmap(grad_and_value(function, argnums), (0, None, None)))(*inputs)


def largest(graph):
    nodes = (node for node in graph.graph.nodes if "tensor_meta" in node.meta)
    return max(node.meta["tensor_meta"].shape.numel() for node in nodes)


@pytest.mark.parametrize("argnums", [0, 1])
def test_shared_tokens_are_not_copied_per_head_or_particle(argnums, generator):
    """No tensor, views included, is as large as those that a plain product expands to."""
    particle, sentence, head, token, dim = 5, 7, 3, 11, 13
    inputs = pooling(generator, particle, sentence, head, token, dim)
    gradient = particle * sentence * token * dim if argnums == 1 else 0
    held = max(particle * sentence * head * max(token, dim), gradient)
    assert largest(recorded(ours, inputs, argnums)) == held
    assert largest(recorded(plain, inputs, argnums)) == particle * sentence * head * token * dim


def test_tokens_without_gradient_cost_none(generator):
    """Three products forward and back to the queries, a fourth through the values."""
    graph = recorded(ours, pooling(generator))
    assert sum(node.target is torch.ops.aten.bmm.default for node in graph.graph.nodes) == 4


def test_the_graph_does_not_grow_with_the_particles(generator):
    few, many = (len(recorded(ours, pooling(generator, n)).graph.nodes) for n in (3, 17))
    assert few == many


def test_a_recorded_graph_replays(generator):
    query, tokens, mask = pooling(generator)
    graph = recorded(ours, (query, tokens, mask))
    gradient, value = graph(2 * query, tokens + 1, mask)
    expected = vmap(grad_and_value(plain), (0, None, None))(2 * query, tokens + 1, mask)
    torch.testing.assert_close((gradient, value), expected)


def test_autocast_in_and_out_of_transforms(generator):
    query, tokens, _ = pooling(generator)
    query, tokens = query.float(), tokens.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert inner_products(query[0], tokens).dtype == torch.bfloat16
        product, pull_back = vjp(lambda q: inner_products(q, tokens), query[0])
    assert product.dtype == torch.bfloat16
    slope = pull_back(torch.ones_like(product))[0]  # outside, as backward is run
    expected = tokens.sum((0, 1, 2)).expand_as(slope)
    torch.testing.assert_close(slope, expected, rtol=0.02, atol=0.2)


def test_inside_transform():
    seen = []

    def look(x):
        seen.append(inside_transform())
        return x.sum()

    look(torch.ones(2))
    vmap(look)(torch.ones(2, 2))
    grad(look)(torch.ones(2))
    assert seen == [False, True, True]
