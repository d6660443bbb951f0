"""Tests of bayesattn.datasets."""

import dataclasses
import gzip
from collections import Counter
from importlib import resources

import numpy as np
import pytest
import torch

from bayesattn import datasets
from bayesattn.datasets.text import cooccurrence, embed, ppmi, tokenize, word_vectors
from tests.reference import cooccurrence as counted_by_hand
from tests.reference import ppmi as ppmi_by_hand

SENTENCES = [
    ["play", "some", "music", "by", "the", "band"],
    ["play", "the", "album"],
    ["what", "is", "the", "weather", "in", "the", "park"],
    ["is", "the", "park", "open"],
    ["music"],
    [],
]
VOCABULARY = sorted({word for words in SENTENCES for word in words} - {"some"})


@pytest.fixture(scope="module")
def pair():
    return datasets.snips(dtype=torch.float64)


def logits_of(train, test, features, penalty=1.0):
    """Held-out logits of a ridge-penalized linear classifier on some features."""
    x, y = features(train), torch.nn.functional.one_hot(train.intent).double()
    weight = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ y)
    return features(test) @ weight


def mean_pooled(data):
    total = (data.tokens * data.mask[..., None]).sum(1)
    ones = torch.ones(len(data), 1)
    return torch.cat([total / data.mask.sum(1, keepdim=True), ones], dim=1)


# Words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What's on, at 9:30?", "what 's on at 9:30"),
        ("I DON’T like R&B; we'll go!", "i do n't like r&b we 'll go"),
        ("'quoted' girls' ha'atzmaut's", "quoted girls ha'atzmaut 's"),
        ("twenty-first - 9/13/2017, p.m.", "twenty-first 9/13/2017 p.m"),
        ("  \n…", ""),
    ],
)
def test_tokenize(text, words):
    assert tokenize(text) == words.split()


# Vectors


@pytest.mark.parametrize("window", [1, 2, 7])
def test_counts_match_reference(window):
    ours = cooccurrence(SENTENCES, VOCABULARY, window).toarray()
    np.testing.assert_array_equal(ours, counted_by_hand(SENTENCES, VOCABULARY, window))
    np.testing.assert_array_equal(ours, ours.T)
    assert ours.sum() > 0


@pytest.mark.parametrize("smoothing", [0.75, 1.0])
def test_ppmi_matches_reference(smoothing):
    counts = cooccurrence(SENTENCES, VOCABULARY, 2)
    expected = ppmi_by_hand(counts.toarray(), smoothing)
    np.testing.assert_allclose(ppmi(counts, smoothing).toarray(), expected, rtol=1e-12)
    assert (expected > 0).any()


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_vectors_are_the_centered_left_factor_of_the_ppmi(dim):
    """Against a dense decomposition, with the entry of largest magnitude positive."""
    vectors = word_vectors(SENTENCES, dim, window=2, min_count=1)
    counts = Counter(word for words in SENTENCES for word in words)
    vocabulary = sorted(counts)
    assert list(vectors) == vocabulary
    matrix = ppmi_by_hand(counted_by_hand(SENTENCES, vocabulary, 2), 0.75)
    left, singular, _ = np.linalg.svd(matrix)
    left = left[:, :dim] * np.sign(left[np.abs(left).argmax(0)[:dim], range(dim)])
    rows = left * np.sqrt(singular[:dim])
    rows -= sum(counts[w] * rows[i] for i, w in enumerate(vocabulary)) / sum(counts.values())
    rows *= np.sqrt(dim) / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(np.stack(list(vectors.values())), rows, rtol=1e-9, atol=1e-9)


def test_vectors_know_which_words_are_alike():
    train, _ = datasets.snips(num_train=2044, num_test=1)
    vectors = {
        word: vector
        for words, rows in zip(train.words, train.tokens, strict=True)
        for word, vector in zip(words, rows, strict=False)
    }
    for word, alike, unlike in [
        ("movie", "film", "weather"),
        ("weather", "forecast", "playlist"),
        ("playlist", "album", "restaurant"),
        ("seven", "six", "song"),
    ]:
        assert vectors[word] @ vectors[alike] > vectors[word] @ vectors[unlike], word


