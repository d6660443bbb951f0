"""Tests of bayesattn.inference.weight_search, on a penalty whose mean is known at every weight."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesattn.inference import NUTS, SVI, ConvergenceWarning, Posterior, weight_for_target
from bayesattn.inference.weight_search import _standard_error

NUM_ENTRIES = 5


def program(weight, floor=0.0):
    """Standard normal entries, penalized by half their squares: their mean is .5 / (1 + λ)."""
    with pyro.plate("entry", NUM_ENTRIES):
        root = pyro.sample("root", dist.Normal(torch.zeros(()), 1.0))
        divergence = pyro.deterministic("divergence", 0.5 * root.square() + floor)
        pyro.deterministic("triple", 3.0 * divergence)
        pyro.factor("alignment", -weight * divergence)


class Exact:
    """Draws of the posterior, the same up to their scale at each weight; remembers the calls."""

    def __init__(self, generator, num_draws=20000, floor=0.0):
        self.noise = torch.randn(1, num_draws, NUM_ENTRIES, generator=generator)
        self.noise /= self.noise.square().mean().sqrt()
        self.floor, self.calls = floor, []

    def __call__(self, weight, init):
        draws = {"root": self.noise / (1 + weight) ** 0.5}
        about = {"model": program, "args": (torch.tensor(weight), self.floor)}
        posterior = Posterior(draws, method="exact", draws_are="iid_guide", **about)
        self.calls.append((weight, init, posterior))
        return posterior


def test_finds_the_weight_from_the_variance_in_two_runs(generator):
    """Kills: the number of entries left out of the variance, which is that of their sum."""
    found = weight_for_target(Exact(generator), 0.1, tolerance=0.1)
    assert len(found.trials) == 2
    assert found.weight == pytest.approx(4.0, rel=0.1)
    assert found.trials[0].weight == 0.0
    assert found.trials[0].mean == pytest.approx(0.5, rel=1e-10)
    assert found.trials[-1].mean == pytest.approx(0.5 / (1 + found.weight), rel=1e-10)
    assert found.posterior.args[0] == found.weight


@pytest.mark.parametrize("first", [1e-3, 0.3, 4.0, 1e3])
@pytest.mark.parametrize("target", [0.45, 0.1, 0.01])
def test_finds_the_weight_from_any_first_one(first, target, generator):
    found = weight_for_target(
        Exact(generator), target, first_weight=first, tolerance=0.01, max_runs=20
    )
    assert found.trials[1].weight == first
    assert found.trials[-1].mean == pytest.approx(target, rel=0.01)
    assert 0.5 / (1 + found.weight) == pytest.approx(target, rel=0.01)
    assert found.posterior.args[0] == found.weight
    means = [trial.mean for trial in sorted(found.trials)]
    assert means == sorted(means, reverse=True)


def test_line_between_logarithms_takes_fewer_runs_than_halving(generator):
    found = weight_for_target(Exact(generator), 0.1, first_weight=0.3, tolerance=0.03)
    assert [trial.weight for trial in found.trials[:4]] == pytest.approx([0.0, 0.3, 1.2, 4.8])
    assert len(found.trials) == 5


def test_runs_start_from_the_nearer_end_of_the_bracket(generator):
    """Kills: the first or the last posterior as start of every run."""
    run = Exact(generator)
    found = weight_for_target(run, 0.1, first_weight=30.0, tolerance=0.01, max_runs=20)
    assert run.calls[0][1] is None
    held = {}
    for weight, init, posterior in run.calls:
        if held:
            above = [w for w, p in held.items() if 0.5 / (1 + w) > 0.1]
            below = [w for w in held if w not in above]
            ends = [max(above), *([min(below)] if below else [])]
            assert init is held[min(ends, key=lambda end: abs(end - weight))]
        held[weight] = posterior
    assert found.posterior is run.calls[-1][2]


def test_target_at_weight_zero_needs_no_weight(generator):
    run = Exact(generator, num_draws=2000)
    found = weight_for_target(run, 0.51, tolerance=0.05)
    assert (found.weight, len(found.trials)) == (0.0, 1)
    with pytest.raises(ValueError, match=r"target: .* zero, 0\.5 ± 0\.0\d+ at weight 0, .* 0\.7"):
        weight_for_target(run, 0.7)


def test_target_out_of_reach_is_told_with_the_least_mean(generator):
    run = Exact(generator, num_draws=2000, floor=0.2)
    with pytest.raises(
        ValueError, match=r"'divergence'\] within reach, got 0\.1, .* least .* 0\.2"
    ):
        weight_for_target(run, 0.1, max_runs=7)
    assert len(run.calls) == 7
    found = weight_for_target(run, 0.3, tolerance=0.01)
    assert found.weight == pytest.approx(4.0, rel=0.1)


def test_chance_that_hides_the_answer_is_told(generator):
    """The figure of four draws is uncertain by a fifth, the tolerance a thousandth."""
    run = Exact(generator, num_draws=4)
    with pytest.warns(ConvergenceWarning, match=r"nearest to the target 0\.1 is .* longer"):
        found = weight_for_target(run, 0.1, tolerance=1e-3)
    last = found.trials[-1]
    assert last.weight == found.weight
    assert 1e-4 < abs(last.mean - 0.1) < last.error


def test_too_few_runs_give_the_nearest_and_say_so(generator):
    run = Exact(generator)
    with pytest.warns(ConvergenceWarning, match="in 4 runs"):
        found = weight_for_target(run, 0.1, tolerance=1e-6, first_weight=60.0, max_runs=4)
    gaps = {abs(trial.mean - 0.1): trial.weight for trial in found.trials}
    assert found.weight == gaps[min(gaps)]
    assert found.posterior.args[0] == found.weight


def test_all_entries_of_all_sites_count_alike(generator):
    found = weight_for_target(
        Exact(generator), 0.2, sites=["divergence", "triple"], tolerance=0.01, max_runs=20
    )
    assert found.trials[0].mean == pytest.approx(1.0, rel=1e-10)
    assert found.weight == pytest.approx(4.0, rel=0.02)


def test_one_draw_has_no_error_and_no_variance(generator):
    found = weight_for_target(Exact(generator, num_draws=1), 0.1, tolerance=0.01, max_runs=20)
    assert found.trials[1].weight == 1.0
    assert all(math.isnan(trial.error) for trial in found.trials)
    assert found.trials[-1].mean == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target": 0.0}, "target must be a positive number, got 0.0"),
        ({"tolerance": math.nan}, "tolerance must be a positive number"),
        ({"first_weight": -1.0}, "first_weight must be a positive number"),
        ({"max_runs": 1}, "max_runs must be a whole number, at least 2, got 1"),
        ({"sites": ["nothing"]}, r"no sites \['nothing'\]"),
    ],
)
def test_refuses_arguments(wrong, message, generator):
    with pytest.raises(ValueError, match=message):
        weight_for_target(Exact(generator, num_draws=9), **{"target": 0.1} | wrong)


def test_refuses_values_that_are_not_finite(generator):
    run = Exact(generator, num_draws=9, floor=math.nan)
    with pytest.raises(ValueError, match="sites: expected finite values, got a mean of nan"):
        weight_for_target(run, 0.1)


def test_error_knows_of_correlation_and_of_chains_that_differ(generator):
    """An autoregression's mean has (1 + ρ) / (1 - ρ) times the variance of independent draws'."""
    noise = torch.randn(1, 4000, generator=generator)
    draws = noise.clone()
    for step in range(1, noise.shape[1]):
        draws[:, step] = 0.8 * draws[:, step - 1] + 0.6 * noise[:, step]
    independent = _standard_error(draws, "iid_guide")
    assert independent == pytest.approx(float(draws.std()) / 4000**0.5)
    assert _standard_error(draws, "markov") == pytest.approx(3 * independent, rel=0.3)
    apart = draws.reshape(4, 1000) + torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None]
    assert _standard_error(apart, "iid_guide") == pytest.approx(1.29 / 2, rel=0.3)
    assert _standard_error(torch.ones(2, 50), "markov") == 0.0


@pytest.mark.parametrize("name", ["svi", "nuts"])
@pytest.mark.filterwarnings("ignore::bayesattn.inference.ConvergenceWarning")
def test_routines_find_it(name, generator):
    routine = SVI(program, guide="normal") if name == "svi" else NUTS(program, step_size=0.5)
    lengths = {"num_steps": 200} if name == "svi" else {"warmup_steps": 50, "num_samples": 300}

    recordings = []

    def run(weight, init):
        quiet = {"init": init, "seed": 0, "progress": False}
        posterior = routine.run(torch.tensor(weight), **quiet, **lengths)
        recordings.append(routine.density_settings.graphs.num_recordings)
        return posterior

    found = weight_for_target(run, 0.1, tolerance=0.1)
    last = found.trials[-1]
    # Three standard errors of the mean, of which a tenth was allowed to begin with.
    exact = 0.5 / (1 + found.weight)
    assert abs(last.mean - exact) < 3 * last.error + 0.02 * exact
    assert abs(exact - 0.1) < 0.01 + 3 * last.error
    # A weight that is a tensor is data to the graph.
    assert len(recordings) > 1
    assert recordings[-1] == recordings[0]
