"""What alignment does to heads, and what rivals are worth under shift, as pictures and a table.

Means are over seeds, with one standard error.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bayesattn.plots.canvas import bare, colors, legend_above, new_figure

__all__ = ["dose_figure", "head_table", "shift_figure"]

Record = Mapping[str, Any]

_DOSE = {
    "MMD": "squared MMD of queries and keys",
    "attention change": "attention that goes elsewhere",
    "validation log score": "validation log score",
}
_SHIFT = ("ECE", "noisy ECE", "accuracy", "noisy accuracy", "out-of-scope AUROC", "step time")
_LEVEL = 0.05


def dose_figure(records: Sequence[Record]) -> Figure:
    """Draw what each weight of each rival comes to, a row for each task.

    The dotted line is training without alignment, in the mean over its tries.
    """
    tasks, rivals = _names(records, "task"), _names(records, "rival")
    size = (1.2 + 3.6 * len(_DOSE), 1.4 + 2.1 * len(tasks))
    figure, grid = new_figure(len(tasks), len(_DOSE), size, sharex=True)
    handles: list[Line2D] = []
    for task, row in zip(tasks, grid, strict=True):
        for axes, (name, label) in zip(row, _DOSE.items(), strict=True):
            handles = _doses(axes, [r for r in records if r["task"] == task], rivals, name)
            axes.set_title(f"{task}: {label}", loc="left", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("λ", fontsize=10)
    legend_above(figure, handles, "What the weight of alignment does")
    return figure


def shift_figure(records: Sequence[Record]) -> Figure:
    """Draw what each rival's chosen model is worth, in domain and under shift."""
    tasks, rivals = _names(records, "task"), _names(records, "rival")
    # As in the other figures; the baseline is grey there too.
    palette = ["0.4", *colors(len(rivals) - 1)]
    size = (1.6 + 2.5 * len(_SHIFT), 1.4 + 0.2 * len(tasks) * (len(rivals) + 1))
    figure, grid = new_figure(1, len(_SHIFT), size, sharey=True)
    handles = []
    for axes, metric in zip(grid[0], _SHIFT, strict=True):
        handles = []
        for place, (rival, color) in enumerate(zip(rivals, palette, strict=True)):
            rows, means, errors = [], [], []
            for row, task in enumerate(tasks):
                values = _metric(records, task, rival, metric)
                if values:
                    rows.append(row + 0.7 * ((place + 0.5) / len(rivals) - 0.5))
                    means.append(np.mean(values))
                    errors.append(_error(values))
            handles.append(
                axes.errorbar(
                    means, rows, xerr=errors, fmt="o", color=color, markersize=4, label=rival
                )
            )
        axes.set_title(metric, fontsize=10)
        axes.locator_params(axis="x", nbins=4)
        axes.set_yticks(range(len(tasks)), tasks, fontsize=9)
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.tick_params(axis="x", labelsize=8)
        bare(axes)
    legend_above(figure, handles, "In domain and under shift")
    return figure


def head_table(records: Sequence[Record]) -> str:
    """Write, as Markdown, how far queries and keys are apart, and how attention is spread.

    "by chance" is the MMD of random splits of the same points; "heads apart" the part of the heads
    whose permutation test has p of .05 at most.
    """
    head = ["task", "model", "squared MMD", "by chance", "heads apart", "entropy"]
    rows = [head, ["---"] * len(head)]
    for task in _names(records, "task"):
        of_task = [record for record in records if record["task"] == task]
        baseline = _names(records, "rival")[0]
        models = [("before training", baseline, "before"), ("no alignment", baseline, "plain")]
        models += [(rival, rival, "after") for rival in _names(records, "rival")[1:]]
        for label, rival, when in models:
            figures = [r["details"][when] for r in of_task if r["rival"] == rival]
            if figures:
                rows.append([task, label, *_cells(figures)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _cells(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = {
        name: [_all_heads(entry[name]) for entry in figures]
        for name in ("squared_mmd", "chance", "p_value", "entropy")
    }
    columns["p_value"] = [heads <= _LEVEL for heads in columns["p_value"]]
    cells = []
    for name, seeds in columns.items():
        means = [float(np.mean(heads)) for heads in seeds]
        digits = 2 if name in ("p_value", "entropy") else 4
        cells.append(f"{np.mean(means):.{digits}f} ± {_error(means):.{digits}f}")
    return cells


def _all_heads(layers: Sequence[Sequence[float]]) -> np.ndarray:
    return np.concatenate([np.asarray(layer) for layer in layers])


def _doses(axes: Axes, records: Sequence[Record], rivals: Sequence[str], name: str) -> list[Line2D]:
    handles = []
    for rival, color in zip(rivals, ["0.4", *colors(len(rivals) - 1)], strict=True):
        tries = [t for r in records if r["rival"] == rival for t in r["details"]["tries"]]
        if rival == rivals[0]:
            values = [t[name] for t in tries if name != "attention change" or t["choice"] > 0]
            if values:
                handles.append(
                    axes.axhline(float(np.mean(values)), color=color, linestyle=":", label=rival)
                )
            continue
        weights = sorted({t["choice"] for t in tries})
        series = [[t[name] for t in tries if t["choice"] == weight] for weight in weights]
        handles += axes.plot(weights, [np.mean(s) for s in series], color=color, label=rival)
        axes.errorbar(
            weights,
            [np.mean(s) for s in series],
            yerr=[_error(s) for s in series],
            fmt="o",
            markersize=4,
            color=color,
        )
    axes.set_xscale("log")
    if name == "MMD":
        axes.set_yscale("log")
    axes.tick_params(labelsize=8)
    bare(axes)
    return handles


def _metric(records: Sequence[Record], task: str, rival: str, metric: str) -> list[float]:
    found = [
        record["metrics"][metric]
        for record in records
        if (record["task"], record["rival"]) == (task, rival)
    ]
    return [value for value in found if value is not None]


def _names(records: Sequence[Record], kind: str) -> list[str]:
    return list(dict.fromkeys(record[kind] for record in records))


def _error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
