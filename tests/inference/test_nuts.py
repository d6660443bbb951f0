"""Tests of bayesattn.inference.nuts: closed forms, statistics that fit together, and processes."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from bayesattn.inference.chain_processes import can_fork
from bayesattn.inference.convergence import (
    bayesian_fraction,
    chain_problems,
    smallest_effective_size,
)
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.markov_chain import STATISTICS, ChainDraws, equally_long
from bayesattn.inference.nuts import NUTS
from bayesattn.inference.running import ConvergenceWarning, seeded

MEAN = torch.tensor([1.0, -2.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=torch.float64)
# Runs that are not judged by their draws are short, and say so.
short = pytest.mark.filterwarnings("ignore::bayesattn.inference.running.ConvergenceWarning")


def gaussian():
    pyro.sample("x", dist.MultivariateNormal(MEAN, COVARIANCE))


def skewed():
    pyro.sample("rate", dist.Gamma(3.0, 1.0))


def run(nuts, *args, warmup_steps=30, num_samples=30, seed=0, **kwargs):
    lengths = {"warmup_steps": warmup_steps, "num_samples": num_samples}
    return nuts.run(*args, **lengths, seed=seed, progress=False, **kwargs)


# ---------------------------------------------------------------- draws


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"full_mass": True}, {"coordinates": "laplace"}],
    ids=["diagonal", "full", "laplace"],
)
def test_moments_are_those_of_the_target(settings):
    """Within four standard errors, by the effective sample size, which is not small either."""
    posterior = run(NUTS(gaussian, **settings), warmup_steps=100, num_samples=250)
    draws, sd = posterior.draws["x"][0], COVARIANCE.diagonal().sqrt()
    size = smallest_effective_size(posterior.unconstrained)
    assert size > 60
    assert ((draws.mean(0) - MEAN) / sd).abs().max() < 4 / math.sqrt(size)
    error = (draws.T.cov() - COVARIANCE) / (sd[:, None] * sd)
    assert error.abs().max() < 4 * math.sqrt(2 / size)


def test_skewed_target_is_met_with_its_log_determinant():
    posterior = run(NUTS(skewed), warmup_steps=100, num_samples=300)
    size = smallest_effective_size(posterior.unconstrained)
    assert posterior.draws["rate"].mean().item() == pytest.approx(3.0, abs=4 * 3**0.5 / size**0.5)


# ---------------------------------------------------------------- statistics


@short
def test_statistics_fit_together():
    posterior = run(NUTS(gaussian), num_chains=2)
    stats = posterior.sample_stats
    assert tuple(stats) == STATISTICS
    lp = LogDensity(gaussian).value_and_score(posterior.unconstrained.flatten(0, 1))[0]
    torch.testing.assert_close(stats["lp"].flatten(), lp)
    # The energy of a draw is its potential and a kinetic energy, of mean dim / 2.
    kinetic = stats["energy"] + stats["lp"]
    assert (kinetic > -1e-9).all()
    assert kinetic.mean().item() == pytest.approx(1.0, abs=0.6)
    assert ((stats["acceptance_rate"] >= 0) & (stats["acceptance_rate"] <= 1)).all()
    assert (stats["step_size"] > 0).all()
    assert (stats["step_size"] == stats["step_size"][:, :1]).all()
    assert stats["tree_depth"].dtype == stats["n_steps"].dtype == torch.int64
    assert (stats["n_steps"] <= 2 ** stats["tree_depth"] - 1).all()
    assert (stats["n_steps"] >= 2 ** (stats["tree_depth"] - 1)).all()
    assert stats["diverging"].dtype == torch.bool
    assert bayesian_fraction(stats["energy"]).isfinite().all()


@short
def test_a_site_may_have_the_name_of_a_statistic():
    """Names of its axes are not those of the statistic, which has none."""

    def model():
        x = pyro.sample("x", dist.MultivariateNormal(MEAN, COVARIANCE))
        pyro.deterministic("energy", x.square())

    model.dims = {"energy": ["component"]}
    exported = run(NUTS(model), warmup_steps=5, num_samples=5).to_arviz()
    assert exported.posterior["energy"].dims == ("chain", "draw", "component")
    assert exported.sample_stats["energy"].dims == ("chain", "draw")


@short
def test_trees_end_at_the_largest_depth():
    stats = run(NUTS(gaussian, max_tree_depth=1), warmup_steps=0).sample_stats
    assert (stats["tree_depth"] == 1).all()
    assert (stats["n_steps"] == 1).all()


@pytest.mark.slow
def test_warmup_meets_the_acceptance_that_is_asked_for():
    gentle = run(NUTS(gaussian, target_accept_prob=0.95), warmup_steps=80, num_samples=60)
    rough = run(NUTS(gaussian, target_accept_prob=0.6), warmup_steps=80, num_samples=60)
    assert gentle.sample_stats["acceptance_rate"].mean() > 0.85
    assert gentle.sample_stats["step_size"][0, 0] < rough.sample_stats["step_size"][0, 0]


def test_fraction_of_missing_information_is_arvizs(generator):
    energy = torch.randn(3, 50, generator=generator).cumsum(-1)
    expected = arviz.bfmi({"energy": energy.numpy()})
    np.testing.assert_allclose(bayesian_fraction(energy).numpy(), np.ravel(expected), rtol=0.05)


# ---------------------------------------------------------------- warnings


def statistics_of(draws, **changes):
    """What a good sampler says of so many draws."""
    shape, generator = draws.shape[:2], torch.Generator().manual_seed(0)
    return {
        "diverging": torch.zeros(shape, dtype=torch.bool),
        "tree_depth": torch.full(shape, 3),
        "energy": torch.randn(shape, generator=generator),
        **changes,
    }


def problems(draws, **changes):
    return "; ".join(chain_problems(draws, statistics_of(draws, **changes), 10))


def test_good_chains_have_no_problems(generator):
    for shape in [(1, 20, 3), (4, 25, 5), (4, 200, 5)]:
        assert not problems(torch.randn(shape, generator=generator))


def test_every_problem_is_told(generator):
    good = torch.randn(2, 100, 3, generator=generator)
    diverging = torch.zeros(2, 100, dtype=torch.bool)
    diverging[1, 3] = True
    assert problems(good, diverging=diverging) == "1 of 200 draws diverged"
    deep = problems(good, tree_depth=torch.full((2, 100), 10))
    assert deep == "200 of 200 draws reached the largest tree depth, 10"
    slow = problems(good.cumsum(1))
    assert "effective sample size" in slow
    assert "R-hat" in slow
    stuck = good.clone()
    stuck[:, :, 1] = 1.0
    assert "the smallest effective sample size is 0 of 200" in problems(stuck)
    apart = good + torch.tensor([0.0, 3.0])[:, None, None]
    assert "the chains disagree: the largest split R-hat is" in problems(apart)
    walk = good[:, :, 0].cumsum(1) / 3
    assert "E-BFMI" in problems(good, energy=walk)


def test_effective_sizes_go_by_parts(generator):
    """In as many dimensions as do not fit at once, the smallest is the same."""
    draws = torch.randn(2, 400, 120, generator=generator)
    draws[:, :, 77] = draws[:, :, 77].cumsum(1)
    alone = smallest_effective_size(draws[:, :, 77:78])
    assert smallest_effective_size(draws) == pytest.approx(alone)


def test_effective_size_of_chains_that_swing_is_not_negative():
    """Pyro's estimate is -30: the lags of draws that alternate have sums below zero."""
    swinging = (-1.0) ** torch.arange(30)
    assert smallest_effective_size(swinging[None, :, None]) == 0


