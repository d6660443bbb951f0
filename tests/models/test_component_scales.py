"""Priors of scales: the laws of their sites, and what scales they make of them."""

import pyro
import pyro.poutine as poutine
import pytest
import torch
from scipy import stats

from bayesattn.models import AutomaticRelevance, GammaProcess, Horseshoe, MultiplicativeGamma

COUNT = 5
# Sites, their laws by another package, and what scales they make; settings that are all different.
PRIORS = {
    "relevance": (
        AutomaticRelevance(1.7, 0.3),
        {"precision": stats.gamma(1.7, scale=1 / 0.3)},
        lambda precision: precision**-0.5,
    ),
    "horseshoe": (
        Horseshoe(0.3, 1.9),
        {"global_scale": stats.halfcauchy(scale=0.3), "local_scale": stats.halfcauchy()},
        lambda tau, local: 1 / (1 / (tau * local) ** 2 + 1 / 1.9**2).sqrt(),
    ),
    "gamma process": (
        GammaProcess(2.3),
        {"share": stats.gamma(2.3 / COUNT)},
        lambda share: share.sqrt(),
    ),
    "multiplicative gamma": (
        MultiplicativeGamma(2.6),
        {"growth": stats.gamma(2.6)},
        lambda growth: torch.stack([growth[: i + 1].prod() for i in range(COUNT)]) ** -0.5,
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_laws_and_scales(name, generator):
    prior, laws, scale_of = PRIORS[name]
    values = {
        site: torch.rand((() if site == "global_scale" else (COUNT,)), generator=generator) + 0.2
        for site in laws
    }
    with torch.random.fork_rng():
        told = poutine.trace(pyro.condition(prior.sample, data=values))
        trace = told.get_trace(pyro.plate("component", COUNT))
    for site, law in laws.items():
        found = trace.nodes[site]["fn"].log_prob(values[site])
        torch.testing.assert_close(found, torch.as_tensor(law.logpdf(values[site].numpy())))
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], scale_of(*values.values()))


def test_the_slab_bounds_scales():
    with torch.random.fork_rng():
        told = {"global_scale": torch.tensor(1e6), "local_scale": torch.full((COUNT,), 1e6)}
        sample = pyro.condition(Horseshoe(slab=1.9).sample, data=told)
        scale = sample(pyro.plate("component", COUNT))
    torch.testing.assert_close(scale, torch.full((COUNT,), 1.9))
