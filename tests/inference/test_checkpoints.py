"""Checkpoints: a run that goes on is, bit for bit, the run that was never stopped."""

import copy
import functools
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesattn.inference import NUTS, SPOS, SVGD, SVI, Checkpoint
from bayesattn.inference.checkpoints import CheckpointFile, described
from bayesattn.kernels import IMQ, RBF


def regression(design, target):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(torch.ones(())))
    with pyro.plate("row", len(design)):
        pyro.sample("target", dist.Normal(design @ weight, noise), obs=target)


def minibatches(design, target):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", len(design), subsample_size=5) as rows:
        pyro.sample("target", dist.Normal(design[rows] @ weight, 1.0), obs=target[rows])


def heads(design, target):
    with pyro.plate("head", 3):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    level = pyro.sample("level", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("row", len(design)):
        pyro.sample("target", dist.Normal((design @ weight).sum(-1) + level, 1.0), obs=target)


def stochastic(design, target):
    """Dropout of inputs, drawn anew at each step."""
    design = torch.nn.functional.dropout(design, 0.3)
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", len(design)):
        pyro.sample("target", dist.Normal(design @ weight, 1.0), obs=target)


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    design = torch.randn(23, 3, generator=generator)
    noise = torch.randn(23, generator=generator)
    return design, design @ torch.tensor([1.0, -2.0, 0.5]) + noise


SHORT = {"progress": False, "seed": 5}
CASES = {
    "svgd": (SVGD(regression, num_particles=20), {"num_steps": 240, "num_runs": 2}),
    "svgd, minibatches": (SVGD(minibatches, num_particles=7), {"num_steps": 30}),
    "svgd, stochastic": (
        SVGD(stochastic, num_particles=7, stochastic=True),
        {"num_steps": 30},
    ),
    "svgd, laplace": (
        SVGD(regression, num_particles=7, coordinates="laplace"),
        {"num_steps": 70},
    ),
    "svgd, other optimizer": (
        SVGD(regression, num_particles=7, optimizer=lambda p: torch.optim.RMSprop(p, lr=0.01)),
        {"num_steps": 30},
    ),
    "heads": (SVGD(heads, particle_plate="head"), {"num_steps": 30, "num_runs": 2}),
    "spos": (
        SPOS(regression, num_particles=7, step_size=1e-3),
        {"warmup_steps": 20, "num_samples": 5},
    ),
    "spos, heads": (SPOS(heads, particle_plate="head"), {"warmup_steps": 20, "num_samples": 5}),
    "svi": (SVI(regression), {"num_steps": 30, "num_samples": 7}),
    "svi, laplace": (SVI(regression, coordinates="laplace"), {"num_steps": 30, "num_samples": 7}),
    "svi, two runs": (SVI(regression), {"num_steps": 30, "num_samples": 7, "num_runs": 2}),
    "nuts": (NUTS(regression), {"warmup_steps": 15, "num_samples": 15}),
    "nuts, full mass": (
        NUTS(regression, full_mass=True, coordinates="laplace"),
        {"warmup_steps": 25, "num_samples": 5},
    ),
    "nuts, chains": (NUTS(regression), {"warmup_steps": 20, "num_samples": 10, "num_chains": 2}),
    "svi, point": (SVI(regression, guide="delta"), {"num_steps": 30}),
}


class StopAt:
    """A checkpoint that interrupts the run, as Ctrl-C does, once so many steps are done."""

    def __init__(self, monkeypatch, done):
        self.done, self.saved = done, 0
        is_due = CheckpointFile.is_due

        def watched(file, done):
            if done == self.done:
                signal.raise_signal(signal.SIGINT)
            return is_due(file, done)

        monkeypatch.setattr(CheckpointFile, "is_due", watched)


@pytest.mark.filterwarnings("ignore::bayesattn.inference.ConvergenceWarning")
@pytest.mark.parametrize(("routine", "length"), CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    "done", [pytest.param(1, marks=pytest.mark.slow), 13, pytest.param(29, marks=pytest.mark.slow)]
)
def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(
    routine, length, done, tmp_path, monkeypatch
):
    """Mutants: a state left out of the checkpoint (generator, moments, metric, kept draws)."""
    whole = routine.run(*data(), **length, **SHORT)
    path = tmp_path / "run.checkpoint"
    with monkeypatch.context() as patch:
        StopAt(patch, done)
        try:
            with pytest.warns(RuntimeWarning, match="interrupted"):
                stopped = routine.run(*data(), **length, **SHORT, checkpoint=path)
            assert stopped.attrs["interrupted"] == 1
        except KeyboardInterrupt:
            # Of Markov chains in their warmup there are no draws yet.
            assert isinstance(routine, NUTS)
    resumed = routine.run(*data(), **length, **SHORT, checkpoint=path)
    assert_same(whole, resumed)
    # What is done is not done again.
    again = routine.run(*data(), **length, **SHORT, checkpoint=path)
    assert_same(whole, again)


def assert_same(first, second):
    assert torch.equal(first.unconstrained, second.unconstrained)
    for field in ("draws", "sample_stats", "optimization", "point_estimates"):
        ours, theirs = getattr(first, field), getattr(second, field)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value.nan_to_num(), theirs[name].nan_to_num()), name
    assert {k: v for k, v in first.attrs.items() if k != "seconds"} == {
        k: v for k, v in second.attrs.items() if k != "seconds"
    }


