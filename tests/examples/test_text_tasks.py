"""Readers, splits that share no sentence, and a vocabulary that knows the training part alone."""

import csv
import gzip
import json

import pytest
import torch

from examples.reproduce.text_tasks import READERS, Corpus, prepare, read_task


def sentences(splits, name):
    """Give the sentences of a part as tuples of numbers, without padding."""
    part = getattr(splits, name)
    return [tuple(row[kept].tolist()) for row, kept in zip(part.tokens, part.mask, strict=True)]


def corpus(*, published_validation):
    """Make sentences of numbered words, some in several parts and one twice in training."""
    train = [((f"w{i % 7}", f"v{i % 11}", f"u{i}"), "ab"[i % 2]) for i in range(60)]
    train.append(train[0])
    validation = [train[5], (("w1", "v2", "fresh"), "a"), (("w3", "shared"), "b")]
    test = [train[8], (("w3", "shared"), "b"), (("w2", "novel"), "a")]
    return Corpus(train, validation if published_validation else None, test)


@pytest.mark.parametrize("published_validation", [True, False])
def test_parts_share_no_sentence(published_validation):
    """Mutant: a part that is not filtered."""
    splits = prepare(corpus(published_validation=published_validation), 0, min_count=1)
    parts = [set(sentences(splits, name)) for name in ("train", "validation", "test")]
    # Words that training does not know all read 1, so compare what has none of them.
    known = [{row for row in part if 1 not in row} for part in parts]
    assert not known[0] & known[1]
    assert not known[0] & known[2]
    assert not known[1] & known[2]
    if published_validation:
        assert splits.sizes() == {"train": 59, "validation": 2, "test": 3, "classes": 2}
    else:
        assert splits.sizes()["validation"] == 9
        assert splits.sizes()["train"] in (50, 51)


def test_split_depends_on_the_seed_alone():
    """Mutant: global random state in place of the seed."""
    splits = [prepare(corpus(published_validation=False), seed, min_count=1) for seed in (3, 3, 4)]
    first, again, other = ((split.vocabulary, sentences(split, "validation")) for split in splits)
    assert first == again
    assert first[0] != other[0]


def test_vocabulary_is_of_the_training_part():
    """Mutant: counts over all parts, or a threshold that is off by one."""
    splits = prepare(corpus(published_validation=True), 0, min_count=2)
    assert not {"fresh", "shared", "novel", "u3"} & set(splits.vocabulary)
    assert {f"w{i}" for i in range(7)} <= set(splits.vocabulary)
    number = splits.vocabulary.index("w2")
    assert sentences(splits, "test")[2] == (number, 1)
    assert set(splits.train.tokens[~splits.train.mask].tolist()) <= {0}


def test_length_is_capped_and_chosen_rows_are_cut():
    splits = prepare(corpus(published_validation=True), 0, max_tokens=2)
    assert splits.train.tokens.shape[1] == 2
    splits = prepare(corpus(published_validation=True), 0)
    chosen = splits.test.choose(torch.tensor([2, 1]))
    assert chosen.tokens.shape == (2, 2)
    assert chosen.label.tolist() == [splits.label_names.index(name) for name in "ab"]


def test_snips_needs_no_folder():
    splits = read_task("snips", None, 0)
    assert splits is not None
    assert splits.sizes()["test"] == 700
    assert splits.sizes()["classes"] == 7
    assert splits.sizes()["train"] + splits.sizes()["validation"] > 2000


@pytest.mark.parametrize("name", [name for name in READERS if name != "snips"])
def test_what_is_not_there_is_none(name, tmp_path):
    assert read_task(name, None, 0) is None
    assert read_task(name, tmp_path, 0) is None


@pytest.mark.parametrize("pack", [True, False])
def test_readers(tmp_path, pack):
    """Mutants: another column, key, file or encoding."""
    (tmp_path / "clinc150").mkdir()
    content = {"train": [["Pay, my bill", "pay"]], "val": [["b", "pay"]], "test": [["c", "pay"]]}
    content |= {"oos_test": [["what", "oos"]]}
    (tmp_path / "clinc150" / "data_small.json").write_text(json.dumps(content))
    (tmp_path / "banking77").mkdir()
    for name in ("train", "test"):
        with (tmp_path / "banking77" / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "category"), (f"one,\n{name}", "card")])
    (tmp_path / "sentconv").mkdir()
    lines = {"TREC.train.all": "3 caf\u00e9 ?", "TREC.test.all": "1 who"}
    lines |= {f"stsa.binary.{part}": f"0 it is n't {part} ." for part in ("train", "dev", "test")}
    for name, line in lines.items():
        path, raw = tmp_path / "sentconv" / name, f"{line}\n".encode("latin-1")
        path = path.with_name(f"{name}.gz") if pack else path
        path.write_bytes(gzip.compress(raw) if pack else raw)

    read = {name: READERS[name](tmp_path) for name in READERS if name != "snips"}
    assert read["clinc150"].train == [(("pay", "my", "bill"), "pay")]
    assert read["clinc150"].test == [(("c",), "pay")]
    assert read["banking77"] == ([(("one", "train"), "card")], None, [(("one", "test"), "card")])
    assert read["trec"] == ([(("caf\u00e9",), "3")], None, [(("who",), "1")])
    assert [part[0][0][-1] for part in read["sst2"]] == ["train", "dev", "test"]
    assert read["sst2"].train[0][0][:3] == ("it", "is", "n't")
