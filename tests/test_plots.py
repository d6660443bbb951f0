"""Tests of bayesattn.plots: what the artists show, and that nothing global is left behind."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection, PolyCollection, QuadMesh
from matplotlib.colors import to_rgba

from bayesattn import plots
from bayesattn.attention_diagnostics import attention_statistics
from bayesattn.calibration import expected_calibration_error, reliability_bins
from bayesattn.normalizations import DoublyNormalized

WORDS = [["what", "is", "the", "weather"], ["play", "music"], ["rate", "this", "book"]]


@pytest.fixture
def weights(generator):
    """Attention of 2 chains, 5 draws, 3 sentences, 4 heads, 7 tokens."""
    lengths = torch.tensor([len(words) for words in WORDS])
    mask = torch.arange(7) < lengths[:, None]
    logits = torch.randn(2, 5, 3, 4, 7, generator=generator)
    return logits.masked_fill(~mask[:, None], -torch.inf).softmax(-1)


def drawn(figure, tmp_path):
    """Save a figure, which runs its layout, and return its axes."""
    path = tmp_path / "figure.png"
    figure.savefig(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000
    assert plt.get_fignums() == []
    return figure.axes


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def labels(ticks):
    return [text.get_text() for text in ticks]


# Attention


def test_bars_are_means_and_whiskers_are_quantiles(weights, tmp_path):
    figure = plots.attention({"attention": weights}, WORDS, level=0.6)
    for row, (axes, words) in enumerate(zip(drawn(figure, tmp_path), WORDS, strict=True)):
        assert labels(axes.get_xticklabels()) == words
        assert len(axes.containers) == 4
        pooled = weights.flatten(0, 1)[:, row, :, : len(words)]
        heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
        np.testing.assert_allclose(heights, pooled.mean(0))
        whiskers = [c for c in axes.collections if c.get_label() != "even attention"]
        ends = np.stack([c.get_segments() for c in whiskers])[0, :, :, 1]
        expected = pooled.flatten(1).quantile(torch.tensor([0.2, 0.8]), dim=0)
        np.testing.assert_allclose(ends, expected.T)
        centers = [bar.get_x() + bar.get_width() / 2 for bars in axes.containers for bar in bars]
        np.testing.assert_allclose(np.round(centers), np.tile(np.arange(len(words)), 4))
    assert legend_of(figure) == [*(f"head {i}" for i in range(4)), "60% interval", "even attention"]


def test_tensor_or_prediction_are_one(weights):
    first, second = (plots.attention(given, WORDS) for given in (weights, {"attention": weights}))
    heights = [
        [bar.get_height() for axes in figure.axes for bar in axes.patches]
        for figure in (first, second)
    ]
    assert heights[0] == heights[1]
    assert len(heights[0]) == 4 * sum(map(len, WORDS))


def test_padding_is_not_drawn(weights):
    other = weights.clone()
    other[:, :, 1, :, 2:] = 0.7
    pictures = [plots.attention(given, WORDS) for given in (weights, other)]
    heights = [[bar.get_height() for bar in figure.axes[1].patches] for figure in pictures]
    assert heights[0] == heights[1]


def test_even_attention_is_one_over_the_number_of_words(weights):
    for axes, words in zip(plots.attention(weights, WORDS).axes, WORDS, strict=True):
        even = next(c for c in axes.collections if c.get_label() == "even attention")
        np.testing.assert_allclose(even.get_segments()[0][:, 1], 1 / len(words))


def test_chosen_heads_keep_their_numbers_and_colors(weights):
    every, some = plots.attention(weights, WORDS), plots.attention(weights, WORDS, heads=[3, 1])
    assert legend_of(some)[:2] == ["head 3", "head 1"]
    for container, head in zip(some.axes[0].containers, (3, 1), strict=True):
        same = every.axes[0].containers[head]
        assert [bar.get_height() for bar in container] == [bar.get_height() for bar in same]
        assert container[0].get_facecolor() == same[0].get_facecolor()
    shades = {container[0].get_facecolor() for container in every.axes[0].containers}
    assert len(shades) == 4


def test_one_draw_has_no_whiskers(weights):
    figure = plots.attention(weights[:1, :1], WORDS)
    assert len(figure.axes[0].collections) == 1
    assert legend_of(figure) == [*(f"head {i}" for i in range(4)), "even attention"]


@pytest.mark.parametrize("kind", ["bars", "heatmap"])
def test_title_and_captions(weights, kind, tmp_path):
    captions = ["GetWeather", "PlayMusic", "RateBook"]
    figure = plots.attention(weights, WORDS, kind=kind, title="Heads", captions=captions)
    assert [axes.get_title(loc="left") for axes in drawn(figure, tmp_path)] == captions
    title = figure.legends[0].get_title().get_text() if kind == "bars" else figure.get_suptitle()
    assert title == "Heads"


def test_heatmap_shows_means_and_spread(weights, tmp_path):
    figure = plots.attention(weights, WORDS, kind="heatmap")
    for row, (axes, words) in enumerate(zip(drawn(figure, tmp_path), WORDS, strict=True)):
        pooled = weights.flatten(0, 1)[:, row, :, : len(words)]
        mean, spread = pooled.mean(0), pooled.std(0, correction=0)
        mesh = next(c for c in axes.collections if isinstance(c, QuadMesh))
        np.testing.assert_allclose(mesh.get_array(), mean)
        assert labels(axes.get_xticklabels()) == words
        assert labels(axes.get_yticklabels()) == [f"head {i}" for i in range(4)]
        cells = {text.get_position(): text.get_text() for text in axes.texts}
        assert cells == {
            (j, i): f"{mean[i, j]:.2f}\n±{spread[i, j]:.2f}"
            for i in range(4)
            for j in range(len(words))
        }


def test_long_words_and_many_heads(generator, tmp_path):
    words = [["antidisestablishmentarianism"] * 20, ["so"] * 20]
    weights = torch.randn(1, 3, 2, 11, 20, generator=generator, dtype=torch.float32).softmax(-1)
    for kind in ("bars", "heatmap"):
        long, short = drawn(plots.attention(weights, words, kind=kind), tmp_path)
        assert {text.get_rotation() for text in long.get_xticklabels()} == {30}
        assert {text.get_rotation() for text in short.get_xticklabels()} == {0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": {"intent": torch.ones(1)}}, r'hold "attention", got \[\'intent\'\]'),
        (
            {"prediction": torch.ones(2, 3, 4)},
            r"\(chain, draw, sentence, head, token\), got shape \(2, 3, 4\)",
        ),
        ({"prediction": torch.ones(0, 3, 3, 2, 4)}, r"attention must not be empty"),
        ({"prediction": torch.full((1, 1, 3, 2, 4), torch.nan)}, r"finite, got 24 of 24 values"),
        ({"words": WORDS[:2]}, r"one list for each of 3 sentences, got 2"),
        ({"words": []}, r"one list for each of 3 sentences, got 0"),
        ({"words": ["what", "is", "the"]}, r"a list of words for each sentence, got 'what'"),
        ({"words": [["a"] * 8, ["b"], ["c"]]}, r"sentence 0 must have between 1 and 7 .* got 8"),
        ({"words": [["a"], [], ["c"]]}, r"sentence 1 must have between 1 and 7 .* got 0"),
        ({"captions": ["one"]}, r"one line for each of 3 sentences, got 1"),
        ({"heads": [4]}, r"heads must be some of 0 to 3, got \[4\]"),
        ({"heads": []}, r"heads must be some of 0 to 3, got \[\]"),
        ({"level": 1.0}, r"level must lie between 0 and 1, got 1.0"),
    ],
)
def test_bad_attention(weights, change, message):
    with pytest.raises(ValueError, match=message):
        plots.attention(**{"prediction": weights, "words": WORDS} | change)


# Draws


@pytest.fixture
def posteriors(generator):
    """Three methods' draws of a site of shape (2, 3), in the three forms that are taken."""
    draws = {
        "NUTS": torch.randn(2, 200, 2, 3, generator=generator),
        "SVGD": 1 + 0.5 * torch.randn(1, 50, 2, 3, generator=generator),
        "MAP": torch.zeros(1, 1, 2, 3),
    }
    return {
        "NUTS": draws["NUTS"],
        "SVGD": {"query": draws["SVGD"], "readout": torch.ones(1, 50)},
        "MAP": SimpleNamespace(draws={"query": draws["MAP"]}),
    }, draws


