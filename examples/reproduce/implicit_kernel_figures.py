"""How kernels fare in regression, and what they make of series, as pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bayesattn.plots.canvas import bare, colors, legend_above, new_figure

__all__ = ["forecast_figure", "relative_figure"]

Record = Mapping[str, Any]


def relative_figure(records: Sequence[Record], baseline: str) -> Figure:
    """Draw each rival's error over the baseline's of the same seed, a panel for each task.

    A dot is a seed, a bar the geometric mean over seeds.
    """
    tasks, rivals = _names(records, "task"), _names(records, "rival")
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    size = (1.4 + 2.6 * columns, 0.6 + rows * (0.7 + 0.24 * len(rivals)))
    figure, grid = new_figure(rows, columns, size, sharey=True)
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    for axes, task in zip(grid.flat, tasks, strict=False):
        errors = {
            (record["rival"], record["seed"]): record["metrics"]["RMSE"]
            for record in records
            if record["task"] == task
        }
        axes.axvline(1, color="0.4", linewidth=0.9, linestyle=":")
        for row, (rival, color) in enumerate(zip(rivals, colors(len(rivals)), strict=True)):
            ratios = [
                error / errors[baseline, seed]
                for (name, seed), error in errors.items()
                if name == rival and (baseline, seed) in errors
            ]
            if ratios:
                axes.plot(ratios, [row] * len(ratios), "o", color=color, markersize=3, alpha=0.5)
                axes.plot(np.exp(np.mean(np.log(ratios))), row, "|", color=color, markersize=14)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(0.2, 0.3, 0.5, 0.7, 0.85, 1.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(task, loc="left", fontsize=9)
        axes.set_yticks(range(len(rivals)), rivals, fontsize=9)
        axes.set_ylim(len(rivals) - 0.5, -0.5)
        axes.tick_params(axis="x", which="both", labelsize=7)
        bare(axes)
    figure.suptitle(f"Test error over that of {baseline}, seed by seed", fontsize=11)
    return figure


def forecast_figure(records: Sequence[Record]) -> Figure:
    """Draw what each rival forecasts of the hidden years of each series, of its first seed.

    Bands are two standard deviations.
    """
    tasks, rivals = _names(records, "task"), _names(records, "rival")
    size = (2.0 + 3.4 * len(tasks), 0.8 + 1.3 * len(rivals))
    figure, grid = new_figure(len(rivals), len(tasks), size, sharex="col")
    handles: list[Any] = []
    for column, task in zip(grid.T, tasks, strict=True):
        for axes, rival in zip(column, rivals, strict=True):
            found = [r for r in records if (r["task"], r["rival"]) == (task, rival)]
            if found:
                first = min(found, key=lambda record: record["seed"])
                handles = _draw_forecast(axes, first["details"]["forecast"])
            axes.set_title(f"{task}: {rival}", loc="left", fontsize=8)
            axes.tick_params(labelsize=7)
            bare(axes)
        column[-1].set_xlabel("hidden month", fontsize=8)
    legend_above(figure, handles, "Forecasts of hidden years")
    return figure


def _draw_forecast(axes: Any, found: Mapping[str, Sequence[float]]) -> list[Any]:
    y, mean, deviation = (np.array(found[name]) for name in ("y", "mean", "deviation"))
    months = np.arange(len(y))
    (color,) = colors(1)
    seen = axes.plot(months, y, ".", color="0.3", markersize=3, label="target")
    line = axes.plot(months, mean, color=color, linewidth=1, label="forecast")
    axes.fill_between(
        months, mean - 2 * deviation, mean + 2 * deviation, color=color, alpha=0.2, linewidth=0
    )
    return [*seen, *line]


def _names(records: Sequence[Record], kind: str) -> list[str]:
    return list(dict.fromkeys(record[kind] for record in records))
