"""Coordinates of one site as several methods see them: densities, or means with intervals."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import gaussian_kde
from torch import Tensor

from bayesattn.plots.canvas import array, bare, colors, legend_above, new_figure, nonempty

__all__ = ["HasDraws", "forest", "marginals"]

Coordinate = tuple[int, ...]


@runtime_checkable
class HasDraws(Protocol):
    """A posterior: its draws map each site to (chain, draw, *shape)."""

    @property
    def draws(self) -> Mapping[str, Tensor]:
        """Draws of each site."""
        ...


Draws = Tensor | Mapping[str, Tensor] | HasDraws


def marginals(
    posteriors: Mapping[str, Draws],
    *,
    site: str,
    coordinates: Sequence[Coordinate] | None = None,
    reference: str | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the marginal densities of several methods over one another.

    Each density is a Gaussian kernel estimate from the pooled draws, which does not pass zero where
    those of all methods are of one sign. Draws that are all equal, a point estimate's, are a
    vertical line.

    Args:
        posteriors: For each method, a posterior, its draws, or the draws of the one site with
            axes (chain, draw, *shape).
        site: Whose coordinates are drawn.
        coordinates: Indices into the site's shape; the first six where None.
        reference: The method whose density is filled, in gray, under the others.
        title: Above the figure.

    Returns:
        A figure that pyplot does not know; keep it with ``figure.savefig``.

    Raises:
        ValueError: If a method lacks the site, or shapes or indices do not fit.
    """
    pooled = _pooled(posteriors, site)
    if reference is not None and reference not in pooled:
        raise ValueError(f"reference must be one of {sorted(pooled)}, got {reference!r}")
    chosen = _chosen_coordinates(pooled, coordinates, default=6)
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, grid = new_figure(rows, columns, (max(5.0, 3.4 * columns), 0.6 + 2.1 * rows))
    for axes in grid.flat[len(chosen) :]:
        axes.remove()
    handles: list[Artist] = []
    for axes, coordinate in zip(grid.flat, chosen, strict=False):
        draws = {name: values[(..., *coordinate)] for name, values in pooled.items()}
        handles = _densities(axes, draws, reference)
        axes.set_title(_label(site, coordinate), fontsize=10)
    legend_above(figure, handles, title)
    return figure


def forest(
    posteriors: Mapping[str, Draws],
    *,
    site: str,
    coordinates: Sequence[Coordinate] | None = None,
    level: float = 0.9,
    title: str | None = None,
) -> Figure:
    """Draw each method's posterior mean (dot), half (thick) and ``level`` (thin) intervals.

    Args:
        posteriors: For each method, a posterior, its draws, or the draws of the one site with
            axes (chain, draw, *shape).
        site: Whose coordinates are drawn.
        coordinates: Indices into the site's shape; the first 16 where None.
        level: Mass of the wider central interval.
        title: Above the figure.

    Returns:
        A figure that pyplot does not know; keep it with ``figure.savefig``.

    Raises:
        ValueError: If a method lacks the site, or shapes, indices or the level do not fit.
    """
    pooled = _pooled(posteriors, site)
    chosen = _chosen_coordinates(pooled, coordinates, default=16)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    step = 0.12 * len(pooled) + 0.1
    figure, grid = new_figure(1, 1, (6.5, 1.1 + step * len(chosen)))
    axes, rows = grid[0, 0], np.arange(len(chosen))
    handles = []
    for i, ((name, values), color) in enumerate(
        zip(pooled.items(), colors(len(pooled)), strict=True)
    ):
        draws = np.stack([values[(..., *coordinate)] for coordinate in chosen])
        places = rows + 0.8 * ((i + 0.5) / len(pooled) - 0.5)
        for mass, width in ((level, 1.2), (0.5, 3.2)):
            low, high = np.quantile(draws, (0.5 - mass / 2, 0.5 + mass / 2), axis=1)
            axes.hlines(places, low, high, color=color, linewidth=width)
        handles += axes.plot(draws.mean(axis=1), places, "o", color=color, label=name, markersize=5)
    axes.set_yticks(rows, [_label(site, coordinate) for coordinate in chosen], fontsize=9)
    axes.set_ylim(len(chosen) - 0.5, -0.5)
    axes.set_xlabel(f"mean, 50% and {level:.0%} intervals", fontsize=10)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    bare(axes)
    legend_above(figure, handles, title)
    return figure