def test_marginals_are_densities(posteriors, tmp_path):
    given, draws = posteriors
    figure = plots.marginals(given, site="query", title="Queries")
    axes = drawn(figure, tmp_path)
    assert [one.get_title() for one in axes] == [
        f"query[{i}, {j}]" for i in range(2) for j in range(3)
    ]
    assert legend_of(figure) == ["NUTS", "SVGD", "MAP"]
    for one, index in zip(axes, np.ndindex(2, 3), strict=True):
        lines = {line.get_label(): line.get_xydata() for line in one.lines}
        for method in ("NUTS", "SVGD"):
            x, density = lines[method].T
            values = draws[method][(..., *index)]
            assert abs(np.trapezoid(density, x) - 1) < 0.03
            assert abs(np.trapezoid(density * x, x) - values.mean()) < 0.05
        np.testing.assert_array_equal(lines["MAP"][:, 0], 0)


def test_reference_is_filled_and_others_keep_their_colors(posteriors):
    given, _ = posteriors
    plain = plots.marginals(given, site="query", coordinates=[(1, 2)])
    figure = plots.marginals(given, site="query", coordinates=[(1, 2)], reference="NUTS")
    (axes,) = figure.axes
    assert axes.get_title() == "query[1, 2]"
    assert [c.get_label() for c in axes.collections if isinstance(c, PolyCollection)] == ["NUTS"]
    assert {line.get_label(): line.get_color() for line in axes.lines} == {
        line.get_label(): line.get_color() for line in plain.axes[0].lines[1:]
    }


