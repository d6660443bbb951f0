"""Tests of pictures of kernels and of errors of features: what the artists show."""

from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

from bayesattn import plots
from bayesattn.inference import Posterior

LAG = torch.linspace(0, 2, 7, dtype=torch.float64)
SIZES = [4, 16, 64]


def drawn(figure, tmp_path):
    figure.savefig(tmp_path / "figure.png")
    assert plt.get_fignums() == []
    return figure.axes


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def ends_of(band):
    """Lower and upper end of a filled band, by place."""
    vertices = band.get_paths()[0].vertices
    places = np.unique(vertices[:, 0])
    ends = [vertices[vertices[:, 0] == place, 1] for place in places]
    return places, np.array([[values.min(), values.max()] for values in ends]).T


@pytest.fixture
def draws(generator):
    """Of two methods: kernels of 5 heads at 7 lags."""
    return {
        "NUTS": torch.randn(2, 11, 5, 7, generator=generator),
        "SVGD": 3 + torch.randn(1, 13, 5, 7, generator=generator),
    }


# Kernels


def test_lines_are_medians_and_bands_are_quantiles(draws, generator, tmp_path):
    """Mutants: means, a band of another mass, chains apart, heads or methods exchanged."""
    true = torch.randn(5, 7, generator=generator)
    figure = plots.kernel_bands(draws, lag=LAG, true=true, level=0.6, title="Kernels")
    panels = drawn(figure, tmp_path)
    assert len(panels) == 5
    for head, axes in enumerate(panels):
        assert axes.get_title(loc="left") == f"head {head}"
        assert axes.get_xlabel() == "lag"
        *lines, dashed = axes.lines
        for values, line, band in zip(draws.values(), lines, axes.collections, strict=True):
            pooled = values.flatten(0, 1)[:, head]
            np.testing.assert_array_equal(line.get_xdata(), LAG)
            np.testing.assert_allclose(line.get_ydata(), pooled.quantile(0.5, dim=0))
            places, ends = ends_of(band)
            np.testing.assert_allclose(places, LAG)
            np.testing.assert_allclose(ends, pooled.quantile(torch.tensor([0.2, 0.8]), dim=0))
            assert to_rgba(line.get_color())[:3] == tuple(band.get_facecolor()[0, :3])
        np.testing.assert_array_equal(dashed.get_ydata(), true[head])
        assert dashed.get_linestyle() == "--"
    assert legend_of(figure) == ["NUTS", "SVGD", "60% band", "true"]
    assert figure.legends[0].get_title().get_text() == "Kernels"


def test_a_kernel_without_heads_is_one_panel(generator, tmp_path):
    values = torch.randn(2, 11, 7, generator=generator)
    figure = plots.kernel_bands(values, lag=LAG.tolist(), true=LAG)
    (axes,) = drawn(figure, tmp_path)
    assert axes.get_title(loc="left") == ""
    middle, dashed = axes.lines
    np.testing.assert_allclose(middle.get_ydata(), values.flatten(0, 1).quantile(0.5, dim=0))
    np.testing.assert_array_equal(dashed.get_ydata(), LAG)
    assert legend_of(figure) == ["median", "90% band", "true"]


def test_one_truth_is_that_of_all_heads(draws):
    for axes in plots.kernel_bands(draws, lag=LAG, true=LAG).axes:
        np.testing.assert_array_equal(axes.lines[-1].get_ydata(), LAG)


def test_a_point_estimate_has_no_band(draws, tmp_path):
    figure = plots.kernel_bands({"MAP": draws["NUTS"][:1, :1]}, lag=LAG)
    assert all(not axes.collections for axes in drawn(figure, tmp_path))
    assert legend_of(figure) == ["MAP"]
    both = plots.kernel_bands({"MAP": draws["NUTS"][:1, :1], "SVGD": draws["SVGD"]}, lag=LAG)
    assert all(len(axes.collections) == 1 for axes in both.axes)
    assert legend_of(both) == ["MAP", "SVGD", "90% band"]


def spectral():
    """A latent frequency a head, and the kernel of it at lags that the program knows."""
    with pyro.plate("head", 3):
        frequency = pyro.sample("frequency", dist.Normal(0.0, 1.0))
    lags = torch.tensor(spectral.coords["lag"])
    pyro.deterministic("kernel", torch.cos(frequency[:, None] * lags))


spectral.coords = {"lag": [0.0, 0.5, 2.0]}


