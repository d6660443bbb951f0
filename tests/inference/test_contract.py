"""What every routine owes its users: one test of everything, over a table of all routines.

A routine is added by one row of :data:`ROUTINES`.
"""

import functools
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from bayesattn.inference.coordinate_ascent import CoordinateAscent
from bayesattn.inference.em import EM
from bayesattn.inference.nuts import NUTS
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.running import NonFiniteError
from bayesattn.inference.sgld import SGLD
from bayesattn.inference.spos import SPOS
from bayesattn.inference.svgd import SVGD
from bayesattn.inference.svi import SVI
from bayesattn.inference.wgd import WGD
from tests.global_state import changes, snapshot

NUM_HEADS, NUM_ROWS = 3, 13


def network(features, response=None):
    """Three heads of a query and a scale each; sizes are distinct primes."""
    with pyro.plate("head", NUM_HEADS):
        query = pyro.sample("query_weight", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        scale = pyro.sample("key_scale", dist.LogNormal(0.0, 0.5))
    readout = pyro.sample("readout", dist.Normal(0.0, 1.0).expand([NUM_HEADS]).to_event(1))
    hidden = pyro.deterministic("hidden", torch.tanh(features @ query.mT) * scale)
    with pyro.plate("row", len(features)):
        pyro.sample("response", dist.Normal(hidden @ readout, 0.5), obs=response)
    return readout


def own_guide(features, response=None):
    """Normal laws with means to learn, and one scale for all queries."""
    query = pyro.param("query_mean", torch.zeros(NUM_HEADS, 2))
    spread = pyro.param("query_spread", torch.tensor(0.5), constraint=dist.constraints.positive)
    scale = pyro.param("key_scale_mean", torch.zeros(NUM_HEADS))
    readout = pyro.param("readout_mean", torch.zeros(NUM_HEADS))
    with pyro.plate("head", NUM_HEADS):
        pyro.sample("query_weight", dist.Normal(query, spread).to_event(1))
        pyro.sample("key_scale", dist.LogNormal(scale, 0.3))
    pyro.sample("readout", dist.Normal(readout, 0.3).to_event(1))


def with_closed_forms(model):
    """Give a program what EM asks for: its readout is maximized exactly, all else stays."""

    def log_density(state, features, response=None):
        cast = {name: value.to(features.dtype) for name, value in state.items()}
        told = poutine.condition(model, cast)
        return poutine.trace(told).get_trace(features, response).log_prob_sum()

    def m_step(state, _, features, response=None):
        features, response, query, scale = (
            part.double()
            for part in (features, response, state["query_weight"], state["key_scale"])
        )
        hidden = torch.tanh(features @ query.mT) * scale
        precision = hidden.mT @ hidden / 0.25 + torch.eye(NUM_HEADS)
        readout = torch.linalg.solve(precision, hidden.mT @ response / 0.25)
        return {**state, "readout": readout.to(state["readout"])}

    if callable(model):
        model.log_density, model.m_step = log_density, m_step
        model.e_step = lambda state, features, response=None: None
    return model


def with_mean_field(model):
    """Give a program what coordinate ascent asks for: a normal law of its readout, all else points.

    Given the hidden activations the program is a linear regression.
    """

    def regression(state, features):
        query, key_scale = (state[name].double() for name in ("query_weight", "key_scale"))
        hidden = torch.tanh(features.double() @ query.mT) * key_scale
        return hidden, hidden.mT @ hidden / 0.25 + torch.eye(NUM_HEADS).double()

    def law_around(values, features, response=None):
        return {**values, "covariance": 0.01 * torch.eye(NUM_HEADS).double()}

    def coordinate_step(state, features, response=None):
        hidden, precision = regression(state, features)
        covariance = torch.linalg.inv(precision)
        readout = covariance @ hidden.mT @ response.double() / 0.25
        return {**state, "readout": readout.to(state["readout"]), "covariance": covariance}

    def laws(state, features, response=None):
        points = {name: dist.Delta(state[name]) for name in ("query_weight", "key_scale")}
        normal = dist.MultivariateNormal(state["readout"].double(), state["covariance"])
        return points | {"readout": normal}

    def elbo(state, features, response=None):
        means = {n: v.to(features.dtype) for n, v in state.items() if n != "covariance"}
        told = poutine.condition(model, means)
        at_means = poutine.trace(told).get_trace(features, response).log_prob_sum().double()
        curvature = (regression(state, features)[1] * state["covariance"]).sum()
        entropy = laws(state, features)["readout"].entropy()
        return at_means - curvature / 2 + entropy

    if callable(model):
        model.law_around, model.laws = law_around, laws
        model.elbo, model.coordinate_step = elbo, coordinate_step
    return model


class Row(NamedTuple):
    """One routine.

    Attributes:
        make: Of a model and further settings.
        lengths: What ``run`` takes for how long to run; enough for a result, not for a good one.
        draws_are: What its draws are.
        num_draws: Of each chain.
        chains: Name of run's argument for the number of chains.
        takes_init: Whether it starts where it is told; a guide of one's own has its own start.
    """

    make: Callable[..., Any]
    lengths: dict[str, int]
    draws_are: str
    num_draws: int
    chains: str = "num_runs"
    takes_init: bool = True


def guided_by(make_guide: Callable) -> Callable[..., SVI]:
    return lambda model, **settings: SVI(model, guide=make_guide(model), **settings)


ROUTINES = {
    "SVGD": Row(functools.partial(SVGD, num_particles=11), {"num_steps": 7}, "particles", 11),
    "SVGD of heads": Row(
        functools.partial(SVGD, particle_plate="head"), {"num_steps": 7}, "heads", NUM_HEADS
    ),
    "WGD": Row(functools.partial(WGD, num_particles=11), {"num_steps": 7}, "particles", 11),
    "SGLD of one particle": Row(
        functools.partial(SGLD, num_particles=1, step_size=1e-3),
        {"warmup_steps": 7, "num_samples": 5, "thinning": 2},
        "markov",
        5,
    ),
    "SPOS of one particle": Row(
        functools.partial(SPOS, num_particles=1, step_size=1e-3),
        {"warmup_steps": 7, "num_samples": 5, "thinning": 2},
        "markov",
        5,
    ),
    "SPOS of heads": Row(
        functools.partial(SPOS, particle_plate="head", step_size=1e-3),
        {"warmup_steps": 7, "num_samples": 5, "thinning": 2},
        "markov",
        5,
    ),
    "SVI": Row(SVI, {"num_steps": 7, "num_samples": 11}, "iid_guide", 11),
    "SVI of points": Row(
        functools.partial(SVI, guide="delta"), {"num_steps": 7, "num_samples": 11}, "point", 1
    ),
    "SVI, Pyro's guide": Row(
        guided_by(AutoNormal),
        {"num_steps": 7, "num_samples": 11},
        "iid_guide",
        11,
        takes_init=False,
    ),
    "SVI, own guide": Row(
        guided_by(lambda _: own_guide),
        {"num_steps": 7, "num_samples": 11},
        "iid_guide",
        11,
        takes_init=False,
    ),
    "NUTS": Row(
        functools.partial(NUTS, max_tree_depth=3),
        {"warmup_steps": 7, "num_samples": 11},
        "markov",
        11,
        "num_chains",
    ),
    "EM": Row(
        lambda model, **settings: EM(with_closed_forms(model), **settings),
        {"num_steps": 7},
        "point",
        1,
    ),
    "CoordinateAscent": Row(
        lambda model, **settings: CoordinateAscent(with_mean_field(model), **settings),
        {"num_steps": 7, "num_samples": 11},
        "iid_guide",
        11,
    ),
}

# Runs are short, and say so.
pytestmark = pytest.mark.filterwarnings("ignore::bayesattn.inference.running.ConvergenceWarning")
every_routine = pytest.mark.parametrize("name", ROUTINES)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(NUM_ROWS, 2, generator=generator, dtype=torch.float64)
    response = torch.randn(NUM_ROWS, generator=generator, dtype=torch.float64)
    return features.to(dtype), response.to(dtype)


@functools.cache
def routine(name: str) -> Any:
    """The routine on :func:`network`; its graphs are recorded once for all tests."""
    return ROUTINES[name].make(network)


def run(name: str, *args: Any, of: Any = None, **options: Any) -> Posterior:
    row = ROUTINES[name]
    options = {**row.lengths, "seed": 0, "progress": False, **options}
    return (of or routine(name)).run(*(args or data()), **options)


@functools.cache
def result(name: str) -> Posterior:
    """Two chains."""
    return run(name, **{ROUTINES[name].chains: 2})


@every_routine
def test_posterior_says_what_it_holds(name):
    row, posterior = ROUTINES[name], result(name)
    shape = (2, row.num_draws)
    assert (posterior.num_chains, posterior.num_draws) == shape
    assert posterior.method == type(routine(name)).__name__
    assert posterior.draws_are == row.draws_are
    assert posterior.attrs["seed"] == 0
    assert posterior.attrs["seconds"] > 0
    assert "interrupted" not in posterior.attrs
    assert posterior.model is network
    values = posterior.network_samples()
    rows = 2 if row.draws_are == "heads" else 2 * row.num_draws
    assert values["query_weight"].shape == (rows, NUM_HEADS, 2)
    assert values["key_scale"].shape == values["readout"].shape == (rows, NUM_HEADS)
    assert (values["key_scale"] > 0).all()
    assert posterior.sample_stats["lp"].shape == shape
    assert posterior.unconstrained.shape == (*shape, 3 if row.draws_are == "heads" else 12)
    for values in [*posterior.draws.values(), *posterior.sample_stats.values()]:
        assert values.isfinite().all()
        assert values.device.type == "cpu"


@every_routine
def test_lp_is_the_log_density_at_the_draws(name):
    posterior = result(name)
    density = routine(name).log_density(*data())
    values = posterior.network_samples()
    rows = density.unconstrain({site.name: values[site.name] for site in density.sites})
    expected = density.value_and_score(rows)[0]
    ours = posterior.sample_stats["lp"]
    torch.testing.assert_close(ours, expected.reshape(2, -1).expand(ours.shape))


@every_routine
def test_curves_have_a_value_for_each_step(name):
    curves, steps = result(name).optimization, result(name).attrs.get("num_steps")
    assert bool(curves) == (name != "NUTS")
    for curve in curves.values():
        assert curve.shape == (2, steps)
        assert curve.isfinite().all()


@every_routine
def test_a_seed_says_all(name):
    """The same draws from a routine made anew; others from another seed, and between chains."""
    row = ROUTINES[name]
    again = run(name, of=row.make(network), **{row.chains: 2})
    other = run(name, seed=1)
    for site, value in result(name).draws.items():
        assert torch.equal(again.draws[site], value)
        assert not torch.equal(other.draws[site][0], value[0])
        assert not torch.equal(value[0], value[1])
    fresh = run(name, seed=None).attrs["seed"], run(name, seed=None).attrs["seed"]
    assert fresh[0] != fresh[1]


@every_routine
def test_global_state_does_not_matter_and_is_left_alone(name):
    """Random state, grad mode, and a parameter of the same name in Pyro's store."""
    pyro.get_param_store().clear()
    pyro.param("readout_mean", torch.full((NUM_HEADS,), 9.0))
    try:
        before = snapshot()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(99)
            posterior = run(name, **{ROUTINES[name].chains: 2})
        assert not changes(before, snapshot())
    finally:
        pyro.get_param_store().clear()
    for site, value in result(name).draws.items():
        assert torch.equal(posterior.draws[site], value)


@every_routine
def test_runs_side_by_side_do_not_meet(name):
    """Mutant: state on the routine. A run of other data between two equal runs changes nothing."""
    features, response = data()
    run(name, features.flip(0), response)
    again = run(name, **{ROUTINES[name].chains: 2})
    for site, value in result(name).draws.items():
        assert torch.equal(again.draws[site], value)


@pytest.mark.parametrize("name", [name for name, row in ROUTINES.items() if row.takes_init])
@pytest.mark.parametrize("other", ["SVGD", "SVGD of heads", "SVI", "NUTS"])
def test_runs_start_from_posteriors_of_others(name, other):
    """Also networks put together of heads, and heads taken out of networks."""
    plain, started = run(name), run(name, init=result(other))
    assert not torch.equal(started.draws["key_scale"], plain.draws["key_scale"])


@every_routine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_draws_have_the_width_of_the_data(name, dtype):
    posterior = run(name, *data(dtype))
    assert posterior.unconstrained.dtype == torch.float32
    assert all(v.isfinite().all() for v in posterior.draws.values())


@every_routine
def test_predictions_likelihoods_and_export_work(name):
    posterior = result(name)
    row = ROUTINES[name]
    num_draws = 1 if row.draws_are == "heads" else row.num_draws
    hidden = posterior.predict(data()[0][:5], sites=["hidden"])["hidden"]
    assert hidden.shape == (2, num_draws, 5, NUM_HEADS)
    likelihood = posterior.log_likelihood()["response"]
    assert likelihood.shape == (2, num_draws, NUM_ROWS)
    exported = posterior.to_arviz()
    assert exported.posterior.attrs["draws_are"] == row.draws_are
    assert dict(exported.posterior["key_scale"].sizes)["draw"] == row.num_draws
    assert "key_scale" in str(posterior.summary(sites=["key_scale"]).index)


@every_routine
@pytest.mark.parametrize("suffix", [".nc", ".safetensors"])
def test_files_keep_all_that_there_is(name, suffix, tmp_path):
    posterior = result(name)
    path = tmp_path / f"posterior{suffix}"
    posterior.save(path)
    loaded = Posterior.load(path, model=network)
    fields = ("draws", "sample_stats", "optimization", "point_estimates")
    for before, after in ((getattr(posterior, f), getattr(loaded, f)) for f in fields):
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key].to(value.dtype), value) for key, value in before.items())
    assert loaded.attrs == posterior.attrs
    assert (loaded.method, loaded.draws_are) == (posterior.method, posterior.draws_are)
    features = data()[0]
    expected = posterior.predict(features, sites=["hidden"])["hidden"]
    torch.testing.assert_close(loaded.predict(features, sites=["hidden"])["hidden"], expected)


