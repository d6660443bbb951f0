"""How narrow may queries and keys be, if heads share their projections, and if they do not?

Cordonnier, Loukas and Jaggi (2020), arXiv:2006.16362, report that heads which share projections of
queries and keys do with a quarter of their width. Here small Transformers learn sentences from
scratch, with as many components for queries and keys in each layer, whether heads share them or
not::

    python -m examples.reproduce.collaborative_training --data DIR --jobs 2

Four heads of two layers of width 64 have 64 components if nothing is saved. ``separate_16`` gives
each head four of 16; ``shared_16`` gives all heads all 16, and each its own mixing of them. Values
stay as they are. ``text_corpora.py`` says what may lie in DIR; SNIPS comes with the package.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bayesattn.plots.canvas import Color, bare, colors, legend_above, new_figure
from bayesattn.shared_projections import Collaborative, SharedProjections, block_mixing
from examples.reproduce.command_line import command
from examples.reproduce.protocol import Build, Outcome, Study, Task
from examples.reproduce.text_classifier import small_transformer
from examples.reproduce.text_problem import TextProblem, load_untrained
from examples.reproduce.text_shift import PartSizes
from examples.reproduce.training import (
    Budget,
    classification_metrics,
    cross_entropy,
    predict,
    train,
)

__all__ = ["STUDY", "build_separate", "build_shared", "measure"]

_NUM_HEADS, _FULL = 4, 64
_WIDTHS = (32, 16, 8)


def build_separate(problem: TextProblem, *, width: int) -> nn.Module:
    """Build a model whose heads have projections of their own, of this width together."""
    if width == _FULL:
        return small_transformer(problem.text.splits, _NUM_HEADS)
    model = build_shared(problem, width=width)
    for part in model.modules():
        if isinstance(part, SharedProjections):
            # Each component is one head's, and the scale is that of heads so narrow.
            with torch.no_grad():
                part.mixing.copy_(block_mixing(_NUM_HEADS, width // _NUM_HEADS))
            part.mixing.requires_grad_(False)
            part.scale.fill_((width / _NUM_HEADS) ** -0.5)
    return model


def build_shared(problem: TextProblem, *, width: int) -> nn.Module:
    """Build a model whose heads share projections of this width."""
    projections = Collaborative(width)
    return small_transformer(problem.text.splits, _NUM_HEADS, projections=projections)


def measure(build: Build, problem: TextProblem, budget: Budget, seed: int) -> Outcome:
    """Train, choose by the validation part, and look at predictions of the test part."""
    training, validation, test = map(budget.cut, problem.text.splits[:3])
    trained = train(build, training, validation, budget, seed, loss=cross_entropy)
    metrics = classification_metrics(predict(trained.model, test), test.label)
    return Outcome(metrics, trained.choices, {"curves": trained.curves})


def draw(records: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Draw what is measured over the width of queries and keys."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    metrics = list(STUDY.metrics)
    size = (1.2 + 3.2 * len(metrics), 0.8 + 2.3 * len(tasks))
    figure, grid = new_figure(len(tasks), len(metrics), size)
    handles = []
    for row, task in zip(grid, tasks, strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            handles = [
                _curve(axes, records, task, metric, kind, color)
                for kind, color in zip(("separate", "shared"), colors(2), strict=True)
            ]
            axes.set_xscale("log", base=2)
            axes.set_xticks([8, 16, 32, 64], ["8", "16", "32", "64"])
            axes.set_title(f"{task}: {metric}", loc="left", fontsize=9)
            axes.set_xlabel("width of queries and keys", fontsize=9)
            bare(axes)
    legend_above(figure, handles, "Projections that heads share, and that they do not")
    figure.savefig(folder / "widths.png", dpi=150)


def _curve(
    axes: Any, records: Sequence[Mapping[str, Any]], task: str, metric: str, kind: str, color: Color
) -> Any:
    found: dict[int, list[float]] = {}
    for width in sorted((*_WIDTHS, _FULL)):
        values = [
            record["metrics"][metric]
            for record in records
            if (record["task"], record["rival"]) == (task, f"{kind}_{width}")
        ]
        if values:
            found[width] = values
    means = [float(np.mean(values)) for values in found.values()]
    errors = [
        float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
        for values in found.values()
    ]
    return axes.errorbar(
        list(found), means, yerr=errors, fmt="o-", color=color, markersize=4, label=kind
    )


def _task(name: str, sizes: PartSizes, num_epochs: int) -> Task:
    budget = Budget(num_epochs, learning_rates=(3e-3, 6e-3), batch_size=64)
    quick = Budget(2, learning_rates=(6e-3,), max_sentences=140)
    return Task(partial(load_untrained, name, sizes), budget, quick)


_RIVALS: dict[str, Callable[[Any], nn.Module]] = {
    **{f"separate_{width}": partial(build_separate, width=width) for width in (_FULL, *_WIDTHS)},
    **{f"shared_{width}": partial(build_shared, width=width) for width in _WIDTHS},
}

STUDY = Study(
    name="collaborative_training",
    tasks={
        "snips": _task("snips", PartSizes(600, 300, 700, 0), 12),
        "trec": _task("trec", PartSizes(2500, 600, 500, 0), 8),
        "clinc150": _task("clinc150", PartSizes(3000, 600, 1500, 0), 12),
    },
    rivals=_RIVALS,
    metrics={"accuracy": "higher", "log score": "higher", "ECE": "lower"},
    measure=measure,
    draw=draw,
    parameter_tolerance=0.2,
)

if __name__ == "__main__":
    command(STUDY)()
