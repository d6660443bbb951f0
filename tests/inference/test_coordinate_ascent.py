"""Coordinate ascent: a bound that never falls, exact laws where there are such, draws from them."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesattn.inference import Checkpoint, ConvergenceWarning, CoordinateAscent, NonFiniteError
from bayesattn.models import SharedComponents
from tests.inference.test_checkpoints import StopAt, assert_same
from tests.models.component_cases import shared_heads

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


class Sample:
    """Normal data of unknown mean and precision, with conjugate priors: a textbook's example.

    Source:
        Bishop (2006), Pattern recognition and machine learning, section 10.1.3.
    """

    def __call__(self, data):
        precision = pyro.sample("precision", dist.Gamma(2.0, 1.5))
        mean = pyro.sample("mean", dist.Normal(0.3, (2 * precision).rsqrt()))
        with pyro.plate("row", len(data)):
            pyro.sample("datum", dist.Normal(mean, precision.rsqrt()), obs=data)

    def law_around(self, values, data):
        shape = torch.tensor(2.0 + (len(data) + 1) / 2)
        state = {"loc": values["mean"], "variance": torch.tensor(0.01), "shape": shape}
        return state | {"rate": shape / values["precision"]}

    def laws(self, state, data):
        mean = dist.Normal(state["loc"], state["variance"].sqrt())
        return {"mean": mean, "precision": dist.Gamma(state["shape"], state["rate"])}

    def coordinate_step(self, state, data):
        loc = (2 * 0.3 + data.sum()) / (2 + len(data))
        variance = state["rate"] / state["shape"] / (2 + len(data))
        return {
            "loc": loc,
            "variance": variance,
            "shape": state["shape"],
            "rate": 1.5 + self._squares(loc, variance, data) / 2,
        }

    def elbo(self, state, data):
        laws = self.laws(state, data)
        precision = state["shape"] / state["rate"]
        log_precision = state["shape"].digamma() - state["rate"].log()
        count = len(data) + 1
        squares = precision * self._squares(state["loc"], state["variance"], data)
        constant = torch.tensor(2.0).log() - count * torch.tensor(2 * torch.pi).log()
        normal = (count * log_precision + constant - squares) / 2
        gamma = 2 * torch.tensor(1.5).log() + log_precision - 1.5 * precision
        return normal + gamma + sum(law.entropy() for law in laws.values())

    @staticmethod
    def _squares(loc, variance, data):
        about = 2 * (loc - 0.3).square() + (data - loc).square().sum()
        return about + (2 + len(data)) * variance


def run(model, *data, **options):
    options = {"num_steps": 40, "seed": 0, "progress": False, "compile": "none", **options}
    return CoordinateAscent(model, compile=options.pop("compile")).run(*data, **options)


@pytest.fixture
def data(generator):
    return 1.7 + 0.6 * torch.randn(11, generator=generator)


@pytest.fixture
def heads(generator):
    return shared_heads(generator, heads=3, dim=2, query=5, key=7, components=3)


def test_the_laws_are_those_of_the_textbook(data):
    """The mean of the posterior is exact; the precision's rate solves its fixed point."""
    start = {"mean": torch.tensor(-2.0), "precision": torch.tensor(40.0)}
    posterior = run(Sample(), data, num_samples=20_000, init=start)
    count, loc = len(data), (0.6 + data.sum()) / (2 + len(data))
    shape = 2 + (count + 1) / 2
    about = 2 * (loc - 0.3) ** 2 + (data - loc).square().sum()
    # The rate r solves r = 1.5 + (about + r / shape) / 2.
    rate = (1.5 + about / 2) / (1 - 1 / (2 * shape))
    variance = rate / shape / (2 + count)
    exact = {"mean": (loc, variance), "precision": (shape / rate, shape / rate**2)}
    for site, (mean, square) in exact.items():
        draws = posterior.draws[site][0]
        # To five standard errors; the start is five of the posterior's own away.
        assert abs(draws.mean() - mean) < 5 * (square / 20_000) ** 0.5
        assert abs(draws.var() / square - 1) < 5 * (3 / 20_000) ** 0.5
        assert abs(start[site] - mean) > 5 * square**0.5
    curve = posterior.optimization["elbo"][0]
    assert curve[0] < curve[-1] - 10
    assert curve[-1] < evidence(data)
    assert evidence(data) - curve[-1] < 0.05


def evidence(data):
    """Log density of the data, both parameters integrated out."""
    count = len(data)
    loc = (0.6 + data.sum()) / (2 + count)
    rate = 1.5 + (2 * (loc - 0.3) ** 2 + (data - loc).square().sum()) / 2
    shape = torch.tensor(2 + count / 2)
    value = shape.lgamma() - shape * rate.log() + 2 * torch.tensor(1.5).log()
    value = value + torch.tensor(2 / (2 + count)).log() / 2
    return value - count / 2 * torch.tensor(2 * torch.pi).log()