def test_a_badly_scaled_posterior_is_flagged():
    def scaled():
        pyro.sample("x", dist.Normal(0.0, torch.logspace(-3, 3, 5)).to_event(1))

    with pytest.warns(ConvergenceWarning, match="effective sample size|tree depth|diverged"):
        run(NUTS(scaled, max_tree_depth=4), num_samples=60)


# ---------------------------------------------------------------- starts and interruptions


@pytest.mark.parametrize("coordinates", ["raw", "laplace"])
def test_chains_start_where_they_are_told(coordinates):
    given = torch.tensor([[3.0, -5.0], [0.5, 1.0]])
    generator = torch.Generator().manual_seed(0)
    nuts = NUTS(gaussian, coordinates=coordinates)
    frame, starts = nuts._starts(LogDensity(gaussian), 2, {"x": given}, generator)
    torch.testing.assert_close(frame.apply(starts), given)


def test_starts_without_a_finite_density_are_passed_over():
    def half():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("half", torch.where(x > 0.5, 0.0, -torch.inf))

    def nowhere():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("nowhere", torch.where(x > 50, 0.0, -torch.inf))

    nuts = NUTS(half)
    _, starts = nuts._starts(LogDensity(half), 3, None, torch.Generator().manual_seed(0))
    assert (starts > 0.5).all()
    with pytest.raises(ValueError, match="only 0 of 40 starts have a finite log density"):
        run(NUTS(nowhere), num_chains=2)


