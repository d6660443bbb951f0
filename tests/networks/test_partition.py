"""Tests of bayesattn.networks: where heads stand, and the walk that finds them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from bayesattn.multihead import MultiheadAttention
from bayesattn.networks import (
    HeadLayout,
    HeadPartition,
    HeadSlice,
    ProjectionSlices,
    attention_layers,
    head_partitions,
    recognition,
    register_attention_layer,
)
from bayesattn.structured_pooling import StructuredSelfAttention

HEADS, WIDTH = 3, 15
ROLES = ("query", "key", "value", "output")


def fused(cls=nn.MultiheadAttention, **settings):
    return cls(WIDTH, HEADS, **settings)


def separate(cls=nn.MultiheadAttention):
    return fused(cls, kdim=7, vdim=11)


LAYERS = {
    "torch's, fused": fused,
    "torch's, separate": separate,
    "torch's without biases": lambda: fused(bias=False),
    "ours, fused": lambda: fused(MultiheadAttention),
    "ours, separate": lambda: separate(MultiheadAttention),
    "pooling": lambda: StructuredSelfAttention(7, 5, HEADS),
}


@pytest.fixture
def own_registry(monkeypatch):
    """Registrations that end with the test."""
    monkeypatch.setattr(recognition, "_registered", {})


def layer_of(module):
    return attention_layers(module)[""]


def all_partitions(layer):
    for biases in (False, True):
        yield from layer.partitions(ROLES, biases=biases)
        yield from layer.partitions(joint=True, biases=biases)


def test_rows_are_those_of_the_weights():
    """Written out for PyTorch's layer: which rows and columns are head 1's."""
    module = fused()
    nn.init.normal_(module.in_proj_bias, generator=torch.Generator().manual_seed(0))
    layer = layer_of(module)
    query, key, value, output = layer.partitions(ROLES, biases=True)
    (joint,) = layer.partitions(joint=True)
    weight, bias = module.in_proj_weight.detach(), module.in_proj_bias.detach()
    rows = [weight[start + 5 : start + 10].flatten() for start in (0, WIDTH, 2 * WIDTH)]
    biases = [bias[start + 5 : start + 10] for start in (0, WIDTH, 2 * WIDTH)]
    for partition, row, entries in zip((query, key, value), rows, biases, strict=True):
        assert torch.equal(partition.particles()[1], torch.cat([row, entries]))
    assert torch.equal(joint.particles()[1], torch.cat(rows))
    columns = module.out_proj.weight.detach()[:, 5:10]
    assert torch.equal(output.particles()[1], columns.mT.flatten())
    names = [partition.name for partition in (query, key, value, output, joint)]
    assert names == [*ROLES, "query+key+value"]
    assert [len(partition.parameters) for partition in (query, output, joint)] == [2, 1, 1]


@pytest.mark.parametrize("kind", LAYERS)
def test_round_trip(kind, generator):
    """What is written is read, exactly; other heads' and roles' parameters stay."""
    module = LAYERS[kind]()
    for partition in all_partitions(layer_of(module)):
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        old = partition.particles().clone()
        assert old.shape == (partition.num_heads, partition.dim) == (HEADS, old.shape[1])
        new = torch.randn(old.shape, generator=generator)
        partition.write(new)
        assert torch.equal(partition.particles(), new)
        changed = sum((p != before[n]).sum().item() for n, p in module.named_parameters())
        assert changed == new.numel()
        partition.write(old)
        assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
        assert all(p.requires_grad and p.is_leaf for p in partition.parameters)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients(kind, generator):
    module = LAYERS[kind]()
    for partition in all_partitions(layer_of(module)):
        module.zero_grad()
        gradients = partition.gradients()
        assert not gradients.any()
        assert all(parameter.grad is None for parameter in partition.parameters)
        gradients += 1
        new = torch.randn(gradients.shape, generator=generator)
        partition.write_gradients(new)
        assert torch.equal(partition.gradients(), new)
        total = sum(p.grad.abs().sum() for p in module.parameters() if p.grad is not None)
        torch.testing.assert_close(total, new.abs().sum())
        # Gradients stand where the particles stand.
        before = partition.particles().clone()
        torch.optim.SGD(module.parameters(), lr=1.0).step()
        torch.testing.assert_close(partition.particles(), before - new)


@pytest.mark.parametrize("kind", ["torch's, fused", "ours, separate", "pooling"])
def test_rows_of_weights_are_views(kind):
    module = LAYERS[kind]()
    for place, partition in enumerate(layer_of(module).partitions()):
        (parameter,) = partition.parameters
        parameter.grad = torch.ones_like(parameter)
        first = partition.slices[0].start * parameter.shape[1] * parameter.itemsize
        assert first == (place * WIDTH**2 * 8 if kind == "torch's, fused" else 0)
        assert partition.particles().data_ptr() == parameter.data_ptr() + first
        assert partition.gradients().data_ptr() == parameter.grad.data_ptr() + first
        assert not partition.particles().requires_grad


def test_heads_that_share_keys_are_one_joint_particle():
    module = nn.ModuleDict({"q": nn.Linear(7, 12), "k": nn.Linear(7, 6)})
    query, key = HeadSlice("q.weight", 0, 0, 2, 6), HeadSlice("k.weight", 0, 0, 2, 3)
    joint = HeadPartition("joint", module, [query.grouped(3), key])
    weights = module["q"].weight.detach(), module["k"].weight.detach()
    expected = torch.cat([weights[0][4:8].flatten(), weights[1][2:4].flatten()])
    assert torch.equal(joint.particles()[1], expected)
    with pytest.raises(ValueError, match="multiple of 4 heads, got 6"):
        query.grouped(4)


def test_parameters_are_looked_up():
    module = fused()
    query = layer_of(module).partitions()[0]
    other = {name: torch.randn(p.shape) for name, p in module.named_parameters()}
    module.load_state_dict(other, assign=True)
    assert torch.equal(query.particles(), other["in_proj_weight"][:WIDTH].reshape(HEADS, -1))


def test_types_come_back():
    module = fused()
    module.in_proj_weight.data = module.in_proj_weight.data.float()
    (joint,) = layer_of(module).partitions(("query", "output"), joint=True)
    before = module.in_proj_weight.detach().clone()
    assert joint.particles().dtype == torch.float64
    joint.write(joint.particles())
    assert torch.equal(module.in_proj_weight, before)


def test_frozen_parameters():
    module = fused()
    query, *_, output = layer_of(module).partitions(ROLES)
    module.in_proj_weight.requires_grad_(False)
    assert not query.requires_grad
    assert output.requires_grad
    assert not query.gradients().any()
    query.write(torch.ones(HEADS, query.dim))
    assert (query.particles() == 1).all()
    with pytest.raises(ValueError, match="in_proj_weight is frozen"):
        query.write_gradients(torch.ones(HEADS, query.dim))
    assert module.in_proj_weight.grad is None


def test_parameters_that_are_none():
    parametrized = MultiheadAttention(WIDTH, HEADS)
    parametrizations.orthogonal(parametrized.out_proj)
    layer = layer_of(parametrized)
    assert len(layer.partitions()) == 3
    with pytest.raises(ValueError, match=r"out_proj.weight: .* got a parametrized one"):
        layer.partitions(("output",))
    plain = fused()
    query = layer_of(plain).partitions()[0]
    del plain.in_proj_weight
    plain.in_proj_weight = torch.ones(3 * WIDTH, WIDTH)
    with pytest.raises(ValueError, match="expected a parameter, got Tensor"):
        query.particles()
    assert not parametrize.is_parametrized(plain)


def test_parameters_without_data_or_not_dense():
    meta = layer_of(nn.MultiheadAttention(WIDTH, HEADS, device="meta")).partitions()[0]
    with pytest.raises(ValueError, match="expected a parameter with data"):
        meta.particles()
    module = nn.Linear(5, 6)
    partition = HeadPartition("sparse", module, [HeadSlice("weight", 0, 0, 2, 3)])
    module.weight.grad = module.weight.detach().to_sparse()
    for use in (partition.gradients, lambda: partition.write_gradients(torch.ones(3, 10))):
        with pytest.raises(ValueError, match=r"gradient of weight: .* got layout torch.sparse_coo"):
            use()
    lazy = nn.LazyLinear(6)
    with pytest.raises(ValueError, match="lazy or meta"):
        HeadPartition("lazy", lazy, [HeadSlice("weight", 0, 0, 2, 3)]).particles()
    module.weight = nn.Parameter(module.weight.detach().to_sparse())
    with pytest.raises(ValueError, match="weight: expected a dense tensor"):
        partition.particles()


def test_shapes_that_do_not_fit():
    query = layer_of(fused()).partitions()[0]
    for use in (query.write, query.write_gradients):
        with pytest.raises(
            ValueError, match=r"query: expected 'head dim' \(3, 75\), got \(3, 74\)"
        ):
            use(torch.ones(3, 74))
    module = nn.Linear(5, 6)
    with pytest.raises(ValueError, match="axis 0 to hold 3 heads of 2 from 1"):
        HeadPartition("beyond", module, [HeadSlice("weight", 0, 1, 2, 3)]).particles()
    with pytest.raises(ValueError, match="axis 1 to hold"):
        HeadPartition("axis", module, [HeadSlice("bias", 1, 0, 2, 3)]).particles()
    whole = HeadSlice("weight", 0, 0, 2, 3)
    with pytest.raises(ValueError, match=r"one number of heads, got \[2, 3\]"):
        HeadPartition("counts", module, [whole, HeadSlice("bias", 0, 0, 2, 2)])
    with pytest.raises(ValueError, match="do not overlap, got weight twice"):
        HeadPartition(
            "twice", module, [whole._replace(num_heads=1), HeadSlice("weight", 0, 1, 1, 1)]
        )


def test_roles():
    layer = layer_of(fused())
    for roles in (("query", "queries"), ("key", "key")):
        with pytest.raises(ValueError, match="roles: expected some of query, key, value, output"):
            layer.partitions(roles)
    pooling = layer_of(StructuredSelfAttention(7, 5, HEADS))
    assert [partition.name for partition in pooling.partitions()] == ["query"]
    with pytest.raises(ValueError, match="roles: layer '' has query, got key"):
        pooling.partitions(("key",))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.TransformerDecoderLayer(12, 3, 24)
        self.pooling = StructuredSelfAttention(12, 5, 7)
        self.body = nn.ModuleList([fused(), nn.Sequential(nn.Linear(2, 2), fused())])
        self.again = self.body[1][1]


def test_walk():
    """In the model's order, a layer that stands twice once, and the model may be the layer."""
    model = Model()
    layers = attention_layers(model)
    assert list(layers) == [
        "decoder.self_attn",
        "decoder.multihead_attn",
        "pooling",
        "body.0",
        "body.1.1",
    ]
    assert all(model.get_submodule(name) is layer.module for name, layer in layers.items())
    assert list(attention_layers(layers["body.0"].module)) == [""]
    assert attention_layers(nn.Linear(2, 3)) == {}
    names = [partition.name for partition in layers["decoder.self_attn"].partitions()]
    assert names == [f"decoder.self_attn.{role}" for role in ("query", "key", "value")]


