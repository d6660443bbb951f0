"""Tests of bayesattn.edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from bayesattn.edge_contractions import edge_sums
from bayesattn.edges import check_edges, edge_softmax, edge_weights, with_self_loops
from bayesattn.functional import attention, attention_weights
from bayesattn.logits import AdditiveLogits, DotProduct, GaussianLogits
from tests.compilation import in_one_graph

HEADS, QUERIES, KEYS, DIM, VALUE_DIM = 3, 5, 7, 4, 2
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def parts(generator, queries=QUERIES, keys=KEYS):
    shapes = ((HEADS, queries, DIM), (HEADS, keys, DIM), (HEADS, keys, VALUE_DIM))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def drawn_edges(generator):
    """Different edges in any order."""
    chosen = torch.rand(KEYS, QUERIES, generator=generator) < 0.5
    edges = chosen.nonzero().T
    return edges[:, torch.randperm(edges.shape[1], generator=generator)]


def pairs_of(edges):
    mask = torch.zeros(QUERIES, KEYS, dtype=torch.bool)
    mask[edges[1], edges[0]] = True
    return mask


def loops(query, key, value, edges):
    """Weights and averages of each head, target by target, from the formula."""
    weights = torch.zeros(len(query), edges.shape[1])
    averages = torch.zeros(len(query), query.shape[1], value.shape[2])
    for head in range(len(query)):
        for target in range(query.shape[1]):
            met = [e for e in range(edges.shape[1]) if edges[1, e] == target]
            masses = [
                math.exp(float(query[head, target] @ key[head, edges[0, e]]) / math.sqrt(DIM))
                for e in met
            ]
            for e, mass in zip(met, masses, strict=True):
                weights[head, e] = mass / sum(masses)
                averages[head, target] += weights[head, e] * value[head, edges[0, e]]
    return weights, averages


@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), number=st.integers(0, 12))
def test_equals_the_formula(seed, number):
    """Edges are drawn with replacement. Mutants: source for target; duplicates that count once."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = parts(generator)
    sources = torch.randint(KEYS, (number,), generator=generator)
    targets = torch.randint(QUERIES, (number,), generator=generator)
    edges = torch.stack([sources, targets])
    weights, averages = loops(query, key, value, edges)
    found = edge_weights(query, key, edges)
    torch.testing.assert_close(found, weights, **EXACT)
    torch.testing.assert_close(edge_sums(found, value, edges, QUERIES), averages, **EXACT)


CHOICES = {
    "none": lambda: None,
    "scale": lambda: DotProduct(0.3),
    "gaussian": lambda: GaussianLogits(HEADS, DIM),
    "additive": lambda: AdditiveLogits(HEADS, DIM),
}


@pytest.fixture(params=CHOICES)
def choice(request, untouched_global_state, generator):
    with torch.random.fork_rng(devices=[]):
        made = CHOICES[request.param]()
    with torch.no_grad():
        for parameter in () if made is None else made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def test_equals_attention_under_the_adjacency_as_mask(choice, generator):
    """Mutants: a scale or a bias that is left out; a bias of another end."""
    query, key, value = parts(generator)
    edges = drawn_edges(generator)
    given = {"attn_mask": pairs_of(edges), "logits": choice}
    dense = attention_weights(query, key, **given)
    weights = edge_weights(query, key, edges, logits=choice)
    torch.testing.assert_close(weights, dense[:, edges[1], edges[0]], **EXACT)
    averages = edge_sums(weights, value, edges, QUERIES)
    torch.testing.assert_close(averages, attention(query, key, value, **given), **EXACT)


def test_order_of_edges_does_not_matter(generator):
    query, key, value = parts(generator)
    edges = drawn_edges(generator)
    order = torch.randperm(edges.shape[1], generator=generator)
    weights, other = edge_weights(query, key, edges), edge_weights(query, key, edges[:, order])
    torch.testing.assert_close(other, weights[:, order], **EXACT)
    averages = [
        edge_sums(found, value, met, QUERIES)
        for found, met in ((weights, edges), (other, edges[:, order]))
    ]
    torch.testing.assert_close(*averages, **EXACT)


def test_large_logits_do_not_overflow(generator):
    """Each target has its own largest logit. Mutants: none, or one for all, subtracted."""
    targets = torch.tensor([0, 1, 0, 2, 1, 0])
    logits = torch.randn(HEADS, 6, generator=generator)
    moved = logits + torch.tensor([2000.0, -2000.0, 0.0])[targets]
    found = edge_softmax(moved, targets, 3)
    torch.testing.assert_close(found, edge_softmax(logits, targets, 3), rtol=1e-10, atol=0)
    totals = torch.zeros(HEADS, 3).index_add(1, targets, found)
    torch.testing.assert_close(totals, torch.ones(HEADS, 3))


