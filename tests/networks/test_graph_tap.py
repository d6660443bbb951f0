"""Tests of bayesattn.networks on graph attention layers."""

import pytest
import torch
from torch import nn

from bayesattn.attention_diagnostics import layer_statistics
from bayesattn.edges import with_self_loops
from bayesattn.functional import attention_weights
from bayesattn.graph_layers import GraphAttention
from bayesattn.logits import AdditiveLogits, GaussianLogits
from bayesattn.networks import (
    AttentionCall,
    attention_calls,
    attention_layers,
    head_partitions,
    watch_attention,
)
from tests.networks.perturbation import assert_particles_are_heads

NODES, WIDTH, HEADS, DIM = 7, 5, 3, 4
LOGITS = {"dot": None, "gaussian": GaussianLogits, "additive": AdditiveLogits}
# A pair twice, one both ways, a node without an incoming edge (0), one without any (6).
EDGES = torch.tensor([[0, 2, 2, 3, 4, 1, 5], [1, 1, 1, 4, 3, 5, 5]])


class Network(nn.Module):
    """Two layers, the first with heads side by side, the second with their mean."""

    def __init__(self, **settings):
        super().__init__()
        self.first = GraphAttention(WIDTH, DIM, HEADS, **settings)
        self.second = GraphAttention(HEADS * DIM, 2, 2, concatenate=False, **settings)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, nodes, edges):
        return self.second(torch.tanh(self.first(nodes, edges)), edges)


def drawn(kind="dot", **settings):
    choice = LOGITS[kind] and LOGITS[kind](HEADS, DIM)
    layer = GraphAttention(WIDTH, DIM, HEADS, logits=choice, **settings)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def test_layers_and_their_partitions_are_found():
    """Mutants: an axis, a start or a width of a slice; a bias of keys, which there is none of."""
    model = Network()
    assert list(attention_layers(model)) == ["first", "second"]
    for biases in (False, True):
        found = {part.name: part for part in head_partitions(model, biases=biases)}
        roles = ("query", "key", "value")
        assert list(found) == [f"{name}.{role}" for name in ("first", "second") for role in roles]
        rows = model.first.query_weight.view(HEADS, -1)
        if biases:
            rows = torch.cat([rows, model.first.query_bias.view(HEADS, -1)], 1)
        torch.testing.assert_close(found["first.query"].particles(), rows)
        key = model.second.key_weight.view(2, -1)
        torch.testing.assert_close(found["second.key"].particles(), key)
    joint = head_partitions(model, joint=True)
    assert [(part.num_heads, part.dim) for part in joint] == [(3, 60), (2, 72)]


def test_particles_are_heads(generator):
    nodes = torch.randn(NODES, WIDTH, generator=generator)
    for concatenate in (True, False):
        layer = drawn(concatenate=concatenate)
        assert_particles_are_heads(layer, lambda model: model(nodes, EDGES), generator)


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("concatenate", [True, False])
def test_calls_are_what_happened(kind, concatenate, generator):
    """Mutants: edges read the other way round; a pair that is there twice counted once."""
    layer = drawn(kind, concatenate=concatenate)
    nodes = torch.randn(NODES, WIDTH, generator=generator)
    with attention_calls(layer) as calls:
        output, weights = layer(nodes, edges=EDGES, need_weights=True)
    (call,) = calls[""]
    assert isinstance(call, AttentionCall)
    query = (nodes @ layer.query_weight.mT + layer.query_bias).view(NODES, HEADS, DIM)
    torch.testing.assert_close(call.query[0].transpose(0, 1), query)
    for part, weight in ((call.key, layer.key_weight), (call.value, layer.value_weight)):
        torch.testing.assert_close(part[0].transpose(0, 1).flatten(1), nodes @ weight.mT)
    dense = call.weights()
    assert dense.shape == (1, HEADS, NODES, NODES)
    expected = torch.zeros(HEADS, NODES, NODES)
    for number, (source, target) in enumerate(EDGES.T.tolist()):
        expected[:, target, source] += weights[:, number]
    torch.testing.assert_close(dense[0], expected)
    torch.testing.assert_close(dense @ call.value, call.head_outputs)
    heads = call.head_outputs[0]
    merged = heads.transpose(0, 1).flatten(1) if concatenate else heads.mean(0)
    torch.testing.assert_close(merged + layer.bias, output)
    by_settings = attention_weights(call.query, call.key, **call.settings)
    torch.testing.assert_close(by_settings, dense)