def _densities(axes: Axes, draws: Mapping[str, np.ndarray], reference: str | None) -> list[Artist]:
    ends = [np.quantile(values, (0.005, 0.995)) for values in draws.values()]
    low, high = np.min(ends), np.max(ends)
    margin = 0.1 * (high - low) or 1.0
    places = np.linspace(low - margin, high + margin, 400)
    # Of all methods: a few draws of a real number may happen to be of one sign.
    has_one_sign = all(v.min() >= 0 for v in draws.values()) or all(
        v.max() <= 0 for v in draws.values()
    )
    handles: list[Artist] = []
    for (name, values), color in zip(draws.items(), colors(len(draws)), strict=True):
        if np.ptp(values) <= 1e-9 * np.abs(values).max():
            handles.append(axes.axvline(values[0], color=color, linewidth=1.8, label=name))
            continue
        density = _density(values, places, has_one_sign)
        if name == reference:
            handles.append(axes.fill_between(places, density, color="0.82", label=name))
        else:
            handles += axes.plot(places, density, color=color, linewidth=1.8, label=name)
    axes.set_xlim(places[0], places[-1])
    axes.set_ylim(bottom=0)
    axes.set_yticks([])
    axes.tick_params(labelsize=9)
    bare(axes)
    axes.spines["left"].set_visible(False)
    return handles


def _density(draws: np.ndarray, places: np.ndarray, has_one_sign: bool) -> np.ndarray:
    """Gaussian kernel estimate; what lies beyond zero of draws of one sign is folded back."""
    estimate = gaussian_kde(draws)
    if not has_one_sign:
        return estimate(places)
    inside = places * np.sign(draws.sum()) >= 0
    return np.where(inside, estimate(places) + estimate(-places), 0)


def _pooled(posteriors: Mapping[str, Draws], site: str) -> dict[str, np.ndarray]:
    """Draws of the site for each method as "draw *shape", chains after one another."""
    nonempty("posteriors", posteriors)
    pooled = {}
    for method, given in posteriors.items():
        sites = given.draws if isinstance(given, HasDraws) else given
        if not isinstance(sites, Tensor):
            if site not in sites:
                raise ValueError(f"{method} must hold site {site!r}, got {sorted(sites)}")
            sites = sites[site]
        shape = [f"axis_{i}" for i in range(sites.ndim - 2)]
        values = array(f"{site} of {method}", sites, ("chain", "draw", *shape))
        pooled[method] = values.reshape(-1, *values.shape[2:])
    shapes = {method: values.shape[1:] for method, values in pooled.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{site} must have one shape in every method, got {shapes}")
    return pooled


def _chosen_coordinates(
    pooled: Mapping[str, np.ndarray], coordinates: Sequence[Coordinate] | None, default: int
) -> list[Coordinate]:
    shape = next(iter(pooled.values())).shape[1:]
    if coordinates is None:
        return list(np.ndindex(shape))[:default]
    for coordinate in coordinates:
        inside = len(coordinate) == len(shape) and all(
            0 <= index < size for index, size in zip(coordinate, shape, strict=True)
        )
        if not inside:
            raise ValueError(f"coordinates must be indices into shape {shape}, got {coordinate}")
    if not coordinates:
        raise ValueError("coordinates must hold at least one index, got none")
    return list(coordinates)


def _label(site: str, coordinate: Coordinate) -> str:
    return f"{site}[{', '.join(map(str, coordinate))}]" if coordinate else site
