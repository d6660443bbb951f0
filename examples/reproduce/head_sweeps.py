"""What the number of heads does: all metrics over it, and what more heads bring, pair by pair.

Tasks are named by the group that they belong to and, after the last underscore, their number of
heads.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure

from bayesattn.plots.canvas import Color, bare, colors, legend_above, new_figure
from examples.reproduce.protocol import Study
from examples.reproduce.report import Findings, findings, markdown, tables

__all__ = ["more_heads", "sweep_figure"]

Record = Mapping[str, Any]


def more_heads(study: Study, records: Sequence[Record]) -> str:
    """Write, for each group of tasks and each rival, what more heads bring beyond the fewest.

    Differences are paired: of one seed, splits and order of batches are the same. Initial weights
    are not, for they differ in shape.

    Returns:
        Tables in Markdown, with a row for each rival and number of heads.
    """
    pages = ["± one standard error over seeds, Δ is paired with the fewest heads of the same rival"]
    for group, counts in _groups(records).items():
        names = [f"heads_{count}" for count in counts]
        build = study.rivals[study.baseline]
        of_heads = dataclasses.replace(study, rivals=dict.fromkeys(names, build), methods={})
        chosen = [
            {**record, "task": record["rival"], "rival": f"heads_{count}"}
            for count in counts
            for record in records
            if _parts(record["task"]) == (group, count)
        ]
        by_rival = tables(of_heads, findings(of_heads, chosen))
        rows = [
            by_rival[rival].rename(lambda heads, rival=rival: f"{rival}, {heads}")
            for rival in study.rivals
            if rival in by_rival
        ]
        pages.append(f"**{group}**\n\n{markdown(pd.concat(rows))}")
    return "\n\n".join(pages) + "\n"


def sweep_figure(study: Study, records: Sequence[Record]) -> Figure:
    """Draw each metric over the number of heads: a row for each, a column for each group of tasks.

    Whiskers are standard errors over seeds. They hold what differs between seeds in all rivals
    alike, too, which paired differences do not.
    """
    found, groups = findings(study, records), _groups(records)
    size = (1.6 + 2.7 * len(groups), 1.6 + 1.7 * len(study.metrics))
    figure, grid = new_figure(len(study.metrics), len(groups), size, sharex="col")
    palette: list[Color] = ["0.15", *colors(len(study.rivals) - 1)]
    handles: list[Container] = []
    for row, (metric, axes_of_row) in enumerate(zip(study.metrics, grid, strict=True)):
        for axes, (group, counts) in zip(axes_of_row, groups.items(), strict=True):
            tasks = {count: f"{group}_{count}" for count in counts}
            handles = [
                _line(axes, found, tasks, rival, metric, color)
                for rival, color in zip(study.rivals, palette, strict=True)
            ]
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, list(map(str, counts)))
            axes.tick_params(labelsize=8)
            bare(axes)
            if row == 0:
                axes.set_title(group, fontsize=10)
        axes_of_row[0].set_ylabel(metric, fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("heads", fontsize=9)
    legend_above(figure, handles, "Test sentences, by the number of heads")
    return figure


def _line(
    axes: Axes,
    found: Findings,
    tasks: Mapping[int, str],
    rival: str,
    metric: str,
    color: Color,
) -> Container:
    """Draw one rival where it has the metric, and give what the legend shows of it."""
    points = {
        count: found[task][rival][metric]["mean"]
        for count, task in tasks.items()
        if "mean" in found[task].get(rival, {}).get(metric, {})
    }
    return axes.errorbar(
        list(points),
        [estimate.mean for estimate in points.values()],
        yerr=[estimate.error for estimate in points.values()],
        color=color,
        linewidth=1.2,
        marker="o",
        markersize=3,
        capsize=2,
        label=rival,
    )


def _groups(records: Sequence[Record]) -> dict[str, list[int]]:
    """Numbers of heads of each group of tasks, the fewest first."""
    groups: dict[str, set[int]] = {}
    for record in records:
        group, count = _parts(record["task"])
        groups.setdefault(group, set()).add(count)
    return {group: sorted(counts) for group, counts in groups.items()}


def _parts(task: str) -> tuple[str, int]:
    group, _, count = task.rpartition("_")
    return group, int(count)
