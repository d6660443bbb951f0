"""Training of a node classifier on one whole graph, with every choice left to the validation part.

Each learning rate of the budget is tried from the same start under the same dropout, for the same
number of epochs, each of which is one step on all training nodes; the learning rate and the epoch
with the best log score on the validation nodes win. Nodes of the test part are seen, as are all of
the graph's, but not their classes.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from bayesattn import calibration
from examples.reproduce.graph_tasks import CitationGraph
from examples.reproduce.protocol import Build
from examples.reproduce.training import Attach, decay_groups

__all__ = [
    "GraphLoss",
    "NodeBudget",
    "TrainedNodes",
    "node_cross_entropy",
    "predict_nodes",
    "train_nodes",
]

GraphLoss = Callable[[nn.Module, CitationGraph], Tensor]


@dataclass(frozen=True)
class NodeBudget:
    """What every rival is given.

    Attributes:
        num_epochs: Steps on the whole graph, for each learning rate.
        learning_rates: Adam's, constant, that are tried.
        weight_decay: Factor of half the squared norm of matrices, as a part of the loss.
    """

    num_epochs: int
    learning_rates: tuple[float, ...] = (5e-3,)
    weight_decay: float = 5e-4


class TrainedNodes(NamedTuple):
    """The chosen model.

    Attributes:
        model: In evaluation mode, as it was after the chosen epoch.
        choices: The learning rate, the epoch (from one) and their log score on validation.
        curves: For each learning rate, the log score after each epoch.
    """

    model: nn.Module
    choices: dict[str, float]
    curves: dict[str, list[float]]


def train_nodes(
    build: Build,
    graph: CitationGraph,
    budget: NodeBudget,
    seed: int,
    *,
    loss: GraphLoss | None = None,
    attach: Attach | None = None,
) -> TrainedNodes:
    """Train from the start with each learning rate, and choose by the validation nodes.

    Args:
        build: Gives the untrained model, which takes features and edges and gives logits of
            classes.
        graph: What is learned from.
        budget: How much is done.
        seed: Of dropout, so the same for all rivals.
        loss: ``loss(model, graph)``, in training mode; the cross-entropy on training nodes if None.
        attach: ``attach(model, optimizer, num_steps)`` is called for each learning rate, and gives
            what is called before each step, when gradients are there. It may add parameters that
            are learned beside the model to the optimizer, which do not decay.

    Raises:
        ValueError: If there is no epoch, or no learning rate leads to a finite log score.
    """
    curves: dict[str, list[float]] = {}
    best: tuple[float, float, int] | None = None
    state: dict[str, Tensor] = {}
    loss = loss or node_cross_entropy
    model = build()
    with torch.random.fork_rng(devices=[]):
        for rate in budget.learning_rates:
            model = build()
            curve = curves[str(rate)] = []
            for epoch in _epochs(model, graph, budget, rate, seed, loss, attach):
                probabilities = predict_nodes(model, graph)[graph.validation]
                score = calibration.log_score(probabilities, graph.label[graph.validation])
                curve.append(float(score))
                if curve[-1] > (-torch.inf if best is None else best[0]):
                    best, state = (curve[-1], rate, epoch), copy.deepcopy(model.state_dict())
    if best is None:
        raise ValueError(f"budget: expected one epoch at least with a finite score, got {budget}")
    score, learning_rate, epoch = best
    model.load_state_dict(state)
    choices = {"learning_rate": learning_rate, "epoch": epoch, "validation_log_score": score}
    return TrainedNodes(model.eval(), choices, curves)


def node_cross_entropy(model: nn.Module, graph: CitationGraph) -> Float[Tensor, ""]:
    """Mean negative log probability of the training nodes' classes."""
    logits = model(graph.features, graph.edges)
    return F.cross_entropy(logits[graph.train], graph.label[graph.train])


@torch.no_grad()
def predict_nodes(model: nn.Module, graph: CitationGraph) -> Float[Tensor, "node class"]:
    """Give each node's probabilities of the classes, in evaluation mode."""
    return model.eval()(graph.features, graph.edges).softmax(-1)


def _epochs(
    model: nn.Module,
    graph: CitationGraph,
    budget: NodeBudget,
    learning_rate: float,
    seed: int,
    loss: GraphLoss,
    attach: Attach | None,
) -> Iterator[int]:
    """Train, and give the number of each epoch after it."""
    groups = decay_groups(model, budget.weight_decay)
    optimizer = torch.optim.Adam(groups, lr=learning_rate, fused=True)
    torch.manual_seed(seed)
    before_step = None if attach is None else attach(model, optimizer, budget.num_epochs)
    for epoch in range(1, budget.num_epochs + 1):
        model.train()
        optimizer.zero_grad()
        loss(model, graph).backward()
        if before_step is not None:
            before_step()
        optimizer.step()
        yield epoch