def test_densities_of_positive_draws_stay_positive(generator):
    draws = torch.randn(1, 400, generator=generator).abs()
    (line,) = plots.marginals({"SVI": draws}, site="scale").axes[0].lines
    x, density = line.get_xydata().T
    assert x.min() < 0
    assert not density[x < 0].any()
    assert abs(np.trapezoid(density, x) - 1) < 0.03
    np.testing.assert_allclose(density[x > 0][0], 2 / np.sqrt(2 * np.pi), rtol=0.15)


def test_few_draws_of_one_sign_are_not_taken_for_positive(generator):
    draws = torch.randn(1, 400, generator=generator)
    given = {"NUTS": draws, "SVGD": draws[draws > 0.1][None, :10]}
    _, few = plots.marginals(given, site="bias").axes[0].lines
    x, density = few.get_xydata().T
    assert density[(x < 0) & (x > -0.2)].min() > 0


def test_forest_shows_means_and_intervals(posteriors, tmp_path):
    given, draws = posteriors
    chosen = [(0, 1), (1, 0)]
    figure = plots.forest(given, site="query", coordinates=chosen, level=0.8)
    (axes,) = drawn(figure, tmp_path)
    assert labels(axes.get_yticklabels()) == ["query[0, 1]", "query[1, 0]"]
    assert legend_of(figure) == ["NUTS", "SVGD", "MAP"]
    intervals = [c for c in axes.collections if isinstance(c, LineCollection)]
    for i, (line, method) in enumerate(zip(axes.lines, draws, strict=True)):
        values = torch.stack([draws[method][(..., *index)].flatten() for index in chosen])
        np.testing.assert_allclose(line.get_xdata(), values.mean(1), atol=1e-12)
        np.testing.assert_array_equal(np.round(line.get_ydata()), [0, 1])
        for lines, mass in zip(intervals[2 * i : 2 * i + 2], (0.8, 0.5), strict=True):
            tails = torch.tensor([0.5 - mass / 2, 0.5 + mass / 2])
            ends = np.stack(lines.get_segments())[:, :, 0]
            np.testing.assert_allclose(ends, values.quantile(tails, dim=1).T, atol=1e-12)