def test_shared_weights_are_there_once():
    first = fused()
    second = MultiheadAttention.from_torch(first)
    model = nn.ModuleList([first, second, StructuredSelfAttention(7, 5, HEADS)])
    assert list(attention_layers(model)) == ["0", "1", "2"]
    names = [partition.name for partition in head_partitions(model)]
    assert names == ["0.query", "0.key", "0.value", "2.query"]
    assert [partition.name for partition in head_partitions(model, ("key",))] == ["0.key"]
    assert head_partitions(model[2], ("key",)) == []
    with pytest.raises(ValueError, match="roles: expected some of"):
        head_partitions(model, ("keys",))
    second.out_proj = copy.deepcopy(second.out_proj)
    with pytest.raises(ValueError, match=r"1.query\+output shares some .*, with 0.query\+output"):
        head_partitions(model, ("query", "output"), joint=True)


class Grouped(nn.Module):
    """A layer with a layer inside it."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Linear(7, 8)
        self.inner = fused()


def grouped_layout(module):
    weight, bias = HeadSlice("queries.weight", 0, 0, 2, 4), HeadSlice("queries.bias", 0, 0, 2, 4)
    return HeadLayout(query=ProjectionSlices(weight, bias))


def test_own_layers(own_registry):
    class Inherited(Grouped):
        pass

    model = nn.Sequential(Inherited(), fused())
    assert list(attention_layers(model)) == ["0.inner", "1"]
    register_attention_layer(Grouped, grouped_layout)
    assert list(attention_layers(model)) == ["0", "1"]
    (query,) = head_partitions(model[0], biases=True)
    assert (query.num_heads, query.dim) == (4, 2 * 7 + 2)
    register_attention_layer(Inherited, lambda module: None)
    assert list(attention_layers(model)) == ["0.inner", "1"]
    register_attention_layer(nn.MultiheadAttention, lambda module: None)
    assert attention_layers(model) == {}


def test_own_layers_that_do_not_fit(own_registry):
    register_attention_layer(Grouped, lambda module: {"queries": grouped_layout(module)["query"]})
    with pytest.raises(ValueError, match=r"some of query, .* for Grouped, got queries"):
        attention_layers(Grouped())
    register_attention_layer(Grouped, lambda module: {})
    with pytest.raises(ValueError, match="for Grouped, got none"):
        attention_layers(Grouped())
    with pytest.raises(ValueError, match="cls: expected a class of modules, got <class 'int'>"):
        register_attention_layer(int, grouped_layout)
