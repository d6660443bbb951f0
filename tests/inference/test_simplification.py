"""Simplified graphs compute what the recorded function does, with fewer operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad_and_value, vmap

from bayesattn.inference.recording import record


def operations(graph):
    nodes = [node for node in graph.module.graph.nodes if node.op == "call_function"]
    return [node.target.__name__.split(".")[0] for node in nodes]


def check(function, *inputs, kept=None):
    """Replay twice on other inputs than were recorded; compare with the function itself."""
    graph = record(function, tuple(torch.ones_like(x) for x in inputs))
    for shift in (0.0, 1.5):
        moved = [x + shift if x.is_floating_point() else x for x in inputs]
        torch.testing.assert_close(graph(*moved), function(*moved), rtol=0, atol=0)
    if kept is not None:
        assert operations(graph) == kept
    return graph


X = torch.tensor([0.3, -0.7, 2.0], dtype=torch.float64)


def test_what_does_nothing_is_dropped():
    def function(x):
        same = (x * torch.tensor(1.0) + torch.zeros_like(x)).view(3).expand(3)
        alone = (same - 0.0).pow(1.0).unsqueeze(0).sum(0)
        return ((torch.ones(3) * alone) / 1.0).exp() * 2.0

    check(function, X, kept=["exp", "mul"])


def test_literals_are_computed_beforehand():
    def function(x):
        return x + (torch.tensor(2.0).log() + torch.arange(3).exp().sum()).sqrt()

    check(function, X, kept=["add"])


def test_equal_operations_are_merged():
    check(lambda x: x.exp() + x.exp() * x.exp().sum(), X, kept=["exp", "sum", "mul", "add"])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 1 - (x + 2),
        lambda x: 1.0 / (x * 0.0) - 1.0 / (x * -0.0),
        lambda x: 0.0 - x,
        lambda x: 1.0 / x,
        lambda x: (x.sum(0), x.sum(0, keepdim=True), x[None].sum(1)),
        lambda x: (x - x.view(3, 1) * 1.0).unsqueeze(0).sum(0, keepdim=True),
        lambda x: torch.where(x > 0, x, 0.0) * torch.ones(3)[:1],
        lambda x: x + torch.zeros(2, 3),
        lambda x: x.sum() * torch.ones(3),
    ],
)
def test_what_only_looks_like_nothing_is_kept(function):
    check(function, X)


def test_numbers_of_other_types_are_not_equal():
    def function(n):
        return n * 1, n * 1.0, n * True, n + 2, n + 2.0

    counts = torch.tensor([1, 2, 3])
    graph = record(function, (counts,))
    for got, expected in zip(graph(counts), function(counts), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)


def test_writes_in_place_keep_their_order():
    def function(x):
        buffer = torch.zeros(3)
        before = buffer.exp().sum()
        row = buffer[:2]
        buffer[1] = 2.0
        middle = buffer.exp().sum() + row.sum()
        buffer.add_(x)
        copied = buffer.clone()
        row.mul_(3.0)
        return before + x.sum(), middle + x.sum(), buffer.exp().sum(), copied

    check(function, X)


def test_results_are_fresh_and_apart():
    graph = record(lambda x: (torch.zeros(3), torch.zeros(3), x + 0.0, x.exp(), x.exp()), (X,))
    first = graph(X)
    for result in first:
        result.add_(7.0)
    assert X[0] == 0.3
    zeros, others, same, one, other = graph(X)
    assert zeros.sum() == others.sum() == 0.0
    torch.testing.assert_close(same, X)
    torch.testing.assert_close(one, X.exp())
    assert len({result.data_ptr() for result in (zeros, others, same, one, other)}) == 5


def test_constants_from_outside_are_read_at_each_call():
    outside = torch.tensor(2.0)
    graph = record(lambda x: x * outside.square(), (X,))
    outside.fill_(3.0)
    torch.testing.assert_close(graph(X), 9.0 * X)


def test_random_numbers_are_drawn_anew_and_apart():
    def function(x):
        return x + torch.rand(3), x + torch.rand(3)

    graph = record(function, (X,))
    with torch.random.fork_rng():
        one, other = graph(X)
        third, _ = graph(X)
    assert not torch.equal(one, other)
    assert not torch.equal(one, third)


def test_large_constants_stay_formulas():
    graph = record(lambda x: x * torch.ones(2**16 + 1).cumsum(0)[-1], (X,))
    assert "cumsum" in operations(graph)
    graph = record(lambda x: x * torch.ones(2**10).cumsum(0)[-1], (X,))
    assert operations(graph) == ["mul"]


def test_sizes_that_a_mask_decides_are_left_alone():
    mask = torch.tensor([True, False, True])
    graph = check(lambda x: (x[mask] + 0.0).exp() * torch.ones(3)[mask] * (2.0 * 1.0), X)
    mask.fill_(True)
    torch.testing.assert_close(graph(X), X.exp() * 2.0)


STEPS = {
    "exp": lambda x, y: (x * 0.1).tanh().exp(),
    "add": lambda x, y: x + y,
    "add zero": lambda x, y: x + torch.zeros_like(y),
    "times one": lambda x, y: torch.ones(()) * x,
    "literal": lambda x, y: x * torch.tensor(0.5).exp(),
    "view": lambda x, y: x.view(3, 1).expand(3, 2)[:, 0],
    "same view": lambda x, y: x.view(3).expand(3)[0:3],
    "sum": lambda x, y: x.unsqueeze(-1).sum(-1) + y.sum(),
    "write": lambda x, y: torch.stack([x, y]).index_fill_(1, torch.tensor([1]), 2.0).sum(0),
    "write in view": lambda x, y: (z := x.clone(), z[:1].mul_(3.0), z)[2] + x,
    "square": lambda x, y: x**2 * 0.1,
    "where": lambda x, y: torch.where(x > 0, x, y),
}


@settings(max_examples=30)
@given(
    names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6),
    order=st.lists(st.integers(0, 5), min_size=6, max_size=6),
)
def test_random_functions_and_their_gradients(names, order):
    def single(x, y):
        pool = [x, y]
        for name, place in zip(names, order, strict=False):
            pool.append(STEPS[name](pool[-1], pool[place % len(pool)]))
        return pool[-1].sum()

    def function(rows, y):
        return vmap(grad_and_value(single), in_dims=(0, None))(rows, y)

    rows = torch.linspace(-1.0, 1.0, 6).view(2, 3)
    graph = record(function, (torch.ones(2, 3), torch.ones(3)))
    for got, expected in zip(graph(rows, X), function(rows, X), strict=True):
        torch.testing.assert_close(got, expected)
