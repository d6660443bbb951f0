"""Tests of bayesattn.inference.svi: guides against closed forms, and what programs learn."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.running import ConvergenceWarning, NonFiniteError
from bayesattn.inference.svi import SVI

MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
COVARIANCE = torch.tensor(
    [[1.0, 0.7, 0.0], [0.7, 2.0, -0.5], [0.0, -0.5, 0.8]], dtype=torch.float64
)
NUM_DRAWS = 4000
# Four standard errors of a mean and of a standard deviation, in standard deviations, with as much
# for the noise that is left in the guide.
SHIFT, WIDTH = 8 / NUM_DRAWS**0.5, 8 / (2 * NUM_DRAWS) ** 0.5


def gaussian():
    pyro.sample("x", dist.MultivariateNormal(MEAN, COVARIANCE))


def conjugate(data):
    """A normal mean and a precision that is known: the evidence is a closed form."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(data)):
        pyro.sample("y", dist.Normal(mean, 2.0), obs=data)


def log_evidence(data):
    covariance = 4 * torch.eye(len(data)) + torch.ones(len(data), len(data))
    return dist.MultivariateNormal(torch.zeros(len(data)), covariance).log_prob(data).item()


@pytest.fixture
def param_store():
    """Pyro's own store, emptied before and after."""
    pyro.get_param_store().clear()
    yield pyro.get_param_store()
    pyro.get_param_store().clear()


def run(svi, *args, num_steps=400, seed=0, **kwargs):
    return svi.run(*args, num_steps=num_steps, seed=seed, progress=False, **kwargs)


def moments(posterior, site="x"):
    draws = posterior.draws[site][0]
    return draws.mean(0), draws.T.cov()


# ---------------------------------------------------------------- known answers


@pytest.mark.parametrize("coordinates", ["raw", "laplace"])
def test_mean_field_has_the_inverse_of_the_precision_diagonal(coordinates):
    """Of a Gaussian: exact means, variances 1 / precision_ii. In Laplace coordinates, all exact."""
    svi = SVI(gaussian, num_elbo_particles=10, coordinates=coordinates)
    mean, covariance = moments(run(svi, num_samples=NUM_DRAWS, num_steps=500))
    exact = COVARIANCE
    if coordinates == "raw":
        exact = torch.diag(1 / torch.linalg.inv(COVARIANCE).diagonal())
    sd = exact.diagonal().sqrt()
    assert ((mean - MEAN) / sd).abs().max() < SHIFT
    assert ((covariance - exact) / (sd[:, None] * sd)).abs().max() < 2 * WIDTH


@pytest.mark.parametrize("guide", ["multivariate_normal", "low_rank"])
def test_guides_with_covariance_are_exact_for_a_gaussian(guide):
    svi = SVI(gaussian, guide=guide, num_elbo_particles=10)
    posterior = run(svi, num_samples=NUM_DRAWS, num_steps=600)
    mean, covariance = moments(posterior)
    sd = COVARIANCE.diagonal().sqrt()
    assert ((mean - MEAN) / sd).abs().max() < SHIFT
    bound = 2 * WIDTH if guide == "multivariate_normal" else 0.25
    assert ((covariance - COVARIANCE) / (sd[:, None] * sd)).abs().max() < bound
    untrained = moments(run(svi, num_samples=NUM_DRAWS, num_steps=1))[0]
    assert ((untrained - MEAN) / sd).abs().max() > SHIFT


def test_elbo_bounds_the_evidence_and_meets_it_where_the_guide_is_exact(generator):
    data = torch.randn(7, generator=generator)
    exact = log_evidence(data)
    posterior = run(SVI(conjugate, num_elbo_particles=20), data, num_steps=300)
    elbo = posterior.optimization["elbo"][0]
    assert elbo[:100].mean() < exact
    assert elbo[-50:].mean().item() == pytest.approx(exact, abs=0.02)
    # With an exact guide lp - log_q is the log evidence at every draw, so that k-hat is small.
    ratio = posterior.sample_stats["lp"] - posterior.sample_stats["log_q"]
    assert ratio.mean().item() == pytest.approx(exact, abs=0.02)
    assert ratio.std() < 0.05
    assert (posterior.summary(sites=["mean"])["pareto_k"] < 0.7).all()


@pytest.mark.parametrize("guide", ["normal", "multivariate_normal", AutoNormal])
def test_log_q_is_the_density_of_the_draws_on_the_real_line(guide):
    """For a positive site; the average of p / q is the evidence of what the draws came from."""

    def program():
        pyro.sample("rate", dist.Gamma(9.0, 3.0))
        pyro.factor("evidence", torch.tensor(math.log(5.0)))

    chosen = guide(program) if isinstance(guide, type) else guide
    posterior = run(SVI(program, guide=chosen), num_steps=200, num_samples=1000)
    ratio = posterior.sample_stats["lp"][0] - posterior.sample_stats["log_q"][0]
    assert ratio.exp().mean().item() == pytest.approx(5.0, rel=0.05)


