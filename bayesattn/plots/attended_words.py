"""Sentences with the posterior of each head's attention on each word."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from torch import Tensor

from bayesattn.plots.canvas import Color, array, bare, colors, legend_above, new_figure

__all__ = ["attention"]


def attention(
    prediction: Mapping[str, Tensor] | Tensor,
    words: Sequence[Sequence[str]],
    *,
    heads: Sequence[int] | None = None,
    captions: Sequence[str] | None = None,
    title: str | None = None,
    kind: Literal["bars", "heatmap"] = "bars",
    level: float = 0.9,
) -> Figure:
    """Draw how much each head attends to each word, and how sure that is.

    The draws of a head are pooled over chains, so heads should mean the same in each of them.

    Args:
        prediction: Attention weights with axes (chain, draw, sentence, head, token), or what
            ``Posterior.predict`` returned, with them under "attention".
        words: The words of each sentence; tokens after the last word are padding, left out.
        heads: Which heads to draw; all of them where None.
        captions: A line above each sentence, such as its intent and the prediction.
        title: Above the figure.
        kind: "bars" draws means as bars and a central interval as whiskers; "heatmap" draws
            means as colors and writes mean and standard deviation into each cell.
        level: Mass of the interval of the whiskers.

    Returns:
        A figure that pyplot does not know; keep it with ``figure.savefig``.

    Raises:
        ValueError: If there is no "attention", its axes are others, or it does not fit the words.
    """
    weights = _pooled(prediction)
    _check_words(weights, words, captions)
    chosen = _chosen_heads(heads, weights.shape[2])
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if kind not in ("bars", "heatmap"):
        raise ValueError(f'kind must be "bars" or "heatmap", got {kind!r}')
    sentences = [
        _Sentence(weights[:, row, chosen, : len(several)], several, chosen, caption)
        for row, (several, caption) in enumerate(
            zip(words, captions or [""] * len(words), strict=True)
        )
    ]
    if kind == "heatmap":
        return _heatmap(sentences, title)
    return _bars(sentences, colors(weights.shape[2]), level, title)


class _Sentence(NamedTuple):
    weights: np.ndarray  # (draw, head, token)
    words: Sequence[str]
    heads: Sequence[int]
    caption: str


def _bars(
    sentences: Sequence[_Sentence], palette: Sequence[Color], level: float, title: str | None
) -> Figure:
    longest = max(len(sentence.words) for sentence in sentences)
    num_heads = len(sentences[0].heads)
    width = min(15.0, max(7.0, 1.0 + longest * max(0.7, 0.2 * num_heads)))
    figure, grid = new_figure(len(sentences), 1, (width, 0.6 + 1.75 * len(sentences)), sharey=True)
    for axes, sentence in zip(grid[:, 0], sentences, strict=True):
        handles = _sentence_bars(axes, sentence, palette, level)
        axes.set_xlim(-0.6, longest - 0.4)
        _label_words(axes, sentence.words, (width - 0.8) / longest)
    grid[0, 0].set_ylim(bottom=0)
    figure.supylabel("attention", fontsize=11)
    legend_above(figure, handles, title)
    return figure


def _sentence_bars(
    axes: Axes, sentence: _Sentence, palette: Sequence[Color], level: float
) -> list[Artist | Container]:
    num_draws, num_heads, num_words = sentence.weights.shape
    mean = sentence.weights.mean(axis=0)
    low, high = np.quantile(sentence.weights, (0.5 - level / 2, 0.5 + level / 2), axis=0)
    places = np.arange(num_words) + 0.8 * ((np.arange(num_heads)[:, None] + 0.5) / num_heads - 0.5)
    handles: list[Artist | Container] = [
        axes.bar(place, height, 0.72 / num_heads, color=palette[head], label=f"head {head}")
        for head, place, height in zip(sentence.heads, places, mean, strict=True)
    ]
    if num_draws > 1:
        ends = (places.ravel(), low.ravel(), high.ravel())
        whiskers = axes.vlines(*ends, color="0.2", linewidth=1.1, label=f"{level:.0%} interval")
        handles.append(whiskers)
    ends = (-0.5, num_words - 0.5)
    even = axes.hlines(1 / num_words, *ends, color="0.4", linewidth=0.9, linestyle=":")
    even.set_label("even attention")
    axes.set_title(sentence.caption, loc="left", fontsize=10)
    axes.tick_params(axis="y", labelsize=9)
    bare(axes)
    axes.spines["bottom"].set_bounds(*ends)
    return [*handles, even]


def _label_words(axes: Axes, words: Sequence[str], inches: float) -> None:
    crowded = max(len(word) for word in words) * 0.08 > inches
    style = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(len(words)), words, fontsize=10.5, **style)
    axes.tick_params(axis="x", length=0)


def _heatmap(sentences: Sequence[_Sentence], title: str | None) -> Figure:
    longest = max(len(sentence.words) for sentence in sentences)
    num_heads = len(sentences[0].heads)
    width = min(15.0, max(7.0, 1.0 + 0.75 * longest))
    height = len(sentences) * (0.75 + 0.4 * num_heads) + 0.5
    figure, grid = new_figure(len(sentences), 1, (width, height))
    top = max(sentence.weights.mean(axis=0).max() for sentence in sentences)
    for axes, sentence in zip(grid[:, 0], sentences, strict=True):
        _sentence_heatmap(axes, sentence, top)
        axes.set_xlim(-0.5, longest - 0.5)
        _label_words(axes, sentence.words, (width - 1.0) / longest)
    figure.supxlabel("mean of attention ± its standard deviation", fontsize=10)
    if title is not None:
        figure.suptitle(title, fontsize=13)
    return figure


def _sentence_heatmap(axes: Axes, sentence: _Sentence, top: float) -> None:
    mean, spread = sentence.weights.mean(axis=0), sentence.weights.std(axis=0)
    num_heads, num_words = mean.shape
    edges = np.arange(num_words + 1) - 0.5, np.arange(num_heads + 1) - 0.5
    axes.pcolormesh(*edges, mean, cmap="Blues", vmin=0, vmax=top, edgecolor="white")
    for head, word in np.ndindex(num_heads, num_words):
        color = "white" if mean[head, word] > 0.6 * top else "0.15"
        cell = f"{mean[head, word]:.2f}\n±{spread[head, word]:.2f}"
        axes.text(word, head, cell, ha="center", va="center", fontsize=7.5, color=color)
    axes.set_yticks(range(num_heads), [f"head {head}" for head in sentence.heads], fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    axes.set_title(sentence.caption, loc="left", fontsize=10)


def _pooled(prediction: Mapping[str, Tensor] | Tensor) -> np.ndarray:
    """Weights as "draw sentence head token", chains after one another."""
    if not isinstance(prediction, Tensor):
        if "attention" not in prediction:
            raise ValueError(f'prediction must hold "attention", got {sorted(prediction)}')
        prediction = prediction["attention"]
    names = ("chain", "draw", "sentence", "head", "token")
    weights = array("attention", prediction, names)
    return weights.reshape(-1, *weights.shape[2:])


def _check_words(
    weights: np.ndarray, words: Sequence[Sequence[str]], captions: Sequence[str] | None
) -> None:
    _, num_sentences, _, num_tokens = weights.shape
    if len(words) != num_sentences:
        raise ValueError(
            f"words must hold one list for each of {num_sentences} sentences, got {len(words)}"
        )
    for row, several in enumerate(words):
        if isinstance(several, str):
            raise ValueError(f"words must hold a list of words for each sentence, got {several!r}")
        if not 1 <= len(several) <= num_tokens:
            raise ValueError(
                f"sentence {row} must have between 1 and {num_tokens} words, as many as it has "
                f"tokens, got {len(several)}"
            )
    if captions is not None and len(captions) != num_sentences:
        raise ValueError(
            f"captions must hold one line for each of {num_sentences} sentences, "
            f"got {len(captions)}"
        )


def _chosen_heads(heads: Sequence[int] | None, num_heads: int) -> list[int]:
    chosen = list(range(num_heads)) if heads is None else list(heads)
    if not chosen or not all(0 <= head < num_heads for head in chosen):
        raise ValueError(f"heads must be some of 0 to {num_heads - 1}, got {chosen}")
    return chosen
