"""How good the predictions of several methods are, side by side."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bayesattn.plots.canvas import bare, colors, new_figure, nonempty

__all__ = ["scores"]


def scores(
    table: Mapping[str, Mapping[str, tuple[float, float]]], *, title: str | None = None
) -> Figure:
    """Draw figures of merit with their standard errors, one panel for each.

    Args:
        table: For each method, for each metric, its value and standard error. All methods have
            the same metrics.
        title: Above the figure.

    Returns:
        A figure that pyplot does not know; keep it with ``figure.savefig``.

    Raises:
        ValueError: If there is no method or metric, or methods have different metrics.
    """
    nonempty("table", table)
    methods = list(table)
    metrics = list(table[methods[0]])
    nonempty(f"table of {methods[0]}", table[methods[0]])
    for method, row in table.items():
        if set(row) != set(metrics):
            raise ValueError(f"{method} must have metrics {sorted(metrics)}, got {sorted(row)}")
    size = (1.2 + 2.9 * len(metrics), 1.0 + 0.42 * len(methods))
    figure, grid = new_figure(1, len(metrics), size, sharey=True)
    for axes, metric in zip(grid[0], metrics, strict=True):
        _values_with_errors(axes, [table[method][metric] for method in methods])
        axes.set_title(metric, fontsize=11)
        axes.set_yticks(range(len(methods)), methods, fontsize=10)
    if title is not None:
        figure.suptitle(title, fontsize=13)
    return figure


def _values_with_errors(axes: Axes, pairs: Sequence[tuple[float, float]]) -> None:
    for place, ((value, error), color) in enumerate(zip(pairs, colors(len(pairs)), strict=True)):
        axes.errorbar(value, place, xerr=error, fmt="o", color=color, markersize=7, capsize=3)
        above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{value:.3f}", (value, place), fontsize=9, **above)
    axes.set_ylim(len(pairs) - 0.5, -0.7)
    axes.margins(x=0.15)
    axes.grid(axis="x", color="0.9")
    axes.tick_params(axis="x", labelsize=9)
    axes.tick_params(axis="y", length=0)
    bare(axes)
