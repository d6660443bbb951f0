"""Tests of bayesattn.graph_layers."""

import copy
import io

import pytest
import torch
from torch import nn

import bayesattn
from bayesattn.edges import with_self_loops
from bayesattn.functional import attention, attention_weights
from bayesattn.graph_layers import GraphAttention
from bayesattn.logits import AdditiveLogits, DotProduct, GaussianLogits, Logits
from tests.compilation import in_one_graph

pytestmark = pytest.mark.usefixtures("seeded_layers")

NODES, WIDTH, HEADS, DIM = 11, 5, 3, 4
LOGITS = {
    "dot": lambda: None,
    "scale": lambda: DotProduct(1.5),
    "gaussian": lambda: GaussianLogits(HEADS, DIM),
    "additive": lambda: AdditiveLogits(HEADS, DIM),
}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def drawn(kind="dot", **settings):
    """A layer all of whose parameters count."""
    layer = GraphAttention(WIDTH, DIM, HEADS, logits=LOGITS[kind](), **settings)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.fixture
def graph(generator):
    """Nodes, and different edges in any order; some nodes have none, some only one way."""
    chosen = torch.rand(NODES, NODES, generator=generator) < 0.3
    chosen[:, 2] = chosen[:, 7] = chosen[7] = False
    edges = chosen.nonzero().T
    edges = edges[:, torch.randperm(edges.shape[1], generator=generator)]
    return torch.randn(NODES, WIDTH, generator=generator), edges


def pairs_of(edges):
    mask = torch.zeros(NODES, NODES, dtype=torch.bool)
    mask[edges[1], edges[0]] = True
    return mask


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("concatenate", [True, False])
@pytest.mark.parametrize("kind", LOGITS)
def test_equals_dense_attention_under_the_adjacency(kind, concatenate, bias, graph):
    """Mutants: edges read the other way round; projections or biases exchanged; mean for sum."""
    layer = drawn(kind, concatenate=concatenate, bias=bias)
    nodes, edges = graph
    query, key, value = (
        (nodes @ weight.mT).view(NODES, HEADS, DIM).transpose(0, 1)
        for weight in (layer.query_weight, layer.key_weight, layer.value_weight)
    )
    if bias:
        query = query + layer.query_bias.view(HEADS, 1, DIM)
    given = {"attn_mask": pairs_of(edges), "logits": layer.logits}
    heads = attention(query, key, value, **given)
    if concatenate:
        expected = torch.cat([heads[head] for head in range(HEADS)], -1)
    else:
        expected = sum(heads[head] for head in range(HEADS)) / HEADS
    expected = expected + layer.bias if bias else expected
    output, weights = layer(nodes, edges, need_weights=True)
    torch.testing.assert_close(output, expected, **EXACT)
    assert output.shape[1] == layer.out_features
    assert torch.equal(layer(nodes, edges), output)
    dense = attention_weights(query, key, **given)
    torch.testing.assert_close(weights, dense[:, edges[1], edges[0]], **EXACT)


def test_additive_layer_is_graph_attention_networks_own(graph):
    """With one projection for all three, node by node from the paper's equations 3, 4 and 5."""
    layer = drawn("additive", bias=False).requires_grad_(False)
    nodes, edges = with_loops = graph[0], with_self_loops(graph[1], NODES)
    layer.key_weight.copy_(layer.query_weight)
    layer.value_weight.copy_(layer.query_weight)
    output = layer(*with_loops)
    for head in range(HEADS):
        part = slice(head * DIM, (head + 1) * DIM)
        hidden = nodes @ layer.query_weight[part].mT
        a = torch.cat([layer.logits.query_vector[head], layer.logits.key_vector[head]])
        for node in range(NODES):
            met = edges[0, edges[1] == node].tolist()
            logits = [float(a @ torch.cat([hidden[node], hidden[other]])) for other in met]
            masses = torch.tensor([s if s > 0 else 0.2 * s for s in logits]).exp()
            expected = (masses / masses.sum()) @ hidden[met]
            torch.testing.assert_close(output[node, part], expected)


def test_permuted_nodes(graph, generator):
    """Numbers of nodes and the order of edges are names only."""
    layer = drawn()
    nodes, edges = graph
    place = torch.randperm(NODES, generator=generator)
    order = torch.randperm(edges.shape[1], generator=generator)
    moved = torch.empty_like(nodes)
    moved[place] = nodes
    output = layer(moved, place[edges][:, order])
    torch.testing.assert_close(output[place], layer(nodes, edges), **EXACT)