def test_scalar_sites_and_default_numbers(generator):
    draws = torch.randn(1, 20, 5, 7, generator=generator)
    assert len(plots.marginals({"SVI": draws}, site="query").axes) == 6
    assert len(plots.forest({"SVI": draws}, site="query").axes[0].get_yticks()) == 16
    scalar = plots.forest({"SVI": draws[..., 0, 0]}, site="scale")
    assert labels(scalar.axes[0].get_yticklabels()) == ["scale"]


@pytest.mark.parametrize("picture", [plots.marginals, plots.forest])
@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {}, r"posteriors must hold at least one entry, got none"),
        (
            {"SVI": {"readout": torch.ones(1, 2)}},
            {},
            r"SVI must hold site 'query', got \['readout'\]",
        ),
        (
            {"SVI": torch.ones(3)},
            {},
            r"query of SVI must have axes \(chain, draw.*got shape \(3,\)",
        ),
        ({"SVI": torch.ones(1, 0)}, {}, r"query of SVI must not be empty"),
        ({"SVI": torch.full((1, 2), torch.inf)}, {}, r"query of SVI must be finite, got 2 of 2"),
        (
            {"SVI": torch.ones(1, 2, 3), "SVGD": torch.ones(1, 2, 4)},
            {},
            r"query must have one shape in every method, got \{'SVI': \(3,\), 'SVGD': \(4,\)\}",
        ),
        ({"SVI": torch.ones(1, 2, 3)}, {"coordinates": [(3,)]}, r"into shape \(3,\), got \(3,\)"),
        ({"SVI": torch.ones(1, 2, 3)}, {"coordinates": [(0, 0)]}, r"shape \(3,\), got \(0, 0\)"),
        ({"SVI": torch.ones(1, 2, 3)}, {"coordinates": []}, r"at least one index, got none"),
    ],
)
def test_bad_draws(picture, given, options, message):
    with pytest.raises(ValueError, match=message):
        picture(given, site="query", **options)


def test_bad_reference_and_level():
    given = {"SVI": torch.zeros(1, 2)}
    with pytest.raises(ValueError, match=r"reference must be one of \['SVI'\], got 'NUTS'"):
        plots.marginals(given, site="query", reference="NUTS")
    with pytest.raises(ValueError, match=r"level must lie between 0 and 1, got 0"):
        plots.forest(given, site="query", level=0.0)


# Curves


def test_optimization_draws_each_chain(generator, tmp_path):
    loss = torch.randn(3, 40, generator=generator)
    norm = torch.logspace(3, 0, 40).expand(2, -1)
    figure = plots.optimization({"loss": loss, "stein_norm": norm}, title="Run")
    first, second = drawn(figure, tmp_path)
    assert [first.get_title(loc="left"), second.get_title(loc="left")] == ["loss", "stein_norm"]
    assert (first.get_yscale(), second.get_yscale()) == ("linear", "log")
    np.testing.assert_array_equal([line.get_ydata() for line in first.lines], loss)
    np.testing.assert_array_equal(first.lines[0].get_xdata(), range(40))
    assert len({to_rgba(line.get_color()) for line in first.lines}) == 3


def test_moving_average_is_centered():
    """A line is its own centered moving average."""
    figure = plots.optimization({"loss": torch.arange(30.0)[None]}, smooth=7)
    _, average = figure.axes[0].lines
    assert len(average.get_xdata()) == 24
    np.testing.assert_allclose(average.get_ydata(), average.get_xdata())


def test_steps_that_are_not_finite_leave_gaps(tmp_path):
    loss = torch.tensor([[1.0, torch.inf, 3.0, torch.nan]])
    axes = drawn(plots.optimization({"loss": loss}), tmp_path)
    np.testing.assert_array_equal(axes[0].lines[0].get_ydata(), [1, np.nan, 3, np.nan])
    assert loss[0, 1] == torch.inf


