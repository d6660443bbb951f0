"""Text that differs from what a classifier has learned from: noisy, and of no class at all.

Each word of a noisy sentence is, with some probability, dropped, exchanged with the next one, or
misspelled. Words change before they become numbers, so that a misspelled word is an unknown one to
a vocabulary of words, and other pieces to one of pieces. Sentences of no class are CLINC150's, for
that task alone.
"""

import random
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from examples.reproduce.text_corpora import READERS, Corpus, Example, Words, read_out_of_scope
from examples.reproduce.text_tasks import (
    Sentences,
    TextSplits,
    number_sentences,
    number_words,
    split_corpus,
    training_vocabulary,
)

__all__ = [
    "PartSizes",
    "ShiftedText",
    "ShiftedWords",
    "load_words",
    "noisy",
    "number_shifted",
    "proportional",
    "read_shifted",
]


class PartSizes(NamedTuple):
    """At most how many sentences of each part are used."""

    train: int
    validation: int
    test: int
    out_of_scope: int


class ShiftedWords(NamedTuple):
    """Sentences as words.

    Attributes:
        parts: Training, validation and test sentences.
        noisy: The test sentences with noise.
        out_of_scope: Sentences of no class, none where the data set has no such.
    """

    parts: Corpus
    noisy: list[Example]
    out_of_scope: list[Example]

    def map(self, change: Callable[[Words], Words]) -> "ShiftedWords":
        """Change the words of every sentence."""

        def changed(examples: list[Example] | None) -> list[Example]:
            return [(change(words), label) for words, label in examples or []]

        parts = Corpus(*map(changed, self.parts))
        return ShiftedWords(parts, changed(self.noisy), changed(self.out_of_scope))


# Equal if the same, so that it may be a key of what has been computed for it.
@dataclass(frozen=True, eq=False)
class ShiftedText:
    """Sentences as numbers.

    Attributes:
        splits: What is learned from, and tested on.
        noisy: The test sentences with noise.
        out_of_scope: Sentences of no class, whose label is -1; None where there are none.
    """

    splits: TextSplits
    noisy: Sentences
    out_of_scope: Sentences | None

    def sizes(self) -> dict[str, int]:
        """How many sentences each part has, and how many classes there are."""
        foreign = 0 if self.out_of_scope is None else len(self.out_of_scope.label)
        return self.splits.sizes() | {"out of scope": foreign}


def read_shifted(name: str, sizes: PartSizes, folder: Path | None, seed: int) -> ShiftedText | None:
    """Read a data set for a vocabulary of its own words; None where it is not there."""
    words = load_words(name, sizes, folder, seed)
    return words and number_shifted(words, training_vocabulary(words.parts.train))


def load_words(
    name: str, sizes: PartSizes, folder: Path | None, seed: int, *, noise: float = 0.2
) -> ShiftedWords | None:
    """Read and split a data set, and add noise to its test sentences.

    Args:
        name: One of ``READERS``.
        sizes: How many sentences are chosen, of each class in proportion.
        folder: Where data sets lie.
        seed: Of all choices.
        noise: How probably a word is changed.
    """
    corpus = READERS[name](folder)
    if corpus is None:
        return None
    parts = split_corpus(corpus, seed)
    parts = Corpus(
        *(proportional(part or [], size, seed) for part, size in zip(parts, sizes[:3], strict=True))
    )
    generator = random.Random(seed)
    changed = [(noisy(words, noise, generator), label) for words, label in parts.test]
    foreign = (read_out_of_scope(folder) if name == "clinc150" else None) or []
    generator.shuffle(foreign)
    return ShiftedWords(parts, changed, [(words, "") for words in foreign[: sizes.out_of_scope]])


def number_shifted(words: ShiftedWords, vocabulary: tuple[str, ...]) -> ShiftedText:
    """Turn words into their numbers in a vocabulary."""
    splits = number_words(words.parts, vocabulary)
    changed, foreign = (
        number_sentences(part, vocabulary, splits.label_names) if part else None
        for part in (words.noisy, words.out_of_scope)
    )
    assert changed is not None
    return ShiftedText(splits, changed, foreign)


def proportional(examples: Sequence[Example], number: int, seed: int) -> list[Example]:
    """Choose some examples at random, of each class in proportion, so that any first ones are too.

    Args:
        examples: To choose from.
        number: How many, all of them if there are no more.
        seed: Of the choice.
    """
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    totals = Counter(label for _, label in shuffled)
    seen: Counter[str] = Counter()
    places = []
    for _, label in shuffled:
        places.append((seen[label] + 0.5) / totals[label])
        seen[label] += 1
    order = sorted(range(len(shuffled)), key=places.__getitem__)
    return [shuffled[row] for row in order[:number]]


def noisy(words: Words, rate: float, generator: random.Random) -> Words:
    """Drop, exchange or misspell some words; of one word at least something is left.

    Args:
        words: Of a sentence.
        rate: How probably each of them is changed, in one of the three ways.
        generator: What decides.
    """
    changed: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if generator.random() >= rate:
            changed.append(word)
            continue
        way = generator.choice(("drop", "exchange", "misspell"))
        if way == "exchange" and waiting:
            changed.append(waiting.pop(0))
            changed.append(word)
        elif way == "misspell" or not (waiting or changed):
            changed.append(_misspelled(word, generator))
        elif way != "drop":
            changed.append(word)
    return tuple(changed)


def _misspelled(word: str, generator: random.Random) -> str:
    """Exchange two neighboring letters, or drop, double or replace one."""
    place = generator.randrange(len(word))
    before, letter, after = word[:place], word[place], word[place + 1 :]
    ways = [before + letter + letter + after]
    ways.append(before + generator.choice(string.ascii_lowercase) + after)
    if len(word) > 1:
        ways.append(before + after)
    if after:
        ways.append(before + after[0] + letter + after[1:])
    return generator.choice(ways)
