"""A node classifier and its training, on a graph whose neighbors tell what words do not."""

import pytest
import torch
from torch import nn

from bayesattn import calibration
from bayesattn.divergences import MMD
from bayesattn.edges import with_self_loops
from bayesattn.inference import Alignment
from bayesattn.logits import AdditiveLogits
from bayesattn.networks import attention_calls
from examples.reproduce.graph_tasks import CitationGraph
from examples.reproduce.node_classifier import NodeClassifier, graph_attention_network
from examples.reproduce.node_training import (
    NodeBudget,
    node_cross_entropy,
    predict_nodes,
    train_nodes,
)

NODES, CLASSES = 60, 3


@pytest.fixture
def graph(generator):
    """Papers cite those of their own class; half of the papers have a word that tells it."""
    label = torch.arange(NODES) % CLASSES
    words = nn.functional.one_hot(label, CLASSES + 1).to(torch.get_default_dtype())
    words[torch.randperm(NODES, generator=generator)[: NODES // 2]] = torch.eye(CLASSES + 1)[-1]
    sources = torch.arange(NODES).repeat(4)
    places = torch.randint(NODES // CLASSES, sources.shape, generator=generator)
    targets = CLASSES * places + label[sources]
    edges = torch.cat([torch.stack([sources, targets]), torch.stack([targets, sources])], 1)
    edges = with_self_loops(edges.unique(dim=1), NODES)
    order = torch.randperm(NODES, generator=generator)
    parts = order.split([12, 24, 24])
    return CitationGraph(words.to_sparse(), edges, label, *parts, num_classes=CLASSES)


def seeded(graph, **settings):
    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = (graph.features.shape[1], CLASSES)
            return NodeClassifier(*sizes, num_heads=2, head_dim=3, **settings)

    return build


class Bag(nn.Module):
    """A classifier that knows words alone; its steps can be followed by hand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(CLASSES + 1, CLASSES))
        self.bias = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, features, edges):
        return features @ self.weight + self.bias


def test_published_sizes(graph):
    with torch.random.fork_rng(devices=[]):
        model = graph_attention_network(graph, logits=AdditiveLogits)
    assert (model.first.num_heads, model.first.head_dim) == (8, 8)
    assert (model.second.num_heads, model.second.head_dim) == (1, CLASSES)
    assert model.first.dropout == model.second.dropout == model.dropout.p == 0.6
    assert model.first.logits.query_vector.shape == (8, 8)
    assert model.eval()(graph.features, graph.edges).shape == (NODES, CLASSES)


def test_sparse_features_are_dense_ones(graph):
    """Also when they are dropped: a half of what is there, each twice as large."""
    model = seeded(graph, dropout=0.5)().eval()
    outputs = [model(given, graph.edges) for given in (graph.features, graph.features.to_dense())]
    torch.testing.assert_close(*outputs)
    seen = []
    model.first.register_forward_pre_hook(lambda _, args: seen.append(args[0].to_dense()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.train()(graph.features, graph.edges)
    (thinned,) = seen
    present = graph.features.to_dense() > 0
    assert not thinned[~present].any()
    assert set(thinned[present].tolist()) == {0.0, 2.0}
    assert 0.2 < (thinned[present] > 0).double().mean() < 0.8


def test_training_learns_and_chooses_by_validation(graph):
    """Words tell half of the classes, neighbors all. Mutants: another epoch, score or part."""
    budget = NodeBudget(40, learning_rates=(1e-4, 5e-2))
    trained = train_nodes(seeded(graph, dropout=0.2), graph, budget, 0)
    scores = [
        (score, float(rate), epoch)
        for rate, curve in trained.curves.items()
        for epoch, score in enumerate(curve, 1)
    ]
    assert len(scores) == 80
    score, rate, epoch = max(scores)
    found = {"learning_rate": rate, "epoch": epoch, "validation_log_score": score}
    assert trained.choices == found
    probabilities = predict_nodes(trained.model, graph)
    part = graph.validation
    again = calibration.log_score(probabilities[part], graph.label[part])
    assert again.item() == pytest.approx(score)
    accuracy = calibration.accuracy(probabilities[graph.test], graph.label[graph.test])
    by_words = train_nodes(Bag, graph, budget, 0).model
    words_only = calibration.accuracy(
        predict_nodes(by_words, graph)[graph.test], graph.label[graph.test]
    )
    assert accuracy > 0.9
    assert words_only < 0.8


def test_labels_of_other_parts_are_not_seen(graph):
    """Mutants: a loss over all nodes; a choice by the test part."""
    other = graph.label.clone()
    other[graph.test] = (other[graph.test] + 1) % CLASSES
    budget = NodeBudget(5, learning_rates=(5e-2,))
    states = [
        train_nodes(seeded(graph), given, budget, 0).model.state_dict()
        for given in (graph, graph._replace(label=other))
    ]
    assert all(map(torch.equal, states[0].values(), states[1].values()))
    other = graph.label.clone()
    other[graph.validation] = (other[graph.validation] + 1) % CLASSES
    changed = train_nodes(seeded(graph), graph._replace(label=other), budget, 0)
    assert changed.choices["validation_log_score"] < -1.0


def test_dropout_is_the_seed_s(graph):
    """Mutant: draws that go on from one learning rate to the next."""
    budget = NodeBudget(3, learning_rates=(1e-2, 1e-2 + 1e-12))
    curves = train_nodes(seeded(graph), graph, budget, 3).curves
    first, again = curves.values()
    assert first == pytest.approx(again, rel=1e-6)
    (other,) = train_nodes(seeded(graph), graph, NodeBudget(3, (1e-2,)), 4).curves.values()
    assert first != pytest.approx(other, rel=1e-6)


def test_only_matrices_decay(graph):
    """The gradient of a matrix is the decay times the matrix, and Adam's step its sign."""

    def build():
        model = Bag()
        for value in model.parameters():
            value.data += 1.0
        return model

    def loss(model, graph):
        return 0.0 * sum(value.sum() for value in model.parameters())

    budget = NodeBudget(1, learning_rates=(0.1,), weight_decay=0.5)
    model = train_nodes(build, graph, budget, 0, loss=loss).model
    assert torch.equal(model.bias, torch.ones(CLASSES))
    torch.testing.assert_close(model.weight, torch.full_like(model.weight, 0.9))


def test_what_is_attached_meets_gradients(graph):
    """Mutants: called once in all, or before there are gradients; a wrong number of steps."""
    seen = []

    def attach(model, optimizer, num_steps):
        beside = nn.Parameter(torch.ones(2, 2))
        optimizer.add_param_group({"params": [beside]})
        seen.append((num_steps, beside, []))
        return lambda: seen[-1][2].append(model.bias.grad.abs().sum().item())

    def loss(model, graph):
        assert model.training
        return node_cross_entropy(model, graph) + seen[-1][1].sum()

    budget = NodeBudget(4, learning_rates=(0.1, 0.2), weight_decay=0.5)
    train_nodes(Bag, graph, budget, 0, loss=loss, attach=attach)
    assert [(steps, len(norms)) for steps, _, norms in seen] == [(4, 4)] * 2
    assert all(norm > 0 for _, _, norms in seen for norm in norms)
    torch.testing.assert_close(seen[0][1].detach(), torch.full((2, 2), 0.6))


def test_alignment_enters_by_the_loss(graph):
    """It draws queries and keys together, and leaves nothing on the model."""
    found = []
    for weight in (0.0, 3.0):
        alignments = []

        def attach(model, optimizer, num_steps, weight=weight, alignments=alignments):
            alignment = Alignment(model, MMD(), weight=weight)
            alignments.append(alignment)
            for group in alignment.parameter_groups():
                optimizer.add_param_group(group)
            return alignment.step

        def loss(model, graph, alignments=alignments):
            with alignments[-1].observe():
                value = node_cross_entropy(model, graph)
            return value + alignments[-1].loss()

        budget = NodeBudget(30, learning_rates=(3e-2,))
        model = train_nodes(
            seeded(graph, dropout=0.2), graph, budget, 0, loss=loss, attach=attach
        ).model
        assert alignments[0].num_steps == 30
        assert list(alignments[0].head_divergences) == ["first", "second"]
        with torch.no_grad(), attention_calls(model) as calls:
            model(graph.features, graph.edges)
        (call,) = calls["first"]
        found.append(float(MMD()(call.query, call.key, *call.cloud_masks()).mean()))
    assert found[1] < found[0] / 2


def test_a_budget_without_an_epoch_is_refused(graph):
    with pytest.raises(ValueError, match="expected one epoch at least"):
        train_nodes(Bag, graph, NodeBudget(0), 0)
