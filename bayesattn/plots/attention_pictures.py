"""Attention maps, and histograms of how much attention the keys receive."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from bayesattn.attention_diagnostics import AttentionStatistics
from bayesattn.plots.canvas import array, bare, colors, legend_above, new_figure, nonempty

__all__ = ["attention_maps", "column_mass"]


def attention_maps(
    weights: Tensor,
    query_words: Sequence[str] | None = None,
    key_words: Sequence[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draw each head's weights as an image: a row for each query, a column for each key.

    Args:
        weights: "head query key", of one sentence.
        query_words: Labels of the queries; what is after the last is padding, left out.
        key_words: Labels of the keys; those of the queries if None and there are as many.
        title: Above the figure.

    Returns:
        A figure that pyplot does not know; keep it with ``figure.savefig``.

    Raises:
        ValueError: If the weights have other axes or there are more words than positions.
    """
    values = array("weights", weights, ("head", "query", "key"))
    if key_words is None and values.shape[1] == values.shape[2]:
        key_words = query_words
    for name, words, size in (
        ("query_words", query_words, values.shape[1]),
        ("key_words", key_words, values.shape[2]),
    ):
        if isinstance(words, str):
            raise ValueError(f"{name}: expected a sequence of words, got the text {words!r}")
        if words is not None and not 0 < len(words) <= size:
            raise ValueError(f"{name}: expected 1 to {size} of them, got {len(words)}")
    rows = values.shape[1] if query_words is None else len(query_words)
    columns = values.shape[2] if key_words is None else len(key_words)
    values = values[:, :rows, :columns]
    across = min(4, len(values))
    down = -(-len(values) // across)
    size = (1.0 + across * (1.0 + 0.24 * columns), 0.8 + down * (1.1 + 0.24 * rows))
    figure, grid = new_figure(down, across, size)
    image = None
    for head, axes in enumerate(grid.flat):
        if head >= len(values):
            axes.set_axis_off()
            continue
        image = axes.imshow(values[head], cmap="viridis", vmin=0.0, vmax=values.max())
        axes.set_title(f"head {head}", fontsize=10)
        axes.set_xlabel("key", fontsize=9)
        axes.set_ylabel("query", fontsize=9)
        if key_words is not None:
            axes.set_xticks(range(columns), key_words, rotation=90, fontsize=8)
        if query_words is not None:
            axes.set_yticks(range(rows), query_words, fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=list(grid.flat), label="weight", shrink=0.8)
    if title:
        figure.suptitle(title, fontsize=13)
    return figure


def column_mass(
    statistics: Mapping[str, AttentionStatistics] | AttentionStatistics,
    *,
    threshold: float = 0.1,
    title: str | None = None,
) -> Figure:
    """Draw histograms of log10 of the attention that keys receive, one picture for each head.

    Args:
        statistics: By name, such as those of several layers or several normalizations; each is a
            line. All have equally many heads. Or those of one.
        threshold: Below it, a key counts as explained away; drawn as a line.
        title: Above the figure.

    Returns:
        A figure that pyplot does not know; keep it with ``figure.savefig``.

    Raises:
        ValueError: If there is nothing to draw or the numbers of heads differ.
    """
    if isinstance(statistics, AttentionStatistics):
        statistics = {"attention": statistics}
    nonempty("statistics", statistics)
    if not threshold > 0.0:
        raise ValueError(f"threshold: expected a positive number, got {threshold}")
    heads = {name: entry.column_mass.shape[-2] for name, entry in statistics.items()}
    if len(set(heads.values())) > 1:
        raise ValueError(f"statistics: expected equally many heads in each, got {heads}")
    num_heads = next(iter(heads.values()))
    across = min(4, num_heads)
    down = -(-num_heads // across)
    size = (1.0 + 2.9 * across, 1.2 + 2.1 * down)
    figure, grid = new_figure(down, across, size, sharex=True, sharey=True)
    masses = {name: _log_masses(name, entry) for name, entry in statistics.items()}
    every = np.concatenate([part for parts in masses.values() for part in parts])
    edges = np.linspace(min(-1.5, every.min()), max(0.5, every.max()), 41)
    handles = []
    for head, axes in enumerate(grid.flat):
        if head >= num_heads:
            axes.set_axis_off()
            continue
        handles = []
        for (name, parts), color in zip(masses.items(), colors(len(masses)), strict=True):
            share = np.histogram(parts[head], edges)[0] / max(1, len(parts[head]))
            handles.append(axes.stairs(share, edges, color=color, linewidth=1.4, label=name))
        axes.axvline(np.log10(threshold), color="0.6", linewidth=0.8)
        axes.set_title(f"head {head}", loc="left", fontsize=10)
        bare(axes)
    figure.supxlabel("log10 of the attention that a key receives", fontsize=10)
    figure.supylabel("share of keys", fontsize=10)
    legend_above(figure, handles, title)
    return figure


def _log_masses(name: str, statistics: AttentionStatistics) -> list[np.ndarray]:
    """Of each head, over all keys that count."""
    mass = statistics.column_mass.movedim(-2, 0).flatten(1)
    counts = statistics.key_mask.movedim(-2, 0).flatten(1)
    values = array(name, mass, ("head", "key"))
    kept = [row[chosen] for row, chosen in zip(values, counts.cpu().numpy(), strict=True)]
    if not any(len(row) for row in kept):
        raise ValueError(f"statistics: expected at least one key in {name!r}, got none")
    return [np.log10(np.clip(row, 1e-30, None)) for row in kept]
