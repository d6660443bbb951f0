"""Tests of SVGD with each kernel, with a kernel for each site, and with the metric of curvature."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesattn.inference import SPOS, SVGD
from bayesattn.inference.coordinates import identity
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.metrics import curvature_metric
from bayesattn.inference.particle_views import PlateParticles, WholeParticles
from bayesattn.inference.step_loop import StepLoop
from bayesattn.kernels import IMQ, RBF, Blocks, Linear, PerSite, Preconditioned
from tests.validation.references import load
from tests.validation.test_gates import missed_by_svgd, svgd_particles

MEAN, SD = torch.tensor([1.0, -2.0, 4.0]), torch.tensor([1.0, 1.5, 0.7])


def independent():
    """Three normal numbers in two sites."""
    pyro.sample("head", dist.Normal(MEAN[:1], SD[:1]).to_event(1))
    pyro.sample("tail", dist.Normal(MEAN[1:], SD[1:]).to_event(1))


def network(features, response, batch=None):
    """Heads in a plate, with sites of two widths, and a site outside of it."""
    with pyro.plate("head", 5):
        scale = pyro.sample("key_scale", dist.LogNormal(0.0, 0.5))
        query = pyro.sample("query_weight", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    readout = pyro.sample("readout", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    with pyro.plate("row", len(features), subsample_size=batch) as rows:
        mean = (torch.tanh(features[rows] @ query[:, 0].mT) * scale) @ readout
        pyro.sample("response", dist.Normal(mean, 0.5), obs=response[rows])


def data(generator):
    return torch.randn(13, 3, generator=generator), torch.randn(13, generator=generator)


def run(svgd, *args, num_steps=400, **kwargs):
    return svgd.run(*args, num_steps=num_steps, seed=0, progress=False, **kwargs)


LOWER = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.5, 0.0], [0.0, 0.3, 0.7]])
KERNELS = {
    "IMQ": IMQ(),
    "RBF": RBF(),
    "linear": Linear(),
    "sum": RBF() + Linear(),
    "preconditioned": Preconditioned(IMQ(), LOWER),
    "blocks": Blocks((IMQ(), RBF()), (1, 2)),
    "per site": PerSite(sites={"tail": RBF()}),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("metric", ["none", "diagonal"])
def test_each_kernel_recovers_a_gaussian(name, metric):
    svgd = SVGD(
        independent, num_particles=50, kernel=KERNELS[name], metric=metric, compile="record"
    )
    posterior = run(svgd, num_runs=2)
    draws = posterior.unconstrained
    for cloud in draws:
        assert ((cloud.mean(0) - MEAN) / SD).abs().max() < 0.1
        torch.testing.assert_close(cloud.std(0), SD, rtol=0.15, atol=0)
    assert posterior.optimization["bandwidth"].isfinite().all()
    assert posterior.sample_stats["stein_norm"].isfinite().all()


@pytest.mark.parametrize("name", KERNELS)
def test_graphs_are_shared_between_runs(name):
    """Mutant: a kernel that is resolved anew for each run."""
    svgd = SVGD(independent, num_particles=5, kernel=KERNELS[name], metric="none")
    run(svgd, num_steps=3)
    before = svgd.density_settings.graphs.num_recordings
    run(svgd, num_steps=3)
    assert svgd.density_settings.graphs.num_recordings == before


# ---------------------------------------------------------------- a kernel for each site


def test_widths_are_those_of_a_particles_coordinates(generator):
    density = LogDensity(network, *data(generator))
    assert WholeParticles(2).widths(density) == {"key_scale": 5, "query_weight": 30, "readout": 5}
    heads = PlateParticles.of(density, "head")
    assert heads.widths(density) == {"key_scale": 1, "query_weight": 6}
    assert sum(heads.widths(density).values()) == heads.inside.shape[1]


@pytest.mark.parametrize("reading", [{"num_particles": 11}, {"particle_plate": "head"}])
def test_sites_move_by_their_own_kernels(reading, generator):
    """One step by hand: the kernel of a site sees the coordinates of that site alone."""
    per_site = PerSite(IMQ(), {"query_weight": RBF(0.7)})
    svgd = SVGD(network, kernel=per_site, metric="none", **reading)
    density = svgd.log_density(*data(generator))
    view = svgd.view(density, 1)
    widths = view.widths(density)
    kernel = svgd.kernel_of(density, view)
    particles = torch.randn(7, sum(widths.values()), generator=generator)
    start = 0
    for name, width in widths.items():
        part = slice(start, start + width)
        alone = (RBF(0.7) if name == "query_weight" else IMQ())(particles[:, part])
        torch.testing.assert_close(kernel(particles).repulsion[:, part], alone.repulsion)
        start += width
    posterior = run(svgd, *data(generator), num_steps=5)
    assert posterior.sample_stats["stein_norm"].isfinite().all()


def test_a_site_that_particles_do_not_have_is_refused(generator):
    svgd = SVGD(network, particle_plate="head", kernel=PerSite(sites={"readout": RBF()}))
    with pytest.raises(ValueError, match=r"given for \['readout'\], but a particle's sites are"):
        run(svgd, *data(generator), num_steps=3)


@pytest.mark.parametrize(
    "settings", [{"metric": "full"}, {"metric": "curvature"}, {"coordinates": "laplace"}]
)
def test_what_mixes_sites_is_refused_with_a_kernel_for_each(settings):
    with pytest.raises(ValueError, match="mixes coordinates of different sites"):
        SVGD(independent, kernel=PerSite(), **settings)


def test_the_automatic_metric_does_not_mix_sites():
    """Where it would be full, it is diagonal."""
    svgd = SVGD(independent, num_particles=20, kernel=PerSite())
    density = svgd.log_density()
    view = svgd.view(density, 1)
    loop = StepLoop("SVGD", 10, 0, False, 50)
    with loop.random_state(density.device):
        assert svgd.begin(density, view, None, loop, 1).metric == "diagonal"


def test_sites_that_depend_on_each_other_come_out_as_mean_field():
    """The price that is written down: each has its variance given the other, 1 - .81."""

    def dependent():
        first = pyro.sample("first", dist.Normal(0.0, 1.0))
        pyro.sample("second", dist.Normal(0.9 * first, 0.19**0.5))

    svgd = SVGD(dependent, kernel=PerSite())
    draws = run(svgd, num_steps=1500).unconstrained[0]
    torch.testing.assert_close(draws.std(0), torch.full((2,), 0.19**0.5), rtol=0.1, atol=0)
    assert draws.T.corrcoef()[0, 1].abs() < 0.2


def test_a_sampler_takes_a_kernel_for_each_site():
    spos = SPOS(independent, num_particles=10, kernel=PerSite(sites={"tail": RBF()}))
    posterior = spos.run(warmup_steps=200, num_samples=200, thinning=5, seed=0, progress=False)
    draws = posterior.unconstrained.flatten(0, 1)
    assert ((draws.mean(0) - MEAN) / SD).abs().max() < 0.3
    torch.testing.assert_close(draws.std(0), SD, rtol=0.25, atol=0)


# ---------------------------------------------------------------- the metric of curvature


UNITS = torch.tensor([1e-3, 1.0, 1e4], dtype=torch.float64)


def badly_scaled():
    lower = UNITS[:, None] * torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.2, 0.0], [-0.5, 0.3, 0.8]])
    pyro.sample("x", dist.MultivariateNormal(torch.ones(3), scale_tril=lower))


@pytest.mark.parametrize("is_triangular", [False, True])
def test_curvature_of_a_gaussian_is_its_cholesky_factor(is_triangular, generator):
    """Whatever the coordinates that it is measured in, and wherever the particles are."""
    density = LogDensity(badly_scaled)
    lower = UNITS[:, None] * torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.2, 0.0], [-0.5, 0.3, 0.8]])
    frame = identity(torch.zeros(3)).expand(2)
    if is_triangular:
        frame = frame._replace(scale=(UNITS[:, None] * LOWER).expand(2, 3, 3))
    particles = 5 + torch.randn(2, 7, 3, generator=generator)
    metric = curvature_metric(density, particles, frame)
    torch.testing.assert_close(
        metric.scale / UNITS[:, None], (lower / UNITS[:, None]).expand(2, 3, 3)
    )
    torch.testing.assert_close(metric.location, particles.mean(1))


def test_curvature_is_averaged_over_a_hundred_particles_at_most(generator):
    """Of -log p = x^4 / 4 it is 3 E x^2, each run with its own."""

    def quartic():
        pyro.factor("tails", -(pyro.sample("x", dist.Normal(0.0, 1.0).mask(False)) ** 4) / 4)

    density = LogDensity(quartic)
    particles = torch.randn(2, 250, 1, generator=generator)
    metric = curvature_metric(density, particles, identity(torch.zeros(2, 1)))
    average = 3 * particles[:, ::3].square().mean(1)
    torch.testing.assert_close(metric.scale[..., 0], average.rsqrt())


def test_a_run_takes_its_coordinates_from_the_curvature():
    """Also with fewer particles than a full metric needs. Mutant: the frame left as it was."""
    svgd = SVGD(badly_scaled, num_particles=3, metric="curvature")
    density = svgd.log_density()
    loop = StepLoop("SVGD", 100, 0, False, 50)
    with loop.random_state(density.device):
        steps = svgd.begin(density, svgd.view(density, 2), None, loop, 2)
        for step in range(51):
            steps.advance(step)
    lower = UNITS[:, None] * torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.2, 0.0], [-0.5, 0.3, 0.8]])
    found = steps.state.metric.scale / UNITS[:, None]
    torch.testing.assert_close(found, (lower / UNITS[:, None]).expand(2, 3, 3))


@pytest.mark.parametrize("name", ["mesquite", "sblrc"])
def test_metric_of_curvature_passes_the_gate_of_the_full_one(name):
    reference = load(name)
    svgd = SVGD(reference.model, metric="curvature", coordinates="laplace")
    assert not missed_by_svgd(reference, svgd_particles(reference, svgd, 600, seed=0))


def test_curvature_is_refused_where_there_are_no_hessians(generator):
    with pytest.raises(ValueError, match="metric='curvature' is of whole networks"):
        SVGD(network, particle_plate="head", metric="curvature")
    svgd = SVGD(network, num_particles=7, metric="curvature")
    with pytest.raises(ValueError, match=r"metrics of curvature need the full data.*\['row'\]"):
        run(svgd, *data(generator), num_steps=3, batch=5)

    def wide():
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([501]).to_event(1))

    with pytest.raises(ValueError, match="at most 500 wide; this model has dimension 501"):
        run(SVGD(wide, num_particles=3, metric="curvature"), num_steps=3)


def test_particles_that_are_no_numbers_raise_nothing():
    """That is for the watch to report, with the site and the step."""
    particles = torch.zeros(1, 5, 3)
    particles[0, 2, 1] = math.nan
    metric = curvature_metric(LogDensity(badly_scaled), particles, identity(torch.zeros(1, 3)))
    assert metric.location.isnan().any()
