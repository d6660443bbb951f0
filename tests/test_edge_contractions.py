"""Products along edges and sums over them: by dense matrices, by blocks, and their derivatives."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from bayesattn import edge_contractions
from bayesattn.edge_contractions import edge_products, edge_sums

HEADS, QUERIES, KEYS, DIM, EDGES = 2, 4, 5, 3, 11
close = torch.testing.assert_close


@pytest.fixture
def parts(generator):
    """Queries, keys, values, weights, and edges of which some are the same."""
    sizes = [(HEADS, QUERIES, DIM), (HEADS, KEYS, DIM), (HEADS, KEYS, DIM), (HEADS, EDGES)]
    edges = [torch.randint(size, (EDGES,), generator=generator) for size in (KEYS, QUERIES)]
    drawn = [torch.randn(*size, generator=generator) for size in sizes]
    return *drawn, torch.stack(edges)


@pytest.fixture(params=[1, 2 * HEADS * DIM, 2**18], ids=["one edge", "two edges", "all edges"])
def _block(request, monkeypatch):
    """How much a block holds."""
    monkeypatch.setattr(edge_contractions, "_BLOCK_ENTRIES", request.param)


@pytest.mark.usefixtures("_block")
def test_both_are_those_of_dense_matrices(parts):
    """Mutants: a block left out or twice, sources and targets exchanged, heads mixed."""
    query, key, value, weights, edges = parts
    every = query @ key.mT
    close(edge_products(query, key, edges), every[:, edges[1], edges[0]])
    dense = torch.zeros(HEADS, QUERIES, KEYS)
    for edge, (source, target) in enumerate(edges.T.tolist()):
        dense[:, target, source] += weights[:, edge]
    close(edge_sums(weights, value, edges, QUERIES), dense @ value)


def test_one_head_goes_with_many(parts):
    query, key, value, weights, edges = parts
    close(edge_products(query, key[:1], edges)[1:], edge_products(query[1:], key[:1], edges))
    close(edge_products(query[:1], key, edges)[1:], edge_products(query[:1], key[1:], edges))
    ones, others = value[:1].requires_grad_(), weights.requires_grad_()
    sums = edge_sums(others, ones, edges, QUERIES)
    close(sums[1:], edge_sums(others[1:], ones, edges, QUERIES))
    (slope,) = torch.autograd.grad(sums.sum(), ones)
    close(slope.sum(), others.sum() * DIM)


@pytest.mark.usefixtures("_block")
def test_first_and_second_derivatives(parts):
    query, key, value, weights, edges = (
        part.requires_grad_() if part.is_floating_point() else part for part in parts
    )
    for function, inputs in (
        (lambda *given: edge_products(*given, edges), (query, key)),
        (lambda *given: edge_sums(*given, edges, QUERIES), (weights, value)),
    ):
        with torch.random.fork_rng(devices=[]):
            assert gradcheck(function, inputs, check_batched_grad=True)
            assert gradgradcheck(function, inputs)


def test_only_what_is_asked_has_a_gradient(parts):
    query, key, value, weights, edges = parts
    for one, other in ((query, key.requires_grad_()), (query.clone().requires_grad_(), key)):
        edge_products(one, other.detach() if one.requires_grad else other, edges).sum().backward()
        assert (one.grad is None) is not one.requires_grad
    edge_sums(weights, value.requires_grad_(), edges, QUERIES).sum().backward()
    assert (weights.grad, value.grad is None) == (None, False)


@pytest.mark.parametrize("transform", ["vmap", "forward mode", "recorded"])
def test_single_operations_give_the_same(parts, transform, monkeypatch):
    """Where PyTorch looks on there are no blocks. Mutants: another order of axes or ends there."""
    query, key, value, weights, edges = parts
    going, blocks, bag = [], edge_contractions._blocks, F.embedding_bag
    monkeypatch.setattr(edge_contractions, "_blocks", lambda *a: going.append(1) or blocks(*a))
    monkeypatch.setattr(F, "embedding_bag", lambda *a, **k: going.append(1) or bag(*a, **k))

    def both(query, key, value, weights, edges=edges):
        return edge_products(query, key, edges), edge_sums(weights, value, edges, QUERIES)

    given = (query, key, value, weights)
    expected = both(*given)
    assert len(going) == 2
    if transform == "vmap":
        found = [part[0] for part in torch.func.vmap(both)(*(part[None] for part in given))]
    elif transform == "recorded":
        found = make_fx(lambda *all_of: both(*all_of), tracing_mode="fake")(*given, edges)(
            *given, edges
        )
    else:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(part, torch.ones_like(part)) for part in given]
            found, slopes = zip(*map(forward_ad.unpack_dual, both(*duals)), strict=True)
        more, less = (both(*(part + step for part in given)) for step in (1e-4, -1e-4))
        for slope, high, low in zip(slopes, more, less, strict=True):
            close(slope, (high - low) / 2e-4)
        del going[-4:]
    assert len(going) == 2
    for one, other in zip(found, expected, strict=True):
        close(one, other)


def test_narrow_types_add_in_single_precision():
    """A thousand ones are not 256, where sums of bfloat16 stop. Mutant: sums in the type given."""
    ones = torch.ones(1, 1, 1000, dtype=torch.bfloat16)
    found = edge_products(ones, ones, torch.zeros(2, 1, dtype=torch.int64))
    assert (found.item(), found.dtype) == (1000.0, torch.float32)
    value = torch.ones(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    edges = torch.zeros(2, 1000, dtype=torch.int64)
    sums = edge_sums(torch.ones(1, 1000), value, edges, 1)
    assert (sums.item(), sums.dtype) == (1000.0, torch.bfloat16)
    (slope,) = torch.autograd.grad(sums, value)
    assert (slope.item(), slope.dtype) == (1000.0, torch.bfloat16)


@pytest.mark.parametrize("narrow", [0, 1])
def test_two_types_give_the_wider(narrow, parts):
    ends = list(parts[:2])
    ends[narrow] = ends[narrow].float()
    assert edge_products(*ends, parts[4]).dtype == torch.float64


def test_without_edges(parts):
    query, key, value, weights, edges = parts
    none = edges[:, :0]
    assert edge_products(query, key, none).shape == (HEADS, 0)
    sums = edge_sums(weights[:, :0], value, none, QUERIES)
    close(sums, torch.zeros(HEADS, QUERIES, DIM))
    # PyTorch's bags refuse an empty table.
    assert edge_sums(weights[:, :0], value[:, :0], none, QUERIES).shape == sums.shape
    assert edge_sums(weights, value[..., :0], edges, QUERIES).shape == (HEADS, QUERIES, 0)
    query.requires_grad_()
    (slope,) = torch.autograd.grad(edge_products(query, key, none).sum(), query)
    close(slope, torch.zeros_like(query))
