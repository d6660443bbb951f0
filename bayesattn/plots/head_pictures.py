"""How alike heads are, layer by layer, and what drives and repels them in training."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from bayesattn.head_diagnostics import HeadStatistics
from bayesattn.plots.canvas import array, bare, colors, legend_above, new_figure, nonempty

__all__ = ["head_forces", "head_similarity"]

# More names than these do not fit above a figure.
_MOST_NAMED = 9

_SHOWN = {
    "cosine": ("cosine of outputs", -1.0, 1.0, "RdBu_r"),
    "alignment": ("CKA of outputs", 0.0, 1.0, "viridis_r"),
    "divergence": ("JS of attention, nats", 0.0, float(np.log(2)), "viridis"),
}


@runtime_checkable
class Forces(Protocol):
    """Figures of a step of repulsion, such as :class:`bayesattn.inference.RepulsionInfo`."""

    @property
    def drive(self) -> Tensor | float:
        """Norm along the descent of the loss."""
        ...

    @property
    def repulsion(self) -> Tensor | float:
        """Norm away from the other heads."""
        ...


def head_similarity(
    statistics: Mapping[str, HeadStatistics], *, title: str | None = None
) -> Figure:
    """Draw, for each layer, how alike every two of its heads are.

    Of CKA and divergence, the darker, the more alike; cosines are red, or blue where negative.

    Args:
        statistics: By layer, of :func:`bayesattn.head_statistics`.
        title: Above the figure.

    Returns:
        A figure that pyplot does not know; keep it with ``figure.savefig``.

    Raises:
        ValueError: If there is nothing to draw.
    """
    nonempty("statistics", statistics)
    size = (1.2 + 3.0 * len(_SHOWN), 0.9 + 2.5 * len(statistics))
    figure, grid = new_figure(len(statistics), len(_SHOWN), size)
    for row, (name, entry) in zip(grid, statistics.items(), strict=True):
        count = float(entry.effective_heads)
        for axes, (field, (label, low, high, shades)) in zip(row, _SHOWN.items(), strict=True):
            values = array(f"{name}: {field}", getattr(entry, field), ("head", "head"))
            image = axes.imshow(values, cmap=shades, vmin=low, vmax=high)
            figure.colorbar(image, ax=axes, shrink=0.8)
            axes.set_title(label, fontsize=10)
            axes.set_xlabel("head", fontsize=9)
            axes.locator_params(integer=True, nbins=8)
        row[0].set_ylabel(f"{name or 'layer'}\n{count:.1f} heads in effect", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=13)
    return figure


def head_forces(history: Sequence[Mapping[str, Forces]], *, title: str | None = None) -> Figure:
    """Draw drive and repulsion over the steps of a training, and their ratio, where positive.

    Args:
        history: ``repulsion.info`` after each step.
        title: Above the figure.

    Returns:
        A figure that pyplot does not know; keep it with ``figure.savefig``.

    Raises:
        ValueError: If there is nothing to draw.
    """
    names = list(dict.fromkeys(name for entry in history for name in entry))
    nonempty("history", dict.fromkeys(names))
    figure, ((forces, ratio),) = new_figure(1, 2, (10.0, 4.2))
    steps = np.arange(1, len(history) + 1)
    handles = []
    for name, color in zip(names, colors(len(names)), strict=True):
        drive, repulsion = (_series(history, name, field) for field in ("drive", "repulsion"))
        handles += forces.plot(steps, drive, color=color, linewidth=1.2, label=name)
        forces.plot(steps, repulsion, color=color, linewidth=1.2, linestyle="--")
        ratio.plot(steps, repulsion / drive, color=color)
    forces.set_title("drive (solid), repulsion (dashed)", loc="left", fontsize=10)
    ratio.set_title("repulsion over drive", loc="left", fontsize=10)
    for axes in (forces, ratio):
        if any(np.isfinite(line.get_ydata()).any() for line in axes.lines):
            axes.set_yscale("log")
        axes.set_xlabel("step", fontsize=9)
        bare(axes)
    if len(names) <= _MOST_NAMED:
        legend_above(figure, handles, title)
    else:
        _bar_of_names(figure, ratio, names)
        figure.suptitle(title or "", fontsize=13)
    return figure


def _bar_of_names(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """Say of many colors what the first and the last one stand for."""
    colored = ScalarMappable(Normalize(0, len(names) - 1), ListedColormap(colors(len(names))))
    bar = figure.colorbar(colored, ax=axes, ticks=[0, len(names) - 1])
    bar.ax.set_yticklabels([names[0], names[-1]], fontsize=8)


def _series(history: Sequence[Mapping[str, Forces]], name: str, field: str) -> np.ndarray:
    """Figures of each step; gaps where there is none, or none that a logarithm shows."""
    values = [float(getattr(entry[name], field)) if name in entry else np.nan for entry in history]
    return np.array([value if 0 < value < np.inf else np.nan for value in values])
