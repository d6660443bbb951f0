"""Statistics of the heads of a model's layers, and the alarm where they are one."""

import pytest
import torch
from torch import nn

import bayesattn as ba
from bayesattn import plots
from bayesattn.head_diagnostics import HeadCollapseWarning, HeadStatistics
from bayesattn.head_similarity import (
    centered_kernel_alignment,
    cosine_similarity,
    jensen_shannon,
)
from bayesattn.networks import head_partitions
from tests.heads import Classifier

pytestmark = pytest.mark.usefixtures("seeded_layers")

EMBED, HEADS, TOKENS = 12, 3, 5


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier(EMBED, HEADS)


def collapsed(model):
    """The same model, in whose first layer all heads are the first one."""
    parts = head_partitions(model.layers[0], biases=True)
    for part in parts:
        part.write(part.particles()[:1].expand(HEADS, -1).clone())
    return model


def outputs_and_weights(layer, tokens):
    """By PyTorch's own weights, and its values."""
    _, weights = layer(tokens, tokens, tokens, average_attn_weights=False)
    _, _, weight = layer.in_proj_weight.detach().chunk(3)
    _, _, bias = layer.in_proj_bias.detach().chunk(3)
    value = (tokens @ weight.mT + bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return weights @ value, weights.detach()


def test_statistics_are_those_of_the_layer_s_outputs_and_weights(model, generator):
    tokens = torch.randn(2, TOKENS, EMBED, generator=generator)
    with ba.head_statistics(model) as statistics:
        model(tokens)
    assert list(statistics) == ["layers.0", "layers.1"]
    outputs, weights = outputs_and_weights(model.layers[0], tokens)
    found = statistics["layers.0"]
    rows = outputs.movedim(1, 0).flatten(1, 2).detach()
    torch.testing.assert_close(found.cosine, cosine_similarity(rows.flatten(1)))
    torch.testing.assert_close(found.alignment, centered_kernel_alignment(rows))
    torch.testing.assert_close(found.divergence, jensen_shannon(weights).mean(0))


def test_queries_that_see_no_key_do_not_count(model, generator):
    layer = model.layers[0]
    tokens = torch.randn(1, TOKENS, EMBED, generator=generator)
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    mask[-1] = True
    with ba.head_statistics(layer) as statistics:
        layer(tokens, tokens, tokens, attn_mask=mask, need_weights=False)
    masked = statistics[""]
    with ba.head_statistics(layer) as statistics:
        layer(tokens[:, :-1], tokens, tokens, need_weights=False)
    for one, other in zip(masked[:3], statistics[""][:3], strict=True):
        torch.testing.assert_close(one, other)


def test_collapse_is_seen_and_warned_of(model, generator):
    tokens = torch.randn(2, TOKENS, EMBED, generator=generator)
    with ba.head_statistics(model) as statistics:
        model(tokens)
    assert ba.warn_of_collapse(statistics) == {}
    with ba.head_statistics(collapsed(model)) as statistics:
        model(tokens)
    assert statistics["layers.0"].effective_heads.item() == pytest.approx(1)
    torch.testing.assert_close(statistics["layers.0"].alignment, torch.ones(HEADS, HEADS))
    torch.testing.assert_close(statistics["layers.0"].divergence, torch.zeros(HEADS, HEADS))
    with pytest.warns(HeadCollapseWarning, match=r"layers\.0 \(1\.0 of 3\)$"):
        found = ba.warn_of_collapse(statistics)
    assert found == {"layers.0": pytest.approx(1)}
    with pytest.raises(ValueError, match="fewest"):
        ba.warn_of_collapse(statistics, fewest=0.0)


def test_one_head_is_no_collapse(generator):
    layer = nn.MultiheadAttention(EMBED, 1, batch_first=True)
    tokens = torch.randn(2, TOKENS, EMBED, generator=generator)
    with ba.head_statistics(layer) as statistics:
        layer(tokens, tokens, tokens)
    assert ba.warn_of_collapse(statistics, fewest=1.0) == {}


def test_weights_and_circuits_of_every_layer(model, generator):
    cosines = ba.weight_similarity(model)
    roles = ("query", "key", "value")
    assert list(cosines) == [f"layers.{i}.{role}" for i in (0, 1) for role in roles]
    rows = model.layers[1].in_proj_weight.detach()[EMBED : 2 * EMBED].view(HEADS, -1)
    torch.testing.assert_close(cosines["layers.1.key"], cosine_similarity(rows))
    circuits = ba.circuit_similarity(model)
    assert list(circuits) == [
        f"layers.{i}.{roles}" for i in (0, 1) for roles in ("query+key", "value+output")
    ]
    query, key, _ = model.layers[0].in_proj_weight.detach().view(3, HEADS, -1, EMBED)
    rows = (query.mT @ key).flatten(1)
    torch.testing.assert_close(circuits["layers.0.query+key"], cosine_similarity(rows))
    (joint,) = head_partitions(model.layers[0], ("query", "key"), joint=True)
    turned = joint.particles().clone().view(HEADS, 2, -1, EMBED)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    turned[1] = turn @ turned[1]
    joint.write(turned.flatten(1))
    after = ba.circuit_similarity(model)["layers.0.query+key"]
    torch.testing.assert_close(after, circuits["layers.0.query+key"])
    assert ba.circuit_similarity(ba.StructuredSelfAttention(5, 4, 3)) == {}


def test_models_without_attention_are_refused_and_idle_contexts_warned_of(model):
    with (
        pytest.raises(ValueError, match="expected attention layers"),
        ba.head_statistics(nn.Linear(2, 2)),
    ):
        pass
    with pytest.warns(UserWarning, match="no attention layer"), ba.head_statistics(model):
        pass


class Forces:
    def __init__(self, drive, repulsion):
        self.drive, self.repulsion = torch.tensor(drive), torch.tensor(repulsion)


def test_pictures_show_the_figures(model, generator, tmp_path):
    with ba.head_statistics(model) as statistics:
        model(torch.randn(2, TOKENS, EMBED, generator=generator))
    figure = plots.head_similarity(statistics, title="heads")
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    shown = [tensor for entry in statistics.values() for tensor in entry[:3]]
    for image, tensor in zip(images, shown, strict=True):
        torch.testing.assert_close(torch.from_numpy(image.data), tensor)
    figure.savefig(tmp_path / "heads.png")
    history = [
        {"a": Forces(1.0, 0.5), "b": Forces(2.0, 1.0)},
        {"a": Forces(0.5, 1.0), "b": Forces(1.0, 3.0)},
    ]
    figure = plots.head_forces(history)
    forces, ratio = figure.axes
    assert [line.get_ydata().tolist() for line in forces.lines] == [
        [1.0, 0.5],
        [0.5, 1.0],
        [2.0, 1.0],
        [1.0, 3.0],
    ]
    assert [line.get_ydata().tolist() for line in ratio.lines] == [[0.5, 2.0], [0.5, 3.0]]
    figure.savefig(tmp_path / "forces.png")
    for draw, empty in ((plots.head_similarity, {}), (plots.head_forces, [])):
        with pytest.raises(ValueError, match="at least one entry"):
            draw(empty)


def test_forces_that_are_missing_zero_or_many_are_drawn(tmp_path):
    history = [{"a": Forces(1.0, 0.5)}, {"a": Forces(0.0, 0.5), "b": Forces(2.0, 1.0)}]
    forces, ratio = plots.head_forces(history).axes
    shown = [line.get_ydata().tolist() for line in forces.lines]
    assert str(shown) == "[[1.0, nan], [0.5, 0.5], [nan, 2.0], [nan, 1.0]]"
    assert str([line.get_ydata().tolist() for line in ratio.lines]) == "[[0.5, nan], [nan, 0.5]]"
    many = [{f"layers.{i}.query": Forces(1.0 + i, 0.5) for i in range(36)}] * 2
    figure = plots.head_forces(many, title="many")
    bar = figure.axes[-1]
    assert [tick.get_text() for tick in bar.get_yticklabels()] == [
        "layers.0.query",
        "layers.35.query",
    ]
    figure.savefig(tmp_path / "many.png")


def test_heads_that_share_a_value_are_one_to_the_alarm():
    alike = HeadStatistics(torch.ones(4, 4), torch.ones(4, 4), torch.zeros(4, 4), 1)
    assert ba.warn_of_collapse({"": alike}) == {}
    with pytest.warns(HeadCollapseWarning, match=r"the layer \(1\.0 of 4\)"):
        ba.warn_of_collapse({"": alike._replace(num_value_heads=4)})