@every_routine
def test_bar_shows_name_and_time_left(name, capsys):
    run(name, progress=True)
    shown = capsys.readouterr().err
    assert type(routine(name)).__name__ in shown
    assert "<" in shown
    figure = dict.fromkeys(("SVGD", "WGD", "SPOS", "SGLD"), "stein norm=") | {"SVI": "elbo="}
    figure |= {"NUTS": "step size=", "EM": "log density=", "CoordinateAscent": "elbo="}
    assert figure[type(routine(name)).__name__] in shown
    run(name, progress=False)
    silent = capsys.readouterr()
    assert not silent.out
    assert not silent.err


@every_routine
def test_an_interrupted_run_returns_what_it_has(name):
    """Ctrl-C arrives within the model, which runs at every step where nothing is recorded."""
    calls = []

    def interrupting(features, response=None):
        calls.append(None)
        if len(calls) == 80:
            signal.raise_signal(signal.SIGINT)
        network(features, response)

    row = ROUTINES[name]
    lengths = {key: 0 if key == "warmup_steps" else 500 for key in row.lengths}
    of = row.make(interrupting, compile="none")
    with pytest.warns(RuntimeWarning, match="interrupted"):
        posterior = run(name, of=of, **lengths)
    assert posterior.attrs["interrupted"] == 1
    assert all(value.isfinite().all() for value in posterior.draws.values())
    assert posterior.attrs.get("num_steps", posterior.num_draws) < 100


