"""Recorded programs: distributions made outside of them and told to check their values."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn

from bayesattn.inference import LogDensity
from bayesattn.inference.running import seeded


def regression(prior):
    """A regression whose prior is what ``prior`` returns."""

    def model(x, y):
        weight = pyro.sample("weight", prior())
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(x @ weight, 1.0), obs=y)

    return model


# Each stores with itself that its values are to be checked.
PRIORS = {
    "expanded": lambda: dist.Normal(0.0, 1.0).expand([3]).to_event(1),
    "masked": lambda: dist.Normal(0.0, 1.0).expand([3]).mask(True).to_event(1),
    "told to": lambda: dist.Normal(torch.zeros(3), 1.0, validate_args=True).to_event(1),
    "positive": lambda: dist.HalfNormal(1.0).expand([3]).to_event(1),
    "made anew": lambda: dist.VonMises(0.0, 1.0, validate_args=True).expand([3]).to_event(1),
    "simplex": lambda: dist.Dirichlet(torch.ones(3), validate_args=True),
}


@pytest.mark.parametrize("make", PRIORS.values(), ids=PRIORS)
def test_a_prior_may_stand_outside(make, generator):
    prior = make()
    x, y = torch.randn(7, 3, generator=generator), torch.randn(7, generator=generator)
    outside, inside = (LogDensity(regression(of), x, y) for of in (lambda: prior, make))
    rows = torch.randn(2, inside.dim, generator=generator)
    torch.testing.assert_close(outside.value_and_score(rows), inside.value_and_score(rows))
    weights = outside.constrain(rows)["weight"]
    errors = y - weights @ x.T
    by_hand = prior.log_prob(weights) + dist.Normal(0.0, 1.0).log_prob(errors).sum(-1)
    by_hand = by_hand + outside.log_determinant(rows)
    torch.testing.assert_close(outside.value_and_score(rows)[0], by_hand)


class TutorialRegression(PyroModule):
    """Bayesian linear regression as Pyro's tutorial writes it."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        scale = pyro.sample("scale", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)


def written_inside(x, y):
    scale = pyro.sample("scale", dist.Uniform(0.0, 10.0))
    weight = pyro.sample("linear.weight", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    bias = pyro.sample("linear.bias", dist.Normal(0.0, 10.0).expand([1]).to_event(1))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(x @ weight[0] + bias, scale), obs=y)


def test_priors_of_a_pyro_module_are_those_written_inside(generator):
    x, y = torch.randn(7, 3, generator=generator), torch.randn(7, generator=generator)
    with seeded(0):
        tutorial = TutorialRegression()
    module, inside = LogDensity(tutorial, x, y), LogDensity(written_inside, x, y)
    assert [site.name for site in module.sites] == [site.name for site in inside.sites]
    rows = torch.randn(2, 5, generator=generator)
    torch.testing.assert_close(module.value_and_score(rows), inside.value_and_score(rows))


def test_checks_are_as_they_were_afterwards(generator):
    x, y = torch.randn(7, 3, generator=generator), torch.randn(7, generator=generator)
    LogDensity(regression(PRIORS["expanded"]), x, y).value_and_score(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="within the support"):
        dist.HalfNormal(1.0).log_prob(torch.tensor(-1.0))
    with pytest.raises(ValueError, match="constraint"):
        dist.Normal(0.0, torch.tensor(-1.0))


def counts(data):
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("row", len(data)):
        pyro.sample("count", dist.Multinomial(total_count=5, probs=share), obs=data)


def impossible_counts(data):
    """The second kind cannot be, and never was."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    logits = torch.stack([x, torch.full_like(x, -torch.inf), torch.zeros_like(x)])
    with pyro.plate("row", len(data)):
        pyro.sample("count", dist.Multinomial(total_count=5, logits=logits), obs=data)


def ratings(data):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    gaps = pyro.sample("gaps", dist.LogNormal(torch.zeros(3), 0.1).to_event(1))
    cuts = gaps.cumsum(-1)
    with pyro.plate("row", len(data)):
        pyro.sample("rating", dist.OrderedLogistic(x.expand(len(data)), cuts), obs=data)


COUNTS = torch.tensor([[3.0, 0.0, 2.0], [1.0, 0.0, 4.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("program", "data"),
    [
        (counts, COUNTS),
        (impossible_counts, COUNTS),
        (ratings, torch.tensor([0, 3, 1, 2, 2])),
    ],
)
def test_formulas_that_write_in_place_are_recorded(program, data, generator):
    density = LogDensity(program, data)
    rows = 0.5 * torch.randn(3, density.dim, generator=generator)
    value, score = density.value_and_score(rows)
    for row, found, slope in zip(rows, value, score, strict=True):
        values = {name: v[0] for name, v in density.constrain(row[None]).items()}
        trace = pyro.poutine.trace(pyro.condition(program, values)).get_trace(data)
        expected = trace.log_prob_sum() + density.log_determinant(row[None])[0]
        torch.testing.assert_close(found, expected)
        assert slope.isfinite().all()
    step = 1e-6 * torch.randn(3, density.dim, generator=generator)
    moved = density.value_and_score(rows + step)[0] - density.value_and_score(rows - step)[0]
    torch.testing.assert_close((score * step).sum(1), moved / 2, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_bernoulli_sites_have_torchs_density_and_slope(value, generator):
    """In one fifth of the passes; also where a sigmoid has long been one."""
    logits = torch.cat([torch.randn(7, generator=generator), torch.tensor([-800.0, 0.0, 800.0])])

    def model(data):
        shift = pyro.sample("shift", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("row", 10):
            pyro.sample("y", dist.Bernoulli(logits=logits + shift), obs=data)

    data = torch.full((10,), value)
    shift = torch.tensor([[0.3], [-1.2]])
    found, score = LogDensity(model, data).value_and_score(shift)

    def expected(row):
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(row).sum()
        return prior + torch.distributions.Bernoulli(logits=logits + row).log_prob(data).sum()

    torch.testing.assert_close(found, torch.stack([expected(row) for row in shift]))
    slopes = [torch.autograd.functional.jacobian(expected, row) for row in shift]
    torch.testing.assert_close(score, torch.stack(slopes))
