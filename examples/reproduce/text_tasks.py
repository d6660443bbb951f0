"""Text classification on real data: splits without shared sentences, words as numbers."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from examples.reproduce.text_corpora import READERS, Corpus, Example, Words

__all__ = [
    "READERS",
    "Corpus",
    "Sentences",
    "TextSplits",
    "number_sentences",
    "number_words",
    "prepare",
    "read_task",
    "split_corpus",
    "training_vocabulary",
]


class Sentences(NamedTuple):
    """Padded sentences; an index chooses some of them by :meth:`choose`.

    Attributes:
        tokens: Number of each word in the vocabulary: 0 pads, 1 is any word that is not in it.
        mask: True where there is a word.
        label: Class of each sentence.
    """

    tokens: Int[Tensor, "sentence token"]
    mask: Bool[Tensor, "sentence token"]
    label: Int[Tensor, " sentence"]

    def choose(self, rows: Int[Tensor, " chosen"] | slice) -> "Sentences":
        """Take some sentences, cut after the last word of the longest of them."""
        mask = self.mask[rows]
        longest = int(mask.sum(-1).max())
        return Sentences(self.tokens[rows, :longest], mask[:, :longest], self.label[rows])


class TextSplits(NamedTuple):
    """Three parts that share no sentence, and what their numbers stand for."""

    train: Sentences
    validation: Sentences
    test: Sentences
    vocabulary: tuple[str, ...]
    label_names: tuple[str, ...]

    def sizes(self) -> dict[str, int]:
        """How many sentences each part has, and how many classes there are."""
        parts = {name: len(getattr(self, name).label) for name in ("train", "validation", "test")}
        return parts | {"classes": len(self.label_names)}


def read_task(name: str, folder: Path | None, seed: int) -> TextSplits | None:
    """Read and split a data set by the name it has in ``READERS``; None where it is not there."""
    corpus = READERS[name](folder)
    return None if corpus is None else prepare(corpus, seed)


def prepare(
    corpus: Corpus,
    seed: int,
    *,
    validation_fraction: float = 0.15,
    min_count: int = 2,
    max_tokens: int = 40,
) -> TextSplits:
    """Split a corpus, as :func:`split_corpus` does, and turn its words into numbers.

    Args:
        corpus: What the data set publishes.
        seed: Chooses the validation sentences among the training ones where none are published.
        validation_fraction: How many of them are chosen.
        min_count: Words that occur less often in the training part count as unknown, so that the
            unknown word is met in training.
        max_tokens: Words after these many are dropped.
    """
    parts = split_corpus(
        corpus, seed, validation_fraction=validation_fraction, max_tokens=max_tokens
    )
    return number_words(parts, training_vocabulary(parts.train, min_count))


def split_corpus(
    corpus: Corpus, seed: int, *, validation_fraction: float = 0.15, max_tokens: int = 40
) -> Corpus:
    """Split a corpus into three parts, and leave its words as they are.

    Test sentences are as published. A sentence that occurs, word for word, in a later part (of
    training, validation, test) is taken out of the earlier one, repetitions within training stay.
    """
    train, test = _cut(corpus.train, max_tokens), _cut(corpus.test, max_tokens)
    validation = corpus.validation and _cut(corpus.validation, max_tokens)
    test_words = {words for words, _ in test}
    if validation is None:
        train = _without(train, test_words)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(train), generator=generator).tolist()
        held = round(validation_fraction * len(train))
        validation = [train[row] for row in order[:held]]
        train = [train[row] for row in order[held:]]
    validation = _without(validation, test_words)
    train = _without(train, test_words | {words for words, _ in validation})
    return Corpus(train, validation, test)


def training_vocabulary(train: Sequence[Example], min_count: int = 2) -> tuple[str, ...]:
    """Give the words of the training part, after the padding and the unknown word."""
    counts = Counter(word for words, _ in train for word in words)
    return ("", "", *sorted(word for word, count in counts.items() if count >= min_count))


def number_words(parts: Corpus, vocabulary: tuple[str, ...]) -> TextSplits:
    """Turn the words and labels of a split corpus into numbers."""
    labels = tuple(sorted({label for _, label in parts.train}))
    train, validation, test = (number_sentences(part or [], vocabulary, labels) for part in parts)
    return TextSplits(train, validation, test, vocabulary, labels)


def number_sentences(
    examples: Sequence[Example], vocabulary: Sequence[str], labels: Sequence[str]
) -> Sentences:
    """Turn words and labels into numbers; the empty label, of no class, is -1."""
    numbers = {word: number for number, word in enumerate(vocabulary) if number > 1}
    classes = {label: number for number, label in enumerate(labels)} | {"": -1}
    # A sentence of punctuation alone becomes one unknown word.
    rows = [[numbers.get(word, 1) for word in words] or [1] for words, _ in examples]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    label = torch.tensor([classes[label] for _, label in examples])
    return Sentences(tokens, tokens > 0, label)


def _cut(examples: list[Example], max_tokens: int) -> list[Example]:
    return [(words[:max_tokens], label) for words, label in examples]


def _without(examples: list[Example], seen: set[Words]) -> list[Example]:
    return [example for example in examples if example[0] not in seen]
