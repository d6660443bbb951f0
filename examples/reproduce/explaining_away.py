"""Does attention explain words away, and does it matter? Four normalizations on real text.

Ding et al. (2020), arXiv:2009.14308, find that the attention of Transformers ignores some of its
inputs, and propose doubly-normalized attention, which cannot. Here small Transformers are trained
from scratch to classify sentences, with each normalization in turn::

    python -m examples.reproduce.explaining_away --data DIR --jobs 2

``text_corpora.py`` says what may lie in DIR; SNIPS comes with the package. See README.md in this
folder for what was found.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import nn

from bayesattn.normalizations import DoublyNormalized, HybridNormalized, Sinkhorn
from bayesattn.plots.canvas import bare, colors, legend_above, new_figure
from examples.reproduce.column_mass import EDGES, THRESHOLDS, profile
from examples.reproduce.command_line import command
from examples.reproduce.protocol import Build, Outcome, Study, Task
from examples.reproduce.running import write_atomically
from examples.reproduce.text_classifier import small_transformer
from examples.reproduce.text_tasks import READERS, TextSplits, read_task
from examples.reproduce.training import Budget, classification_metrics, predict, train

__all__ = ["NORMALIZATIONS", "STUDY", "build_classifier", "measure"]

_NUM_HEADS = 4
# Passes over the training sentences, fewer where there are more of them; for each learning rate.
_EPOCHS = {"snips": 6, "clinc150": 6, "banking77": 6, "trec": 4, "sst2": 3}
_WHEN = ("initial", "trained")


def softmax() -> None:
    """Softmax, which is what the layers do by themselves."""


NORMALIZATIONS = {
    "softmax": softmax,
    "doubly": DoublyNormalized,
    "hybrid": partial(HybridNormalized, _NUM_HEADS),
    "sinkhorn3": partial(Sinkhorn, 3),
}


def build_classifier(normalization: str, splits: TextSplits) -> nn.Module:
    """Build an untrained classifier: two layers of width 64 with four heads."""
    return small_transformer(splits, _NUM_HEADS, normalization=NORMALIZATIONS[normalization])


def measure(build: Build, splits: TextSplits, budget: Budget, seed: int) -> Outcome:
    """Train a classifier, and look at the words' masses before and after."""
    training, validation, test = map(budget.cut, splits[:3])
    before = profile(build(), test)
    trained = train(build, training, validation, budget, seed)
    details = {
        "initial": before,
        "trained": profile(trained.model, test),
        "curves": trained.curves,
        "normalization": {
            name: value.tolist()
            for name, value in trained.model.named_parameters()
            if ".normalization." in name
        },
    }
    metrics = classification_metrics(predict(trained.model, test), test.label)
    return Outcome(metrics, trained.choices, details)


def draw(records: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write the histograms of log10 column mass, and a table of the explained-away rates."""
    mass_figure(records).savefig(folder / "column_mass.png", dpi=150)
    write_atomically(folder / "explained_away.md", rates_table(records))


def mass_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the histogram of log10 column mass, a row for each task, a column for each layer.

    Lines are trained models, and the dotted one is the untrained baseline, pooled over seeds and
    heads.
    """
    tasks = list(dict.fromkeys(record["task"] for record in records))
    rivals = list(dict.fromkeys(record["rival"] for record in records))
    num_layers = len(records[0]["details"]["trained"])
    size = (1.2 + 4.2 * num_layers, 1.4 + 1.9 * len(tasks))
    figure, grid = new_figure(len(tasks), num_layers, size, sharex=True, sharey=True)
    handles = []
    for task, row in zip(tasks, grid, strict=True):
        for layer, axes in enumerate(row):
            handles = _mass_lines(axes, [r for r in records if r["task"] == task], rivals, layer)
            axes.set_title(f"{task}, layer {layer + 1}", loc="left", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("log10 of the attention that a word receives", fontsize=9)
    figure.supylabel("share of words, for each 1/8 of a decade", fontsize=10)
    legend_above(figure, handles, "Attention that the words of test sentences receive")
    return figure


def rates_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Write explained-away rates as Markdown: means over seeds and heads, ± over seeds."""
    head = ["task", "normalization", "when", "layer"]
    head += [f"below {bound}" for bound in THRESHOLDS]
    head += [f"below {THRESHOLDS[0]} in all heads", "lowest mass", "words attended to"]
    rows = [head, ["---"] * len(head)]
    groups = dict.fromkeys((record["task"], record["rival"]) for record in records)
    for task, rival in groups:
        for when in _WHEN:
            layers = [
                r["details"][when] for r in records if (r["task"], r["rival"]) == (task, rival)
            ]
            for layer, seeds in enumerate(zip(*layers, strict=True)):
                rates = [[np.mean(s["rates"][str(bound)]) for s in seeds] for bound in THRESHOLDS]
                everywhere = [s["in_all_heads"][str(THRESHOLDS[0])] for s in seeds]
                cells = [task, rival, when, str(layer + 1), *map(_percent, [*rates, everywhere])]
                cells.append(f"{min(s['lowest'] for s in seeds):.1e}")
                cells.append(f"{np.mean([s['attended'] for s in seeds]):.1f}")
                rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _percent(values: Sequence[float]) -> str:
    several = len(values) > 1
    error = f" ± {100 * np.std(values, ddof=1) / np.sqrt(len(values)):.1f}" if several else ""
    return f"{100 * np.mean(values):.1f}{error} %"


def _mass_lines(
    axes: Axes, records: Sequence[Mapping[str, Any]], rivals: Sequence[str], layer: int
) -> list[Line2D]:
    edges, handles = EDGES.numpy(), []
    for place, (rival, color) in enumerate(zip(rivals, colors(len(rivals)), strict=True)):
        for when, style in (("initial", ":"), ("trained", "-")):
            if when == "initial" and place > 0:
                continue
            counts = [
                record["details"][when][layer]["histogram"]
                for record in records
                if record["rival"] == rival
            ]
            if not counts:
                continue
            total = np.sum(counts, axis=0)
            share = np.where(total > 0, total / total.sum(), np.nan)
            label = rival if when == "trained" else f"{rival}, untrained"
            middles = (edges[1:] + edges[:-1]) / 2
            handles += axes.plot(middles, share, style, color=color, linewidth=1.5, label=label)
    axes.set_yscale("log")
    axes.axvline(-1, color="0.6", linewidth=0.8)
    axes.tick_params(labelsize=8)
    bare(axes)
    return handles


STUDY = Study(
    name="explaining_away",
    tasks={
        name: Task(
            partial(read_task, name),
            Budget(_EPOCHS[name], learning_rates=(3e-3, 6e-3), batch_size=64),
            Budget(2, learning_rates=(6e-3,), max_sentences=210),
        )
        for name in READERS
    },
    rivals={name: partial(build_classifier, name) for name in NORMALIZATIONS},
    metrics={"accuracy": "higher", "log score": "higher", "ECE": "lower"},
    measure=measure,
    draw=draw,
)

if __name__ == "__main__":
    command(STUDY)()
