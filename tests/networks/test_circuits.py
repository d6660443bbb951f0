"""Circuits of heads: products of their projections, which do not see the gauge of the weights."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from bayesattn.networks import circuit_products, head_batches, head_circuits, head_partitions

EMBED, HEADS, WIDTH = 15, 3, 5


def batch_of(module, roles, **settings):
    (heads,) = head_batches(head_partitions(module, roles, joint=True, **settings))
    return heads


def explicit(left, right):
    """Circuits as matrices, those of a group side by side."""
    group = max(left.shape[-3], right.shape[-3])
    left, right = (x.expand(*x.shape[:-3], group, *x.shape[-2:]) for x in (left, right))
    return (left.mT @ right).flatten(-3)


@pytest.mark.parametrize("biases", [False, True])
def test_circuits_are_products_of_projections(biases):
    """Written out for PyTorch's layer. Mutants: W_K for W_Q, a head's rows, the bias left out."""
    module = nn.MultiheadAttention(EMBED, HEADS)
    nn.init.normal_(module.in_proj_bias)
    query, key, value = module.in_proj_weight.detach().view(3, HEADS, WIDTH, EMBED)
    bias = module.in_proj_bias.detach().view(3, HEADS, WIDTH, 1)
    if biases:
        query, key, value = torch.cat([torch.stack([query, key, value]), bias], -1)
    heads = batch_of(module, ("query", "key"), biases=biases)
    found = head_circuits(heads, heads.particles())
    torch.testing.assert_close(explicit(*found)[0], (query.mT @ key).flatten(-2))
    heads = batch_of(module, ("value", "output"), biases=biases)
    output = module.out_proj.weight.detach().view(EMBED, HEADS, WIDTH).movedim(0, -1)
    found = head_circuits(heads, heads.particles())
    torch.testing.assert_close(explicit(*found)[0], (value.mT @ output).flatten(-2))


@pytest.mark.parametrize("roles", [("query", "key"), ("value", "output")])
def test_products_are_those_of_the_matrices(roles):
    heads = batch_of(nn.MultiheadAttention(EMBED, HEADS), roles)
    circuits = head_circuits(heads, heads.particles())
    rows = explicit(*circuits)
    torch.testing.assert_close(circuit_products(circuits, circuits), rows @ rows.mT)
    with torch.autocast("cpu", torch.bfloat16):
        found = circuit_products(circuits, circuits)
    torch.testing.assert_close(found, rows @ rows.mT)


@pytest.mark.parametrize("roles", [("query", "key"), ("value", "output")])
def test_heads_that_share_a_key_are_one(roles):
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=11,
    )
    model = LlamaModel(config)
    heads = batch_of(model, roles)
    circuits = head_circuits(heads, heads.particles())
    attention = model.layers[0].self_attn
    if roles == ("query", "key"):
        many = attention.q_proj.weight.detach().view(2, 3, 4, 24)
        one = attention.k_proj.weight.detach().view(2, 1, 4, 24)
        rows = (many.mT @ one).flatten(1)
    else:
        many = attention.o_proj.weight.detach().view(24, 2, 3, 4).movedim(0, -1)
        one = attention.v_proj.weight.detach().view(2, 1, 4, 24)
        rows = (one.mT @ many).flatten(1)
    torch.testing.assert_close(circuit_products(circuits, circuits)[0], rows @ rows.mT)


def test_a_gauge_changes_weights_and_no_product(generator):
    module = nn.MultiheadAttention(EMBED, HEADS)
    heads = batch_of(module, ("query", "key"))
    before = head_circuits(heads, heads.particles())
    turn = torch.randn(HEADS, 1, WIDTH, WIDTH, generator=generator)
    after = before._replace(left=turn @ before.left, right=torch.linalg.inv(turn).mT @ before.right)
    assert (after.left - before.left).abs().max() > 0.1
    torch.testing.assert_close(
        circuit_products(after, before), circuit_products(before, before), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("roles", [("query",), ("query", "key", "value")])
def test_particles_of_other_roles_are_refused(roles):
    heads = batch_of(nn.MultiheadAttention(EMBED, HEADS), roles)
    with pytest.raises(ValueError, match="circuits need heads of two projections"):
        head_circuits(heads, heads.particles())


def test_layers_of_one_size_are_one_batch_and_others_their_own():
    layers = [nn.MultiheadAttention(width, HEADS) for width in (15, 21, 15)]
    batches = head_batches(head_partitions(nn.ModuleList(layers)))
    names = [[name.split(".")[0] for name in heads.names] for heads in batches]
    assert names == [["0", "0", "0", "2", "2", "2"], ["1", "1", "1"]]
    assert batches[0].particles().shape == (6, HEADS, 75)
    before = batches[0].particles()
    batches[0].write(before + 1.0)
    torch.testing.assert_close(batches[0].particles(), before + 1.0)
    batches[0].write_gradients(before)
    torch.testing.assert_close(batches[0].gradients(), before)
    assert torch.equal(batches[0].partitions[3].gradients(), before[3])


def test_parts_that_differ_in_shape_have_no_circuits():
    """Seven by two heads of five and eleven by ... are of one width, but not of one shape."""
    one = nn.MultiheadAttention(12, 2, kdim=6, vdim=12)
    other = nn.MultiheadAttention(12, 2, kdim=12, vdim=6)
    heads = head_batches(
        [
            *head_partitions(one, ("key", "value"), joint=True),
            *head_partitions(other, ("key", "value"), joint=True),
        ]
    )
    (batch,) = heads
    with pytest.raises(ValueError, match="parts have one shape"):
        batch.parts(batch.particles())


def test_half_precision_is_widened():
    (heads,) = head_batches(head_partitions(nn.MultiheadAttention(EMBED, HEADS).bfloat16()))
    assert heads.particles().dtype == torch.float32
    heads.write(heads.particles() * 2)
    assert heads.partitions[0].particles().dtype == torch.bfloat16