def test_a_union_of_graphs_is_graphs(graph, generator):
    layer = drawn()
    nodes, edges = graph
    other = torch.randn(NODES, WIDTH, generator=generator)
    output = layer(torch.cat([nodes, other]), torch.cat([edges, edges + NODES], 1))
    torch.testing.assert_close(output[:NODES], layer(nodes, edges), **EXACT)
    torch.testing.assert_close(output[NODES:], layer(other, edges), **EXACT)


def test_nodes_without_an_edge_get_the_bias(graph):
    layer = drawn()
    nodes, edges = graph
    output = layer(nodes, edges)
    alone = ~pairs_of(edges).any(1)
    assert alone[2]
    assert alone[7]
    assert torch.equal(output[alone], layer.bias.expand(int(alone.sum()), -1))
    assert not (output[~alone] == layer.bias).any()
    none = layer(nodes, edges[:, :0])
    assert torch.equal(none, layer.bias.expand(NODES, -1))
    assert not drawn(bias=False)(nodes, edges[:, :0]).any()


def test_edges_that_are_there_twice_count_twice(graph):
    """As a bias of log 2 on the pair."""
    layer = drawn()
    nodes, edges = graph
    doubled = torch.cat([edges, edges[:, :5]], 1)
    query, key, value = layer.projections(nodes)
    mask = torch.where(pairs_of(edges), 0.0, -torch.inf)
    mask[edges[1, :5], edges[0, :5]] = torch.log(torch.tensor(2.0))
    expected = attention(query, key, value, attn_mask=mask).transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer(nodes, doubled), expected + layer.bias, **EXACT)


@pytest.mark.parametrize("kind", LOGITS)
def test_gradients(kind, graph):
    """Of nodes and of every parameter, none of which is idle."""
    layer = drawn(kind)
    nodes, edges = graph
    names = [name for name, _ in layer.named_parameters()]

    def call(nodes, *values):
        given = (nodes, edges)
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), given)

    leaves = (nodes.requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    slopes = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    assert all(slope.abs().min() > 0 for slope in slopes[1:])


def test_sparse_nodes(graph):
    """The same outputs and gradients. Mutant: values of the sparse tensor taken for its rows."""
    layer = drawn()
    nodes, edges = graph
    nodes = torch.where(nodes > 0.5, nodes, 0.0)
    slopes = []
    for given in (nodes, nodes.to_sparse()):
        output = layer(given, edges)
        slopes.append(torch.autograd.grad(output.square().sum(), layer.parameters()))
        torch.testing.assert_close(output, layer(nodes, edges), **EXACT)
    torch.testing.assert_close(*slopes, **EXACT)


def test_dropout_is_of_weights_and_in_training_only(graph):
    """Mutants: dropout in evaluation; of values; weights returned as they were before."""
    layer = drawn(dropout=0.5, concatenate=False)
    nodes, edges = graph
    _, plain = layer.eval()(nodes, edges, need_weights=True)
    torch.testing.assert_close(layer(nodes, edges), drawn_like(layer)(nodes, edges), **EXACT)
    output, weights = layer.train()(nodes, edges, need_weights=True)
    kept = weights != 0
    assert 0.3 < kept.double().mean() < 0.7
    torch.testing.assert_close(weights[kept], 2 * plain[kept])
    _, _, value = layer.projections(nodes)
    dense = torch.zeros(HEADS, NODES, NODES)
    dense[:, edges[1], edges[0]] = weights
    torch.testing.assert_close(output, (dense @ value).mean(0) + layer.bias)


def drawn_like(layer):
    """The same layer without dropout."""
    other = GraphAttention(WIDTH, DIM, HEADS, concatenate=layer.concatenate)
    other.load_state_dict(layer.state_dict())
    return other


def test_float32_and_autocast(graph):
    nodes, edges = graph
    layer = drawn("gaussian")
    expected = layer(nodes, edges).float()
    layer, nodes = layer.float(), nodes.float()
    torch.testing.assert_close(layer(nodes, edges), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        output, weights = layer(nodes, edges, need_weights=True)
    assert output.dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)
    output.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_state_and_copies(graph):
    """Mutant: logits that layers share."""
    choice = AdditiveLogits(HEADS, DIM)
    layer = GraphAttention(WIDTH, DIM, HEADS, logits=choice)
    names = ["query_weight", "key_weight", "value_weight", "query_bias", "bias"]
    names += ["logits.query_vector", "logits.key_vector"]
    assert list(layer.state_dict()) == names
    assert layer.logits is not choice
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = GraphAttention(WIDTH, DIM, HEADS, logits=choice)
    assert not torch.equal(other(*graph), layer(*graph))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(*graph), layer(*graph))
    assert torch.equal(copy.deepcopy(layer)(*graph), layer(*graph))
    place = {"dtype": torch.float32, "device": "meta"}
    meta = GraphAttention(WIDTH, DIM, HEADS, logits=choice, **place)
    assert {part.dtype for part in meta.parameters()} == {torch.float32}
    assert all(part.is_meta for part in meta.parameters())


