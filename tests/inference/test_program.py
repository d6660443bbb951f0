"""Programs are read as they are, and refused by name where they have no log density."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import nn
from torch.distributions import constraints
from torch.nn import functional as F

from bayesattn.inference import DensitySettings, LogDensity
from bayesattn.inference.program import Plate, read_program
from bayesattn.inference.running import private_param_store, seeded

Y = torch.tensor([0.3, -1.2, 2.0, 0.7, 0.1, -0.4], dtype=torch.float64)


def noisy(y):
    location = pyro.sample("location", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(location, 1.0), obs=y)


def everything(y):
    shift = pyro.param("shift", torch.tensor(1.5))
    bounded = pyro.param("bounded", torch.tensor(0.5), constraint=constraints.unit_interval)
    head = pyro.plate("head", 3, dim=-1)
    with pyro.plate("layer", 2, dim=-2), head:
        pyro.sample("weight", dist.Dirichlet(torch.ones(4)))
    with head:
        scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    pyro.deterministic("twice", 2 * scale)
    kind = pyro.sample("kind", dist.Bernoulli(0.5))
    with pyro.plate("row", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(shift + bounded + kind, 1.0), obs=y[index])
    pyro.factor("penalty", -scale.sum())


def test_a_program_is_read():
    program = read_program(everything, (Y,), {})
    weight, scale = program.latents
    assert (weight.name, weight.shape, weight.unconstrained_shape) == (
        "weight",
        (2, 3, 4),
        (2, 3, 3),
    )
    assert weight.plates == (Plate("layer", 0, 2), Plate("head", 1, 3))
    assert (weight.start, weight.stop, scale.start, scale.stop) == (0, 18, 18, 21)
    assert scale.plates == (Plate("head", 0, 3),)
    assert program.dim == 21
    assert program.discrete == ("kind",)
    assert program.observed == ("y",)
    assert program.factors == ("penalty",)
    assert program.deterministic == ("twice",)
    assert program.subsamples == {"row": (6, 2)}
    assert {name: float(value) for name, value in program.parameters.items()} == {
        "shift": 1.5,
        "bounded": 0.5,
    }
    assert program.plate_nesting == 2
    assert (program.device, program.dtype) == (torch.device("cpu"), torch.float64)
    assert program.first_values["weight"].sum(-1).allclose(torch.ones(2, 3))
    assert read_program(everything, (Y,), {}, max_plate_nesting=4).event_start == -5


def test_parameters_of_modules_are_not_free_ones():
    net = nn.Linear(1, 1, device="meta").to_empty(device="cpu")
    nn.init.ones_(net.weight)
    nn.init.ones_(net.bias)

    def model(y):
        pyro.module("net", net)
        pyro.sample(
            "y", dist.Normal(net(y[:1]) + pyro.sample("x", dist.Beta(1.0, 2.0)), 1.0), obs=Y
        )

    assert read_program(model, (Y,), {}).parameters == {}


def test_values_of_trained_parameters_are_the_stores():
    with private_param_store():
        pyro.param("shift", torch.tensor(4.0))
        assert read_program(everything, (Y,), {}).parameters["shift"] == 4.0


def test_plates_in_a_loop():
    def model(y):
        location = pyro.sample("location", dist.Normal(0.0, 1.0))
        for row in pyro.plate("row", 6):
            pyro.sample(f"y_{row}", dist.Normal(location, 1.0), obs=y[row])

    rows = torch.tensor([[0.3], [-2.0]])
    expected = LogDensity(noisy, Y).value_and_score(rows)
    torch.testing.assert_close(LogDensity(model, Y).value_and_score(rows), expected)


def test_a_parameter_is_subsampled_by_its_plate():
    def model(y):
        location = pyro.sample("location", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 6, subsample_size=2) as index:
            offset = pyro.param("offset", torch.arange(6.0), event_dim=0)
            pyro.sample("y", dist.Normal(location + offset, 1.0), obs=y[index])

    density = LogDensity(model, Y)
    index = torch.tensor([4, 1])
    value, _ = density.value_and_score(torch.zeros(1, 1), {"row": index})
    likelihood = dist.Normal(index.double(), 1.0).log_prob(Y[index]).sum()
    torch.testing.assert_close(
        value[0], 3 * likelihood + dist.Normal(0.0, 1.0).log_prob(Y.new_zeros(()))
    )


def test_improper_sites_start_inside_of_their_support():
    def model():
        pyro.sample("x", dist.ImproperUniform(constraints.positive, (2,), (3,)).to_event(1))
        pyro.factor("f", torch.tensor(0.0))

    density = LogDensity(model)
    assert (density.program.first_values["x"] > 0).all()
    rows = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(density.value_and_score(rows)[0], rows.sum(1))


def test_a_prior_that_always_overflows_is_read_at_the_origin():
    def model(y):
        x = pyro.sample("x", dist.Normal(1e5, 1.0))
        pyro.sample("y", dist.Normal(y, x.exp() / x.exp()), obs=y)

    value, _ = LogDensity(model, Y[0]).value_and_score(torch.zeros(1, 1))
    assert value.isfinite()


def test_a_density_of_zero_or_nan_at_a_prior_draw_is_no_fault():
    def impossible(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(x > 9.0, y.sum(), -torch.inf))

    values, _ = LogDensity(impossible, Y).value_and_score(torch.tensor([[10.0], [0.0]]))
    assert values.isfinite().tolist() == [True, False]
    assert values[1] == -torch.inf

    def overflowing(y):
        x = pyro.sample("x", dist.Normal(1e5, 1.0))
        pyro.factor("f", -(x.exp() - x.exp()).square() * y.sum())

    assert LogDensity(overflowing, Y).value_and_score(torch.zeros(1, 1))[0].isfinite()


def with_latent(distribution):
    def model(y):
        pyro.sample("bad", distribution)
        pyro.sample("x", dist.Normal(0.0, 1.0))

    return model


def spread(y):
    location = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 6):
        pyro.sample("bad", dist.Normal(location * y[:, None], 1.0), obs=y)


def inside_of_given_indices(y):
    with pyro.plate("row", 6, subsample=torch.tensor([1, 2])):
        pyro.sample("bad", dist.Normal(0.0, 1.0))


def sequential(y):
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("bad", dist.Bernoulli(0.5), infer={"enumerate": "sequential"})


def undeclared(y):
    pyro.sample("bad", dist.Normal(0.0, 1.0).expand([3]))
    pyro.sample("z", dist.Bernoulli(0.5))


REFUSED = {
    "Delta": (with_latent(dist.Delta(torch.tensor(1.0))), "'bad' is a Delta.*deterministic"),
    "Poisson": (with_latent(dist.Poisson(2.0)), "'bad' is a Poisson"),
    "gathered": (with_latent(dist.Bernoulli(0.5).expand([2]).to_event(1)), "'bad' gathers.*plate"),
    "sphere": (
        with_latent(dist.ProjectedNormal(torch.ones(2))),
        r"'bad' \(Projected.*no bijection",
    ),
    "sequential": (sequential, "'bad' asks for 'sequential'"),
    "spread": (spread, r"'bad' data of shape \(6,\).*\(6, 6\)"),
    "indices": (inside_of_given_indices, "'bad' is inside the subsampled plate 'row'"),
    "undeclared": (undeclared, "site 'bad'"),
    "nothing": (lambda y: pyro.factor("f", y.sum()), r"no continuous latent site.*\['f'\]"),
    "error": (lambda y: y[:, 0], r"float64\(6,\)\): IndexError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_log_density_is_refused_by_name(name):
    model, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        LogDensity(model, Y)


def writing(target):
    def model(y, **rest):
        target(y, **rest)
        noisy(y)

    return model


OUTER = torch.zeros(3)
NORM = nn.BatchNorm1d(1, momentum=0.5)
WRITES = {
    "the argument 'y'": (lambda y: y.mul_(2.0), {}),
    "the argument 'y' ": (lambda y: y.view(2, 3)[0].fill_(9.0), {}),
    "the argument 'more', tensor 1": (
        lambda y, more: more["b"].zero_(),
        {"more": {"a": torch.ones(1), "b": torch.ones(2)}},
    ),
    "the outer tensor 'OUTER'": (lambda y: torch.exp(torch.ones(3), out=OUTER), {}),
    "the outer tensor 'NORM.num_batches_tracked'": (lambda y: NORM(y[:, None]), {}),
    "the outer tensor 'NORM.running_mean'": (
        lambda y: F.batch_norm(y[:, None], NORM.running_mean, NORM.running_var, training=True),
        {},
    ),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_refused_by_name_before_they_are_done(name):
    target, more = WRITES[name]
    y, state = Y.clone(), {key: value.clone() for key, value in NORM.state_dict().items()}
    with pytest.raises(ValueError, match=f"writes {name.strip()} in place"):
        LogDensity(writing(target), y, **more)
    torch.testing.assert_close(y, Y, rtol=0, atol=0)
    assert OUTER.sum() == 0.0
    for key, value in NORM.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_a_copy_may_be_written():
    def model(y):
        noisy(y.clone().mul_(2.0))

    expected = LogDensity(noisy, 2 * Y).value_and_score(torch.zeros(1, 1))
    torch.testing.assert_close(LogDensity(model, Y).value_and_score(torch.zeros(1, 1)), expected)


DRAWS = {
    "numpy.random": lambda: float(np.random.standard_normal()),
    "random": random.random,
    "aten.rand": lambda: torch.rand(()),
    "aten.normal_": lambda: torch.zeros(()).normal_(generator=torch.Generator()),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_outside_of_sample_sites_are_refused_by_name(name):
    def model(y):
        noisy(y + DRAWS[name]())

    with pytest.raises(ValueError, match=rf"by \['{name}'\].*stochastic=True"):
        LogDensity(model, Y)
    LogDensity(model, Y, settings=DensitySettings(stochastic=True, compile="none"))
    if name.startswith("aten"):
        LogDensity(model, Y, settings=DensitySettings(stochastic=True))
    else:
        with pytest.raises(ValueError, match=rf"\['{name}'\].*compile='none'"):
            LogDensity(model, Y, settings=DensitySettings(stochastic=True))


def test_lazy_modules_and_spectral_norms_out_of_training_are_fine():
    with seeded(0):
        linear = nn.utils.parametrizations.spectral_norm(nn.Linear(1, 1))
        net = nn.Sequential(nn.LazyBatchNorm1d(), linear)
    net.eval()

    def model(y):
        noisy(net(y[:, None])[:, 0])

    assert LogDensity(model, Y).value_and_score(torch.zeros(1, 1))[0].isfinite()
    assert net[0].num_features == 1
    with pytest.raises(ValueError, match=r"net\.1\..*in place"):
        LogDensity(lambda y: (net[1].train(), model(y)), Y)


def test_a_nan_in_the_data_is_found_where_it_is():
    def model(first, more):
        noisy(first + more["b"])

    more = {"a": torch.ones(1), "b": torch.full((6,), torch.nan)}
    with pytest.raises(ValueError, match=r"site 'y' is NaN in 6 of 6 entries; .* argument 'more'"):
        LogDensity(model, Y, more)
    with pytest.raises(ValueError, match=r"site 'y' is NaN in 6 of 6 entries$"):
        LogDensity(lambda y: noisy(y * torch.nan), Y)


def test_masked_entries_may_be_nan():
    y = torch.cat([Y, torch.tensor([torch.nan])])

    def model(y):
        location = pyro.sample("location", dist.Normal(0.0, 1.0))
        known = ~y.isnan()
        with pyro.plate("row", len(y)), poutine.mask(mask=known):
            pyro.sample("y", dist.Normal(location, 1.0), obs=torch.where(known, y, 0.0))

    row = torch.full((1, 1), 0.4)
    expected = LogDensity(noisy, Y).value_and_score(row)
    torch.testing.assert_close(LogDensity(model, y).value_and_score(row), expected)


def test_errors_of_torch_and_pyro_are_told_in_a_line():
    """Less the table of shapes that Pyro appends, and the entries that torch found invalid."""
    x = torch.ones(40, 2)
    x[3, 1] = torch.nan

    def model(x):
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(x @ slope, 1.0), obs=torch.zeros(len(x)))

    with pytest.raises(ValueError, match=r"found invalid values; NaN .* argument 'x'$") as caught:
        LogDensity(model, x)
    assert "\n" not in str(caught.value)
