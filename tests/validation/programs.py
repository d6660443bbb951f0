"""The programs of eight posteriors of posteriordb, written anew for Pyro.

A flat prior is a proper one with its density masked out.

Source:
    Magnusson, Bürkner, Vehtari, posteriordb, commit 28f8d3d (BSD-3-Clause).
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def eight_schools(effect: Tensor, error: Tensor) -> None:
    """Non-centered: the reference's theta is mu + tau * z; tau has a heavy tail."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effect)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mu + tau * z, error), obs=effect)


def kidiq(mother_iq: Tensor, score: Tensor) -> None:
    """A regression on raw predictors."""
    beta = pyro.sample("beta", _flat(2))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("child", len(score)):
        pyro.sample("score", dist.Normal(beta[0] + beta[1] * mother_iq, sigma), obs=score)


def earnings(height: Tensor, log_earnings: Tensor) -> None:
    """Flat priors; intercept and slope strongly correlated."""
    beta = pyro.sample("beta", _flat(2))
    sigma = pyro.sample("sigma", _flat_positive())
    with pyro.plate("person", len(height)):
        mean = beta[0] + beta[1] * height
        pyro.sample("log_earnings", dist.Normal(mean, sigma), obs=log_earnings)


def kilpisjarvi(year: Tensor, temperature: Tensor, prior_mean: Tensor, prior_sd: Tensor) -> None:
    """A trend over uncentered years: condition number 1.6e5."""
    alpha = pyro.sample("alpha", dist.Normal(prior_mean[0], prior_sd[0]))
    beta = pyro.sample("beta", dist.Normal(prior_mean[1], prior_sd[1]))
    sigma = pyro.sample("sigma", _flat_positive())
    with pyro.plate("summer", len(year)):
        pyro.sample("temperature", dist.Normal(alpha + beta * year, sigma), obs=temperature)


def sblrc(features: Tensor, response: Tensor) -> None:
    """A regression whose coefficients have sd .001, beside a sigma of sd .07."""
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([features.shape[-1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("row", len(response)):
        pyro.sample("response", dist.Normal(features @ beta, sigma), obs=response)


def mesquite(features: Tensor, log_weight: Tensor) -> None:
    """Flat priors; collinear predictors."""
    beta = pyro.sample("beta", _flat(features.shape[-1]))
    sigma = pyro.sample("sigma", _flat_positive())
    with pyro.plate("bush", len(log_weight)):
        pyro.sample("log_weight", dist.Normal(features @ beta, sigma), obs=log_weight)


def gauss_mix(y: Tensor) -> None:
    """Two normals; the ordered means are the lower one and a positive gap."""
    location = dist.Normal(0.0, 2.0)
    low = pyro.sample("low", location)
    gap = pyro.sample("gap", _flat_positive())
    pyro.factor("high", location.log_prob(low + gap))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = torch.stack([theta, 1 - theta], dim=-1)
    components = dist.Normal(torch.stack([low, low + gap], dim=-1), sigma)
    with pyro.plate("draw", len(y)):
        mixture = dist.MixtureSameFamily(dist.Categorical(weights), components)
        pyro.sample("y", mixture, obs=y)


def gp_regr(x: Tensor, y: Tensor) -> None:
    """A Gaussian process; sigma stands on the diagonal as a variance."""
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    distance = x[:, None] - x
    covariance = alpha**2 * torch.exp(-(distance**2) / (2 * rho**2))
    covariance = covariance + sigma * torch.eye(len(x), dtype=x.dtype)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(x), covariance), obs=y)


def _flat(size: int) -> dist.Distribution:
    return dist.Normal(0.0, 1.0).expand([size]).to_event(1).mask(mask=False)


def _flat_positive() -> dist.Distribution:
    return dist.LogNormal(0.0, 1.0).mask(mask=False)
