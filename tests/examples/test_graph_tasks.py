"""Readers of citation graphs: words as rows that sum to one, both directions, the public split."""

import numpy as np
import pytest
import torch

from examples.reproduce.graph_tasks import GRAPHS, read_graph

# Of six papers and five words; the fifth paper has no word, no citation and no class.
WORDS = [[0, 3], [1], [0, 1, 2, 4], [3], [], [2]]
EDGES = [[0, 2], [1, 2], [3, 5]]


@pytest.fixture
def arrays():
    return {
        "x_data": np.ones(9, dtype=np.float32),
        "x_indices": np.array([word for row in WORDS for word in row], dtype=np.int32),
        "x_indptr": np.cumsum([0, *map(len, WORDS)]).astype(np.int32),
        "x_shape": np.array([6, 5]),
        "y": np.array([1, 0, 2, 1, -1, 0], dtype=np.int8),
        "edges": np.array(EDGES, dtype=np.int32),
        "train": np.array([0, 1]),
        "val": np.array([5]),
        "test": np.array([3, 2]),
    }


def saved(arrays, folder, name="cora"):
    (folder / "planetoid").mkdir(exist_ok=True)
    np.savez(folder / "planetoid" / f"{name}.npz", **arrays)
    return folder


def test_a_graph_is_read(arrays, tmp_path):
    """Mutants: one direction only; no self-loops; rows that are not normalized; parts exchanged."""
    graph = read_graph("cora", saved(arrays, tmp_path), 0)
    assert graph is not None
    expected = torch.zeros(6, 5)
    for paper, words in enumerate(WORDS):
        for word in words:
            expected[paper, word] = 1 / len(words)
    assert graph.features.is_sparse
    assert graph.features.is_coalesced()
    torch.testing.assert_close(graph.features.to_dense(), expected)
    pairs = {*map(tuple, EDGES), *((b, a) for a, b in EDGES), *((a, a) for a in range(6))}
    assert sorted(map(tuple, graph.edges.T.tolist())) == sorted(pairs)
    assert graph.label.tolist() == [1, 0, 2, 1, -1, 0]
    assert graph.train.tolist() == [0, 1]
    assert graph.validation.tolist() == [5]
    assert graph.test.tolist() == [3, 2]
    sizes = {"train": 2, "validation": 1, "test": 2, "nodes": 6, "classes": 3}
    assert graph.sizes() == sizes


def test_the_split_is_the_published_one(arrays, tmp_path):
    folder = saved(arrays, tmp_path, "citeseer")
    first, other = (read_graph("citeseer", folder, seed) for seed in (0, 1))
    assert torch.equal(first.train, other.train)
    assert torch.equal(first.test, other.test)


@pytest.mark.parametrize(
    "change", [{"test": np.array([3, 4])}, {"val": np.array([1])}, {"train": np.array([0, 0])}]
)
def test_parts_share_nothing_and_are_labeled(change, arrays, tmp_path):
    """Mutant: a paper without a class in a part, where -1 would read as the last class."""
    with pytest.raises(ValueError, match="expected parts that share no paper, each with its class"):
        read_graph("cora", saved(arrays | change, tmp_path), 0)


def test_words_are_where_the_shape_says(arrays, tmp_path):
    changed = arrays | {"x_shape": np.array([6, 4])}
    with pytest.raises(RuntimeError, match="size"):
        read_graph("cora", saved(changed, tmp_path), 0)


@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_not_there_is_none(name, tmp_path):
    assert read_graph(name, None, 0) is None
    assert read_graph(name, tmp_path, 0) is None
