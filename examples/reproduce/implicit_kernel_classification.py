"""Do kernels that learn their spectrum, or draw it, help attention to classify?

The kernels of ``kernel_rivals.py``, as in ``implicit_kernel.py``, in two networks that learn from
scratch: graph attention of two layers on citation graphs (``node_classifier.py``), and Transformers
of two layers, width 64 and four heads on sentences (``text_classifier.py``)::

    python -m examples.reproduce.implicit_kernel_classification --data DIR

``graph_tasks.py`` and ``text_corpora.py`` say what may lie in DIR; SNIPS comes with the package.
Predictions of rivals that draw are means over draws, and "step time" is that of a training step
over that of one with the dot product. Numbers of parameters differ by those of the logits.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from examples.reproduce.command_line import command
from examples.reproduce.graph_tasks import GRAPHS
from examples.reproduce.kernel_rivals import LOGITS, LogitsRun, drawn, norms
from examples.reproduce.node_classifier import graph_attention_network
from examples.reproduce.node_problem import NodeProblem, load_nodes
from examples.reproduce.node_training import NodeBudget, predict_nodes
from examples.reproduce.protocol import Build, Outcome, Study, Task, equal_start
from examples.reproduce.step_time import relative_time
from examples.reproduce.text_classifier import small_transformer
from examples.reproduce.text_problem import TextProblem, load_untrained
from examples.reproduce.text_shift import PartSizes
from examples.reproduce.training import Budget, classification_metrics, predict

__all__ = ["STUDY", "build_classifier", "measure"]

_NUM_HEADS = 4
# Turns in which steps are timed.
_TURNS = 3
# Of the frequencies, in which probabilities are averaged.
_NUM_DRAWS = 8


def build_classifier(problem: NodeProblem | TextProblem, *, rival: str) -> nn.Module:
    """Build an untrained network with one of ``LOGITS``."""
    logits = LOGITS[rival]
    if isinstance(problem, NodeProblem):
        return graph_attention_network(problem.graph, logits=logits)
    return small_transformer(problem.text.splits, _NUM_HEADS, logits=logits)


def measure(build: Build, problem: NodeProblem | TextProblem, budget: Any, seed: int) -> Outcome:
    """Train, choose by the validation part, and look at predictions of the test part."""
    # A graph is one sequence to a network, and a sentence another.
    terms = len(problem.graph.train) if isinstance(problem, NodeProblem) else 1
    trained = problem.train(build, budget, seed, LogitsRun(terms))
    metrics = classification_metrics(*_predictions(trained.model, problem, budget))
    baseline = equal_start(STUDY, STUDY.baseline, problem, seed)
    own, plain = (problem.step(start, budget, LogitsRun(terms)) for start in (build, baseline))
    metrics["step time"] = relative_time(own, plain, _TURNS)
    details = {"curves": trained.curves, "norms": norms(trained.model)}
    return Outcome(metrics, trained.choices, details)


def _predictions(
    model: nn.Module, problem: NodeProblem | TextProblem, budget: Any
) -> tuple[Tensor, Tensor]:
    """Probabilities of the classes of the test part, and its labels."""
    if isinstance(problem, NodeProblem):
        graph = problem.graph
        draws = drawn(model, partial(predict_nodes, model, graph), _NUM_DRAWS)
        return draws.mean(0)[graph.test], graph.label[graph.test]
    test = budget.cut(problem.text.splits.test)
    return drawn(model, partial(predict, model, test), _NUM_DRAWS).mean(0), test.label


def _nodes(name: str) -> Task:
    budget, quick = NodeBudget(60, (2e-2,)), NodeBudget(2, (2e-2,))
    return Task(partial(load_nodes, name), budget, quick)


def _text(name: str, sizes: PartSizes, num_epochs: int) -> Task:
    budget = Budget(num_epochs, learning_rates=(6e-3,), batch_size=64)
    quick = Budget(2, learning_rates=(6e-3,), max_sentences=140)
    return Task(partial(load_untrained, name, sizes), budget, quick)


STUDY = Study(
    name="implicit_kernel_classification",
    tasks={
        **{name: _nodes(name) for name in GRAPHS},
        "trec": _text("trec", PartSizes(2500, 600, 500, 0), 8),
        "snips": _text("snips", PartSizes(600, 300, 700, 0), 12),
    },
    rivals={name: partial(build_classifier, rival=name) for name in LOGITS},
    metrics={
        "accuracy": "higher",
        "log score": "higher",
        "ECE": "lower",
        "step time": "lower",
    },
    measure=measure,
    parameter_tolerance=0.4,
)

if __name__ == "__main__":
    command(STUDY)()