@pytest.mark.parametrize("name", [n for n in ROUTINES if n not in ("EM", "CoordinateAscent")])
def test_a_score_that_fails_is_named(name):
    """Its value is finite, so that only the score tells; NUTS finds no start, EM takes no score."""

    def failing(features, response=None):
        readout = network(features, response)
        # The square root of zero: finite, with a slope that is not.
        pyro.factor("kink", (readout - readout.detach()).square().sum().sqrt())

    row = ROUTINES[name]
    of = row.make(failing)
    error = ValueError if name == "NUTS" else NonFiniteError
    message = r"finite log density|not finite at step 0, first in .*readout"
    with pytest.raises(error, match=message) as caught:
        run(name, of=of)
    if isinstance(caught.value, NonFiniteError):
        assert caught.value.step == 0
        assert any("readout" in site for site in caught.value.sites)
        assert all(v.isfinite().all() for v in caught.value.posterior.draws.values())


def without_latents(features, response=None):
    with pyro.plate("row", len(features)):
        pyro.sample("response", dist.Normal(features.sum(-1), 1.0), obs=response)


@every_routine
def test_bad_input_is_refused(name):
    features, response = data()
    row = ROUTINES[name]
    with pytest.raises(ValueError, match="no continuous latent site"):
        run(name, of=row.make(without_latents))
    with pytest.raises(ValueError, match="NaN"):
        run(name, features, response.clone().fill_(torch.nan))
    with pytest.raises(ValueError, match="is empty"):
        run(name, features[:0], response[:0])
    with pytest.raises(ValueError, match="site 'response' on arguments"):
        run(name, features, response[:5])
    with pytest.raises(ValueError, match="unexpected keyword argument 'colour'"):
        run(name, features, response, colour="red")
    with pytest.raises(ValueError, match="seed must be an integer"):
        run(name, seed=-1)
    with pytest.raises(ValueError, match=r"init must give values for the sites|guide of your own"):
        run(name, init={"colour": torch.zeros(2)})
    with pytest.raises(TypeError, match=r"no options \['colour'\]; its options are .*chunk_size"):
        row.make(network, colour="red")
    with pytest.raises(ValueError, match="chunk_size must be at least one"):
        row.make(network, chunk_size=0)


@every_routine
@pytest.mark.usefixtures("unchecked_types")
def test_bad_lengths_are_refused(name):
    row = ROUTINES[name]
    for length in [*row.lengths, row.chains]:
        for bad in (-1, 1.5, None):
            with pytest.raises(ValueError, match=f"{length} must be a whole number, at least"):
                run(name, **{length: bad})
    with pytest.raises(ValueError, match="callable"):
        row.make("network")


@every_routine
def test_a_model_parameter_named_like_one_of_runs_is_refused(name):
    def seeded_model(features, response=None, seed=0):
        network(features, response)

    row = ROUTINES[name]
    with pytest.raises(ValueError, match=r"parameters \['seed'\] bear names .* functools.partial"):
        row.make(seeded_model)
    fixed = functools.partial(seeded_model, seed=3)
    assert run(name, of=row.make(fixed)).attrs["seed"] == 0
