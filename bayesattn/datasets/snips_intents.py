"""SNIPS: short orders to a voice assistant, each with one of seven intents.

2088 training and 700 held-out sentences: of the 2100 that the source holds, those that also
occur, word for word, among the held-out ones are left out.

Source:
    Coucke et al. (2018), Snips Voice Platform, arXiv:1805.10190; github.com/sonos/nlu-benchmark,
    CC0 1.0 (see snips_license.txt).
"""

import gzip
from collections.abc import Mapping, Sequence
from importlib import resources

import numpy as np
import torch

from bayesattn.datasets.text import embed, tokenize, word_vectors
from bayesattn.datasets.text_dataset import TextDataset

__all__ = ["snips"]

Words = tuple[str, ...]
SentencesByIntent = Mapping[str, Sequence[Words]]


def snips(
    *,
    num_train: int = 490,
    num_test: int = 700,
    dim: int = 16,
    max_tokens: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[TextDataset, TextDataset]:
    """Load SNIPS intents with fixed word vectors.

    The vectors are learned without labels from all training sentences, whatever ``num_train``,
    and from no held-out one. Words that these hold less than twice are zero (about one word in
    six of the held-out sentences, most of them in names and titles).

    Intents take turns: every run of seven sentences holds each once, and less data are the first
    part of more data under the same seed.

    Args:
        num_train: Number of labeled training sentences.
        num_test: Number of held-out sentences.
        dim: Width of the word vectors.
        max_tokens: Words after these many of a sentence are dropped; None keeps all.
        seed: Chooses and orders the sentences; global random state is neither read nor changed.
        dtype: Of the vectors; torch's default where None.

    Returns:
        Training and test sentences, each padded to its own longest one.

    Raises:
        ValueError: If a number is out of range.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point one, got {dtype}")
    train, test = _read()
    vectors = word_vectors([words for several in train.values() for words in several], dim)
    rng = np.random.default_rng(seed)

    def choose(name: str, sentences: SentencesByIntent, number: int) -> TextDataset:
        chosen = _take_turns(name, sentences, number, rng)
        words = tuple(words[:max_tokens] for _, words in chosen)
        tokens, mask = embed(words, vectors, dtype)
        names = tuple(sentences)
        intent = torch.tensor([names.index(name) for name, _ in chosen])
        return TextDataset(tokens, mask, intent, words, names)

    return choose("num_train", train, num_train), choose("num_test", test, num_test)


def _read() -> tuple[dict[str, list[Words]], dict[str, list[Words]]]:
    """Training and held-out sentences of each intent, in the order of the file."""
    packed = resources.files("bayesattn.datasets").joinpath("snips.tsv.gz").read_bytes()
    rows = [line.split("\t") for line in gzip.decompress(packed).decode().splitlines()]
    names = sorted({intent for _, intent, _ in rows})
    splits: dict[str, dict[str, list[Words]]] = {
        split: {name: [] for name in names} for split in ("train", "validate")
    }
    for split, intent, text in rows:
        splits[split][intent].append(tuple(tokenize(text)))
    held_out = {words for several in splits["validate"].values() for words in several}
    train = {
        name: [words for words in several if words not in held_out]
        for name, several in splits["train"].items()
    }
    return train, splits["validate"]


def _take_turns(
    argument: str, sentences: SentencesByIntent, number: int, rng: np.random.Generator
) -> list[tuple[str, Words]]:
    """Shuffle the sentences of each intent and take one of each in turn."""
    shuffled = {name: rng.permutation(len(several)) for name, several in sentences.items()}
    shortest = min(len(several) for several in sentences.values())
    if not 1 <= number <= shortest * len(sentences):
        raise ValueError(
            f"{argument} must be between 1 and {shortest * len(sentences)}, got {number}"
        )
    turns = [
        (name, several[shuffled[name][turn]])
        for turn in range(shortest)
        for name, several in sentences.items()
    ]
    return turns[:number]