def test_log_q_counts_the_frame():
    """In Laplace coordinates, whose determinant is a thousandth."""

    def scaled():
        pyro.sample(
            "x", dist.Normal(torch.tensor([0.0, 5.0]), torch.tensor([1e-4, 10.0])).to_event(1)
        )

    posterior = run(SVI(scaled, coordinates="laplace"), num_steps=200)
    ratio = posterior.sample_stats["lp"] - posterior.sample_stats["log_q"]
    assert ratio.exp().mean().item() == pytest.approx(1.0, rel=0.1)


def test_delta_is_the_penalized_optimum(generator):
    """Ridge regression: the mode in the constrained space, without log-determinant."""
    features = torch.randn(30, 3, generator=generator)
    response = torch.randn(30, generator=generator)

    def ridge(features, response):
        weight = pyro.sample("weight", dist.Normal(0.0, 0.5).expand([3]).to_event(1))
        scale = pyro.sample("scale", dist.Exponential(1.0))
        with pyro.plate("row", len(response)):
            pyro.sample("response", dist.Normal(features @ weight, scale), obs=response)

    posterior = run(SVI(ridge, guide="delta"), features, response, num_steps=500)
    assert posterior.draws_are == "point"
    weight, scale = posterior.draws["weight"][0, 0], posterior.draws["scale"][0, 0]
    penalty = (scale / 0.5) ** 2 * torch.eye(3)
    exact = torch.linalg.solve(features.T @ features + penalty, features.T @ response)
    torch.testing.assert_close(weight, exact, rtol=0, atol=1e-4)
    residual = (response - features @ weight).square().sum()
    # d/ds: -n / s + r / s^3 - 1 = 0.
    assert (-30 / scale + residual / scale**3 - 1).abs() < 1e-2
    untrained = run(SVI(ridge, guide="delta"), features, response, num_steps=1)
    assert (untrained.draws["weight"][0, 0] - exact).abs().max() > 1e-2


# ---------------------------------------------------------------- programs of all kinds


@pytest.mark.slow
def test_minibatches_meet_the_full_posterior(generator):
    data = 1 + torch.randn(500, generator=generator)

    def program(data, batch=None):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(data), subsample_size=batch) as rows:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=data[rows])

    sd = 1 / math.sqrt(501)
    for options, bound in [({}, 0.2), ({"batch": 50}, 0.5)]:
        svi = SVI(program, num_elbo_particles=10)
        posterior = run(svi, data, num_steps=500, **options)
        draws = posterior.draws["mean"]
        assert abs(draws.mean().item() - data.sum().item() / 501) < bound * sd
        assert draws.std().item() == pytest.approx(sd, rel=0.25)


@pytest.mark.parametrize("guide", ["normal", "delta", AutoDiagonalNormal])
def test_discrete_sites_are_summed_out(guide, generator):
    """A mixture of two known components; only the weight is continuous."""

    def mixture(data):
        weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
        with pyro.plate("row", len(data)):
            kind = pyro.sample("kind", dist.Bernoulli(weight))
            pyro.sample("y", dist.Normal(6 * kind, 1.0), obs=data)

    noise = torch.randn(40, generator=generator)
    data = torch.cat([noise[:30], 6 + noise[30:]])
    chosen = guide
    if isinstance(guide, type):
        marked = pyro.poutine.block(pyro.infer.config_enumerate(mixture), hide=["kind"])
        chosen = guide(marked)
    posterior = run(SVI(mixture, guide=chosen), data, num_steps=200)
    # Beta(2 + 10, 2 + 30), and its mode.
    expected = 11 / 42 if guide == "delta" else 12 / 44
    assert posterior.draws["weight"].mean().item() == pytest.approx(expected, abs=0.02)


# ---------------------------------------------------------------- guides of one's own


