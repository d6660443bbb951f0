"""How far queries and keys of each head are apart, before and after, beside what attention did."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bayesattn.alignment_diagnostics import AlignmentStatistics
from bayesattn.attention_changes import AttentionChange
from bayesattn.plots.canvas import array, bare, colors, legend_above, new_figure, nonempty

__all__ = ["alignment"]

_BEFORE, _AFTER, _CHANGE = "0.45", *map(str, colors(2))
_OFFSET = 0.16
# Of each column, its title and how far its axis goes at least, so that nothing looks like much.
_COLUMNS = {
    "squared MMD of queries and keys": 0.0,
    "total variation of attention": 0.1,
    "entropy, nats": 0.0,
}
# Longer names of layers take two lines beside their row.
_LONGEST = 18


def alignment(
    before: Mapping[str, AlignmentStatistics],
    after: Mapping[str, AlignmentStatistics],
    change: Mapping[str, AttentionChange],
    *,
    level: float = 0.05,
    title: str | None = None,
) -> Figure:
    """Draw, for each layer and head, distances before and after, and the change in attention.

    A head whose queries and keys came closer has learned something of it only if its attention
    changed: see :mod:`bayesattn.alignment_diagnostics`. Of many heads, a part as large as the level
    is marked by chance.

    Args:
        before: By layer, of :func:`bayesattn.alignment_statistics`.
        after: The same later.
        change: By layer, of :func:`bayesattn.attention_change` between the two.
        level: Markers are filled where the p-value is at most this.
        title: Above the figure.

    Returns:
        A figure that pyplot does not know; keep it with ``figure.savefig``.

    Raises:
        ValueError: If there is nothing to draw, layers or heads differ, or figures are not finite.
    """
    nonempty("before", before)
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    for name, other in (("after", after), ("change", change)):
        if set(other) != set(before):
            raise ValueError(f"{name}: expected layers {sorted(before)}, got {sorted(other)}")
    num_heads = max(len(entry.entropy) for entry in before.values())
    size = (2.4 + 3 * max(2.2, 0.26 * num_heads), 1.1 + 1.5 * len(before))
    figure, grid = new_figure(len(before), 3, size, sharex=True, sharey="col")
    for row, name in zip(grid, before, strict=True):
        states = (before[name], after[name])
        heads = np.arange(len(states[0].entropy))
        _distances(row[0], heads, name, states, level)
        shares = _figures(name, change[name], "total_variation", heads)
        row[1].bar(heads, shares, 0.6, color=_CHANGE)
        _moved(row[2], heads, [_figures(name, state, "entropy", heads) for state in states])
        row[0].set_ylabel(_in_two_lines(name or "layer"), fontsize=9)
    for axes, (heading, least) in zip(grid[0], _COLUMNS.items(), strict=True):
        axes.set_title(heading, loc="left", fontsize=10)
        # Shared by all layers.
        axes.set_ylim(0.0, max(least, 1.05 * axes.get_ylim()[1]))
    for axes in grid.flat:
        axes.set_xlim(-0.6, num_heads - 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.tick_params(labelsize=8)
        bare(axes)
    for axes in grid[-1]:
        axes.set_xlabel("head", fontsize=9)
    legend_above(figure, _handles(level), title)
    return figure


def _distances(
    axes: Axes, heads: np.ndarray, name: str, states: tuple[AlignmentStatistics, ...], level: float
) -> None:
    values = [_figures(name, state, "squared_mmd", heads) for state in states]
    is_marked = [_figures(name, state, "p_value", heads) <= level for state in states]
    for side, state in zip((-_OFFSET, _OFFSET), states, strict=True):
        chance = _figures(name, state, "chance", heads)
        places = heads + side
        axes.hlines(chance, places - 0.13, places + 0.13, color="0.7", linewidth=1.4, zorder=1)
    _moved(axes, heads, values, is_marked)


def _moved(
    axes: Axes,
    heads: np.ndarray,
    values: list[np.ndarray],
    is_filled: list[np.ndarray] | None = None,
) -> None:
    """Two markers a head, and a line from the one to the other."""
    ends = np.stack([heads - _OFFSET, heads + _OFFSET])
    axes.plot(ends, np.stack(values), color="0.75", linewidth=1.0, zorder=2)
    for place, height, color, index in zip(ends, values, (_BEFORE, _AFTER), (0, 1), strict=True):
        filled = np.ones(len(heads), bool) if is_filled is None else is_filled[index]
        faces = [color if full else "white" for full in filled]
        axes.scatter(place, height, 22, c=faces, edgecolors=color, linewidths=1.2, zorder=3)


def _figures(
    name: str, entry: AlignmentStatistics | AttentionChange, field: str, heads: np.ndarray
) -> np.ndarray:
    values = array(f"{name}: {field}", getattr(entry, field), ("head",))
    if len(values) != len(heads):
        raise ValueError(f"{name}: expected {len(heads)} heads in {field}, got {len(values)}")
    return values


def _in_two_lines(name: str) -> str:
    dots = [place for place, letter in enumerate(name) if letter == "."]
    if len(name) <= _LONGEST or not dots:
        return name
    middle = min(dots, key=lambda place: abs(2 * place - len(name)))
    return f"{name[:middle]}\n{name[middle:]}"


def _handles(level: float) -> list[Line2D]:
    marker = {"marker": "o", "linestyle": "", "markersize": 5}
    return [
        Line2D([], [], color=_BEFORE, label="before", **marker),
        Line2D([], [], color=_AFTER, label="after", **marker),
        Line2D([], [], color="0.3", label=f"p ≤ {level:g}", **marker),
        Line2D([], [], color="0.3", markerfacecolor="white", label=f"p > {level:g}", **marker),
        Line2D([], [], color="0.7", linewidth=1.4, label="by chance"),
    ]
