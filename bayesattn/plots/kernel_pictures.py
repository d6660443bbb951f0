"""Kernels as a posterior knows them, and how far random features are from the kernel they mean."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from bayesattn.plots.canvas import Color, array, bare, colors, legend_above, new_figure, nonempty
from bayesattn.plots.posterior_draws import HasDraws

__all__ = ["HasPredictions", "feature_error", "kernel_bands"]

# A whole number is a number too, which run-time type checks do not take for a float.
Number = float | int


@runtime_checkable
class HasPredictions(Protocol):
    """A posterior that gives deterministic sites by running its program."""

    def predict(self, *, sites: Sequence[str]) -> Mapping[str, Tensor]:
        """Values of sites as (chain, draw, *shape)."""
        ...


Draws = Tensor | Mapping[str, Tensor] | HasDraws


def kernel_bands(
    posteriors: Draws | Mapping[str, Draws],
    *,
    site: str = "kernel",
    lag: Sequence[Number] | Tensor | None = None,
    true: Tensor | None = None,
    level: Number = 0.9,
    title: str | None = None,
) -> Figure:
    """Draw each head's kernel over the lag: the median of the draws, and a band about it.

    Draws of frequencies that differ in order and signs are draws of one kernel, so that it can be
    looked at where frequencies cannot. Heads are taken as they are numbered: see
    :meth:`bayesattn.inference.Posterior.match`. A band holds its share of the draws at each lag by
    itself.

    Args:
        posteriors: For each method, a posterior, its draws or predictions, or the draws of the one
            site with axes (chain, draw, head, lag) or (chain, draw, lag); or those of one method.
        site: The kernel's name, of a latent or deterministic site.
        lag: Values of the lags; those that a program calls so, ``model.coords["lag"]``, where None.
        true: The kernel that there is to find, (head, lag) or (lag,), drawn dashed.
        level: Mass of the bands.
        title: Above the figure.

    Returns:
        A figure that pyplot does not know; keep it with ``figure.savefig``.

    Raises:
        ValueError: If a method lacks the site, shapes or the level do not fit, or nobody knows the
            lags.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    named = _named(posteriors, site)
    pooled = {method: _pooled(method, given, site) for method, given in named.items()}
    shapes = {method: values.shape[1:] for method, values in pooled.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{site} must have one (head, lag) in every method, got {shapes}")
    num_heads, num_lags = next(iter(shapes.values()))
    places = _lags(named, lag, num_lags)
    truth = None if true is None else _truth(true, (num_heads, num_lags))
    columns = min(3, num_heads)
    rows = -(-num_heads // columns)
    size = (max(5.0, 3.6 * columns), 0.9 + 2.6 * rows)
    figure, grid = new_figure(rows, columns, size, sharey=True)
    for axes in grid.flat[num_heads:]:
        axes.remove()
    handles: list[Artist] = []
    for head, axes in enumerate(grid.flat[:num_heads]):
        draws = {method: values[:, head] for method, values in pooled.items()}
        handles = _bands(axes, places, draws, level)
        if truth is not None:
            style = {"color": "0.1", "linestyle": "--", "linewidth": 1.3, "label": "true"}
            handles += axes.plot(places, truth[head], **style)
        if num_heads > 1:
            axes.set_title(f"head {head}", loc="left", fontsize=10)
        if num_lags > 1:
            axes.set_xlim(places.min(), places.max())
        _finish(axes, "lag")
    for axes in grid[:, 0]:
        axes.set_ylabel(site, fontsize=10)
    legend_above(figure, handles, title)
    return figure


def feature_error(
    errors: Mapping[str, Tensor],
    sizes: Sequence[int],
    *,
    title: str | None = None,
) -> Figure:
    """Draw errors of random features over their number, both on logarithmic axes.

    Lines are means over seeds, bands go from the lowest to the highest tenth of them. Errors of
    independent features fall as the dotted line does, one over the root of the number.

    Args:
        errors: For each kind of features, its errors, (seed, size), positive.
        sizes: Numbers of features, rising.
        title: Above the figure.

    Returns:
        A figure that pyplot does not know; keep it with ``figure.savefig``.

    Raises:
        ValueError: If there is nothing to draw, sizes do not rise from one or more, or errors are
            of other sizes or not positive.
    """
    nonempty("errors", errors)
    numbers = np.array([*sizes], dtype=float)
    if numbers.size == 0 or numbers[0] < 1 or (np.diff(numbers) <= 0).any():
        raise ValueError(f"sizes must rise from one or more, got {[*sizes]}")
    figure, ((axes,),) = new_figure(1, 1, (6.4, 4.6))
    handles, starts = [], []
    for (name, given), color in zip(errors.items(), colors(len(errors)), strict=True):
        values = array(name, given, ("seed", "size"))
        if values.shape[1] != len(numbers):
            raise ValueError(f"{name} must have {len(numbers)} sizes, got shape {values.shape}")
        if values.min() <= 0:
            raise ValueError(f"{name} must be positive to be drawn, got {values.min():g}")
        mean = values.mean(0)
        starts.append(mean[0])
        style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1.6}
        handles += axes.plot(numbers, mean, label=name, **style)
        _between(axes, numbers, np.quantile(values, (0.1, 0.9), axis=0), color)
    start = np.exp(np.log(starts).mean())
    rate = {"color": "0.3", "linestyle": ":", "linewidth": 1.4, "label": r"$M^{-1/2}$"}
    handles += axes.plot(numbers, start * (numbers / numbers[0]) ** -0.5, **rate)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
    axes.set_xticks([], minor=True)
    axes.set_ylabel("error", fontsize=10)
    _finish(axes, "number of features M")
    legend_above(figure, handles, title)
    return figure


def _named(posteriors: Any, site: str) -> Mapping[str, Draws]:
    """Methods by their names; a mapping that holds the site itself is one method's."""
    if isinstance(posteriors, Tensor | HasDraws) or isinstance(posteriors.get(site), Tensor):
        return {"median": posteriors}
    nonempty("posteriors", posteriors)
    return posteriors


def _pooled(method: str, given: Draws, site: str) -> np.ndarray:
    """Draws of the site as "draw head lag", chains after one another."""
    draws = given if isinstance(given, Tensor) else _of_site(method, given, site)
    axes = ("chain", "draw", "lag") if draws.ndim == 3 else ("chain", "draw", "head", "lag")
    values = array(f"{site} of {method}", draws, axes)
    return values.reshape(-1, *((1, *values.shape[2:])[-2:]))


def _of_site(method: str, given: Mapping[str, Tensor] | HasDraws, site: str) -> Tensor:
    sites = given.draws if isinstance(given, HasDraws) else given
    if site in sites:
        return sites[site]
    if isinstance(given, HasPredictions):
        return given.predict(sites=[site])[site]
    raise ValueError(f"{method} must hold site {site!r}, got {sorted(sites)}")


def _lags(
    named: Mapping[str, Draws], lag: Sequence[Number] | Tensor | None, num_lags: int
) -> np.ndarray:
    """Values of the lags: given, or those of the first program that has them."""
    known = [getattr(getattr(given, "model", None), "coords", {}) for given in named.values()]
    found = next((coords["lag"] for coords in known if "lag" in coords), None)
    values = found if lag is None else lag
    if values is None:
        raise ValueError("lag: expected the values of the lags, since no posterior's program knows")
    places = array("lag", torch.as_tensor(values, dtype=torch.float64), ("lag",))
    if len(places) != num_lags:
        raise ValueError(f"lag: expected {num_lags} values, one for each lag, got {len(places)}")
    return places


def _truth(true: Tensor, shape: tuple[int, int]) -> np.ndarray:
    """The true kernel of each head; one for all where it has no heads."""
    values = array("true", true, ("lag",) if true.ndim == 1 else ("head", "lag"))
    if values.shape not in (shape, shape[1:]):
        raise ValueError(f"true must be (head, lag) = {shape}, or lags alone, got {values.shape}")
    return np.broadcast_to(values, shape)


def _bands(
    axes: Axes, places: np.ndarray, draws: Mapping[str, np.ndarray], level: Number
) -> list[Artist]:
    handles: list[Artist] = []
    shades = colors(len(draws))
    for (method, values), color in zip(draws.items(), shades, strict=True):
        ends = (0.5 - level / 2, 0.5, 0.5 + level / 2)
        low, middle, high = np.quantile(values, ends, axis=0)
        handles += axes.plot(places, middle, color=color, linewidth=1.8, label=method)
        # A point estimate has no band.
        if len(values) > 1:
            _between(axes, places, np.stack([low, high]), color)
    if any(len(values) > 1 for values in draws.values()):
        style: dict[str, Any] = {"color": shades[0] if len(shades) == 1 else "0.4", "alpha": 0.2}
        handles.append(Patch(label=f"{level:.0%} band", **style))
    return handles


def _between(axes: Axes, places: np.ndarray, ends: np.ndarray, color: Color) -> None:
    axes.fill_between(places, *ends, color=color, alpha=0.2, linewidth=0)


def _finish(axes: Axes, label: str) -> None:
    axes.set_xlabel(label, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    bare(axes)