def test_posteriors_are_asked_for_a_deterministic_site_and_their_lags(generator):
    frequency = torch.randn(2, 11, 3, generator=generator)
    posterior = Posterior(
        {"frequency": frequency}, method="NUTS", draws_are="markov", model=spectral
    )
    figure = plots.kernel_bands(posterior)
    values = torch.cos(frequency[..., None] * torch.tensor(spectral.coords["lag"])).flatten(0, 1)
    for head, axes in enumerate(figure.axes):
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), spectral.coords["lag"])
        expected = values[:, head].quantile(0.5, dim=0)
        np.testing.assert_allclose(axes.lines[0].get_ydata(), expected)
    named = plots.kernel_bands({"other": values[None], "NUTS": posterior}, lag=[1.0, 2.0, 3.0])
    np.testing.assert_array_equal(named.axes[0].lines[1].get_xdata(), [1, 2, 3])
    latent = plots.kernel_bands(posterior, site="frequency", lag=[0.0, 1.0, 2.0])
    expected = frequency.flatten(0, 1).quantile(0.5, dim=0)
    np.testing.assert_allclose(latent.axes[0].lines[0].get_ydata(), expected)


def test_predictions_of_one_method_are_not_names(draws):
    for given in ({"kernel": draws["NUTS"]}, SimpleNamespace(draws={"kernel": draws["NUTS"]})):
        figure = plots.kernel_bands(given, lag=LAG)
        assert legend_of(figure) == ["median", "90% band"]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {}, "posteriors must hold at least one entry, got none"),
        ({"a": {"w": torch.ones(1, 2, 7)}}, {}, r"a must hold site 'kernel', got \['w'\]"),
        (
            {"a": torch.ones(2, 7)},
            {},
            r"kernel of a must have axes \(chain, draw, head, lag\), got",
        ),
        ({"a": torch.ones(1, 0, 7)}, {}, r"kernel of a must not be empty, got \(chain, draw, lag"),
        ({"a": torch.full((1, 2, 7), torch.nan)}, {}, "kernel of a must be finite, got 14 of 14"),
        (
            {"a": torch.ones(1, 2, 3, 7), "b": torch.ones(1, 2, 7)},
            {},
            r"one \(head, lag\) in every method, got \{'a': \(3, 7\), 'b': \(1, 7\)\}",
        ),
        (torch.ones(1, 2, 7), {"lag": None}, "since no posterior's program knows"),
        (torch.ones(1, 2, 7), {"lag": [1.0]}, "expected 7 values, one for each lag, got 1"),
        (torch.ones(1, 2, 7), {"level": 1}, "level must lie between 0 and 1, got 1"),
        (torch.ones(1, 2, 7), {"true": torch.ones(6)}, r"= \(1, 7\), or lags alone, got \(6,\)"),
        (torch.ones(1, 2, 7), {"true": torch.ones(1, 1, 7)}, r"true must have axes \(head, lag\)"),
    ],
)
def test_bad_kernels(given, options, message):
    with pytest.raises(ValueError, match=message):
        plots.kernel_bands(given, **{"lag": LAG, **options})


# Features


def test_errors_are_means_and_tenths_over_seeds(generator, tmp_path):
    """Mutants: a median for the mean, other quantiles, a rate of other power."""
    errors = {name: torch.rand(11, 3, generator=generator) + 0.1 for name in ("cosines", "waves")}
    figure = plots.feature_error(errors, SIZES, title="Features")
    (axes,) = drawn(figure, tmp_path)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "16", "64"]
    *lines, rate = axes.lines
    for values, line, band in zip(errors.values(), lines, axes.collections, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), SIZES)
        np.testing.assert_allclose(line.get_ydata(), values.mean(0))
        _, ends = ends_of(band)
        np.testing.assert_allclose(ends, values.quantile(torch.tensor([0.1, 0.9]), dim=0))
    start = np.prod([values.mean(0)[0] for values in errors.values()]) ** 0.5
    np.testing.assert_allclose(rate.get_ydata(), [start, start / 2, start / 4])
    assert legend_of(figure) == ["cosines", "waves", "$M^{-1/2}$"]


@pytest.mark.parametrize(
    ("errors", "sizes", "message"),
    [
        ({}, SIZES, "errors must hold at least one entry, got none"),
        ({"a": torch.ones(3)}, SIZES, r"a must have axes \(seed, size\), got shape \(3,\)"),
        ({"a": torch.ones(2, 4)}, SIZES, r"a must have 3 sizes, got shape \(2, 4\)"),
        ({"a": torch.zeros(2, 3)}, SIZES, "a must be positive to be drawn, got 0"),
        ({"a": torch.ones(2, 3)}, [], r"sizes must rise from one or more, got \[\]"),
        ({"a": torch.ones(2, 3)}, [4, 4, 8], r"sizes must rise from one or more, got \[4, 4, 8\]"),
        ({"a": torch.ones(2, 3)}, [0, 4, 8], "sizes must rise from one or more, got"),
    ],
)
def test_bad_errors(errors, sizes, message):
    with pytest.raises(ValueError, match=message):
        plots.feature_error(errors, sizes)
