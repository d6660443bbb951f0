"""LogDensity equals Pyro's own log joint plus log determinants, whatever the sites are."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import biject_to, constraints

from bayesattn.inference import DensitySettings, LogDensity
from bayesattn.inference.running import private_param_store, seeded


def oracle(density, row, *args, supports=None):
    """Pyro's log joint at a row's constrained values, by condition, plus log determinants."""
    supports = supports or {}
    values, total = {}, 0.0
    for site in density.sites:
        support = supports[site.name](values) if site.name in supports else site.support
        transform = biject_to(support)
        image = row[site.start : site.stop].reshape(site.unconstrained_shape)
        values[site.name] = transform(image)
        total = total + transform.log_abs_det_jacobian(image, values[site.name]).sum()
    with private_param_store():
        trace = poutine.trace(poutine.condition(density.model, values)).get_trace(*args)
    return trace.log_prob_sum() + total


def assert_agrees(model, *args, supports=None, scale=1.0):
    density = LogDensity(model, *args)
    generator = torch.Generator().manual_seed(1)
    rows = scale * torch.randn(3, density.dim, generator=generator)
    values, scores = density.value_and_score(rows)
    for row, value, score in zip(rows, values, scores, strict=True):
        row = row.clone().requires_grad_()
        expected = oracle(density, row, *args, supports=supports)
        torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)
        (gradient,) = torch.autograd.grad(expected, row)
        torch.testing.assert_close(score, gradient, rtol=1e-8, atol=1e-8)
    constrained = density.constrain(rows)
    torch.testing.assert_close(density.unconstrain(constrained), rows, rtol=1e-6, atol=1e-6)
    return density


def one_site(distribution):
    def model(y):
        x = pyro.sample("x", distribution())
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)

    return model


DISTRIBUTIONS = {
    "real": lambda: dist.Normal(torch.zeros(3), 2.0).to_event(1),
    "positive": lambda: dist.Gamma(torch.tensor(2.0), 3.0),
    "half cauchy": lambda: dist.HalfCauchy(torch.tensor(2.0)),
    "unit interval": lambda: dist.Beta(torch.tensor([2.0, 3.0]), 1.5).to_event(1),
    "interval": lambda: dist.Uniform(torch.tensor(-1.0), 5.0),
    "simplex": lambda: dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
    "simplexes": lambda: dist.Dirichlet(torch.ones(2, 3)).to_event(1),
    "correlation Cholesky": lambda: dist.LKJCholesky(3, torch.tensor(1.5)),
    "batch without plate": lambda: dist.Normal(torch.zeros(2, 3), 1.0),
    "ordered": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
    ),
    "improper": lambda: dist.LogNormal(torch.zeros(2), 1.0).to_event(1).mask(False),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_supports(name):
    assert_agrees(one_site(DISTRIBUTIONS[name]), torch.tensor(0.3))


def test_support_that_depends_on_another_site():
    def model():
        top = pyro.sample("top", dist.Gamma(torch.tensor(2.0), 1.0))
        pyro.sample("x", dist.Uniform(-top, 2 * top))

    interval = {"x": lambda values: constraints.interval(-values["top"], 2 * values["top"])}
    assert_agrees(model, supports=interval)


def test_plates_factors_masks_scales_and_deterministic_sites(generator):
    y = torch.randn(5, 3, generator=generator)
    seen = torch.tensor([True, False, True, True, False])[:, None]

    def model(y):
        with pyro.plate("column", 3, dim=-1):
            location = pyro.sample("location", dist.Normal(torch.tensor(0.0), 2.0))
        with poutine.scale(scale=2.5):
            width = pyro.sample("width", dist.HalfNormal(torch.tensor(1.0)))
        pyro.deterministic("ratio", location / width)
        pyro.factor("penalty", -(location.square().sum()))
        with (
            pyro.plate("row", 5, dim=-2),
            pyro.plate("column_", 3, dim=-1),
            poutine.mask(mask=seen),
        ):
            local = pyro.sample("local", dist.Exponential(width))
            pyro.sample("y", dist.Normal(location + local, width), obs=y)

    density = assert_agrees(model, y)
    assert [plate.name for plate in density.sites[2].plates] == ["row", "column_"]
    assert [plate.axis for plate in density.sites[2].plates] == [0, 1]


def test_pyro_module_with_samples_and_constrained_parameters(generator):
    class Regression(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = pyro.nn.PyroModule[nn.Linear](2, 1)
            self.linear.weight = pyro.nn.PyroSample(dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))
            self.width = pyro.nn.PyroParam(torch.tensor(0.7), constraint=constraints.positive)

        def forward(self, x, y):
            mean = self.linear(x)[:, 0]
            with pyro.plate("n", len(x)):
                pyro.sample("y", dist.Normal(mean, self.width), obs=y)

    with seeded(0):
        model = Regression()
    x, y = torch.randn(5, 2, generator=generator), torch.randn(5, generator=generator)
    density = assert_agrees(model, x, y)
    row = torch.zeros(1, 2)
    before = density.value_and_score(row)[0]
    with torch.no_grad():
        model.linear.bias += 1.0
    after = density.value_and_score(row)[0]
    torch.testing.assert_close(after[0], oracle(density, row[0], x, y).detach())
    assert (before - after).abs() > 0.01


def test_transformer_encoder_layer_inside_a_program(generator):
    with seeded(0):
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    x = torch.randn(3, 5, 4, generator=generator)

    def model(x):
        pyro.module("layer", layer)
        weight = pyro.sample("weight", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("n", 3):
            pyro.sample("y", dist.Normal(layer(x * weight).sum((1, 2)), 1.0), obs=torch.zeros(3))

    assert_agrees(model, x)


def test_lazy_module_is_made_before_anything_is_recorded(generator):
    with seeded(0):
        layer = nn.LazyLinear(1)

        def model(x):
            scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0), 1.0))
            with pyro.plate("n", len(x)):
                pyro.sample("y", dist.Normal(layer(x)[:, 0], scale), obs=x[:, 0])

        assert_agrees(model, torch.randn(5, 3, generator=generator))


def test_handlers_and_plates_around_a_call_do_not_matter(generator):
    y = torch.randn(7, generator=generator)

    def model(y):
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    rows = torch.zeros(3, 1)
    expected = LogDensity(model, y).value_and_score(rows)[0]
    with pyro.plate("outer", 5, dim=-1), poutine.trace() as outer:
        inside = LogDensity(model, y).value_and_score(rows)[0]
    torch.testing.assert_close(inside, expected)
    assert "x" not in outer.trace.nodes


def test_hessian_is_the_derivative_of_the_score(generator):
    model = one_site(DISTRIBUTIONS["simplex"])
    density = LogDensity(model, torch.tensor(0.3))
    row = torch.randn(1, 2, generator=generator)
    _, score, second = density.value_score_and_hessian(row)
    torch.testing.assert_close(score, density.value_and_score(row)[1])
    for axis in range(2):
        shift = torch.zeros(1, 2)
        shift[0, axis] = 1e-5
        upper, lower = (density.value_and_score(row + s)[1] for s in (shift, -shift))
        torch.testing.assert_close((upper - lower)[0] / 2e-5, second[0, axis], rtol=1e-5, atol=1e-6)


def test_particle_index_gathers_the_slices_of_a_plate():
    def model():
        pyro.sample("outside", dist.Normal(torch.tensor(0.0), 1.0))
        heads = pyro.plate("head", 3, dim=-1)
        with pyro.plate("layer", 2, dim=-2), heads:
            pyro.sample("weight", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        with heads:
            pyro.sample("share", dist.Dirichlet(torch.ones(3)))

    density = LogDensity(model)
    inside, outside = density.particle_index("head")
    assert inside.shape == (3, 2 * 5 + 2)
    assert outside.tolist() == [0]
    rows = torch.zeros(1, density.dim)
    rows[0, inside[1]] = 1.0
    values = density.constrain(rows)
    changed = values["weight"][0].abs().sum((0, 2)) > 0
    assert changed.tolist() == [False, True, False]
    same = (values["share"][0] - 1 / 3).abs().max(-1).values < 1e-9
    assert same.tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"'token'.*\['head', 'layer'\]"):
        density.particle_index("token")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_follows_the_data(dtype, generator):
    y = torch.randn(5, generator=generator).to(dtype)

    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 5):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    density = LogDensity(model, y)
    assert density.sites[0].dtype == dtype
    assert density.dtype == torch.promote_types(dtype, torch.float32)
    value, score = density.value_and_score(torch.tensor([[0.25]]))
    exact = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.25))
    exact = exact + dist.Normal(0.25, 1.0).log_prob(y.double()).sum()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(value[0].double(), exact, rtol=tolerance, atol=tolerance)
    assert score.dtype == density.dtype


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 7])
def test_chunks_change_nothing(chunk_size, generator):
    model, data = one_site(DISTRIBUTIONS["simplex"]), torch.tensor(0.3)
    rows = torch.randn(5, 2, generator=generator)
    whole = LogDensity(model, data)
    parts = LogDensity(model, data, settings=DensitySettings(chunk_size=chunk_size))
    for one, other in zip(whole.value_and_score(rows), parts.value_and_score(rows), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(whole.constrain(rows), parts.constrain(rows))


SITES = st.sampled_from(["real", "positive", "unit interval", "simplex", "interval", "simplexes"])


@settings(max_examples=15)
@given(
    names=st.lists(SITES, min_size=1, max_size=3), size=st.integers(1, 4), in_plate=st.booleans()
)
def test_random_programs(names, size, in_plate):
    def model():
        total = torch.tensor(0.0)
        for place, name in enumerate(names):
            value = pyro.sample(f"site_{place}", DISTRIBUTIONS[name]())
            total = total + value.sum()
        if in_plate:
            with pyro.plate("p", size):
                local = pyro.sample("local", dist.Gamma(2.0 + total.square(), 1.0))
                total = total + local.mean()
        with pyro.plate("n", size):
            pyro.sample("y", dist.Normal(total, 1.0), obs=torch.ones(size))

    assert_agrees(model, scale=0.5)