@pytest.mark.parametrize(
    ("curves", "smooth", "message"),
    [
        ({}, 1, r"curves must hold at least one entry, got none"),
        ({"loss": torch.ones(4)}, 1, r"loss must have axes \(chain, step\), got shape \(4,\)"),
        ({"loss": torch.full((1, 2), torch.nan)}, 1, r"a finite value, got none in shape \(1, 2\)"),
        ({"loss": torch.ones(1, 0)}, 1, r"a finite value, got none in shape \(1, 0\)"),
        ({"loss": torch.ones(1, 4)}, 0, r"smooth must be at least 1, got 0"),
    ],
)
def test_bad_curves(curves, smooth, message):
    with pytest.raises(ValueError, match=message):
        plots.optimization(curves, smooth=smooth)


# Scores


def test_scores_show_values_and_errors(tmp_path):
    table = {
        "NUTS": {"accuracy": (0.97, 0.01), "log score": (-0.2, 0.03)},
        "SVI": {"log score": (-0.3, 0.02), "accuracy": (0.95, 0.02)},
    }
    figure = plots.scores(table, title="Held out")
    for axes, metric in zip(drawn(figure, tmp_path), ("accuracy", "log score"), strict=True):
        assert axes.get_title() == metric
        assert [text.get_text() for text in axes.texts] == [
            f"{table[method][metric][0]:.3f}" for method in table
        ]
        for place, (container, row) in enumerate(zip(axes.containers, table.values(), strict=True)):
            value, error = row[metric]
            point, _, (whisker,) = container
            assert (point.get_xdata().item(), point.get_ydata().item()) == (value, place)
            ends = whisker.get_segments()[0][:, 0]
            np.testing.assert_allclose(ends, [value - error, value + error])
    assert labels(figure.axes[0].get_yticklabels()) == ["NUTS", "SVI"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"table must hold at least one entry, got none"),
        ({"NUTS": {}}, r"table of NUTS must hold at least one entry, got none"),
        (
            {"NUTS": {"accuracy": (1.0, 0.0)}, "SVI": {"loss": (1.0, 0.0)}},
            r"SVI must have metrics \['accuracy'\], got \['loss'\]",
        ),
    ],
)
def test_bad_scores(table, message):
    with pytest.raises(ValueError, match=message):
        plots.scores(table)


# Calibration


@pytest.fixture
def predictions(generator):
    """Calibrated predictions of 300 labels, and the same predictions squeezed toward one half."""
    sure = 0.5 + 0.5 * torch.rand(300, generator=generator)
    labels = (torch.rand(300, generator=generator) > sure).long()
    half = 0.5 + (sure - 0.5) / 2
    return {
        "NUTS": torch.stack([sure, 1 - sure], -1),
        "SVI": torch.stack([half, 1 - half], -1),
    }, labels


def test_reliability_shows_the_bins(predictions, tmp_path):
    probabilities, labels = predictions
    figure = plots.reliability(probabilities, labels, num_bins=8, title="Trust")
    curves, shares = drawn(figure, tmp_path)
    for method, points, bars in zip(
        probabilities, curves.containers, shares.containers, strict=True
    ):
        bins = reliability_bins(probabilities[method], labels, num_bins=8)
        seen = bins.count > 0
        assert 0 < seen.sum() < 8
        line, _, (whiskers,) = points
        np.testing.assert_allclose(line.get_xdata(), bins.confidence[seen])
        np.testing.assert_allclose(line.get_ydata(), bins.accuracy[seen])
        ends = np.stack(whiskers.get_segments())[:, :, 1]
        chance = (bins.confidence * (1 - bins.confidence) / bins.count).sqrt()[seen]
        np.testing.assert_allclose(ends[:, 1], (bins.accuracy[seen] + chance).clip(max=1))
        np.testing.assert_allclose(ends[:, 0], (bins.accuracy[seen] - chance).clip(min=0))
        np.testing.assert_allclose([bar.get_height() for bar in bars], bins.count / 300)
        places = [bar.get_x() + bar.get_width() / 2 for bar in bars]
        np.testing.assert_array_equal(np.floor(np.multiply(places, 8)), range(8))
    errors = [
        expected_calibration_error(given, labels, num_bins=8) for given in probabilities.values()
    ]
    assert legend_of(figure) == [f"NUTS (ECE {errors[0]:.3f})", f"SVI (ECE {errors[1]:.3f})"]


