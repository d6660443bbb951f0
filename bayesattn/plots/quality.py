"""How good the predictions of several methods are, side by side."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bayesattn import calibration
from bayesattn.plots.canvas import bare, colors, legend_above, new_figure, nonempty

__all__ = ["pavpu", "reliability", "scores", "selective_risk"]

# Thresholds that a curve goes through.
_NUM_THRESHOLDS = 101


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


def reliability(
    probabilities: Mapping[str, Float[Tensor, "*_batch _class"]],
    labels: Shaped[Tensor, "*_batch"],
    *,
    num_bins: int = 15,
    title: str | None = None,
) -> Figure:
    """Draw how often predictions are right against how sure they are, and how sure most are.

    On the diagonal, confidence can be taken at its word. Whiskers are one standard deviation of
    the accuracy that chance alone gives to a bin of as many predictions with this confidence, cut
    where no accuracy can be. The legend gives each method's expected calibration error.

    Args:
        probabilities: For each method, its predicted probability of each class.
        labels: What came true, the same for all methods.
        num_bins: Number of bins of equal width over the confidence.
        title: Above the figure.

    Returns:
        A figure that pyplot does not know; keep it with ``figure.savefig``.

    Raises:
        ValueError: If there is no method, inputs are no probabilities and labels, or there is no
            bin.
    """
    nonempty("probabilities", probabilities)
    figure, grid = new_figure(2, 1, (6.4, 6.6), sharex=True, height_ratios=(3, 1))
    (curves,), (shares,) = grid
    curves.plot([0, 1], [0, 1], color="0.4", linewidth=0.9, linestyle=":")
    handles, width = [], 0.85 / (num_bins * len(probabilities))
    for place, (method, color) in enumerate(
        zip(probabilities, colors(len(probabilities)), strict=True)
    ):
        bins = calibration.reliability_bins(probabilities[method], labels, num_bins=num_bins)
        error = calibration.expected_calibration_error(
            probabilities[method], labels, num_bins=num_bins
        )
        count, confidence, right = (part.detach().cpu().double().numpy() for part in bins)
        seen = count > 0
        chance = np.sqrt(confidence * (1 - confidence) / count.clip(min=1))
        low, high = right - (right - chance).clip(min=0), (right + chance).clip(max=1) - right
        whiskers = np.stack([low, high])[:, seen]
        label = f"{method} (ECE {error.item():.3f})"
        style = {"color": color, "marker": "o", "markersize": 5, "capsize": 2, "label": label}
        handles.append(curves.errorbar(confidence[seen], right[seen], whiskers, **style))
        centers = (np.arange(num_bins) + 0.5) / num_bins
        offset = (place - (len(probabilities) - 1) / 2) * width
        shares.bar(centers + offset, count / count.sum(), width, color=color)
    curves.set_ylabel("fraction right", fontsize=10)
    shares.set_ylabel("share of\npredictions", fontsize=10)
    shares.set_xlabel("confidence", fontsize=10)
    for axes in (curves, shares):
        axes.set_xlim(0, 1.01)
        axes.set_ylim(0, 1.03)
        axes.tick_params(labelsize=9)
        bare(axes)
    legend_above(figure, handles, title)
    return figure


def selective_risk(
    probabilities: Mapping[str, Float[Tensor, "*_batch _class"]],
    labels: Shaped[Tensor, "*_batch"],
    uncertainties: Mapping[str, Float[Tensor, "*_batch"]] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draw the error rate among the predictions that are kept against how many are kept.

    The most uncertain are refused first. A method whose curve rises late knows where it errs. The
    legend gives the area under each curve, its risk at all coverages in the mean.

    Args:
        probabilities: For each method, its predicted probability of each class.
        labels: What came true, the same for all methods.
        uncertainties: For some methods, how uncertain each prediction is; of the others, one less
            the highest probability.
        title: Above the figure.

    Returns:
        A figure that pyplot does not know; keep it with ``figure.savefig``.

    Raises:
        ValueError: If there is no method, an uncertainty is of none of them, or inputs are no
            probabilities and labels.
    """
    given = _uncertainties(probabilities, uncertainties)
    curves = {}
    for method, predicted in probabilities.items():
        found = calibration.selective_risk(predicted, labels, given.get(method))
        coverage, risk, area = (part.detach().cpu().double().numpy() for part in found)
        curves[f"{method} (AURC {area:.3f})"] = (coverage, risk)
    names = ("coverage: share of predictions kept", "risk: error rate among them")
    return _curves_from_zero(curves, names, title)


def pavpu(
    probabilities: Mapping[str, Float[Tensor, "*_batch _class"]],
    labels: Shaped[Tensor, "*_batch"],
    uncertainties: Mapping[str, Float[Tensor, "*_batch"]] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draw how often right and certain, or wrong and uncertain, go together.

    Against the share of predictions that count as certain, the least uncertain first, so that only
    their order matters. Curves end at the accuracy, where all are certain; where one is above that,
    uncertainty tells wrong predictions from right ones. The legend gives its greatest value.

    Args:
        probabilities: For each method, its predicted probability of each class.
        labels: What came true, the same for all methods.
        uncertainties: For some methods, how uncertain each prediction is; of the others, the
            entropy.
        title: Above the figure.

    Returns:
        A figure that pyplot does not know; keep it with ``figure.savefig``.

    Raises:
        ValueError: If there is no method, an uncertainty is of none of them, or inputs are no
            probabilities and labels.
    """
    given = _uncertainties(probabilities, uncertainties)
    curves = {}
    for method, predicted in probabilities.items():
        uncertainty = given.get(method)
        if uncertainty is None:
            uncertainty = calibration.predictive_entropy(predicted)
        uncertainty = uncertainty.detach().cpu().double()
        parts = predicted.detach().cpu(), labels.cpu(), uncertainty
        ordered = uncertainty.flatten().sort().values
        places = np.linspace(0, len(ordered) - 1, _NUM_THRESHOLDS).round().astype(int)
        thresholds = ordered[places].tolist()
        shares = [(ordered <= threshold).double().mean().item() for threshold in thresholds]
        values = [calibration.pavpu(*parts, threshold=threshold).item() for threshold in thresholds]
        curves[f"{method} (at best {max(values):.3f})"] = (np.array(shares), np.array(values))
    names = (
        "share of predictions that count as certain",
        "right and certain, or wrong and uncertain",
    )
    return _curves_from_zero(curves, names, title)


def _uncertainties(
    probabilities: Mapping[str, Tensor], uncertainties: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor]:
    nonempty("probabilities", probabilities)
    given = {} if uncertainties is None else uncertainties
    unknown = sorted(set(given) - set(probabilities))
    if unknown:
        raise ValueError(f"uncertainties: expected some of {list(probabilities)}, got {unknown}")
    return given


def _curves_from_zero(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], names: tuple[str, str], title: str | None
) -> Figure:
    """Draw curves by their labels in the legend, with a dot where each ends."""
    figure, ((axes,),) = new_figure(1, 1, (6.4, 4.6))
    handles = []
    for (label, (x, y)), color in zip(curves.items(), colors(len(curves)), strict=True):
        handles += axes.plot(x, y, color=color, linewidth=1.5, label=label)
        axes.plot(x[-1:], y[-1:], color=color, marker="o", markersize=5)
    axes.set_xlabel(names[0], fontsize=10)
    axes.set_ylabel(names[1], fontsize=10)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.tick_params(labelsize=9)
    bare(axes)
    legend_above(figure, handles, title)
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
