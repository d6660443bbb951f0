"""A recording replays its function on other inputs, refuses decisions on values, keeps no trace."""

import gc
import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import vmap

from bayesattn.inference.recording import GraphCache, RecordingError, record, tensor_layout

X = torch.tensor([[0.3, -0.7], [2.0, 1.0]], dtype=torch.float64)


def write(x):
    buffer = torch.zeros(2)
    buffer[0] = x[0]
    return buffer


REFUSED = {
    "a decision": (lambda x: x if x.sum() > 0 else -x, "reads a tensor's value in Python"),
    "a number": (lambda x: x * float(x.sum()), "reads a tensor's value in Python"),
    "an index": (lambda x: [1.0, 2.0][int(x.sum())] * x, "reads a tensor's value in Python"),
    "an array": (lambda x: x * x.numpy().sum(), "reads a tensor's value|cannot be traced"),
    "a write": (vmap(write), "into a tensor in place"),
    "a draw": (vmap(lambda x: x + torch.rand(2)), "draws random numbers"),
    "another error": (
        lambda x: x + undefined_name,
        "cannot be traced .NameError: .*undefined_name",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_graph_is_refused_with_the_reason(name):
    function, reason = REFUSED[name]
    with pytest.raises(RecordingError, match=reason):
        record(function, (X,))


def test_a_refusal_is_told_once_and_not_logged(caplog):
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    with pytest.raises(RecordingError, match="in place"), caplog.at_level(logging.ERROR):
        record(lambda x: torch.zeros(2).add_(x), (X,))
    assert not logger.disabled
    assert not [entry for entry in caplog.records if entry.levelno >= logging.ERROR]


def choose_and_count(mask, x):
    chosen = x[mask]
    return chosen * (1.0 + sum(1 for _ in range(len(chosen))))


def test_selection_by_a_constant_is_right_until_the_constant_is_written():
    mask = torch.tensor([True, False])
    graph = record(lambda x: choose_and_count(mask, x), (torch.ones(2, 2),))
    torch.testing.assert_close(graph(X), 2.0 * X[:1])
    assert graph.is_current
    mask.fill_(True)
    assert not graph.is_current


def test_selection_by_an_input_with_a_size_in_python_is_refused():
    with pytest.raises(RecordingError, match="depends on the data"):
        record(lambda x: choose_and_count(x[:, 0] > 0, x), (X,))


def test_numbers_read_beside_a_selection_are_watched_too():
    mask, power = torch.tensor([True, False]), torch.tensor(2)

    def function(x):
        return choose_and_count(mask, x) ** int(power)

    graph = record(function, (X,))
    torch.testing.assert_close(graph(X), function(X))
    power.fill_(3)
    assert not graph.is_current


def test_a_cache_records_each_key_once_and_again_what_is_outdated():
    cache, mask = GraphCache(), torch.tensor([True, False])

    def get(key):
        return cache.get(key, lambda: record(lambda x: choose_and_count(mask, x), (X,)))

    assert get("a") is get("a")
    assert get("b") is not get("a")
    assert cache.num_recordings == 2
    mask.fill_(True)
    torch.testing.assert_close(get("a")(X), 3.0 * X)
    assert cache.num_recordings == 3


def test_a_full_cache_drops_what_was_used_longest_ago():
    cache = GraphCache(max_graphs=2)

    def get(key):
        return cache.get(key, lambda: record(lambda x: x.exp(), (X,)))

    for key in ("a", "b", "a", "c"):
        get(key)
    assert list(cache.graphs) == ["a", "c"]


def test_a_cache_gives_one_token_to_equal_constants():
    cache = GraphCache()
    assert cache.token((1, "x")) == cache.token((1, "x")) != cache.token((2, "x"))


def test_nothing_of_a_trace_is_kept():
    gc.collect()
    before = sum(type(entry) is FakeTensor for entry in gc.get_objects())
    graph = record(vmap(lambda x: (x.exp() * 1.0 + torch.zeros(2)).sum()), (X,))
    gc.collect()
    assert sum(type(entry) is FakeTensor for entry in gc.get_objects()) == before
    torch.testing.assert_close(graph(X), X.exp().sum(1))


def test_a_layout_is_what_a_recording_bakes_in():
    layout = tensor_layout(X)
    assert layout == tensor_layout(X + 1.0)
    others = [X[:1], X.T, X.float(), X[None], X.to("meta"), torch.stack([X, X], -1)[..., 0]]
    assert all(tensor_layout(other) != layout for other in others)


def test_what_is_made_from_nothing_keeps_its_dtype():
    torch.set_default_dtype(torch.float32)
    graph = record(lambda x: (x + torch.ones(2), torch.arange(2), torch.rand(2) + x), (X.float(),))
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng():
        one, count, drawn = graph(X.float())
    assert (one.dtype, count.dtype, drawn.dtype) == (torch.float32, torch.int64, torch.float32)
