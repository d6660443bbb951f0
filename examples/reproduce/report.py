"""What a study found, as tables, as JSON and as a figure of paired differences."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from bayesattn.plots.canvas import bare, colors, legend_above, new_figure
from examples.reproduce.paired_statistics import (
    BySeed,
    Estimate,
    mean_and_error,
    mean_over_tasks,
    paired_difference,
)
from examples.reproduce.protocol import Study

__all__ = ["Findings", "difference_figure", "findings", "markdown", "summary", "tables"]

ALL_TASKS = "all tasks"
Record = Mapping[str, Any]
# task -> rival -> metric -> mean, or difference from the baseline
Findings = dict[str, dict[str, dict[str, dict[str, Estimate]]]]


# Beside each other in a figure, so that a page can hold it.
_MOST_PANELS = 5


def findings(study: Study, records: Sequence[Record]) -> Findings:
    """Estimate every metric and its difference from the baseline.

    Of several tasks there is also the mean, over the seeds that all of them have. A figure that
    no model of a task has is left out, there and in that mean.

    Returns:
        For each task, for each rival, for each metric, "mean" and, where the baseline has a seed
        in common, "difference".
    """
    values: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
    for record in records:
        by_rival = values.setdefault(record["task"], {})
        by_metric = by_rival.setdefault(record["rival"], {name: {} for name in study.metrics})
        for name in study.metrics:
            value = record["metrics"][name]
            if value is not None:
                by_metric[name][record["seed"]] = value
    if len(values) > 1:
        values[ALL_TASKS] = _over_tasks(study, values)
    return {
        task: {
            rival: {
                name: _estimates(by_metric[name], by_rival.get(study.baseline, {}).get(name))
                for name in study.metrics
            }
            for rival, by_metric in by_rival.items()
        }
        for task, by_rival in values.items()
    }


def tables(study: Study, found: Findings) -> dict[str, pd.DataFrame]:
    """Write the findings of each task as a table of rivals and metrics.

    A star marks a difference whose 95 % interval (Student's) excludes zero.
    """
    return {
        task: pd.DataFrame(
            {
                rival: {
                    column: text
                    for name in study.metrics
                    for column, text in _cells(name, by_metric[name], rival == study.baseline)
                }
                for rival, by_metric in by_rival.items()
            }
        ).T
        for task, by_rival in found.items()
    }


def summary(study: Study, found: Findings, records: Sequence[Record]) -> dict[str, Any]:
    """Give all there is to keep, fit for JSON."""
    return {
        "study": study.name,
        "baseline": study.baseline,
        "metrics": dict(study.metrics),
        "findings": {
            task: {
                rival: {
                    name: {kind: _plain(estimate) for kind, estimate in estimates.items()}
                    for name, estimates in by_metric.items()
                }
                for rival, by_metric in by_rival.items()
            }
            for task, by_rival in found.items()
        },
        "runs": [
            {key: record[key] for key in record if key not in ("details", "terms")}
            for record in records
        ],
    }


def markdown(table: pd.DataFrame) -> str:
    """Write a table as Markdown."""
    rows = [["", *table.columns], ["---"] * (len(table.columns) + 1)]
    rows += [[name, *row] for name, row in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def difference_figure(study: Study, found: Findings) -> Figure:
    """Draw each rival's paired differences from the baseline, a panel for each metric.

    Whiskers are 95 % intervals (Student's) over seeds.
    """
    rivals = [rival for rival in study.rivals if rival != study.baseline]
    tasks, metrics = list(found), list(study.metrics)
    rows = -(-len(metrics) // _MOST_PANELS)
    columns = -(-len(metrics) // rows)
    height = 0.8 + rows * (0.6 + 0.16 * len(tasks) * (len(rivals) + 1))
    figure, grid = new_figure(rows, columns, (1.4 + 3.0 * columns, height), sharey=True)
    handles = []
    for axes in grid.flat[len(metrics) :]:
        axes.set_visible(False)
    for axes, metric in zip(grid.flat, metrics, strict=False):
        axes.axvline(0, color="0.4", linewidth=0.9, linestyle=":")
        handles = []
        for place, (rival, color) in enumerate(zip(rivals, colors(len(rivals)), strict=True)):
            shift = 0.7 * ((place + 0.5) / len(rivals) - 0.5)
            points = [
                (row + shift, found[task][rival][metric]["difference"])
                for row, task in enumerate(tasks)
                if "difference" in found[task].get(rival, {}).get(metric, {})
            ]
            handles.append(
                axes.errorbar(
                    [estimate.mean for _, estimate in points],
                    [where for where, _ in points],
                    xerr=[estimate.interval() for _, estimate in points],
                    fmt="o",
                    color=color,
                    markersize=5,
                    capsize=2,
                    label=rival,
                )
            )
        better = study.metrics[metric]
        axes.set_title(
            metric if better == "neither" else f"{metric} ({better} is better)", fontsize=10
        )
        axes.set_xlabel(f"difference from {study.baseline}", fontsize=9)
        axes.locator_params(axis="x", nbins=5)
        axes.set_yticks(range(len(tasks)), tasks, fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        bare(axes)
    legend_above(figure, handles, "Paired differences, with 95 % intervals over seeds")
    return figure


def _estimates(values: BySeed, baseline: BySeed | None) -> dict[str, Estimate]:
    # Over all tasks, a rival may have no seed that every task has.
    estimates = {"mean": mean_and_error(values)} if values else {}
    if baseline is not None and values.keys() & baseline.keys():
        estimates["difference"] = paired_difference(values, baseline)
    return estimates


def _over_tasks(study: Study, values: Mapping[str, Any]) -> dict[str, Any]:
    rivals = [r for r in study.rivals if all(r in by_rival for by_rival in values.values())]
    return {
        rival: {
            name: mean_over_tasks(
                {task: values[task][rival][name] for task in values if values[task][rival][name]}
            )
            for name in study.metrics
        }
        for rival in rivals
    }


def _cells(
    metric: str, estimates: Mapping[str, Estimate], is_baseline: bool
) -> list[tuple[str, str]]:
    mean, difference = estimates.get("mean"), estimates.get("difference")
    cells = [(metric, "" if mean is None else f"{mean.mean:.4f} ± {mean.error:.4f}")]
    text = ""
    if difference is not None and not is_baseline:
        star = "*" if difference.excludes_zero() else ""
        text = f"{difference.mean:+.4f} ± {difference.error:.4f}{star}"
    return [*cells, (f"Δ {metric}", text)]


def _plain(estimate: Estimate) -> dict[str, float | int | None]:
    fields = estimate._asdict()
    return {key: None if math.isnan(value) else value for key, value in fields.items()}
