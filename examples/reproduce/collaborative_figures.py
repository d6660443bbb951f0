"""What a trained encoder loses with the width of its shared projections, drawn and told."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from bayesattn.conversion_report import ConversionReport
from bayesattn.networks import attention_layers
from bayesattn.plots.canvas import bare, colors, legend_above, new_figure

__all__ = ["mixing_figure", "width_figure", "width_table"]

Record = Mapping[str, Any]
_KINDS = ("plain", "weighed")
_METRICS = ("cosine", "probe accuracy", "accuracy")


def width_figure(records: Sequence[Record]) -> Figure:
    """Draw errors with their lower bound, and what the encoder is worth, over the width."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    panels = ("relative error", *_METRICS)
    size = (1.2 + 3.0 * len(panels), 0.9 + 2.4 * len(tasks))
    figure, grid = new_figure(len(tasks), len(panels), size)
    handles: list[Any] = []
    for row, task in zip(grid, tasks, strict=True):
        of_task = [record for record in records if record["task"] == task]
        for axes, metric in zip(row, panels, strict=True):
            handles = []
            for kind, color in zip(_KINDS, colors(2), strict=True):
                found = _by_width(of_task, kind, partial(_metric, name=metric))
                handles.append(_curve(axes, found, color, kind))
                if metric == "relative error":
                    bound = _by_width(of_task, kind, _mean_bound)
                    means = [float(np.mean(values)) for values in bound.values()]
                    axes.plot(list(bound), means, ":", color=color, linewidth=1)
            original = [r["metrics"][metric] for r in of_task if r["rival"] == "original"]
            if original and metric != "relative error":
                axes.axhline(float(np.mean(original)), color="0.4", linewidth=1, linestyle=":")
            axes.set_title(f"{task}: {metric}", loc="left", fontsize=9)
            axes.set_xlabel("shared components", fontsize=9)
            bare(axes)
    legend_above(figure, handles, "Fewer components (dotted: original, or lower bound)")
    return figure


def mixing_figure(model: nn.Module) -> Figure:
    """Draw how much each head takes of each component, in the first and the last layer."""
    layers = list(attention_layers(model).items())
    shown = [layers[0], layers[-1]]
    figure, grid = new_figure(len(shown), 1, (9, 1.2 + 2.2 * len(shown)))
    for axes, (name, layer) in zip(grid[:, 0], shown, strict=True):
        mixing = layer.module.get_parameter(layer.layout["query"].weight.parameter)
        values = mixing.detach().abs()
        # Components stand by the head that takes most of them.
        order = (values.argmax(0) * 1000 - values.amax(0)).argsort()
        axes.imshow(values[:, order], aspect="auto", cmap="Greys", vmin=0)
        axes.set_title(name, loc="left", fontsize=9)
        axes.set_ylabel("head", fontsize=9)
        axes.set_xlabel("shared component, by the head that takes most of it", fontsize=9)
    return figure


def width_table(reports: Mapping[tuple[bool, float], ConversionReport]) -> str:
    """Write, as Markdown, the width that each layer needs for an allowed relative error."""
    rows = [["errors", "allowed", *(f"layer {i}" for i in range(_num_layers(reports)))]]
    rows.append(["---"] * len(rows[0]))
    for (is_weighed, error), report in reports.items():
        widths = [str(layer.width[1]) for layer in report.values()]
        rows.append([_KINDS[is_weighed], f"{error}", *widths])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _num_layers(reports: Mapping[Any, ConversionReport]) -> int:
    return len(next(iter(reports.values())))


def _metric(record: Record, name: str) -> float:
    return record["metrics"][name]


def _mean_bound(record: Record) -> float:
    return float(np.mean([layer["bound"] for layer in record["details"]["layers"].values()]))


def _by_width(records: Sequence[Record], kind: str, value: Any) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for record in records:
        name, _, width = record["rival"].partition("_")
        if name == kind:
            found.setdefault(int(width), []).append(value(record))
    return dict(sorted(found.items()))


def _curve(axes: Any, found: Mapping[int, Sequence[float]], color: Any, label: str) -> Any:
    means = [float(np.mean(values)) for values in found.values()]
    errors = [
        float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
        for values in found.values()
    ]
    return axes.errorbar(
        list(found), means, yerr=errors, fmt="o-", color=color, markersize=4, label=label
    )