def test_a_word_that_stands_alone_is_zero():
    vectors = word_vectors([*SENTENCES, ["stop"]], 2, min_count=1)
    assert not vectors.pop("stop").any()
    np.testing.assert_allclose([np.linalg.norm(v) for v in vectors.values()], np.sqrt(2))


def test_embed_pads_with_zeros_and_masks():
    vectors = {"play": np.array([1.0, 2.0]), "music": np.array([3.0, 4.0])}
    tokens, mask = embed([["play"], ["play", "new", "music"], []], vectors)
    expected = [[[1, 2], [0, 0], [0, 0]], [[1, 2], [0, 0], [3, 4]], [[0, 0]] * 3]
    torch.testing.assert_close(tokens, torch.tensor(expected, dtype=torch.float64))
    assert mask.tolist() == [[True, False, False], [True, True, True], [False] * 3]
    assert embed([["play"]], vectors, torch.float32)[0].dtype == torch.float32


# SNIPS


def test_shapes_masks_and_classes(pair):
    for data, number in zip(pair, (490, 700), strict=True):
        assert len(data) == len(data.words) == number
        assert data.tokens.shape == (number, max(map(len, data.words)), 16)
        assert data.mask.sum(1).tolist() == [len(words) for words in data.words]
        assert not data.tokens[~data.mask].any()
        assert data.intent.bincount().tolist() == [number // 7] * 7
        assert len(data.intent_names) == 7
        assert data.intent_names[data.intent[2]] == "GetWeather"
    assert any(word in pair[0].words[2] for word in ("weather", "forecast", "snow", "rain", "warm"))


def test_no_held_out_sentence_is_seen_in_training():
    train, test = datasets.snips(num_train=2044)
    assert not set(train.words) & set(test.words)


def test_a_known_word_has_one_vector_of_unit_scale(pair):
    train, test = pair
    lengths = torch.cat([data.tokens[data.mask].norm(dim=-1) for data in pair])
    known = lengths > 0
    torch.testing.assert_close(lengths[known], torch.full_like(lengths[known], 4.0))
    assert 0.75 < known.double().mean() < 0.9
    row, column = next(
        (i, words.index("weather")) for i, words in enumerate(test.words) if "weather" in words
    )
    same = [words.index("weather") if "weather" in words else None for words in train.words]
    other = next(i for i, place in enumerate(same) if place is not None)
    torch.testing.assert_close(test.tokens[row, column], train.tokens[other, same[other]])


def test_vectors_do_not_depend_on_the_labeled_selection():
    small, _ = datasets.snips(num_train=7, num_test=1)
    large, _ = datasets.snips(num_train=700, num_test=1)
    assert large.words[:7] == small.words
    width = small.tokens.shape[1]
    torch.testing.assert_close(large.tokens[:7, :width], small.tokens, rtol=0, atol=0)


def test_seeds(pair):
    again = datasets.snips(dtype=torch.float64)
    other = datasets.snips(seed=1, dtype=torch.float64)
    for first, same, different in zip(pair, again, other, strict=True):
        assert first.words == same.words
        assert torch.equal(first.tokens, same.tokens)
        assert first.words != different.words


def test_uneven_numbers_differ_by_at_most_one():
    train, test = datasets.snips(num_train=12, num_test=5)
    assert train.intent.bincount().tolist() == [2] * 5 + [1] * 2
    assert test.intent.tolist() == [0, 1, 2, 3, 4]


def test_options():
    train, test = datasets.snips(num_train=21, num_test=7, dim=5, max_tokens=3, dtype=torch.float32)
    assert train.tokens.shape == (21, 3, 5)
    assert train.tokens.dtype == torch.float32
    assert all(len(words) <= 3 for words in test.words)
    assert datasets.snips(num_train=7, num_test=7)[0].tokens.dtype == torch.float64


def test_linear_classifier_on_mean_vectors(pair):
    """Above .95 (chance is 1/7): the vectors carry the intents."""
    train, test = pair
    accuracy = (logits_of(train, test, mean_pooled).argmax(-1) == test.intent).double().mean()
    assert accuracy > 0.95
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    shuffled = dataclasses.replace(train, intent=train.intent[order])
    by_chance = logits_of(shuffled, test, mean_pooled).argmax(-1) == test.intent
    assert by_chance.double().mean() < 0.4


def test_standard_normal_queries_attend_neither_evenly_nor_to_one_word(pair, generator):
    _, test = pair
    query = torch.randn(100, 16, generator=generator)
    mask = test.mask[:, None]
    logits = query @ test.tokens.mT / 4
    assert 0.9 < logits.movedim(1, -1)[test.tokens.norm(dim=-1) > 0].std() < 1.1
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    entropy = torch.special.entr(weights).sum(-1) / mask.sum(-1).log()
    assert 0.8 < entropy.mean() < 0.95
    assert 0.2 < weights.max(-1).values.mean() < 0.4


# Data set objects


def test_slices_agree_in_every_part(pair):
    _, test = pair
    rows = [4, 5]
    for index in (slice(4, 6), rows, torch.tensor(rows), torch.arange(700) // 2 == 2):
        part = test[index]
        assert part.words == tuple(test.words[row] for row in rows)
        assert torch.equal(part.tokens, test.tokens[rows])
        assert torch.equal(part.mask, test.mask[rows])
        assert torch.equal(part.intent, test.intent[rows])
        tokens, mask = test.inputs[index]
        assert torch.equal(tokens, part.tokens)
        assert torch.equal(mask, part.mask)


def test_inputs_unpack_into_a_call(pair):
    def model(tokens, mask):
        return tokens.shape, mask.shape

    longest = pair[1].tokens.shape[1]
    assert model(*pair[1].inputs) == ((700, longest, 16), (700, longest))
    assert model(*pair[1].inputs[:5]) == ((5, longest, 16), (5, longest))


def test_integers_keep_the_sentence_axis(pair):
    _, test = pair
    assert len(test[2]) == 1
    assert test[-1].words == test[699].words == (test.words[699],)
    assert sum(1 for _ in test[:3]) == 3
    with pytest.raises(IndexError, match=r"\[-700, 700\), got 700"):
        test[700]


def test_to_converts_the_vectors_only(pair):
    moved = pair[1].to(dtype=torch.float32, device="cpu")
    assert moved.tokens.dtype == torch.float32
    assert moved.mask.dtype == torch.bool
    assert moved.intent.dtype == torch.int64
    assert moved.words == pair[1].words


def test_data_sets_are_frozen_and_print_briefly(pair):
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair[0].intent = None
    longest = pair[0].tokens.shape[1]
    assert repr(pair[0]) == (
        f"TextDataset(490 sentences, up to {longest} words, 16-dimensional vectors, 7 intents)"
    )


def test_the_license_is_shipped_beside_the_file():
    folder = resources.files("bayesattn.datasets")
    assert "CC0 1.0" in folder.joinpath("snips_license.txt").read_text()
    lines = gzip.decompress(folder.joinpath("snips.tsv.gz").read_bytes()).decode().splitlines()
    splits = Counter(tuple(line.split("\t")[:2]) for line in lines)
    assert sorted(splits.values()) == [100] * 7 + [300] * 7


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train": 0}, r"num_train must be between 1 and 2044, got 0"),
        ({"num_train": 2045}, r"num_train must be between 1 and 2044, got 2045"),
        ({"num_test": 701}, r"num_test must be between 1 and 700, got 701"),
        ({"dim": 0}, r"dim must be at least 1 .* got 0"),
        ({"dim": 5000}, r"dim must be at least 1 and below .* \(1069\), got 5000"),
        ({"max_tokens": 0}, r"max_tokens must be at least 1, got 0"),
        ({"seed": -1}, r"seed must not be negative, got -1"),
        ({"dtype": torch.int64}, r"floating-point one, got torch.int64"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        datasets.snips(**options)


def test_a_window_of_nothing():
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        cooccurrence(SENTENCES, VOCABULARY, 0)
