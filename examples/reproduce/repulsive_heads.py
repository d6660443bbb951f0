"""Does repulsion between heads help, and how many heads? Small classifiers on real text.

An et al. (2020), arXiv:2009.09364, see heads as particles of a posterior, let them repel each other
while a network is trained, and find gains. Here classifiers are trained from scratch, each in
several ways that differ in nothing else (``head_methods.py``)::

    python -m examples.reproduce.repulsive_heads --data DIR --jobs 2

``text_corpora.py`` says what may lie in DIR; SNIPS comes with the package. Tasks are a data set, a
network and a number of heads:

* ``pooling``, the paper's set-up: a bidirectional LSTM and structured self-attention with a shared
  key map, where a head is a row of the queries' matrix; 30 heads as in the paper, and fewer;
* ``transformer``: two layers of width 64, where heads' queries, keys and values are three particle
  systems in each layer, and more heads are narrower ones.

Beside the model after the chosen epoch, the mean of the predictions after each epoch of the second
half of training is measured, for all rivals alike. Under SPOS these epochs are when the heads are
samples, two or three of one short chain with a falling step size; its model is the last of them, or
an earlier one if the validation part says so.

Learning rate and epoch are chosen by the validation part, and so is one of two strengths of the
penalty and of the decoupled force, which is an advantage of theirs.

A run of a rival without such a choice, two trainings, takes on one of two busy cores about 2 to 5
seconds on SNIPS, 4 to 9 on TREC and 10 to 12 on SST-2, the longer ones being Transformers'. The
960 runs of five seeds take about two hours of process time: an hour with ``--jobs 2``.
"""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from examples.reproduce.command_line import command
from examples.reproduce.head_diversity import DIVERSITY, head_diversity
from examples.reproduce.head_methods import METHODS, Method, Start, fit
from examples.reproduce.head_sweeps import more_heads, sweep_figure
from examples.reproduce.pooling_classifier import PoolingClassifier
from examples.reproduce.protocol import Build, Outcome, Study, Task
from examples.reproduce.running import write_atomically
from examples.reproduce.text_classifier import small_transformer
from examples.reproduce.text_tasks import Sentences, TextSplits, read_task
from examples.reproduce.training import Budget, Trained, classification_metrics, predict

__all__ = ["STUDY", "HeadTask", "build_classifier", "measure"]

# Passes over the training sentences, fewer where they are longer; for each learning rate.
_EPOCHS = {"snips": 6, "trec": 4, "sst2": 3}
_HEADS = {"pooling": (1, 2, 4, 8, 30), "transformer": (2, 4, 8)}


class HeadTask(NamedTuple):
    """What is to be learned, and by what.

    Attributes:
        text: The data.
        network: "pooling" or "transformer".
        num_heads: Number of heads, of each layer.
    """

    text: TextSplits
    network: str
    num_heads: int

    def sizes(self) -> dict[str, int]:
        """How many sentences, classes and heads there are."""
        return self.text.sizes() | {"heads": self.num_heads}


def load(
    name: str, network: str, num_heads: int, folder: Path | None, seed: int
) -> HeadTask | None:
    """Read a data set; None where it is not there."""
    text = _text(name, folder, seed)
    return None if text is None else HeadTask(text, network, num_heads)


def build_classifier(task: HeadTask) -> nn.Module:
    """Build an untrained classifier, of whichever network."""
    if task.network == "transformer":
        return small_transformer(task.text, task.num_heads)
    sizes = len(task.text.vocabulary), len(task.text.label_names)
    return PoolingClassifier(*sizes, task.num_heads)


def measure(build: Build, task: HeadTask, budget: Budget, seed: int, *, method: Method) -> Outcome:
    """Train a classifier by a method, and look at its predictions and at its heads."""
    training, validation, test = map(budget.cut, task.text[:3])
    untrained = head_diversity(build(), test)
    trained = fit(method, Start(build, training, validation, budget, seed))
    metrics = classification_metrics(predict(trained.model, test), test.label)
    diversity = head_diversity(trained.model, test)
    averaged = classification_metrics(_averaged(trained, test), test.label)
    return Outcome(
        metrics | {"averaged log score": averaged["log score"]} | diversity,
        trained.choices,
        {"untrained": untrained, "averaged": averaged, "curves": trained.curves},
    )


def draw(records: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write all metrics over the number of heads, and what more heads bring."""
    sweep_figure(STUDY, records).savefig(folder / "heads.png", dpi=150)
    write_atomically(folder / "more_heads.md", more_heads(STUDY, records))


def _averaged(trained: Trained, sentences: Sentences) -> Float[Tensor, "sentence class"]:
    """Give the mean of the predictions after each epoch of the second half."""
    predictions = []
    for state in trained.states[len(trained.states) // 2 :]:
        trained.model.load_state_dict(state)
        predictions.append(predict(trained.model, sentences))
    return torch.stack(predictions).mean(0)


@cache
def _text(name: str, folder: Path | None, seed: int) -> TextSplits | None:
    # Kept, since tasks of one data set differ in their networks only.
    return read_task(name, folder, seed)


STUDY = Study(
    name="repulsive_heads",
    tasks={
        f"{name}_{network}_{num_heads}": Task(
            partial(load, name, network, num_heads),
            Budget(num_epochs, learning_rates=(5e-3, 1e-2), batch_size=64),
            Budget(2, learning_rates=(6e-3,), max_sentences=210),
        )
        for name, num_epochs in _EPOCHS.items()
        for network, counts in _HEADS.items()
        for num_heads in counts
    },
    rivals=dict.fromkeys(METHODS, build_classifier),
    metrics={
        "accuracy": "higher",
        "log score": "higher",
        "ECE": "lower",
        "averaged log score": "higher",
        **dict.fromkeys(DIVERSITY, "neither"),
    },
    measure=measure,
    methods=METHODS,
    draw=draw,
)

if __name__ == "__main__":
    command(STUDY)()