def test_subsampled_plates_are_refused():
    def program(data):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(data), subsample_size=3) as rows:
            pyro.sample("y", dist.Normal(x, 1.0), obs=data[rows])

    with pytest.raises(ValueError, match=r"NUTS needs the full data.*\['row'\]"):
        run(NUTS(program), torch.zeros(7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 0.0}, "step_size must be a positive number"),
        ({"target_accept_prob": 1.0}, "target_accept_prob must be below one"),
        ({"max_tree_depth": 0}, "max_tree_depth must be a whole number, at least 1"),
        ({"coordinates": "polar"}, "coordinates must be one of"),
        ({"chain_method": "threads"}, "chain_method must be one of 'sequential', 'processes'"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.usefixtures("unchecked_types")
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NUTS(gaussian, **settings)


def interrupted_after(seconds):
    """Send Ctrl-C to this process only, as another program would."""
    return threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))


@short
@pytest.mark.parametrize("chain_method", ["sequential", "processes"])
def test_an_interrupted_run_returns_what_it_has(chain_method):
    nuts = NUTS(gaussian, chain_method=chain_method)
    run(nuts, warmup_steps=0, num_samples=1)
    timer = interrupted_after(1.0)
    timer.start()
    with pytest.warns(RuntimeWarning, match=r"NUTS was interrupted; \d of 2 chains with \d+ of"):
        posterior = run(nuts, warmup_steps=5, num_samples=100_000, num_chains=2)
    timer.join()
    assert posterior.attrs["interrupted"] == 1
    assert posterior.num_draws > 1
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("chain_method", ["sequential", "processes"])
def test_without_a_draw_there_is_nothing_to_return(chain_method):
    nuts = NUTS(gaussian, chain_method=chain_method)
    timer = interrupted_after(1.0)
    timer.start()
    with pytest.raises(KeyboardInterrupt, match="before its first draw"):
        run(nuts, warmup_steps=100_000, num_samples=1, num_chains=2)
    timer.join()
    assert not multiprocessing.active_children()


def test_chains_of_unequal_length_keep_the_most_draws():
    def chain(length):
        return ChainDraws(np.zeros((length, 1)), np.zeros((length, len(STATISTICS))), 0)

    def kept(*lengths):
        chains = equally_long([chain(length) for length in lengths])
        return [len(one.working) for one in chains]

    assert kept(50, 50, 3) == [50, 50]
    assert kept(50, 40, 3) == [40, 40]
    assert kept(50, 3) == [50]
    assert kept(30, 30, 29) == [29, 29, 29]
    assert kept(0, 7) == [7]
    assert kept(0, 0) == []
    assert kept() == []


# ---------------------------------------------------------------- processes


@short
def test_processes_make_the_same_draws():
    lengths = {"warmup_steps": 10, "num_samples": 7, "num_chains": 3}
    alone = run(NUTS(gaussian), **lengths)
    apart = run(NUTS(gaussian, chain_method="processes"), **lengths)
    assert torch.equal(apart.draws["x"], alone.draws["x"])
    for name, value in alone.sample_stats.items():
        assert torch.equal(apart.sample_stats[name], value)
    assert not torch.equal(alone.draws["x"][0], alone.draws["x"][1])
    assert not multiprocessing.active_children()