def test_a_legend_is_no_wider_than_its_figure(predictions):
    probabilities, labels = predictions
    given = {f"{'a long name':>40} {i}": probabilities["NUTS"] for i in range(5)}
    figure = plots.reliability(given, labels)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_bad_predictions(predictions):
    probabilities, labels = predictions
    with pytest.raises(ValueError, match="probabilities must hold at least one entry, got none"):
        plots.reliability({}, labels)
    with pytest.raises(ValueError, match="labels: expected one for each prediction"):
        plots.reliability(probabilities, labels[:5])


def test_selective_risk_shows_the_curves_and_their_areas(predictions, tmp_path):
    """By hand: of predictions in order, errors so far; mutants: methods or axes exchanged."""
    probabilities, labels = predictions
    figure = plots.selective_risk(probabilities, labels, {"SVI": torch.arange(300.0)}, title="Risk")
    (axes,) = drawn(figure, tmp_path)
    wrong = probabilities["NUTS"].argmax(-1) != labels
    orders = [probabilities["NUTS"].amax(-1).argsort(descending=True), torch.arange(300)]
    names = []
    kept = np.arange(1, 301)
    for method, line, order in zip(probabilities, axes.lines[::2], orders, strict=True):
        risk = np.cumsum(wrong[order].numpy()) / kept
        np.testing.assert_allclose(line.get_xdata(), kept / 300)
        np.testing.assert_allclose(line.get_ydata(), risk)
        names.append(f"{method} (AURC {risk.mean():.3f})")
    assert legend_of(figure) == names
    for end in axes.lines[1::2]:
        np.testing.assert_allclose(end.get_xydata(), [[1, wrong.double().mean()]])


def test_pavpu_is_that_of_each_share_of_certain_predictions(predictions, tmp_path):
    """By hand at the first, the middle and the last, which is the accuracy; ties stay together."""
    probabilities, labels = predictions
    right = probabilities["NUTS"].argmax(-1) == labels
    given = torch.where(right, 1.0, 2.0)
    given[:50] = 5.0
    figure = plots.pavpu(probabilities, labels, {"SVI": given})
    (axes,) = drawn(figure, tmp_path)
    entropy = torch.special.entr(probabilities["NUTS"]).sum(-1)
    for line, uncertainty in zip(axes.lines[::2], (entropy, given), strict=True):
        for place, last in ((0, 0), (50, 150), (100, 299)):
            certain = uncertainty <= uncertainty.sort().values[last]
            value = ((right & certain) | (~right & ~certain)).double().mean()
            np.testing.assert_allclose(line.get_xydata()[place], [certain.double().mean(), value])
    for end in axes.lines[1::2]:
        np.testing.assert_allclose(end.get_xydata(), [[1, right.double().mean()]])
    best = [line.get_ydata().max() for line in axes.lines[::2]]
    assert best[1] > right.double().mean() + 0.01
    assert legend_of(figure) == [f"NUTS (at best {best[0]:.3f})", f"SVI (at best {best[1]:.3f})"]
    # Only the order of uncertainties matters.
    (other,) = plots.pavpu(probabilities, labels, {"NUTS": entropy.exp(), "SVI": given**3}).axes
    for line, same in zip(axes.lines, other.lines, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), same.get_xydata())


@pytest.mark.parametrize("draw", [plots.selective_risk, plots.pavpu])
def test_curves_of_uncertainty_lie_within_their_axes_and_refuse(draw, predictions):
    probabilities, labels = predictions
    (axes,) = draw(probabilities, labels).axes
    highest = max(line.get_ydata().max() for line in axes.lines)
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > highest
    with pytest.raises(ValueError, match="probabilities must hold at least one entry, got none"):
        draw({}, labels)
    with pytest.raises(ValueError, match=r"some of \['NUTS', 'SVI'\], got \['HMC'\]"):
        draw(probabilities, labels, {"HMC": torch.ones(300)})
    with pytest.raises(ValueError, match="labels: expected one for each prediction"):
        draw(probabilities, labels[:5])
    with pytest.raises(ValueError, match="uncertainty: expected one for each of 300 predictions"):
        draw(probabilities, labels, {"SVI": torch.ones(3)})


