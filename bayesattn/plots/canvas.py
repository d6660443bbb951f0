"""What all pictures share: figures that belong to no global state, colors, checked arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

__all__ = ["Color", "array", "bare", "colors", "legend_above", "new_figure", "nonempty"]

Color = str | tuple[float, ...]

# Okabe and Ito's palette, which the color-blind can tell apart, without its yellow and black.
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def new_figure(
    rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Figure, np.ndarray]:
    """Make a figure that pyplot does not know, and its axes as "row column".

    Args:
        rows: Number of rows of axes.
        columns: Number of columns of axes.
        size: Width and height in inches.
        **options: Passed to :meth:`matplotlib.figure.Figure.subplots`.
    """
    figure = Figure(figsize=size, dpi=120, layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def colors(number: int) -> list[Color]:
    """Choose as many colors as asked for; up to six the color-blind can tell apart with ease."""
    if number <= len(_PALETTE):
        return list(_PALETTE[:number])
    return [colormaps["viridis"](fraction) for fraction in np.linspace(0, 0.95, number)]


def bare(axes: Axes) -> None:
    """Take away the frame above and to the right."""
    axes.spines[["top", "right"]].set_visible(False)


def legend_above(
    figure: Figure, handles: Sequence[Artist | Container], title: str | None = None
) -> None:
    """Write what some labeled artists mean above the whole figure, and a title above that."""
    widths = [0.65 + 0.075 * len(str(handle.get_label())) for handle in handles]
    fits = [
        columns
        for columns in range(1, len(widths) + 1)
        if sum(map(max, np.array_split(widths, columns))) <= figure.get_figwidth()
    ]
    figure.legend(
        handles=list(handles),
        loc="outside upper center",
        ncols=max(fits, default=1),
        frameon=False,
        fontsize=10,
        title=title,
        title_fontsize=13,
    )


def array(name: str, tensor: Tensor, axes: Sequence[str]) -> np.ndarray:
    """Turn a tensor into float64 on the CPU after checking its axes and values.

    Raises:
        ValueError: If axes are too few or too many, an axis is empty, or a value is not finite.
    """
    wanted = f"({', '.join(axes)})"
    if tensor.ndim != len(axes):
        raise ValueError(f"{name} must have axes {wanted}, got shape {tuple(tensor.shape)}")
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty, got {wanted} of {tuple(tensor.shape)}")
    values = tensor.detach().cpu().double().numpy()
    if not np.isfinite(values).all():
        count = values.size - np.isfinite(values).sum()
        raise ValueError(f"{name} must be finite, got {count} of {values.size} values that are not")
    return values


def nonempty(name: str, mapping: Mapping[str, object]) -> None:
    """Refuse a mapping without entries.

    Raises:
        ValueError: If there is none.
    """
    if not mapping:
        raise ValueError(f"{name} must hold at least one entry, got none")
