"""Tests of bayesattn.plots.alignment: what the artists show."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

from bayesattn import plots
from bayesattn.alignment_diagnostics import AlignmentStatistics
from bayesattn.attention_changes import AttentionChange

HEADS = 3


def statistics(generator, p_values, num_heads=HEADS):
    figures = torch.rand(4, num_heads, generator=generator)
    mmd, chance, energy, entropy = figures
    p_values = torch.tensor(p_values[:num_heads])
    return AlignmentStatistics(mmd, chance, p_values, energy, entropy, torch.ones(num_heads).long())


def change(generator, num_heads=HEADS):
    figures = torch.rand(2, num_heads, generator=generator)
    return AttentionChange(*figures, torch.ones(num_heads).long())


@pytest.fixture
def given(generator):
    names = ("layers.0", "encoder.layers.11.attention")
    before = {name: statistics(generator, [0.01, 0.05, 0.2]) for name in names}
    after = {name: statistics(generator, [0.3, 0.01, 0.2]) for name in names}
    return before, after, {name: change(generator) for name in names}


def test_shows_distances_change_and_entropy(given, tmp_path):
    """Mutants: before and after, or figures, in each other's place; marks of the other state."""
    before, after, changes = given
    figure = plots.alignment(before, after, changes, title="heads")
    figure.savefig(tmp_path / "alignment.png")
    assert plt.get_fignums() == []
    assert len(figure.axes) == 6
    for row, name in zip(np.array(figure.axes).reshape(2, 3), before, strict=True):
        states = (before[name], after[name])
        distances, shares, entropies = row
        *chance, first, last = distances.collections
        for lines, points, state in zip(chance, (first, last), states, strict=True):
            segments = np.stack(lines.get_segments())
            np.testing.assert_array_equal(segments[..., 1], state.chance[:, None].expand(-1, 2))
            np.testing.assert_allclose(segments[..., 0].mean(1), points.get_offsets()[:, 0])
        for points, state in zip((first, last), states, strict=True):
            places = points.get_offsets()
            np.testing.assert_array_equal(places[:, 1], state.squared_mmd)
            np.testing.assert_array_equal(np.round(places[:, 0].astype(float)), range(HEADS))
            is_hollow = (points.get_facecolors() == to_rgba("white")).all(-1)
            np.testing.assert_array_equal(is_hollow, state.p_value > 0.05)
        assert (first.get_offsets()[:, 0] < last.get_offsets()[:, 0]).all()
        ends = np.stack([line.get_ydata() for line in distances.lines], 1)
        np.testing.assert_array_equal(ends, np.stack([s.squared_mmd for s in states]))
        heights = [bar.get_height() for bar in shares.patches]
        np.testing.assert_array_equal(heights, changes[name].total_variation)
        for points, state in zip(entropies.collections, states, strict=True):
            np.testing.assert_array_equal(points.get_offsets()[:, 1], state.entropy)
    labels = [axes.get_ylabel() for axes in figure.axes[::3]]
    assert labels == ["layers.0", "encoder.layers\n.11.attention"]
    legend = figure.legends[0]
    assert legend.get_title().get_text() == "heads"
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["before", "after", "p ≤ 0.05", "p > 0.05", "by chance"]


def test_level_marks_more_heads(given):
    figure = plots.alignment(*given, level=0.25)
    first, last = figure.axes[0].collections[-2:]
    for points, expected in ((first, [0, 0, 0]), (last, [1, 0, 0])):
        is_hollow = (points.get_facecolors() == to_rgba("white")).all(-1)
        assert is_hollow.tolist() == [bool(flag) for flag in expected]


def test_all_is_within_its_axes_and_rounding_does_not_look_like_change(given):
    before, after, changes = given
    none = {
        name: entry._replace(total_variation=torch.full((HEADS,), 1e-16))
        for name, entry in changes.items()
    }
    figure = plots.alignment(before, after, none)
    for column in range(3):
        limits = {axes.get_ylim() for axes in figure.axes[column::3]}
        assert len(limits) == 1
    values = [entry.squared_mmd for entry in (*before.values(), *after.values())]
    assert figure.axes[0].get_ylim()[1] > torch.cat(values).max()
    assert figure.axes[1].get_ylim() == (0.0, 0.1)


def test_layers_may_have_different_numbers_of_heads(generator, tmp_path):
    sizes = {"a": 1, "b": 3}
    before, after = (
        {name: statistics(generator, [0.01, 0.2, 0.3], size) for name, size in sizes.items()}
        for _ in range(2)
    )
    figure = plots.alignment(before, after, {n: change(generator, s) for n, s in sizes.items()})
    figure.savefig(tmp_path / "alignment.png")
    assert [len(axes.patches) for axes in figure.axes[1::3]] == [1, 3]


def test_refuses(given, generator):
    before, after, changes = given
    with pytest.raises(ValueError, match="before must hold at least one entry"):
        plots.alignment({}, after, changes)
    with pytest.raises(ValueError, match=r"after: expected layers .* got"):
        plots.alignment(before, {"a": after["layers.0"]}, changes)
    with pytest.raises(ValueError, match="change: expected layers"):
        plots.alignment(before, after, {})
    with pytest.raises(ValueError, match=r"level: expected a number between 0 and 1, got 1\.0"):
        plots.alignment(before, after, changes, level=1.0)
    with pytest.raises(ValueError, match=r"layers\.0: expected 3 heads in total_variation, got 2"):
        plots.alignment(before, after, changes | {"layers.0": change(generator, 2)})
    empty = before["layers.0"]._replace(squared_mmd=torch.full((HEADS,), torch.nan))
    with pytest.raises(ValueError, match=r"layers\.0: squared_mmd must be finite"):
        plots.alignment(before | {"layers.0": empty}, after, changes)