def test_derivatives(choice, generator):
    """First and second. Mutant: a gradient through the largest logit alone."""
    query, key, value = (p.requires_grad_() for p in parts(generator, queries=3, keys=4))
    edges = torch.tensor([[0, 1, 1, 3, 2], [0, 0, 0, 2, 2]])
    parameters = () if choice is None else tuple(choice.parameters())

    def attend(query, key, value, *_):
        return edge_sums(edge_weights(query, key, edges, logits=choice), value, edges, 3)

    given = (query, key, value, *parameters)
    assert torch.autograd.gradcheck(attend, given)
    with torch.random.fork_rng(devices=[]):
        assert torch.autograd.gradgradcheck(attend, given)


def test_targets_without_edges(generator):
    """They get zeros, and gradients stay finite. Mutant: a sum over nothing that is divided by."""
    query, key, value = (part.requires_grad_() for part in parts(generator))
    edges = torch.tensor([[0, 6], [3, 3]])
    for met, seeing in ((edges, [3]), (edges[:, :0], [])):
        weights = edge_weights(query, key, met)
        averages = edge_sums(weights, value, met, QUERIES)
        assert averages.abs().sum((0, 2)).nonzero().flatten().tolist() == seeing
        slopes = torch.autograd.grad(averages.square().sum(), (query, key, value))
        assert all(slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_sums_exactly(dtype, generator):
    """A hub of 5000 edges: the mean of ones is one. Mutant: sums in the values' own type."""
    number = 5000
    key = torch.zeros(1, number, DIM, dtype=dtype)
    value = torch.ones(1, number, 1, dtype=dtype)
    edges = torch.stack([torch.arange(number), torch.zeros(number, dtype=torch.int64)])
    weights = edge_weights(key[:, :1], key, edges)
    assert weights.dtype == torch.float32
    found = edge_sums(weights, value, edges, 1)
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.ones(1, 1, 1, dtype=dtype), rtol=1e-4, atol=0)


def test_self_loops():
    """Mutants: loops that are there stay; other edges are lost; loops before the others."""
    edges = torch.tensor([[0, 2, 1, 2, 2], [1, 2, 1, 0, 2]])
    expected = torch.tensor([[0, 2, 0, 1, 2, 3], [1, 0, 0, 1, 2, 3]])
    assert torch.equal(with_self_loops(edges, 4), expected)
    assert torch.equal(with_self_loops(edges[:, :0], 2), torch.tensor([[0, 1], [0, 1]]))


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (torch.tensor([[0, 7], [0, 0]]), "sources from 0 to 6 and targets from 0 to 4, got 0 to 7"),
        (torch.tensor([[0, 1], [0, 5]]), "got 0 to 1 and 0 to 5"),
        (torch.tensor([[0, -1], [0, 0]]), "got -1 to 0 and 0 to 0"),
        (torch.tensor([[0, 1], [-2, 0]]), "got 0 to 1 and -2 to 0"),
        (torch.zeros(3, 2, dtype=torch.int64), r"sources and then all targets, got shape \(3, 2\)"),
        (torch.tensor([]), r"got shape \(0,\)"),
        (torch.zeros(2, 3), "numbers of nodes as int64, got torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int32), "got torch.int32"),
        (torch.zeros(2, 3, dtype=torch.bool), "got torch.bool"),
    ],
)
def test_bad_edges(edges, message, generator, unchecked_types):
    query, key, _ = parts(generator)
    with pytest.raises(ValueError, match=f"edges: expected .*{message}"):
        edge_weights(query, key, edges)
    with pytest.raises(ValueError, match="edges: expected"):
        with_self_loops(edges, 5)


def test_recording_looks_at_no_values(generator):
    query, key, _ = parts(generator)
    edges = drawn_edges(generator)
    graph = make_fx(lambda *given: edge_weights(*given), tracing_mode="fake")(query, key, edges)
    torch.testing.assert_close(graph(query, key, edges), edge_weights(query, key, edges))
    mapped = torch.func.vmap(lambda query: edge_weights(query, key, edges))(query[None])
    torch.testing.assert_close(mapped[0], edge_weights(query, key, edges))
    check_edges(edges, KEYS, QUERIES)


@pytest.mark.compile
def test_compiles_into_one_graph(generator):
    """Mutant: a look at the edges' values, at which a graph would break."""
    query, key, value = parts(generator)

    def attend(query, key, value, edges):
        return edge_sums(edge_weights(query, key, edges), value, edges, QUERIES)

    given = (query, key, value, drawn_edges(generator))
    torch.testing.assert_close(in_one_graph(attend, *given), attend(*given))
