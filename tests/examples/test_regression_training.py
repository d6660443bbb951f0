"""Training of a regression: choices by validation, targets from others, forecasts of draws."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal

from examples.reproduce.attention_regression import AttentionRegression
from examples.reproduce.kernel_rivals import LOGITS
from examples.reproduce.regression_tasks import Points, split_table
from examples.reproduce.regression_training import (
    Forecast,
    RandomTargets,
    RegressionBudget,
    forecast,
    train_regression,
)
from tests.examples.test_regression_tasks import table

BUDGET = RegressionBudget(40, learning_rates=(1e-2, 1e-4), num_looks=5, num_draws=3)


@pytest.fixture
def splits():
    return split_table(table(90), 0)


def seeded(logits=None):
    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AttentionRegression(2, dim=16, num_heads=4, logits=logits)

    return build


def test_training_learns_and_chooses_by_validation(splits):
    """Mutants: another look, rate, score or part; the last state instead of the chosen."""
    trained = train_regression(seeded(), splits, BUDGET, 0, RandomTargets())
    scores = [
        (score, float(rate), 8 * look)
        for rate, curve in trained.curves.items()
        for look, score in enumerate(curve, 1)
    ]
    assert len(scores) == 10
    score, rate, step = max(scores)
    assert trained.choices == {
        "learning_rate": rate,
        "step": step,
        "validation_log_score": score,
    }
    assert rate == 1e-2
    found = forecast(trained.model, splits.validation, splits.train, 1)
    assert found.log_score(splits.validation.y) == pytest.approx(score)
    assert forecast(trained.model, splits.test, splits.train, 1).error(splits.test.y) < 0.5


def test_test_part_is_not_seen(splits):
    other = splits._replace(test=splits.test._replace(y=splits.test.y + 5))
    budget = RegressionBudget(8, num_looks=4)
    states = [
        train_regression(seeded(), given, budget, 0, RandomTargets()).model.state_dict()
        for given in (splits, other)
    ]
    assert all(map(torch.equal, states[0].values(), states[1].values()))


def test_order_is_the_seed_s(splits):
    """Mutant: an order that goes on from one learning rate to the next."""
    budget = RegressionBudget(6, learning_rates=(1e-2, 1e-2 + 1e-12), num_looks=2)
    first, again = train_regression(seeded(), splits, budget, 3, RandomTargets()).curves.values()
    assert first == pytest.approx(again, rel=1e-6)
    one = RegressionBudget(6, learning_rates=(1e-2,), num_looks=2)
    (other,) = train_regression(seeded(), splits, one, 4, RandomTargets()).curves.values()
    assert first != pytest.approx(other, rel=1e-6)


class Recorder(nn.Module):
    """Notes what it is asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, targets, known):
        self.asked.append((targets, known))
        return torch.zeros_like(targets.y), torch.ones_like(targets.y)


def test_targets_are_predicted_from_others(splits):
    """Mutants: targets among the known points; always the same; a sum over points."""
    model, order = Recorder(), torch.Generator().manual_seed(0)
    budget = RegressionBudget(1, batch_size=7, num_known=11)
    losses = [RandomTargets().loss(model, splits.train, budget, order) for _ in range(2)]
    for loss, (targets, known) in zip(losses, model.asked, strict=True):
        assert (len(targets.y), len(known.y)) == (7, 11)
        assert not set(targets.group.tolist()) & set(known.group.tolist())
        expected = (targets.y.square() / 2 + math.log(2 * math.pi) / 2).mean()
        torch.testing.assert_close(loss, expected)
    assert model.asked[0][0].group.tolist() != model.asked[1][0].group.tolist()
    few = Points(*(part[:6] for part in splits.train))
    RandomTargets().loss(model, few, budget, order)
    assert [len(part.y) for part in model.asked[-1]] == [3, 3]


def test_forecasts_are_mixtures_of_draws(generator):
    """Mutants: a mean of log densities; the error of single draws."""
    mean = torch.randn(5, 7, generator=generator)
    deviation = 0.5 + torch.rand(5, 7, generator=generator)
    y = torch.randn(7, generator=generator)
    found = Forecast(mean, deviation)
    law = MixtureSameFamily(Categorical(logits=torch.zeros(7, 5)), Normal(mean.mT, deviation.mT))
    assert found.log_score(y) == pytest.approx(law.log_prob(y).mean().item())
    assert found.error(y) == pytest.approx((law.mean - y).square().mean().sqrt().item())


def test_draws_are_taken_where_a_model_draws(splits):
    for name, num_draws in (("dot", 1), ("implicit", 3)):
        model = seeded(LOGITS[name])()
        found = forecast(model, splits.test, splits.train, 3)
        assert found.mean.shape == (num_draws, len(splits.test.y))
        assert found.deviation.shape == found.mean.shape
        assert not model.training
    assert not torch.equal(found.mean[0], found.mean[1])


def test_a_budget_without_a_look_is_refused(splits):
    with pytest.raises(ValueError, match="expected one look at least"):
        train_regression(seeded(), splits, RegressionBudget(1, ()), 0, RandomTargets())