def test_a_fresh_seed_is_the_checkpoints(tmp_path, monkeypatch):
    routine, path = SVGD(regression, num_particles=3), tmp_path / "run"
    length = {"num_steps": 30, "progress": False, "checkpoint": path}
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        StopAt(patch, 13)
        stopped = routine.run(*data(), **length)
    resumed = routine.run(*data(), **length)
    assert resumed.attrs["seed"] == stopped.attrs["seed"]
    with pytest.raises(ValueError, match="another run: its seed is"):
        routine.run(*data(), **length, seed=(stopped.attrs["seed"] + 1) % 2**32)


CHILD = """
import sys, torch
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
from bayesattn.inference import SVGD, Checkpoint
from tests.inference.test_checkpoints import data, minibatches

routine = SVGD(minibatches, num_particles=7)
checkpoint = Checkpoint(sys.argv[1], every_steps=1) if sys.argv[1] else None
posterior = routine.run(
    *data(), num_steps=int(sys.argv[2]), seed=3, progress=False, checkpoint=checkpoint
)
torch.save(posterior.unconstrained, sys.argv[3])
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on(tmp_path):
    """With SIGKILL, again and again, while every step is being written."""

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CHILD), *map(str, arguments)], cwd=Path.cwd()
        )

    num_steps = 3000
    assert start("", num_steps, tmp_path / "whole").wait() == 0
    path, result = tmp_path / "run.checkpoint", tmp_path / "resumed"
    kills = 0
    for attempt in range(50):
        process = start(path, num_steps, result)
        while not path.exists() and process.poll() is None:
            time.sleep(0.01)
        if attempt:
            # Past the start of Python, at another moment each time.
            time.sleep(5.0)
        time.sleep(0.3 + 0.37 * attempt % 1.0)
        if process.poll() is None and kills < 4:
            process.send_signal(signal.SIGKILL)
            kills += 1
            process.wait()
            continue
        assert process.wait() == 0
        break
    assert kills >= 2
    assert torch.equal(torch.load(result), torch.load(tmp_path / "whole"))
    assert not list(tmp_path.glob(".run*")) or kills


def other_sites(design, target):
    pyro.sample("slope", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def other_shapes(design, target):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    pyro.sample("noise", dist.HalfNormal(torch.ones(())))
    pyro.sample("target", dist.Normal(weight.sum(), 1.0), obs=target[0])


def other_support(design, target):
    pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("noise", dist.Normal(torch.zeros(()), 1.0))


@pytest.mark.parametrize(
    ("routine", "num_steps", "name"),
    [
        (SVGD(other_sites, num_particles=3), 5, "sites"),
        (SVGD(other_shapes, num_particles=3), 5, "sites"),
        (SVGD(other_support, num_particles=3), 5, "sites"),
        (SVGD(regression, num_particles=4), 5, "num_particles"),
        (SVGD(regression, num_particles=3, kernel=RBF()), 5, "kernel"),
        (SVGD(regression, num_particles=3, kernel=IMQ(2.0)), 5, "kernel"),
        (SVGD(regression, num_particles=3, compile="none"), 5, "evaluation"),
        (SVGD(regression, num_particles=3), 6, "num_steps"),
        (SVI(regression), 5, "method"),
    ],
)
def test_checkpoints_of_other_runs_are_refused(routine, num_steps, name, tmp_path):
    path = tmp_path / "run"
    SVGD(regression, num_particles=3).run(*data(), num_steps=5, **SHORT, checkpoint=path)
    with pytest.raises(ValueError, match=rf"checkpoint of another run: its {name} is"):
        routine.run(*data(), num_steps=num_steps, **SHORT, checkpoint=path)


def test_checkpoints_of_other_data_are_refused(tmp_path):
    routine, path = SVGD(regression, num_particles=3), tmp_path / "run"
    design, target = data()
    routine.run(design, target, num_steps=5, **SHORT, checkpoint=path)
    with pytest.raises(ValueError, match="another run: its arguments is"):
        routine.run(design, -target, num_steps=5, **SHORT, checkpoint=path)


def test_another_stopping_rule_is_another_run(tmp_path):
    routine, path = SVGD(regression, num_particles=5), tmp_path / "run"
    length = {"num_steps": 300, "checkpoint": path, **SHORT}
    first = routine.run(*data(), **length, stop_below_ksd=5.0)
    assert first.attrs["is_settled"] == 1
    again = routine.run(*data(), **length, stop_below_ksd=5.0)
    assert_same(first, again)
    with pytest.raises(ValueError, match="another run: its stop_below_ksd is"):
        routine.run(*data(), **length)


def adam(rate):
    return lambda tensors: torch.optim.Adam(tensors, lr=rate)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (adam(0.1), adam(0.01)),
        (functools.partial(adam, 0.1), functools.partial(adam, 0.01)),
        (RBF(torch.tensor(1.0)), RBF(torch.tensor(1.00001))),
        (RBF() + IMQ(), RBF() + RBF()),
        (torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float32)),
        ({"a": 1}, {"a": 2}),
    ],
)
def test_settings_are_told_apart_by_what_is_in_them(one, other):
    assert described(one) != described(other)
    assert described(one) == described(copy.deepcopy(one))
    assert " at 0x" not in str(described(one))


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "run"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="run is no checkpoint of bayesattn"):
        SVGD(regression).run(*data(), num_steps=5, **SHORT, checkpoint=path)


def test_places_that_cannot_be_written_are_refused_before_the_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        SVGD(regression).run(*data(), num_steps=5, checkpoint=tmp_path / "no" / "run", **SHORT)
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        SVGD(regression).run(*data(), num_steps=5, checkpoint=tmp_path, **SHORT)


@pytest.mark.parametrize("settings", [{"every_steps": 0}, {"every_seconds": -1.0}])
def test_intervals_must_be_positive(settings):
    with pytest.raises(ValueError, match="must be positive, got"):
        Checkpoint("run", **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"every_steps": 7}, [7, 14, 20]), ({"every_seconds": 1e-9}, [*range(1, 21), 20])],
)
def test_it_is_saved_as_often_as_was_asked(settings, expected, tmp_path, monkeypatch):
    saved, save = [], CheckpointFile.save

    def noted(file, state):
        saved.append(state["record"]["done"])
        save(file, state)

    monkeypatch.setattr(CheckpointFile, "save", noted)
    checkpoint = Checkpoint(tmp_path / "run", **settings)
    SVGD(regression, num_particles=3).run(*data(), num_steps=20, **SHORT, checkpoint=checkpoint)
    assert saved == expected


def test_another_version_is_told(tmp_path, monkeypatch):
    path, routine = tmp_path / "run", SVGD(regression, num_particles=3)
    routine.run(*data(), num_steps=5, **SHORT, checkpoint=path)
    monkeypatch.setattr("platform.machine", lambda: "abacus")
    with pytest.warns(RuntimeWarning, match="bits may differ .* then, Linux abacus now"):
        routine.run(*data(), num_steps=5, **SHORT, checkpoint=path)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
trees = st.recursive(
    plain,
    lambda t: st.lists(t) | st.tuples(t, t) | st.dictionaries(st.text() | st.integers(), t),
    max_leaves=20,
)


@given(tree=trees)
def test_what_is_saved_is_loaded(tree, tmp_path_factory):
    file = CheckpointFile(Checkpoint(tmp_path_factory.mktemp("tree") / "run"), {"method": "none"})
    tensors = [torch.arange(3)[::2], torch.tensor(True), torch.zeros(0, 2), torch.eye(2).half()]
    file.save({"tree": tree, 1: tensors})
    loaded = file.load()
    np.testing.assert_equal(loaded["tree"], tree)
    assert type(loaded["tree"]) is type(tree)
    for found, expected in zip(loaded[1], tensors, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
