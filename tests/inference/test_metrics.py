"""Tests of bayesattn.inference.metrics: coordinates from a cloud."""

import pytest
import torch

from bayesattn.inference.coordinates import Affine, identity
from bayesattn.inference.metrics import chosen_metric, metric_of


def cloud(generator, *shape):
    """Rows with units from a thousandth to a thousand, correlated."""
    mixing = torch.randn(shape[-1], shape[-1], generator=generator) + 2 * torch.eye(shape[-1])
    units = 10.0 ** torch.linspace(-3, 3, shape[-1])
    return 5 + torch.randn(*shape, generator=generator) @ mixing * units


def frames(dim):
    lower = torch.eye(dim) + 0.5 * torch.ones(dim, dim).tril(-1)
    return {
        "raw": identity(torch.zeros(dim)),
        "diagonal": Affine(torch.ones(dim), torch.linspace(0.5, 2.0, dim)),
        "triangular": Affine(torch.ones(dim), lower),
    }


@pytest.mark.parametrize("frame", frames(3))
def test_full_metric_gives_unit_covariance(frame, generator):
    particles = cloud(generator, 2, 40, 3)
    metric = metric_of(particles, "full", frames(3)[frame].expand(2))
    for working in metric.invert(particles):
        torch.testing.assert_close(working.mean(0), torch.zeros(3), rtol=0, atol=1e-8)
        torch.testing.assert_close(working.T.cov(), torch.eye(3), rtol=0, atol=1e-3)


@pytest.mark.parametrize("frame", frames(3))
def test_diagonal_metric_gives_unit_variances_in_its_frame(frame, generator):
    particles = cloud(generator, 2, 40, 3)
    metric = metric_of(particles, "diagonal", frames(3)[frame].expand(2))
    working = metric.invert(particles)
    torch.testing.assert_close(working.mean(1), torch.zeros(2, 3), rtol=0, atol=1e-9)
    torch.testing.assert_close(working.std(1), torch.ones(2, 3))


def test_diagonal_metric_keeps_the_correlations_of_its_frame(generator):
    """Mutant: variances of the particles themselves, with the frame forgotten."""
    frame = Affine(torch.zeros(2), torch.tensor([[1.0, 0.0], [0.99, 0.1]]))
    particles = frame.apply(torch.randn(500, 2, generator=generator))
    working = metric_of(particles, "diagonal", frame).invert(particles)
    assert particles.T.corrcoef()[0, 1] > 0.9
    assert working.T.corrcoef()[0, 1].abs() < 0.2


def test_no_metric_is_the_frame(generator):
    frame = frames(3)["triangular"]
    assert metric_of(cloud(generator, 9, 3), "none", frame) is frame


@pytest.mark.parametrize("metric", ["full", "diagonal"])
def test_coordinates_without_spread_keep_their_scale(metric, generator):
    particles = cloud(generator, 40, 3)
    particles[:, 1] = 2.0
    working = metric_of(particles, metric, identity(torch.zeros(3))).invert(particles)
    assert working.isfinite().all()
    assert (working[:, 1] == 0).all()
    torch.testing.assert_close(working[:, [0, 2]].std(0), torch.ones(2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cloud_in_a_plane_has_a_metric(dtype, generator):
    """Two equal coordinates: a singular covariance."""
    line = torch.randn(40, 1, generator=generator).to(dtype)
    particles = torch.cat([line, line, torch.randn(40, 1, generator=generator).to(dtype)], 1)
    metric = metric_of(particles, "full", identity(torch.zeros(3, dtype=dtype)))
    assert metric.invert(particles).isfinite().all()


def test_particles_that_are_no_numbers_raise_nothing(generator):
    """That is for the watch to report, with the site and the step."""
    particles = cloud(generator, 40, 3)
    particles[7, 1] = torch.nan
    metric = metric_of(particles, "full", identity(torch.zeros(3)))
    assert metric.invert(particles)[7].isnan().any()


def test_automatic_metric_by_size():
    assert chosen_metric("auto", 100, 25) == "full"
    assert chosen_metric("auto", 100, 26) == "diagonal"
    assert chosen_metric("auto", 19, 26) == "none"
    assert chosen_metric("auto", 1, 1) == "none"
    assert chosen_metric("none", 100, 2) == "none"


@pytest.mark.parametrize(("metric", "count"), [("full", 3), ("diagonal", 1)])
def test_too_few_particles_for_a_metric_are_refused(metric, count):
    with pytest.raises(ValueError, match=f"metric='{metric}' needs .* got {count}"):
        chosen_metric(metric, count, 3)
