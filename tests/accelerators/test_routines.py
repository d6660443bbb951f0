"""Routines on an accelerator: the same draws as on the CPU where chance is the same."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesattn.inference import EM, NUTS, SPOS, SVGD, SVI, WGD, CoordinateAscent, Posterior, compare
from bayesattn.inference.log_density import LogDensity
from bayesattn.models import (
    AutomaticRelevance,
    ComponentScalesAlone,
    KeysFromQueries,
    SharedComponents,
)
from tests.inference.test_contract import ROUTINES, network
from tests.models.cases import make_data, make_model
from tests.models.component_cases import shared_heads
from tests.models.mixture_cases import make_problem

pytestmark = [
    pytest.mark.filterwarnings("ignore::bayesattn.inference.running.ConvergenceWarning"),
    # PyTorch's compiler makes one itself, and hides what it says unless warnings are errors.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]

QUIET = {"seed": 0, "progress": False}
# Guides and closed forms of that table are written for the CPU.
NAMES = [name for name in ROUTINES if name not in ("SVI, own guide", "EM", "CoordinateAscent")]


def data_on(device, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(13, 2, generator=generator, dtype=dtype)
    response = torch.randn(13, generator=generator, dtype=dtype)
    return features.to(device), response.to(device)


@pytest.mark.parametrize("mode", ["none", "record"])
@pytest.mark.parametrize("name", NAMES)
def test_every_routine_runs_and_repeats(name, mode, device, tmp_path):
    row = ROUTINES[name]
    settings = {} if name == "SVI, Pyro's guide" else {"compile": mode}
    args = data_on(device)
    posteriors = [
        row.make(network, **settings).run(*args, **row.lengths, **QUIET) for _ in range(2)
    ]
    for site, draws in posteriors[0].draws.items():
        assert draws.isfinite().all()
        assert torch.equal(draws, posteriors[1].draws[site])
    exported = posteriors[0].to_arviz()
    assert exported.posterior["query_weight"].dims[:2] == ("chain", "draw")
    posteriors[0].save(tmp_path / "posterior.nc")
    loaded = Posterior.load(tmp_path / "posterior.nc", model=network)
    for site, draws in posteriors[0].draws.items():
        assert torch.equal(loaded.draws[site].cpu(), draws.cpu())


@pytest.mark.parametrize(
    "mode", ["none", "record", pytest.param("inductor", marks=pytest.mark.compile)]
)
@pytest.mark.parametrize("routine", [SVGD, WGD])
@pytest.mark.parametrize("model", ["pooling", "self_attention", "aligned"])
def test_particles_are_those_of_the_cpu(model, routine, mode, generator, device):
    """From the same start, after twenty steps. Mutants: any sum that leaves a particle out."""
    program, args = make_model(model), make_data(generator)
    make = functools.partial(routine, num_particles=7)
    start = make(program, compile="none").run(*args, num_steps=1, **QUIET)
    init = {name: value[0] for name, value in start.draws.items()}
    expected = make(program, compile="none").run(*args, num_steps=20, init=init, **QUIET)
    there = [None if part is None else part.to(device) for part in args]
    init = {name: value.to(device) for name, value in init.items()}
    found = make(program, compile=mode).run(*there, num_steps=20, init=init, **QUIET)
    for name, value in expected.draws.items():
        torch.testing.assert_close(found.draws[name].cpu(), value, rtol=1e-6, atol=1e-7)


def test_densities_and_scores_are_those_of_the_cpu(generator, device):
    program, args = make_model("self_attention", "normal"), make_data(generator, "normal")
    here = LogDensity(program, *args)
    there = LogDensity(program, *(None if part is None else part.to(device) for part in args))
    rows = 0.3 * torch.randn(5, here.dim, generator=generator)
    expected = here.value_and_score(rows)
    for one, other in zip(there.value_and_score(rows.to(device)), expected, strict=True):
        torch.testing.assert_close(one.cpu(), other)


def test_em_of_a_mixture(generator, device):
    program = KeysFromQueries(center_scale=1.5)
    data = make_problem(generator)
    state = EM(program, compile="none").run(*data, num_steps=5, **QUIET)
    there = EM(program, compile="none").run(
        *(part.to(device) for part in data), num_steps=5, **QUIET
    )
    for name, value in state.draws.items():
        torch.testing.assert_close(there.draws[name].cpu(), value)


def test_laws_of_components_and_a_chain_over_their_scales(generator, device):
    data = shared_heads(generator, heads=3, dim=2, query=7, key=5, components=3)
    model, scales = SharedComponents(5), ComponentScalesAlone(AutomaticRelevance())
    here = CoordinateAscent(model, compile="none").run(*data, num_steps=30, **QUIET)
    data = [part.to(device) for part in data]
    there = CoordinateAscent(model, compile="none").run(*data, num_steps=30, **QUIET)
    torch.testing.assert_close(
        there.optimization["elbo"].cpu(), here.optimization["elbo"], rtol=1e-6, atol=1e-6
    )
    directions = [there[name].mean((0, 1)) for name in ("query_component", "key_component")]
    chain = NUTS(scales, max_tree_depth=3).run(
        *data, *(part.to(device) for part in directions), warmup_steps=10, num_samples=10, **QUIET
    )
    assert (chain.predict(sites=["width"])["width"] <= 5).all()


def test_a_normal_law_is_found_and_compared(device):
    """By three routines; moments within bounds that a prior's draws fail."""
    mean = torch.tensor([1.0, -2.0], device=device)
    covariance = torch.tensor([[1.0, 0.6], [0.6, 2.0]], device=device)

    def model(mean):
        pyro.sample("x", dist.MultivariateNormal(mean, covariance))

    nuts = NUTS(model).run(mean, warmup_steps=100, num_samples=300, **QUIET)
    svi = SVI(model, guide="multivariate_normal").run(mean, num_steps=800, num_samples=500, **QUIET)
    svgd = SVGD(model, num_particles=100).run(mean, num_steps=300, **QUIET)
    spos = SPOS(model, num_particles=10).run(
        mean, warmup_steps=200, num_samples=40, thinning=5, **QUIET
    )
    for posterior, bound in ((nuts, 0.35), (svi, 0.3), (svgd, 0.1), (spos, 0.4)):
        draws = posterior.draws["x"].flatten(0, -2).cpu()
        assert (draws.mean(0) - mean.cpu()).abs().max() < bound
        assert (draws.std(0) - covariance.cpu().diagonal().sqrt()).abs().max() < 0.4
    table = compare(nuts, num_null=20, svgd=svgd, svi=svi).sites
    assert table.notna().any().all()