def test_the_curve_is_the_bound_before_each_step_and_never_falls(heads):
    """Mutant: the bound after the step."""
    model = SharedComponents(4)
    curve = run(model, *heads, num_steps=13).optimization["elbo"][0]
    state = model.law_around(model.initial_state(*heads), *heads)
    for value in curve:
        close(value, model.elbo(state, *heads))
        state = model.coordinate_step(state, *heads)
    assert (curve.diff() > -1e-9).all()
    assert (curve.diff()[:5] > 0).all()


def test_the_bound_is_what_draws_say(heads):
    """Of their log density less that of the law, in the coordinates of the program."""
    posterior = run(SharedComponents(4), *heads, num_samples=2000, tolerance=1e-9)
    gaps = (posterior.sample_stats["lp"] - posterior.sample_stats["log_q"])[0]
    bound = posterior.optimization["elbo"][0, -1]
    assert abs(gaps.mean() - bound) < 5 * gaps.std() / 2000**0.5
    assert gaps.std() < 20


def test_restarts_differ_but_for_the_first(heads):
    """That starts at the program's own state, whatever the seed."""
    model = SharedComponents(4)
    one = run(model, *heads, num_steps=1, num_samples=3)
    with pytest.warns(ConvergenceWarning, match="3 runs disagree: their bounds end between"):
        three = run(model, *heads, num_steps=1, num_samples=3, num_runs=3, seed=5)
    starts = three.optimization["elbo"][:, 0]
    close(starts[0], one.optimization["elbo"][0, 0])
    assert len(starts.unique()) == 3
    assert three.draws["mixing"].shape == (3, 3, 4, 3)


def test_it_stops_where_a_step_brings_no_more(data):
    posterior = run(Sample(), data, num_steps=1000, tolerance=1e-9, check_every=5)
    assert posterior.attrs["is_settled"] == 1
    assert posterior.attrs["num_steps"] < 100


@pytest.mark.parametrize("done", [1, 9])
@pytest.mark.filterwarnings("ignore:CoordinateAscent. the 2 runs disagree")
def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(done, heads, tmp_path, monkeypatch):
    model, length = SharedComponents(4), {"num_steps": 13, "num_runs": 2, "num_samples": 7}
    whole = run(model, *heads, **length)
    path = tmp_path / "run.checkpoint"
    with monkeypatch.context() as patch:
        StopAt(patch, done)
        with pytest.warns(RuntimeWarning, match=f"interrupted after {done} of 13 steps"):
            stopped = run(model, *heads, **length, checkpoint=Checkpoint(path, every_steps=4))
    assert stopped.attrs["interrupted"] == 1
    assert_same(whole, run(model, *heads, **length, checkpoint=path))
    with pytest.raises(ValueError, match="num_samples"):
        run(model, *heads, **length | {"num_samples": 8}, checkpoint=path)


class Wrong(Sample):
    """A step that is none of the program."""

    def coordinate_step(self, state, data):
        moved = super().coordinate_step(state, data)
        return moved | {"rate": state["rate"] * self.factor}

    factor = 3.0


class Diverging(Wrong):
    factor = torch.inf


class Mistaken(Sample):
    """A bound that lacks a constant."""

    def __init__(self, lacking):
        self.lacking = lacking

    def elbo(self, state, data):
        return super().elbo(state, data) - self.lacking


def test_closed_forms_that_are_not_the_programs_are_noticed(data):
    with pytest.warns(ConvergenceWarning, match="evidence lower bound of run 0 fell at step"):
        posterior = run(Wrong(), data)
    assert posterior.attrs["problems"]
    with pytest.raises(NonFiniteError, match=r"CoordinateAscent: .* not finite at step 1"):
        run(Diverging(), data)
    with pytest.raises(ValueError, match=r"at the start the elbo is .*, but draws put it at"):
        run(Mistaken(1e4), data)
    with pytest.warns(ConvergenceWarning, match=r"run 0: the elbo is .*, but draws put it at"):
        run(Mistaken(1.0), data)


def test_what_it_cannot_do_is_refused(data):
    with pytest.raises(ValueError, match=r"lacks \['law_around', 'laws', 'elbo', 'coordinate_st"):
        CoordinateAscent(lambda data: None)
    with pytest.raises(ValueError, match="tolerance must not be negative, got -1"):
        run(Sample(), data, tolerance=-1.0)
    with pytest.raises(ValueError, match="init must give values for the sites"):
        run(Sample(), data, init={"mean": data[0]})

    class Minibatches(Sample):
        def __call__(self, data):
            mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("row", len(data), subsample_size=3) as rows:
                pyro.sample("datum", dist.Normal(mean, 1.0), obs=data[rows])

    with pytest.raises(ValueError, match=r"CoordinateAscent needs the full data, but .*\['row'\]"):
        run(Minibatches(), data)
