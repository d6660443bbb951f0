"""What a routine reported at each of its steps."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bayesattn.plots.canvas import bare, colors, new_figure, nonempty

__all__ = ["optimization"]


def optimization(
    curves: Mapping[str, Tensor], *, smooth: int = 1, title: str | None = None
) -> Figure:
    """Draw learning curves, one panel for each name and one line for each chain.

    An axis is logarithmic where all its values are positive and span two decades or more. Steps
    that are not finite are left out.

    Args:
        curves: For each name, such as "loss" or "stein_norm", values with axes (chain, step);
            ``posterior.optimization`` is one.
        smooth: Width, in steps, of a centered moving average that is drawn over the values, which
            turn pale; 1 draws the values alone.
        title: Above the figure.

    Returns:
        A figure that pyplot does not know; keep it with ``figure.savefig``.

    Raises:
        ValueError: If a curve has other axes or no finite value, or the width is too small.
    """
    nonempty("curves", curves)
    if smooth < 1:
        raise ValueError(f"smooth must be at least 1, got {smooth}")
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, grid = new_figure(rows, columns, (max(5.0, 4.2 * columns), 0.5 + 2.5 * rows))
    for axes in grid.flat[len(curves) :]:
        axes.remove()
    for axes, (name, tensor) in zip(grid.flat, curves.items(), strict=False):
        _panel(axes, _finite_or_nan(name, tensor), smooth)
        axes.set_title(name, loc="left", fontsize=11)
    if title is not None:
        figure.suptitle(title, fontsize=13)
    return figure


def _panel(axes: Axes, values: np.ndarray, smooth: int) -> None:
    num_chains, num_steps = values.shape
    steps, width = np.arange(num_steps), min(smooth, num_steps)
    for chain, color in zip(values, colors(num_chains), strict=True):
        if width > 1:
            axes.plot(steps, chain, color=color, linewidth=0.8, alpha=0.25)
            chain = np.convolve(chain, np.full(width, 1 / width), mode="valid")
        axes.plot(steps[: len(chain)] + (width - 1) / 2, chain, color=color, linewidth=1.4)
    if np.nanmin(values) > 0 and np.nanmax(values) >= 100 * np.nanmin(values):
        axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(color="0.92")
    bare(axes)


def _finite_or_nan(name: str, tensor: Tensor) -> np.ndarray:
    if tensor.ndim != 2:
        raise ValueError(f"{name} must have axes (chain, step), got shape {tuple(tensor.shape)}")
    values = tensor.detach().cpu().double().numpy().copy()
    values[~np.isfinite(values)] = np.nan
    if np.isnan(values).all():
        raise ValueError(f"{name} must hold a finite value, got none in shape {values.shape}")
    return values
