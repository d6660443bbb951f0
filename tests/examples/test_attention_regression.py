"""Targets look at known points of other groups alone, and predict by nothing else."""

import pytest
import torch

from bayesattn.logits import SpectralLogits
from examples.reproduce.attention_regression import AttentionRegression
from examples.reproduce.regression_tasks import Points

pytestmark = pytest.mark.usefixtures("seeded_layers")


def points(num_points, first_group, generator):
    x = torch.randn(num_points, 3, generator=generator)
    y = torch.randn(num_points, generator=generator)
    return Points(x, y, first_group + torch.arange(num_points))


@pytest.fixture
def model():
    model = AttentionRegression(3, dim=10, num_heads=5)
    # A readout that does not start as a constant.
    torch.nn.init.normal_(model.attention.out_proj.weight)
    return model


def test_own_group_is_not_seen(model, generator):
    """Mutants: no mask, or one of others; a readout that sees the target's inputs."""
    known, targets = points(11, 0, generator), points(7, 4, generator)
    mean, _ = model(targets, known)
    other = known._replace(y=known.y + torch.eye(11)[6])
    changed = model(targets, other)[0] != mean
    assert changed.tolist() == [True, True, False, True, True, True, True]
    answered = targets._replace(y=targets.y + 1)
    assert torch.equal(model(answered, known)[0], mean)
    weights = model.weights(targets, known)
    assert weights.shape == (5, 7, 11)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 7))
    hidden = targets.group[:, None] == known.group
    assert not weights[:, hidden].any()
    assert (weights[:, ~hidden] > 0).all()


def test_predictions_come_by_attention_alone(model, generator):
    """Where all known points are alike, whatever the target is does not matter."""
    known, targets = points(11, 0, generator), points(7, 20, generator)
    alike = Points(known.x[:1].expand(11, 3), known.y[:1].expand(11), known.group)
    mean, deviation = model(targets, alike)
    torch.testing.assert_close(mean, mean[:1].expand(7))
    assert deviation.tolist() == pytest.approx([0.2] * 7)
    assert model(targets, known)[0].std() > 1e-4


def test_known_points_are_a_set(model, generator):
    known, targets = points(11, 0, generator), points(7, 4, generator)
    order = torch.randperm(11, generator=generator)
    torch.testing.assert_close(model(targets, known.choose(order))[0], model(targets, known)[0])
    torch.testing.assert_close(
        model(targets.choose(slice(2)), known)[0], model(targets, known)[0][:2]
    )


def test_logits_are_those_of_the_layer(generator):
    """Mutants: logits that are not handed on, or of another width."""
    given = []

    def logits(num_heads, dim):
        given.append((num_heads, dim))
        return SpectralLogits(num_heads, dim, 7)

    model = AttentionRegression(3, dim=10, num_heads=5, logits=logits)
    assert given == [(5, 2)]
    assert isinstance(model.attention.logits, SpectralLogits)
    model(points(7, 4, generator), points(11, 0, generator))[0].sum().backward()
    assert model.attention.logits.first.grad.abs().sum() > 0
