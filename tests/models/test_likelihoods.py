"""Likelihoods: beside their formulas, of one's own, and what they refuse."""

import math

import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from bayesattn.inference import SVGD, LogDensity
from bayesattn.models import AttentionPooling, Bernoulli, Categorical, Likelihood, Normal
from tests.models.cases import NUM_SENTENCES, Data, make_data, run


class Poisson(Likelihood):
    """Counts, in the way of the documentation."""

    def __call__(self, outputs):
        rate = outputs.squeeze(-1).exp()
        return dist.Poisson(rate), rate


def test_categorical_is_its_logits(generator):
    outputs = torch.randn(7, 5, generator=generator)
    distribution, expected = Categorical(5)(outputs)
    total = outputs.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(expected, outputs.exp() / total)
    classes = torch.tensor([0, 4, 2, 1, 3, 3, 0])
    torch.testing.assert_close(
        distribution.log_prob(classes), expected[torch.arange(7), classes].log()
    )
    assert Categorical(5).num_outputs == 5


def test_bernoulli_is_its_logit(generator):
    outputs = torch.randn(7, 1, generator=generator)
    distribution, expected = Bernoulli()(outputs)
    torch.testing.assert_close(expected, 1 / (1 + (-outputs[:, 0]).exp()))
    torch.testing.assert_close(distribution.log_prob(torch.ones(7)), expected.log())
    torch.testing.assert_close(distribution.log_prob(torch.zeros(7)), (1 - expected).log())


def test_normal_has_noise_of_unknown_scale(generator):
    outputs = torch.randn(7, 1, generator=generator)
    model = poutine.condition(lambda: Normal(0.3)(outputs), {"noise_scale": torch.tensor(0.2)})
    trace = poutine.trace(model).get_trace()
    prior = trace.nodes["noise_scale"]["fn"]
    by_hand = math.log(2 / (0.3 * math.sqrt(2 * math.pi))) - (0.2 / 0.3) ** 2 / 2
    assert prior.log_prob(torch.tensor(0.2)).item() == pytest.approx(by_hand)
    distribution, expected = trace.nodes["_RETURN"]["value"]
    assert torch.equal(expected, outputs[:, 0])
    torch.testing.assert_close(
        distribution.log_prob(outputs[:, 0] + 0.2),
        torch.full((7,), -0.5 - math.log(0.2 * math.sqrt(2 * math.pi))),
    )


def test_likelihood_of_ones_own(generator):
    model = AttentionPooling(2, Poisson())
    tokens, mask, _ = make_data(generator)
    data = Data(tokens, mask, torch.tensor([0.0, 3, 1, 0, 2, 5, 1]))
    density = LogDensity(model, *data)
    particle = torch.randn(1, density.dim, generator=generator)
    values = {site: value[0] for site, value in density.constrain(particle).items()}
    sites, log_joint = run(model, data, values)
    rate = sites["expected_target"]
    prior = sum(
        dist.Normal(0.0, 1.0 if site == "query_weight" else 0.3).log_prob(value).sum()
        for site, value in values.items()
    )
    likelihood = data.target * rate.log() - rate - (data.target + 1).lgamma()
    torch.testing.assert_close(log_joint, prior + likelihood.sum())
    torch.testing.assert_close(density.value_and_score(particle)[0][0], log_joint)
    posterior = SVGD(model, num_particles=3).run(*data, num_steps=2, seed=0, progress=False)
    predicted = posterior.predict(tokens, mask, sites=["target", "expected_target"], seed=0)
    assert predicted["target"].shape == (1, 3, NUM_SENTENCES)
    idata = posterior.to_arviz()
    assert idata["posterior"]["readout_weight"].dims[2:] == ("head", "feature", "output")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Categorical(1), "num_classes must be at least two, got 1"),
        (lambda: Normal(0.0), r"noise_prior_scale must be positive, got 0\.0"),
        (lambda: Normal(math.nan), "noise_prior_scale must be positive, got nan"),
    ],
)
def test_refuses_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("likelihood", "target", "message"),
    [
        (Categorical(3), torch.rand(7), r"whole numbers for Categorical\(num_classes=3\), got"),
        (
            Bernoulli(),
            torch.ones(7) > 0,
            r"floating point numbers for Bernoulli\(\), got torch.bool",
        ),
        (Normal(), torch.ones(7).int(), r"floating point numbers for Normal\(.*got torch.int32"),
        (Normal(), torch.full((7,), math.nan), "'target' is NaN in 7 of 7 entries"),
    ],
)
def test_refuses_observations(likelihood, target, message, generator):
    tokens, mask, _ = make_data(generator)
    with pytest.raises(ValueError, match=message):
        LogDensity(AttentionPooling(2, likelihood), tokens, mask, target)
