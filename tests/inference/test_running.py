"""Tests of bayesattn.inference.running: private state, the watch, the bar."""

import random

import numpy as np
import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesattn.inference.running import (
    NonFiniteWatch,
    Progress,
    Watched,
    private_param_store,
    resolve_seed,
    seeded,
)


def draws():
    return (
        torch.rand(3).tolist(),
        np.random.rand(3).tolist(),
        [random.random() for _ in range(3)],
    )


def test_seeded_draws_repeat_and_leave_no_trace():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with seeded(7):
        first = draws()
    with seeded(7):
        assert draws() == first
    with seeded(8):
        assert all(a != b for a, b in zip(draws(), first, strict=True))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_state_comes_back_after_an_error():
    def fail():
        with private_param_store(), seeded(1):
            pyro.param("mine", torch.ones(1))
            torch.rand(3)
            raise KeyError

    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.get_rng_state(), before)
    assert "mine" not in pyro.get_param_store()


def test_other_devices_are_not_seeded(monkeypatch):
    """Mutant: torch.manual_seed, which seeds them all and forks the CPU only."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    with seeded(7):
        pass
    assert not seeds


def test_seeds_are_whole_numbers():
    assert resolve_seed(np.int64(3)) == 3
    assert resolve_seed(None) != resolve_seed(None)
    for bad in (-1, 2**32, 1.5, True, "0"):
        with pytest.raises(ValueError, match="seed must be an integer in"):
            resolve_seed(bad)


def test_private_store_hides_and_restores():
    with private_param_store({"params": {}, "constraints": {}}):
        mine = pyro.param("mine", torch.tensor(1.0))
        with private_param_store():
            assert "mine" in pyro.get_param_store()
            pyro.param("other", torch.tensor(2.0))
        assert "other" not in pyro.get_param_store()
        with private_param_store({"params": {}, "constraints": {}}):
            assert not list(pyro.get_param_store())
        # What a running program holds is as it was, Pyro's own mark on it included.
        assert pyro.param("mine") is mine
        assert mine.unconstrained() is mine
    assert "mine" not in pyro.get_param_store()


def observed(watch, rows):
    for step, row in enumerate(rows):
        values = torch.tensor(row[:1])
        watch.observe(step, Watched.of(values, torch.tensor(row[1:])[None].expand(2, -1)))


@given(
    bad=st.sets(st.integers(0, 129), max_size=3),
    entry=st.integers(0, 2),
    kind=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
def test_watch_finds_the_first_bad_step_and_its_entries(bad, entry, kind):
    """Also where sums are looked through many at a time; entry 0 is the value itself."""
    rows = [[0.0, 1.0, -1.0] for _ in range(130)]
    for step in bad:
        rows[step][entry] = kind
    watch = NonFiniteWatch(2, torch.device("cpu"))
    observed(watch, rows)
    assert watch.poll() == (min(bad) if bad else None)
    assert watch.bad_entries().tolist() == [bool(bad) and entry == e for e in (1, 2)]
    observed(watch, [[kind, kind, kind]])
    assert watch.poll() == (min(bad) if bad else 0)


def test_opposite_infinities_do_not_cancel():
    watch = NonFiniteWatch(1, torch.device("cpu"))
    opposite = torch.tensor([[float("inf")], [-float("inf")]])
    watch.observe(0, Watched.of(torch.tensor([0.0]), opposite))
    assert watch.poll() == 0


def test_bar_shows_label_figures_and_time_left(capsys):
    with Progress(3, "SVGD", True) as bar:
        for step in range(3):
            bar.advance(lambda step=step: {"log density": -1234.5678 * (step + 1)})
    shown = capsys.readouterr().err
    assert "SVGD: 100%" in shown
    assert "3/3" in shown
    assert "<00:00" in shown
    assert "log density=-3704" in shown


def test_hidden_bar_is_silent_and_asks_for_no_figures(capsys):
    def figures():
        raise AssertionError("figures synchronize the device")

    with Progress(2, "SVGD", False) as bar:
        bar.advance(figures)
        bar.advance()
    captured = capsys.readouterr()
    assert not captured.out
    assert not captured.err