def own_guide(data):
    location = pyro.param("location", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("mean", dist.Normal(location, scale))


def test_a_guide_of_ones_own_is_fitted(generator):
    data = torch.randn(7, generator=generator)
    variance = 1 / (1 + 7 / 4)
    posterior = run(SVI(conjugate, guide=own_guide, num_elbo_particles=3), data, num_steps=300)
    draws = posterior.draws["mean"]
    expected = variance * data.sum().item() / 4
    assert draws.mean().item() == pytest.approx(expected, abs=0.2 * variance**0.5)
    assert draws.std().item() == pytest.approx(variance**0.5, rel=0.15)
    assert posterior.point_estimates == {}


@pytest.mark.parametrize("kind", [AutoNormal, AutoDelta], ids=lambda kind: kind.__name__)
def test_a_guide_that_is_a_module_stays_as_it_is(kind, generator, param_store):
    """Also one that was used before, and also where runs are several: each begins from it."""
    data = torch.randn(7, generator=generator)
    guide = kind(conjugate)
    model = guide.model
    with torch.random.fork_rng(devices=[]):
        guide(data)
    before = {name: value.detach().clone() for name, value in guide.named_parameters()}
    svi = SVI(conjugate, guide=guide)
    lengths = {"num_runs": 2, "num_steps": 20, "num_samples": 5}
    first, again = run(svi, data, **lengths), run(svi, data, **lengths)
    assert torch.equal(first.draws["mean"], again.draws["mean"])
    for name, value in guide.named_parameters():
        assert torch.equal(value, before[name])
    assert guide.model is model


def test_lists_of_guides_are_taken(generator):
    def program():
        pyro.sample("x", dist.Normal(2.0, 1.0))
        pyro.sample("z", dist.Normal(-3.0, 1.0))

    guide = AutoGuideList(program)
    guide.append(AutoNormal(pyro.poutine.block(program, expose=["x"])))
    guide.append(AutoDelta(pyro.poutine.block(program, expose=["z"])))
    posterior = run(SVI(program, guide=guide), num_steps=500)
    assert posterior.draws["x"].mean().item() == pytest.approx(2.0, abs=0.2)
    assert posterior.draws["z"].unique().item() == pytest.approx(-3.0, abs=0.1)
    assert posterior.draws["z"].std() == 0


def test_runs_are_chains_and_the_first_is_that_of_a_single_run(generator):
    data = torch.randn(7, generator=generator)
    several = run(SVI(conjugate), data, num_runs=3, num_samples=11, num_steps=20)
    one = run(SVI(conjugate), data, num_samples=11, num_steps=20)
    assert several.draws["mean"].shape == (3, 11)
    assert several.optimization["elbo"].shape == (3, 20)
    assert torch.equal(several.draws["mean"][:1], one.draws["mean"])
    assert torch.equal(several.optimization["elbo"][:1], one.optimization["elbo"])


def two_modes():
    x = pyro.sample("x", dist.Normal(0.0, 10.0))
    pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("modes", torch.logaddexp(-8 * (x - 4) ** 2, -8 * (x + 4) ** 2))


@pytest.mark.slow
def test_runs_that_disagree_are_warned_of():
    with pytest.warns(ConvergenceWarning, match=r"^SVI: the 4 runs disagree.*\d, at site 'x'"):
        posterior = run(SVI(two_modes), num_runs=4)
    assert len(posterior.attrs["problems"]) == 1


@pytest.mark.slow
def test_runs_that_agree_and_points_are_not_warned_of():
    assert run(SVI(gaussian), num_runs=3).attrs["problems"] == []
    guide = AutoDelta(gaussian)
    assert run(SVI(gaussian, guide=guide), num_runs=2, num_steps=3).attrs["problems"] == []


# ---------------------------------------------------------------- parameters to learn


net = nn.utils.skip_init(nn.Linear, 1, 1, dtype=torch.float64)
nn.init.constant_(net.weight, 0.1)
nn.init.constant_(net.bias, 0.2)


def line_of_parameters(x, y=None):
    slope = pyro.param("slope", torch.zeros(()))
    level = pyro.param("level", torch.tensor(0.5), constraint=dist.constraints.positive)
    observe(slope * x[:, 0] + level, y)


def line_of_a_module(x, y=None):
    pyro.module("net", net)
    observe(net(x)[:, 0], y)


class LineModule(PyroModule):
    def __init__(self):
        super().__init__()
        self.slope = PyroModule[nn.Linear](1, 1, bias=False)
        nn.init.constant_(self.slope.weight, 0.1)
        self.level = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

    def forward(self, x, y=None):
        observe(self.slope(x)[:, 0] + self.level, y)


def observe(mean, y):
    mean = pyro.deterministic("line", mean)
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("row", len(mean)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


LINES = {
    "pyro.param": (lambda: line_of_parameters, {"slope", "level"}),
    "pyro.module": (lambda: line_of_a_module, {"net$$$weight", "net$$$bias"}),
    "PyroModule": (LineModule, {"slope.weight", "level"}),
}


@pytest.fixture
def line_data(generator):
    x = torch.randn(30, 1, generator=generator)
    return x, 2 * x[:, 0] + 1 + 0.2 * torch.randn(30, generator=generator)


@pytest.mark.parametrize(
    ("kind", "guide"),
    [
        ("pyro.param", "normal"),
        ("pyro.module", "delta"),
        ("PyroModule", "own"),
        *(
            pytest.param(kind, guide, marks=pytest.mark.slow)
            for kind, guide in [
                ("pyro.param", "delta"),
                ("pyro.param", "own"),
                ("pyro.module", "normal"),
                ("pyro.module", "own"),
                ("PyroModule", "normal"),
                ("PyroModule", "delta"),
            ]
        ),
    ],
)
def test_parameters_are_learned_and_predicted_with(kind, guide, line_data, param_store):
    """Least squares. The program's own parameters stay, so that runs are independent."""
    make, names = LINES[kind]
    with torch.random.fork_rng(devices=[]):
        model = make()
    x, y = line_data
    columns = torch.cat([x, torch.ones_like(x)], 1)
    exact = columns @ torch.linalg.lstsq(columns, y).solution
    module = {"pyro.module": net, "PyroModule": model}.get(kind)
    before = [] if module is None else [p.detach().clone() for p in module.parameters()]

    chosen = AutoNormal(model) if guide == "own" else guide
    svi = SVI(model, guide=chosen)
    posterior = run(svi, x, y, num_steps=300, num_runs=2, num_samples=5)

    assert set(posterior.point_estimates) == names
    for value in posterior.point_estimates.values():
        torch.testing.assert_close(value[0], value[1], rtol=0, atol=0.15)
        assert not torch.equal(value[0], value[1])
    line = posterior.predict(x, sites=["line"])["line"]
    torch.testing.assert_close(line, exact.expand_as(line), rtol=0, atol=0.05)
    likelihood = posterior.log_likelihood(x, y)["y"]
    scale = posterior.draws["scale"][..., None]
    torch.testing.assert_close(likelihood, dist.Normal(line, scale).log_prob(y))
    after = [] if module is None else list(module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not list(param_store)


def test_what_was_trained_before_is_where_learning_starts(param_store):
    """Parameters in Pyro's store are read, and stay as they are."""

    def program():
        location = pyro.param("location", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(location, 1.0))

    pyro.param("location", torch.tensor(7.0))
    stored = pyro.param("location")
    posterior = run(SVI(program), num_steps=1)
    assert posterior.point_estimates["location"].item() == pytest.approx(7.0, abs=0.1)
    run(SVI(program), num_steps=50)
    assert pyro.param("location") is stored
    assert stored.item() == 7.0


def test_guides_of_the_same_name_in_pyros_store_are_not_met(generator, param_store):
    """A user's AutoNormal of other shapes, trained before, is neither read nor written."""

    def other():
        pyro.sample("mean", dist.Normal(0.0, 1.0).expand([5]).to_event(1))

    data = torch.randn(7, generator=generator)
    plain = run(SVI(conjugate, guide=AutoNormal(conjugate)), data, num_steps=20)
    theirs = AutoNormal(other)
    with torch.random.fork_rng(devices=[]):
        theirs()
    names = {name: value.clone() for name, value in param_store.items()}
    assert names
    ours = run(SVI(conjugate, guide=AutoNormal(conjugate)), data, num_steps=20)
    assert torch.equal(ours.draws["mean"], plain.draws["mean"])
    for name, value in param_store.items():
        assert torch.equal(value, names[name])


def test_modules_that_a_program_only_uses_are_not_learned(generator):
    """A network in reach that nothing registers: no parameters, no gradients left on it."""
    used = nn.utils.skip_init(nn.Linear, 1, 1)
    nn.init.ones_(used.weight)
    nn.init.ones_(used.bias)

    def program(x, y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(used(x)[:, 0], scale), obs=y)

    x, y = torch.randn(5, 1, generator=generator), torch.randn(5, generator=generator)
    for guide in ("normal", "delta"):
        assert run(SVI(program, guide=guide), x, y, num_steps=5).point_estimates == {}
        assert all(parameter.grad is None for parameter in used.parameters())


# ---------------------------------------------------------------- runs that fail or stop


def test_a_failed_run_comes_with_those_before_it():
    """Mutant: only the posterior of the run that failed."""
    calls = []

    def guide():
        location = pyro.param("location", torch.tensor(0.0))
        calls.append(None)
        # The second run fails some way on.
        broken = torch.nan if len(calls) > 40 else 0.0
        pyro.sample("x", dist.Normal(location + broken, 1.0))

    def program():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(NonFiniteError, match=r"SVI 2/2.* first in location") as caught:
        run(SVI(program, guide=guide), num_steps=20, num_runs=2, num_samples=3, check_every=5)
    posterior = caught.value.posterior
    assert posterior.num_chains == 2
    assert posterior.draws["x"][0].isfinite().all()
    elbo = posterior.optimization["elbo"]
    assert elbo.shape == (2, 20)
    assert elbo[0].isfinite().all()
    assert elbo[1, -1].isnan()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guide": "gaussian"}, r"guide must be one of \['delta', .*got 'gaussian'"),
        ({"guide": AutoNormal}, "an instance where it is an autoguide"),
        ({"guide": 3}, "guide must be a name or a Pyro program, got 3"),
        ({"num_elbo_particles": 0}, "num_elbo_particles must be a whole number, at least 1"),
        ({"init_scale": 0.0}, "init_scale must be a positive number"),
        ({"init_scale": 0.1, "guide": "delta"}, "init_scale goes with named guides"),
        ({"coordinates": "polar"}, "coordinates must be one of"),
        ({"coordinates": "laplace", "guide": "delta"}, "not with 'delta'"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS evaluates the objective by itself"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.usefixtures("unchecked_types")
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SVI(gaussian, **settings)


def test_guides_that_do_not_fit_are_refused(generator):
    """Before the first step, not after the last."""
    data = torch.randn(7, generator=generator)
    with pytest.raises(ValueError, match="the guide lacks the model's latent site 'mean'"):
        run(SVI(conjugate, guide=lambda data: None), data)

    def wide(data):
        pyro.sample("mean", dist.Normal(0.0, 1.0).expand([5]).to_event(1))

    with pytest.raises(ValueError, match=r"must have shape \(\), as in the model, got \(5,\)"):
        run(SVI(conjugate, guide=wide), data)
    with pytest.raises(ValueError, match="a guide of your own has its own start"):
        run(SVI(conjugate, guide=own_guide), data, init={"mean": torch.tensor(0.0)})


def test_laplace_coordinates_go_with_a_fixed_density(line_data):
    with pytest.raises(ValueError, match=r"without parameters to learn.*\['slope', 'level'\]"):
        run(SVI(line_of_parameters, coordinates="laplace"), *line_data)


def test_starts_are_where_the_guide_begins():
    posterior = run(
        SVI(gaussian, init_scale=1e-3), num_steps=1, init={"x": torch.tensor([9.0, 8, 7])}
    )
    torch.testing.assert_close(
        posterior.draws["x"].mean((0, 1)), torch.tensor([9.0, 8.0, 7.0]), rtol=0, atol=0.1
    )


def test_elbo_is_that_of_the_recorded_density():
    """With a point mass as guide, the ELBO is lp, entropy apart."""
    density = LogDensity(gaussian)
    posterior = run(SVI(gaussian, init_scale=1e-9), num_steps=1, init={"x": MEAN})
    entropy = 3 * (0.5 * math.log(2 * math.pi * math.e) + math.log(1e-9))
    expected = density.value_and_score(MEAN[None])[0].item() + entropy
    # One draw: its own log density under the guide stands for the entropy.
    assert posterior.optimization["elbo"].item() == pytest.approx(expected, abs=8.0)


def positive(data):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("row", len(data)):
        pyro.sample("y", dist.Normal(0.0, scale), obs=data)


def without_arguments():
    pyro.sample("scale", dist.HalfNormal(1.0))


def of_another_support(data):
    pyro.sample("scale", dist.Normal(-9.0, 0.1))


def with_more_sites(data, helper=None):
    pyro.sample("extra", dist.Normal(0.0, 1.0), infer={"is_auxiliary": helper is not None})
    pyro.sample("scale", dist.LogNormal(pyro.param("location", torch.tensor(0.0)), 0.5))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (without_arguments, r"the guide failed when run on arguments .*TypeError"),
        (of_another_support, r"the guide draws values that .*'scale': GreaterThan"),
        (with_more_sites, r"the guide has sites \['extra'\] that are no latent"),
    ],
)
def test_guides_that_do_not_fit_are_refused_at_once(guide, message, generator):
    with pytest.raises(ValueError, match=message):
        run(SVI(positive, guide=guide), torch.ones(3), num_steps=3, num_samples=3)


def test_sites_that_help_a_guide_are_taken():
    guide = functools.partial(with_more_sites, helper=True)
    run(SVI(positive, guide=guide), torch.ones(3), num_steps=3, num_samples=3)


def test_the_summary_of_a_point_is_its_value():
    table = run(SVI(gaussian, guide="delta"), num_steps=3).summary()
    assert list(table.columns) == ["mean"]