def test_clouds_are_the_nodes_that_take_part(generator):
    """Mutants: clouds of all nodes whatever the edges are; sources for targets."""
    layer, nodes = drawn(), torch.randn(NODES, WIDTH, generator=generator)
    with attention_calls(layer) as calls:
        layer(nodes, EDGES)
        layer(nodes, with_self_loops(EDGES, NODES))
    some, whole = calls[""]
    # What a call knows by its masks, it knows by its edges too.
    for call in (some, whole):
        settings = call.settings
        plain = AttentionCall(call.query, call.key, call.value, call.head_outputs, settings)
        assert all(map(torch.equal, call.cloud_masks(), plain.cloud_masks()))
    query, key = some.cloud_masks()
    assert query.shape == key.shape == (1, HEADS, NODES)
    assert query[0, 1].nonzero().flatten().tolist() == [1, 3, 4, 5]
    assert key[0, 1].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert all(mask.all() for mask in whole.cloud_masks())


def test_nothing_is_formed_for_all_pairs(generator):
    """Of 10⁵ nodes the weights would take 75 GiB. Mutant: a mask that is formed with the call."""
    number = 100_000
    nodes = torch.randn(number, 2, generator=generator)
    edges = torch.randint(number, (2, 5), generator=generator)
    layer = GraphAttention(2, 1, 1)
    with torch.no_grad(), attention_calls(layer) as calls:
        layer(nodes, edges)
    query, _ = calls[""][0].cloud_masks()
    assert query.sum() == edges[1].unique().numel()


def test_watching_changes_nothing(generator):
    """Also where dropout draws, of which the heads' outputs tell; nothing is left on the layer."""
    layer = drawn(dropout=0.5)
    nodes = torch.randn(NODES, WIDTH, generator=generator)
    torch.manual_seed(5)
    expected = layer(nodes, EDGES)
    torch.manual_seed(5)
    with attention_calls(layer) as outer, attention_calls(layer) as inner:
        found = layer(nodes, EDGES)
    assert torch.equal(found, expected)
    assert "attend" not in vars(layer)
    assert len(inner[""]) == len(outer[""]) == 1
    (call,) = inner[""]
    merged = call.head_outputs[0].transpose(0, 1).flatten(1) + layer.bias
    torch.testing.assert_close(merged, found)
    assert not torch.allclose(call.weights() @ call.value, call.head_outputs)
    layer(nodes, EDGES)
    assert len(inner[""]) == len(outer[""]) == 1


def test_gradients_pass_through_calls(generator):
    layer, nodes = drawn(), torch.randn(NODES, WIDTH, generator=generator)
    with attention_calls(layer) as calls:
        layer(nodes, EDGES)
    (call,) = calls[""]
    (call.query.square().sum() + call.key.square().sum()).backward(retain_graph=True)
    assert layer.query_weight.grad.abs().min() > 0
    assert layer.key_weight.grad.abs().min() > 0
    assert not layer.value_weight.grad.any()
    call.head_outputs.square().sum().backward()
    assert layer.value_weight.grad.abs().min() > 0


def test_an_interrupted_call_leaves_nothing(generator):
    layer, nodes = drawn(), torch.randn(NODES, WIDTH, generator=generator)

    def interrupt(name, call):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watch_attention(layer, interrupt):
        layer(nodes, EDGES)
    assert "attend" not in vars(layer)


def test_statistics_of_a_model(generator):
    """Column masses are sums of the edges' weights; duplicates count. Mutant: settings unmasked."""
    model = Network()
    nodes = torch.randn(NODES, WIDTH, generator=generator)
    with layer_statistics(model) as statistics:
        model(nodes, EDGES)
    _, weights = model.first(nodes, EDGES, need_weights=True)
    mass = torch.zeros(HEADS, NODES).index_add(1, EDGES[0], weights)
    torch.testing.assert_close(statistics["first"].column_mass[0], mass)
    assert statistics["second"].query_mask[0, 0].nonzero().flatten().tolist() == [1, 3, 4, 5]
