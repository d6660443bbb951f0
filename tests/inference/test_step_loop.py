"""Tests of bayesattn.inference.step_loop: what is kept when a run is stopped or goes wrong."""

import math
import signal
import threading
from typing import NamedTuple

import pytest
import torch

from bayesattn.inference.posterior import Posterior
from bayesattn.inference.running import NonFiniteError, Watched
from bayesattn.inference.step_loop import StepLoop, interruptible


class Info(NamedTuple):
    height: torch.Tensor
    watched: Watched


class Walk:
    """A number that grows by one a step, and whose log density fails from some height on."""

    dim = 1
    device = torch.device("cpu")
    enough = math.inf

    def __init__(self, start=0.0, bad_from=math.inf, interrupt_at=None):
        self.height, self.bad_from, self.interrupt_at = start, bad_from, interrupt_at

    def evaluate(self):
        value = torch.nan if self.height >= self.bad_from else -self.height
        return Watched(torch.tensor(value), torch.tensor([value]))

    def advance(self, step):
        if step == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)
        info = Info(torch.tensor([self.height]), self.evaluate())
        self.height += 1
        return info

    def snapshot(self):
        return self.height

    def is_settled(self):
        return self.height >= self.enough

    def state_dict(self):
        return {"height": self.height}

    def load_state_dict(self, state):
        self.height = state["height"]

    def figures(self, info):
        return {"height": float(info.height)}

    def names(self, entries):
        return ["height"] if bool(entries[0]) else []

    def finish(self, snapshot, curves, attrs):
        draws = {"height": torch.tensor([[snapshot]])}
        return Posterior(draws, method="Walk", draws_are="point", optimization=curves, attrs=attrs)


def loop(num_steps=20, check_every=5):
    return StepLoop("Walk", num_steps, 0, False, check_every)


def test_a_run_does_all_its_steps():
    posterior = loop().run(Walk())
    assert posterior.draws["height"].item() == 20
    assert posterior.attrs["num_steps"] == 20
    assert posterior.attrs["seed"] == 0
    assert posterior.optimization["height"].tolist() == [list(range(20))]


@pytest.mark.parametrize(
    ("bad_from", "kept"), [(0, 0), (1, 0), (3, 0), (5, 4), (9, 4), (12, 9), (19, 14), (20, 19)]
)
def test_a_bad_step_leaves_the_last_state_known_to_be_good(bad_from, kept):
    """Mutants: a snapshot after the step, which nothing has evaluated; no look at the end."""
    with pytest.raises(NonFiniteError, match=f"at step {bad_from}, first in height") as caught:
        loop().run(Walk(bad_from=bad_from))
    error = caught.value
    assert (error.step, error.sites) == (bad_from, ["height"])
    assert error.posterior.draws["height"].item() == kept
    assert error.posterior.attrs["num_steps"] == kept
    assert not kept or error.posterior.optimization["height"].shape == (1, kept)


@pytest.mark.parametrize("step", [0, 3, 7])
def test_an_interrupted_run_returns_what_it_has(step):
    with pytest.warns(RuntimeWarning, match=f"interrupted after {step + 1} of 20 steps") as caught:
        posterior = loop().run(Walk(interrupt_at=step))
    assert len(caught) == 1
    assert posterior.draws["height"].item() == step + 1
    assert posterior.attrs["interrupted"] == 1
    assert posterior.optimization["height"].shape == (1, step + 1)


def test_an_interrupted_run_that_went_wrong_says_so():
    with pytest.raises(NonFiniteError) as caught:
        loop().run(Walk(bad_from=7, interrupt_at=8))
    assert caught.value.posterior.draws["height"].item() == 4


def test_an_interrupt_at_the_last_step_is_none():
    assert "interrupted" not in loop().run(Walk(interrupt_at=19)).attrs


@pytest.fixture
def interrupts_raise():
    """Python's own handler, which a process started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_interrupts(interrupts_raise):
    with interruptible() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_threads_leave_signals_alone():
    seen = []

    def work():
        with interruptible() as stop:
            seen.append((stop.is_set(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGINT))]


def test_streams_of_one_seed_are_not_the_same_numbers():
    """Starts come from the generator, noise from global state: equal streams would be tied."""
    run = loop()
    with run.random_state(torch.device("cpu")):
        noise = torch.rand(3)
    assert not torch.equal(noise, torch.rand(3, generator=torch.Generator().manual_seed(run.seed)))


@pytest.mark.parametrize("name", ["num_steps", "check_every"])
@pytest.mark.parametrize("value", [0, -1, 2.5])
@pytest.mark.usefixtures("unchecked_types")
def test_numbers_of_steps_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number, at least 1, got {value}"):
        loop(**{name: value})


def test_a_run_that_has_settled_does_no_more_steps(recwarn):
    """It is asked at looks only, every five steps."""
    walk = Walk()
    walk.enough = 7
    posterior = loop().run(walk)
    assert posterior.attrs["num_steps"] == 10
    assert posterior.attrs["is_settled"] == 1
    assert posterior.optimization["height"].shape == (1, 10)
    assert "interrupted" not in posterior.attrs
    assert not recwarn.list