# Global state


def test_pyplot_is_neither_needed_nor_loaded():
    program = (
        "import sys, torch; from bayesattn import plots;"
        "plots.scores({'NUTS': {'accuracy': (0.9, 0.1)}});"
        "print({'matplotlib.pyplot', 'pyro', 'arviz'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_whiskers_of_a_reliability_diagram_stay_where_accuracies_can_be(tmp_path):
    labels = torch.tensor([0, 0, 1, 1])
    sure = {"SVI": torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.8, 0.2], [0.8, 0.2]])}
    curves, _ = drawn(plots.reliability(sure, labels, num_bins=8), tmp_path)
    _, _, (whiskers,) = curves.containers[0]
    (_, wrong), (low, right) = (segment[:, 1] for segment in whiskers.get_segments())
    assert right == 1
    assert low == pytest.approx(1 - (0.9 * 0.1 / 2) ** 0.5)
    assert wrong == pytest.approx((0.8 * 0.2 / 2) ** 0.5)


def test_errors_of_calibration_are_those_of_the_figure(predictions):
    probabilities, labels = predictions
    error = expected_calibration_error(probabilities["NUTS"], labels)
    assert legend_of(plots.reliability(probabilities, labels))[0] == f"NUTS (ECE {error:.3f})"


def test_attention_maps_show_the_weights(generator, tmp_path):
    weights = torch.rand(3, 5, 4, generator=generator)
    figure = plots.attention_maps(weights, ["a", "b"], ["x", "y", "z"], title="maps")
    axes = [axes for axes in drawn(figure, tmp_path) if axes.get_title().startswith("head")]
    assert len(axes) == 3
    for head, one in enumerate(axes):
        np.testing.assert_array_equal(one.images[0].get_array(), weights[head, :2, :3])
        assert [label.get_text() for label in one.get_xticklabels()] == ["x", "y", "z"]
        assert [label.get_text() for label in one.get_yticklabels()] == ["a", "b"]
    square = plots.attention_maps(torch.rand(1, 3, 3, generator=generator), WORDS[2])
    labels = drawn(square, tmp_path)[0].get_xticklabels()
    assert [label.get_text() for label in labels] == WORDS[2]
    with pytest.raises(ValueError, match=r"weights must have axes \(head, query, key\)"):
        plots.attention_maps(weights[0])
    with pytest.raises(ValueError, match="query_words: expected 1 to 5 of them, got 6"):
        plots.attention_maps(weights, list("abcdef"))


def test_column_mass_shows_each_head_and_leaves_padding_out(generator, tmp_path):
    query, key = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(2))
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    entries = {
        "softmax": attention_statistics(query, key, key_mask=mask),
        "doubly": attention_statistics(query, key, key_mask=mask, normalization=DoublyNormalized()),
    }
    figure = plots.column_mass(entries, threshold=0.2)
    assert legend_of(figure) == ["softmax", "doubly"]
    axes = [axes for axes in drawn(figure, tmp_path) if axes.get_title(loc="left")]
    assert len(axes) == 3
    for head, one in enumerate(axes):
        for patch, entry in zip(one.patches, entries.values(), strict=True):
            share, edges = patch.get_data()[:2]
            np.testing.assert_allclose(share.sum(), 1.0)
            masses = entry.column_mass[:, head][mask].log10()
            middle = (share * (edges[1:] + edges[:-1]) / 2).sum()
            assert abs(middle - masses.mean()) < edges[1] - edges[0]
    with pytest.raises(ValueError, match="statistics must hold at least one entry, got none"):
        plots.column_mass({})
    other = attention_statistics(query[:, :2], key[:, :2])
    with pytest.raises(ValueError, match=r"equally many heads in each, got \{'a': 3, 'b': 2\}"):
        plots.column_mass({"a": entries["softmax"], "b": other})
