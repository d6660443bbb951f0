"""Coupled heads: correlations and divergences beside PyTorch's multivariate normal."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from bayesattn.logits.head_coupling import (
    correlation_tril,
    coupled_divergence,
    coupled_scale_tril,
)

BATCH, HEADS, LATENT = 2, 5, 3
close = torch.testing.assert_close


@pytest.fixture
def guide(generator):
    """Mean, scale and coupling of a batch."""
    mean = torch.randn(BATCH, HEADS, LATENT, generator=generator)
    scale = torch.rand(BATCH, HEADS, LATENT, generator=generator) + 0.3
    return mean, scale, torch.randn(BATCH, HEADS, generator=generator)


def normals(mean, scale, coupling):
    """Over heads, one for each latent coordinate."""
    return MultivariateNormal(mean.mT, scale_tril=coupled_scale_tril(scale, coupling))


def standard(latent=LATENT, heads=HEADS):
    return MultivariateNormal(torch.zeros(latent, heads), scale_tril=torch.eye(heads))


def test_correlations_are_those_of_the_formula(guide):
    """Mutants: no unit rows, an upper triangle, an outer product with its diagonal."""
    coupling = guide[-1]
    for row, found in zip(coupling.tolist(), correlation_tril(coupling), strict=True):
        factor = torch.eye(HEADS)
        for i in range(HEADS):
            for j in range(i):
                factor[i, j] = row[i] * row[j]
        covariance = factor @ factor.mT
        deviations = covariance.diagonal().sqrt()
        close(found @ found.mT, covariance / deviations / deviations[:, None])
        close(found, torch.linalg.cholesky(found @ found.mT))


def test_later_heads_correlate_strongly_where_coupling_is_one(generator):
    """Root of 3/4 between the last two of four; products with row sums of L leave .02."""
    factor = correlation_tril(torch.ones(4))
    assert (factor @ factor.mT)[2, 3].item() == pytest.approx(0.75**0.5, rel=1e-12)
    noise = torch.randn(4, 20_000, generator=generator)
    assert torch.corrcoef(factor @ noise)[2, 3].item() == pytest.approx(0.866, abs=0.01)
    sums = (torch.eye(4) + torch.ones(4, 4).tril(-1)).sum(-1, keepdim=True)
    assert abs(torch.corrcoef(sums * noise)[2, 3].item()) < 0.03


def test_marginals_keep_their_scale(guide):
    mean, scale, coupling = guide
    close(normals(mean, scale, coupling).stddev, scale.mT)
    close(coupled_scale_tril(scale, torch.zeros(HEADS)).diagonal(dim1=-2, dim2=-1), scale.mT)


def test_divergence_is_that_of_multivariate_normals(guide):
    """Mutants: no information between heads, of one coordinate only, half or twice of it."""
    expected = kl_divergence(normals(*guide), standard()).sum(-1)
    close(coupled_divergence(*guide), expected)
    mean, scale, _ = guide
    close(coupled_divergence(mean, scale, torch.zeros(BATCH, HEADS)), _independent(mean, scale))
    zero = torch.zeros(HEADS, LATENT)
    assert coupled_divergence(zero, zero + 1, torch.zeros(HEADS)).item() == 0


def _independent(mean, scale):
    normal = torch.distributions.Normal
    zero = torch.zeros_like(mean)
    return kl_divergence(normal(mean, scale), normal(zero, zero + 1)).sum((-2, -1))


def test_divergence_bounds_that_of_either_sign(generator):
    """A mixture of two signs is closer to the prior, by at most the log of two."""
    mean = torch.full((2, 1), 0.7)
    scale, coupling = torch.tensor([[0.5], [0.8]]), torch.tensor([1.0, -0.6])
    guide = normals(mean, scale, coupling)
    other = normals(-mean, scale, coupling)
    noise = torch.randn(40_000, 2, generator=generator)
    draws = (mean.mT + noise @ guide.scale_tril[0].mT)[:, None]
    mixture = torch.logaddexp(guide.log_prob(draws), other.log_prob(draws)) - math.log(2)
    ratio = mixture - standard(1, 2).log_prob(draws)
    error = 5 * ratio.std() / len(noise) ** 0.5
    bound = coupled_divergence(mean, scale, coupling)
    assert ratio.mean() + error < bound
    assert ratio.mean() - error > bound - math.log(2)


def test_gradients(guide):
    inputs = [part.clone().requires_grad_() for part in guide]
    assert torch.autograd.gradcheck(coupled_divergence, inputs)
    assert torch.autograd.gradcheck(coupled_scale_tril, inputs[1:])


def test_one_head_has_nothing_to_couple(generator):
    coupling = torch.randn(BATCH, 1, generator=generator)
    close(correlation_tril(coupling), torch.ones(BATCH, 1, 1))
    assert correlation_tril(coupling.float()).dtype == torch.float32
