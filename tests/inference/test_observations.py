"""Observations that no latent value makes possible are refused, and no others."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from bayesattn.inference import DensitySettings, LogDensity

EAGER = DensitySettings(compile="none")


def observing(make_distribution, *, mask=True):
    """A program whose data are from a distribution that one latent number moves."""

    def model(data):
        latent = pyro.sample("latent", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("row", len(data)), poutine.mask(mask=mask):
            pyro.sample("value", make_distribution(latent), obs=data)

    return model


def simplex_noise(latent):
    return dist.Dirichlet(latent.exp() * torch.ones(3))


IMPOSSIBLE = {
    "half a success": (lambda z: dist.Bernoulli(logits=z), [1.0, 0.5, 0.0, 2.0], r"2 of 4 .* 0\.5"),
    "a class too many": (
        lambda z: dist.Categorical(logits=z * torch.arange(3.0)),
        [0, 2, 3],
        r"1 of 3 values .*Categorical takes, the first of them 3; .*upper_bound=2",
    ),
    "a negative count": (lambda z: dist.Poisson(z.exp()), [1.0, -2.0], r".*first of them -2\.0"),
    "no simplex": (simplex_noise, [[0.5, 0.2, 0.3], [0.5, 0.2, 0.9]], r"1 of 2 .*\[0\.5"),
}


@pytest.mark.parametrize(("likelihood", "data", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_values_are_refused(likelihood, data, message):
    with pytest.raises(ValueError, match=f"observed site 'value', {message}"):
        LogDensity(observing(likelihood), torch.tensor(data), settings=EAGER)


def test_masked_values_are_not_looked_at():
    data, mask = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([True, False, True])
    by_handler = observing(lambda z: dist.Poisson(z.exp()), mask=mask)
    by_distribution = observing(lambda z: dist.Poisson(z.exp().expand(3)).mask(mask))
    for model in (by_handler, by_distribution):
        LogDensity(model, data, settings=EAGER)
    with pytest.raises(ValueError, match=r"1 of 3"):
        LogDensity(observing(lambda z: dist.Poisson(z.exp())), data, settings=EAGER)


def test_supports_that_latents_move_are_not_looked_at():
    model = observing(lambda z: dist.Uniform(z - 9.0, z + 9.0))
    LogDensity(model, torch.tensor([7.0, -7.0]), settings=EAGER)


def test_one_value_for_many_rows_is_looked_at():
    model = observing(lambda z: dist.Bernoulli(logits=z.expand(5)))

    def repeated(data):
        return model(data.expand(5))

    with pytest.raises(ValueError, match=r"5 of 5"):
        LogDensity(repeated, torch.tensor([0.5]), settings=EAGER)


def in_a_plate(make_distribution):
    def model(data):
        latent = pyro.sample("latent", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("row", 5):
            pyro.sample("value", make_distribution(latent), obs=data)

    return model


def mixed_in_a_plate(data):
    latent = pyro.sample("latent", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    with pyro.plate("row", 5):
        kind = pyro.sample("kind", dist.Categorical(torch.ones(5)))
        pyro.sample("value", dist.Normal(latent[kind], 1.0), obs=data)


def without_a_plate(data):
    latent = pyro.sample("latent", dist.Normal(torch.zeros(()), 1.0))
    pyro.sample("value", dist.Normal(latent + torch.zeros(5), 1.0), obs=data)


CROSSED = {
    "column": (in_a_plate(lambda z: dist.Normal(z.expand(5), 1.0)), (5, 1)),
    "column of one number": (in_a_plate(lambda z: dist.Normal(z, 1.0)), (5, 1)),
    "rows too many": (in_a_plate(lambda z: dist.Normal(z, 1.0)), (3, 5)),
    "events in a column": (
        in_a_plate(lambda z: dist.Normal(z.expand(2), 1).to_event(1)),
        (5, 1, 2),
    ),
    "mixture": (mixed_in_a_plate, (5, 1)),
    "no plate": (without_a_plate, (5, 1)),
}


@pytest.mark.parametrize(("model", "shape"), CROSSED.values(), ids=CROSSED)
def test_data_that_cross_their_distribution_are_refused(model, shape):
    with pytest.raises(ValueError, match=rf"'value' data of shape \({shape[0]}, .* no plate"):
        LogDensity(model, torch.zeros(shape), settings=EAGER)


@pytest.mark.parametrize("model", [in_a_plate(lambda z: dist.Normal(z, 1.0)), mixed_in_a_plate])
def test_data_of_the_shape_of_the_plates_are_taken(model):
    for shape in ((5,), (1,), ()):
        LogDensity(model, torch.zeros(shape), settings=EAGER)


@pytest.mark.parametrize("shape", [(5,), (3, 5), ()])
def test_without_plates_many_draws_of_one_distribution_are_taken(shape):
    LogDensity(without_a_plate, torch.zeros(shape), settings=EAGER)