def test_start():
    """Glorot's bound of each projection, and no biases."""
    layer = GraphAttention(WIDTH, DIM, HEADS)
    bound = (6 / (WIDTH + HEADS * DIM)) ** 0.5
    for weight in (layer.query_weight, layer.key_weight, layer.value_weight):
        assert 0.8 * bound < weight.abs().max() <= bound
    assert not layer.query_bias.any()
    assert not layer.bias.any()
    assert [name for name, _ in GraphAttention(5, 4, 3, bias=False).named_parameters()] == [
        "query_weight",
        "key_weight",
        "value_weight",
    ]


def test_representation():
    assert repr(GraphAttention(5, 4, 3)) == "GraphAttention(5, 4, num_heads=3)"
    settings = {"concatenate": False, "dropout": 0.6, "bias": False}
    shown = "GraphAttention(5, 4, num_heads=3, concatenate=False, dropout=0.6, bias=False)"
    assert repr(GraphAttention(5, 4, 3, **settings)) == shown
    assert bayesattn.GraphAttention is GraphAttention


@pytest.mark.compile
@pytest.mark.parametrize("kind", LOGITS)
def test_compiles_into_one_graph(kind, graph):
    layer = drawn(kind)
    torch.testing.assert_close(in_one_graph(layer, *graph), layer(*graph))


@pytest.mark.compile
def test_compiles_for_any_graph(generator):
    """Mutant: a number of nodes or edges that is recorded as a constant."""
    layer = drawn()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for number in (7, 5, 11):
        nodes = torch.randn(number, WIDTH, generator=generator)
        edges = torch.randint(number, (2, 2 * number + 1), generator=generator)
        torch.testing.assert_close(compiled(nodes, edges), layer(nodes, edges))


class Dense(Logits):
    def forward(self, query, key):
        return torch.cdist(query, key)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_features": 0}, "in_features: expected at least 1, got 0"),
        ({"head_dim": 0}, "head_dim: expected at least 1, got 0"),
        ({"num_heads": -1}, "num_heads: expected at least 1, got -1"),
        ({"dropout": 1.5}, "dropout: expected a probability, got 1.5"),
        ({"logits": AdditiveLogits}, "logits: expected an object, such as AdditiveLogits()"),
        ({"logits": Dense()}, "logits: expected a choice that is known for single pairs.*Dense"),
        ({"logits": torch.add}, "logits: expected a choice that is known for single pairs.*add"),
        ({"logits": GaussianLogits(2, DIM)}, "logits: expected num_heads=3.*got num_heads=2"),
        ({"logits": AdditiveLogits(HEADS, 5)}, "logits: expected dim=4.*got dim=5"),
    ],
)
def test_construction_errors(settings, message, unchecked_types):
    sizes = {"in_features": WIDTH, "head_dim": DIM, "num_heads": HEADS}
    with pytest.raises(ValueError, match=message):
        GraphAttention(**(sizes | settings))


def test_call_errors(graph, unchecked_types):
    layer = drawn()
    nodes, edges = graph
    with pytest.raises(ValueError, match=r"nodes: expected .* width 5, got shape \(11, 4\)"):
        layer(nodes[:, :4], edges)
    with pytest.raises(ValueError, match=r"nodes: expected 'node feature'.*got shape \(1, 11, 5\)"):
        layer(nodes[None], edges)
    with pytest.raises(ValueError, match=r"edges: expected '2 edge'.*got shape \(\d+, 2\)"):
        layer(nodes, edges.mT)
    with pytest.raises(
        ValueError, match=r"edges: expected numbers of nodes as int64, got torch.float64"
    ):
        layer(nodes, edges.double())
    with pytest.raises(ValueError, match="edges: expected sources from 0 to 2 and targets"):
        layer(nodes[:3], edges)
