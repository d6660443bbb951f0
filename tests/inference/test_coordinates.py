"""Tests of bayesattn.inference.coordinates: affine maps, and the mode with its curvature."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesattn.inference.coordinates import (
    Affine,
    composed,
    differentiable_value,
    identity,
    laplace,
)
from bayesattn.inference.log_density import LogDensity


def affine(generator, dim, is_diagonal, *batch):
    location = torch.randn(*batch, dim, generator=generator)
    scale = 0.5 + torch.rand(*batch, dim, generator=generator)
    if is_diagonal:
        return Affine(location, scale)
    lower = torch.randn(*batch, dim, dim, generator=generator).tril(-1)
    return Affine(location, lower + torch.diag_embed(scale))


@given(seed=st.integers(0, 99), dim=st.integers(1, 4), is_diagonal=st.booleans())
def test_inverting_undoes_applying(seed, dim, is_diagonal):
    generator = torch.Generator().manual_seed(seed)
    frame = affine(generator, dim, is_diagonal, 3)
    points = torch.randn(3, 5, dim, generator=generator)
    torch.testing.assert_close(frame.invert(frame.apply(points)), points)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_composing_is_applying_one_after_the_other(outer, inner, generator):
    first, second = affine(generator, 3, inner, 2), affine(generator, 3, outer, 2)
    points = torch.randn(2, 5, 3, generator=generator)
    both = composed(second, first)
    torch.testing.assert_close(both.apply(points), second.apply(first.apply(points)))
    assert both.is_diagonal == (outer and inner)


@pytest.mark.parametrize("is_diagonal", [True, False])
def test_scores_and_determinants_are_those_of_autograd(is_diagonal, generator):
    frame = affine(generator, 3, is_diagonal)
    mixing = torch.randn(3, 3, generator=generator)
    points = torch.randn(5, 3, generator=generator).requires_grad_()
    unconstrained = frame.apply(points)
    (expected,) = torch.autograd.grad((unconstrained @ mixing).sin().sum(), points)
    score = (unconstrained @ mixing).cos() @ mixing.T
    torch.testing.assert_close(frame.pull_back(score), expected)
    jacobian = torch.func.jacrev(lambda x: frame.apply(x[None])[0])(points[0])
    torch.testing.assert_close(frame.log_determinant(), torch.linalg.det(jacobian).abs().log())


def test_identity_changes_nothing(generator):
    points = torch.randn(2, 5, 3, generator=generator)
    frame = identity(torch.ones(3)).expand(2)
    assert torch.equal(frame.apply(points), points)
    assert torch.equal(frame.invert(points), points)
    assert frame.log_determinant().tolist() == [0.0, 0.0]


MEAN = torch.tensor([3.0, -1e4, 0.5], dtype=torch.float64)
COVARIANCE = torch.tensor(
    [[1e-6, 0.9e-1, 0.0], [0.9e-1, 1e4, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64
)


def gaussian():
    """Units from a thousandth to a hundred, correlation .9."""
    pyro.sample("x", dist.MultivariateNormal(MEAN, COVARIANCE))


def test_laplace_is_exact_for_a_gaussian(generator):
    frame = laplace(LogDensity(gaussian), generator=generator)
    sd = COVARIANCE.diagonal().sqrt()
    assert ((frame.location - MEAN) / sd).abs().max() < 1e-4
    found = frame.scale @ frame.scale.T
    assert ((found - COVARIANCE) / (sd[:, None] * sd)).abs().max() < 1e-3


def test_curvature_is_one_in_laplace_coordinates(generator):
    """Of a skewed posterior, at its mode; the score there is zero."""

    def skewed():
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        pyro.sample("chance", dist.Beta(1.0 + rate, 3.0))

    density = LogDensity(skewed)
    frame = laplace(density, generator=generator)
    _, score, hessian = density.value_score_and_hessian(frame.location[None])
    assert score.abs().max() < 1e-3
    curvature = -frame.scale.T @ hessian[0] @ frame.scale
    torch.testing.assert_close(curvature, torch.eye(2), rtol=0, atol=1e-6)


def test_the_highest_mode_is_taken(generator):
    """Two modes, of which some starts find each."""

    def bimodal():
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        heights = torch.stack([-((x + 1.5) ** 2) / 0.02, 2.0 - (x - 1.5) ** 2 / 0.02])
        pyro.factor("modes", heights.logsumexp(0))

    frame = laplace(LogDensity(bimodal), generator=generator)
    assert frame.location.item() == pytest.approx(1.5, abs=0.01)


def test_starts_of_ones_own_are_tried_too(generator):
    """A density that is finite only far from the usual starts."""

    def far():
        x = pyro.sample("x", dist.Normal(0.0, 1e3))
        pyro.factor("far", torch.where(x > 50, -((x - 60) ** 2) / 2, -torch.inf))

    with pytest.raises(ValueError, match="no start of the search for the mode"):
        laplace(LogDensity(far), generator=generator)
    frame = laplace(LogDensity(far), generator=generator, starts=torch.tensor([[55.0]]))
    assert frame.location.item() == pytest.approx(60.0, abs=0.1)


def test_float32_finds_the_mode(generator):
    def program(data):
        x = pyro.sample("x", dist.Normal(0.0, 100.0))
        with pyro.plate("row", len(data)):
            pyro.sample("y", dist.Normal(x, 0.5), obs=data)

    data = torch.tensor([30.0, 31.0, 32.0], dtype=torch.float32)
    frame = laplace(LogDensity(program, data), generator=generator)
    assert frame.location.dtype == torch.float32
    assert frame.location.item() == pytest.approx(31.0, abs=0.01)
    assert frame.scale.item() == pytest.approx(0.5 / 3**0.5, rel=1e-3)


def test_differentiable_value_has_the_score_as_its_gradient(generator):
    density = LogDensity(gaussian)
    frame = laplace(density, generator=generator)
    working = torch.randn(2, 5, 3, generator=generator).requires_grad_()
    value, scores = differentiable_value(working, density, frame)
    (gradient,) = torch.autograd.grad(value.sum(), working)
    torch.testing.assert_close(gradient, scores)
    target = torch.distributions.MultivariateNormal(MEAN, COVARIANCE)
    points = frame.apply(working.detach())
    torch.testing.assert_close(value.detach(), target.log_prob(points), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores, -working.detach(), rtol=1e-2, atol=1e-2)


def test_subsampled_plates_are_refused(generator):
    def program(data):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(data), subsample_size=3) as rows:
            pyro.sample("y", dist.Normal(x, 1.0), obs=data[rows])

    with pytest.raises(ValueError, match=r"need the full data.*\['row'\]"):
        laplace(LogDensity(program, torch.zeros(7)), generator=generator)


def test_large_dimensions_are_refused(generator):
    def program():
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([501]).to_event(1))

    with pytest.raises(ValueError, match="at most 500 wide; this model has dimension 501"):
        laplace(LogDensity(program), generator=generator)