@short
def test_processes_tell_how_far_they_are(capsys):
    nuts = NUTS(gaussian, chain_method="processes")
    nuts.run(warmup_steps=7, num_samples=16, num_chains=2, seed=0)
    shown = capsys.readouterr().err
    assert "46/46" in shown
    assert "acceptance=" in shown


def test_an_error_in_a_process_comes_with_its_traceback():
    parent = os.getpid()

    def failing():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        if os.getpid() != parent:
            raise RuntimeError("only in a process")

    nuts = NUTS(failing, compile="none", chain_method="processes")
    with pytest.raises(RuntimeError, match=r"(?s)chain \d failed .*in failing.*only in a process"):
        run(nuts, num_chains=2)
    assert not multiprocessing.active_children()


def test_a_process_that_dies_is_noticed():
    parent = os.getpid()

    def dying():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        if os.getpid() != parent:
            os._exit(3)

    nuts = NUTS(dying, compile="none", chain_method="processes")
    with pytest.raises(RuntimeError, match=r"the process of chain \d ended without a result"):
        run(nuts, num_chains=2)
    assert not multiprocessing.active_children()


SCRIPT = """
import pyro, pyro.distributions as dist, torch
from bayesattn.inference import NUTS
torch.set_num_threads(4)
x = torch.randn(600, 600)
for _ in range(3):
    x = torch.tanh(x @ x)
a = torch.ones(400, 400, requires_grad=True)
(a @ a).sum().backward()

def model(data):
    weight = pyro.sample("weight", dist.Normal(0., 1.).expand([600]).to_event(1))
    with pyro.plate("row", 600):
        pyro.sample("y", dist.Normal(data @ weight, 1.), obs=torch.zeros(600))

if __name__ == "__main__":
    nuts = NUTS(model, chain_method="processes", max_tree_depth=2)
    posterior = nuts.run(x, warmup_steps=2, num_samples=2, num_chains=2, seed=0, progress=False)
    print(torch.get_num_threads(), tuple(posterior.draws["weight"].shape))
"""


def test_processes_do_not_hang_where_torch_has_used_many_threads():
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1) == ["4", "(2, 2, 600)\n"]


@short
def test_where_processes_cannot_be_chains_run_one_by_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert can_fork(torch.device("cpu")) == ""
    assert "cannot use the device cuda" in can_fork(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "threads for CUDA devices" in can_fork(torch.device("cpu"))
    with pytest.warns(RuntimeWarning, match="the chains run one by one: autograd has threads"):
        posterior = run(NUTS(gaussian, chain_method="processes"), num_chains=2)
    assert posterior.num_chains == 2


@short
def test_one_graph_serves_starts_and_chains():
    """One of the score, recorded before processes are forked, and one that constrains the draws."""
    nuts = NUTS(gaussian, chain_method="processes")
    run(nuts, num_chains=2)
    assert nuts.density_settings.graphs.num_recordings == 2


def with_parameters(net, frozen):
    def model():
        pyro.module("net", net)
        pyro.module("frozen", frozen)
        scale = pyro.param("scale", torch.tensor(2.0))
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("fit", -scale * (frozen(net(x[None])) - 1).square().sum())

    return model


@short
def test_parameters_that_are_held_are_named():
    with seeded(0):
        net, frozen, unused = (nn.Linear(1, 1) for _ in range(3))
    frozen.requires_grad_(False).eval()
    with pytest.warns(
        UserWarning, match=r"holds .*\['net\$\$\$weight', 'net\$\$\$bias', 'scale'\]"
    ):
        NUTS(with_parameters(net, frozen)).run(
            warmup_steps=3, num_samples=3, seed=0, progress=False
        )

    def undeclared():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("fit", -unused(x[None]).square().sum())

    NUTS(undeclared).run(warmup_steps=3, num_samples=3, seed=0, progress=False)
