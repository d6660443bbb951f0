"""Classification of a graph's nodes, as the study of alignment sees it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesattn.divergences import permutation_test
from bayesattn.edges import edge_weights
from bayesattn.networks import attention_calls
from examples.reproduce.alignment_methods import AlignmentRun
from examples.reproduce.graph_tasks import CitationGraph, read_graph
from examples.reproduce.node_classifier import graph_attention_network
from examples.reproduce.node_training import (
    NodeBudget,
    TrainedNodes,
    node_cross_entropy,
    predict_nodes,
    train_nodes,
)
from examples.reproduce.protocol import Build
from examples.reproduce.shift_metrics import SHIFT_METRICS, prediction_metrics

__all__ = ["NodeProblem", "load_nodes", "noisy_features"]

# Of the nodes, whose queries and keys are compared.
_LOOKED_AT = 256


# Equal if the same, so that it may be a key of what has been computed for it.
@dataclass(frozen=True, eq=False)
class NodeProblem:
    """What is to be learned.

    Attributes:
        graph: The data.
        noisy: The same graph, where part of the papers' words are others.
    """

    graph: CitationGraph
    noisy: CitationGraph

    def sizes(self) -> dict[str, int]:
        """How many nodes each part and the graph have, and how many classes there are."""
        return self.graph.sizes()

    def build(self) -> nn.Module:
        """Build an untrained graph attention network."""
        return graph_attention_network(self.graph)

    def train(self, build: Build, budget: NodeBudget, seed: int, run: AlignmentRun) -> TrainedNodes:
        """Train from the start, and choose the epoch by the validation nodes."""

        def loss(model: nn.Module, graph: CitationGraph) -> Tensor:
            return run.loss(partial(node_cross_entropy, model, graph))

        return train_nodes(build, self.graph, budget, seed, loss=loss, attach=run.attach)

    def evaluate(self, model: nn.Module, budget: NodeBudget) -> dict[str, float | None]:
        """Measure predictions of the test nodes, with their words and with noisy ones."""
        del budget
        metrics: dict[str, float | None] = dict.fromkeys(SHIFT_METRICS)
        for prefix, graph in (("", self.graph), ("noisy ", self.noisy)):
            probabilities = predict_nodes(model, graph)[graph.test]
            found = prediction_metrics(probabilities, graph.label[graph.test])
            metrics |= {f"{prefix}{name}": value for name, value in found.items()}
        return {name: metrics[name] for name in SHIFT_METRICS}

    @torch.no_grad()
    def figures(self, model: nn.Module) -> dict[str, list[list[float]]]:
        """Give how far some nodes' queries and keys are apart, and the entropy, as "layer head"."""
        names = ("squared_mmd", "chance", "p_value", "entropy")
        figures: dict[str, list[list[float]]] = {name: [] for name in names}
        rows = torch.randperm(len(self.graph.label), generator=torch.Generator().manual_seed(0))[
            :_LOOKED_AT
        ]
        for call in self._calls(model):
            test = permutation_test(call.query[0, :, rows], call.key[0, :, rows])
            weights = self._weights(call)
            entropy = torch.special.entr(weights).sum(-1) / len(self.graph.label)
            found = (test.statistic, test.null.mean(0), test.p_value, entropy)
            for name, values in zip(names, found, strict=True):
                figures[name].append(values.tolist())
        return figures

    @torch.no_grad()
    def difference(self, model: nn.Module, other: nn.Module) -> list[list[float]]:
        """Give the part of a node's attention that goes elsewhere, the mean, "layer head"."""
        pairs = zip(self._calls(model), self._calls(other), strict=True)
        return [
            (
                (self._weights(call) - self._weights(other_call)).abs().sum(-1)
                / (2 * len(self.graph.label))
            ).tolist()
            for call, other_call in pairs
        ]

    def step(self, build: Build, budget: NodeBudget, run: AlignmentRun) -> Callable[[], None]:
        """Give what does a training step whenever it is called."""
        model = build().train()
        optimizer = torch.optim.Adam(model.parameters(), lr=budget.learning_rates[0], fused=True)
        before_step = run.attach(model, optimizer, 1)

        def step() -> None:
            optimizer.zero_grad()
            run.loss(partial(node_cross_entropy, model, self.graph)).backward()
            before_step()
            optimizer.step()

        return step

    def _calls(self, model: nn.Module) -> list[Any]:
        model.eval()
        with attention_calls(model) as calls:
            model(self.graph.features, self.graph.edges)
        return [call for (call,) in calls.values()]

    def _weights(self, call: Any) -> Tensor:
        """Of the edges, each of which the graph has once, "head edge"."""
        return edge_weights(call.query[0], call.key[0], self.graph.edges, logits=call[4]["logits"])


def load_nodes(name: str, folder: Path | None, seed: int) -> NodeProblem | None:
    """Read a graph, and add noise to its words; None where it is not there."""
    graph = read_graph(name, folder, seed)
    return graph and NodeProblem(graph, noisy_features(graph, seed))


def noisy_features(graph: CitationGraph, seed: int, *, rate: float = 0.3) -> CitationGraph:
    """Put other words, at random, in the place of some of each paper's.

    Args:
        graph: What is changed.
        seed: Of the choice.
        rate: How probably a word is changed.
    """
    generator = torch.Generator().manual_seed(seed)
    places = graph.features.indices().clone()
    changed = torch.rand(places.shape[1], generator=generator) < rate
    others = torch.randint(graph.features.shape[1], changed.shape, generator=generator)
    places[1] = torch.where(changed, others, places[1])
    features = torch.sparse_coo_tensor(
        places, graph.features.values(), graph.features.shape, check_invariants=True
    )
    return graph._replace(features=features.coalesce())
