"""Tests of the reading in which the slices of a plate, such as heads, are the particles."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.particle_views import PlateParticles, WholeParticles
from bayesattn.inference.schedules import constant
from bayesattn.inference.svgd import SVGD, direction
from bayesattn.kernels import IMQ

NUM_HEADS, NUM_FEATURES = 5, 2


def network(features, response=None, num_heads=NUM_HEADS):
    """Heads of a query and a positive scale each, and a readout outside of their plate."""
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
    with pyro.plate("head", num_heads):
        query = pyro.sample("query_weight", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        scale = pyro.sample("key_scale", dist.LogNormal(0.0, 0.5))
    readout = pyro.sample("readout", dist.Normal(0.0, 1.0).expand([num_heads]).to_event(1))
    hidden = torch.tanh(features @ query.mT) * scale
    with pyro.plate("row", len(features)):
        pyro.sample("response", dist.Normal(hidden @ readout + bias, 0.5), obs=response)


def separable():
    """Heads that share nothing, and a site outside of them that leans on none."""
    with pyro.plate("head", 7):
        pyro.sample("x", dist.Normal(torch.tensor([1.0, -1.0]), 1.0).to_event(1))
    pyro.sample("center", dist.Normal(3.0, 2.0))


@pytest.fixture
def data(generator):
    features = torch.randn(11, NUM_FEATURES, generator=generator)
    return features, torch.randn(11, generator=generator)


def run(svgd, *args, num_steps=50, seed=0, **kwargs):
    return svgd.run(*args, num_steps=num_steps, seed=seed, progress=False, **kwargs)


def test_slices_of_scores_are_scores_of_slices(data, generator):
    """Each head's score given the others is the joint score's slice, by central differences."""
    density = LogDensity(network, *data)
    view = PlateParticles.of(density, "head")
    networks = torch.randn(2, density.dim, generator=generator)
    inside, outside = view.split(density.value_and_score(networks)[1])
    particles, rest = view.split(networks)
    assert inside.shape == particles.shape == (2, NUM_HEADS, 3)
    assert outside.shape == rest.shape == (2, 1 + NUM_HEADS)
    step = 1e-5
    for head in range(NUM_HEADS):
        for entry in range(3):
            ahead, behind = particles.clone(), particles.clone()
            ahead[:, head, entry] += step
            behind[:, head, entry] -= step
            above, below = (
                density.value_and_score(view.assemble(moved, rest))[0] for moved in (ahead, behind)
            )
            slope = (above - below) / (2 * step)
            torch.testing.assert_close(inside[:, head, entry], slope, rtol=1e-6, atol=1e-6)


def test_assembling_undoes_splitting(data, generator):
    density = LogDensity(network, *data)
    view = PlateParticles.of(density, "head")
    networks = torch.randn(3, density.dim, generator=generator)
    assert torch.equal(view.assemble(*view.split(networks)), networks)
    whole = WholeParticles(3)
    networks = torch.randn(3 * 7, density.dim, generator=generator)
    assert torch.equal(whole.assemble(*whole.split(networks)), networks)


def test_moving_one_particle_moves_one_head(data, generator):
    """Mutant: entries taken site by site, as a reshape of the whole vector would."""
    density = LogDensity(network, *data)
    view = PlateParticles.of(density, "head")
    particles, outside = view.split(torch.randn(1, density.dim, generator=generator))
    moved = particles.clone()
    moved[:, 2] += 1.0
    before = density.constrain(view.assemble(particles, outside))
    after = density.constrain(view.assemble(moved, outside))
    for site in ("query_weight", "key_scale"):
        changed = (before[site] != after[site])[0].reshape(NUM_HEADS, -1).any(1)
        assert changed.tolist() == [False, False, True, False, False]
    assert torch.equal(before["readout"], after["readout"])
    assert torch.equal(before["bias"], after["bias"])


def test_permuting_heads_permutes_directions(data, generator):
    """With the readout permuted alike, the joint density is the same."""
    density = LogDensity(network, *data)
    view = PlateParticles.of(density, "head")
    networks = torch.randn(1, density.dim, generator=generator)
    order = torch.randperm(NUM_HEADS, generator=generator)
    readout = next(site for site in density.sites if site.name == "readout")
    particles, outside = view.split(networks)
    permuted = view.assemble(particles[:, order], outside)
    permuted[:, readout.start : readout.stop] = networks[:, readout.start : readout.stop][:, order]

    def directions(networks):
        inside, _ = view.split(density.value_and_score(networks)[1])
        return direction(view.split(networks)[0], inside, IMQ())

    torch.testing.assert_close(directions(permuted), directions(networks)[:, order])


def test_heads_that_share_nothing_are_particles_of_one_posterior():
    """Then the theory for independent particles applies; what is outside climbs to its mode."""
    posterior = run(SVGD(separable, particle_plate="head"), num_steps=500, num_runs=3)
    assert posterior.draws["x"].shape == (3, 7, 2)
    means = posterior.draws["x"].mean(1)
    torch.testing.assert_close(means, torch.tensor([1.0, -1.0]).expand(3, 2), rtol=0, atol=0.1)
    assert (posterior.draws["x"].std(1) > 0.5).all()
    center = posterior.point_estimates["center"]
    torch.testing.assert_close(center, torch.full((3,), 3.0), rtol=0, atol=1e-2)
    untrained = run(SVGD(separable, particle_plate="head"), num_steps=1, num_runs=3)
    assert (untrained.point_estimates["center"] - 3).abs().max() > 0.1


def test_what_is_outside_ends_at_the_joint_optimum(data):
    """Its score given the heads is zero at the end, and not at the start."""

    def outside_score(posterior):
        density = LogDensity(network, *data)
        networks = density.unconstrain(
            {name: posterior.network_samples()[name] for name in [s.name for s in density.sites]}
        )
        view = PlateParticles.of(density, "head")
        return view.split(density.value_and_score(networks)[1])[1].abs().max()

    svgd = SVGD(network, particle_plate="head")
    assert outside_score(run(svgd, *data, num_steps=1500)) < 0.05
    assert outside_score(run(svgd, *data, num_steps=1)) > 1


def test_what_is_outside_may_stay_where_it_starts(data):
    start = {
        "bias": torch.tensor(0.3),
        "query_weight": torch.randn(5, 2, generator=torch.Generator().manual_seed(0)),
        "key_scale": torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5]),
        "readout": torch.linspace(-1.0, 1.0, 5),
    }
    svgd = SVGD(network, particle_plate="head", outside="fixed")
    posterior = run(svgd, *data, init=start)
    torch.testing.assert_close(posterior.point_estimates["bias"][0], start["bias"])
    torch.testing.assert_close(posterior.point_estimates["readout"][0], start["readout"])
    assert not torch.equal(posterior.draws["key_scale"][0], start["key_scale"])


def test_equal_heads_separate(data):
    start = {
        "bias": torch.tensor(0.3),
        "query_weight": torch.ones(5, 2),
        "key_scale": torch.ones(5),
        "readout": torch.ones(5),
    }
    posterior = run(SVGD(network, particle_plate="head"), *data, init=start, num_runs=2)
    queries = posterior.draws["query_weight"].flatten(0, 1)
    assert len(queries.unique(dim=0)) == 10


def test_one_head_climbs_to_the_joint_mode(data):
    """A plate of one slice: gradient ascent on the joint density, by plain torch."""
    features, response = data
    svgd = SVGD(
        network,
        particle_plate="head",
        optimizer=functools.partial(torch.optim.SGD, lr=1e-3),
        schedule=constant,
    )
    density = LogDensity(network, features, response, num_heads=1)
    start = torch.linspace(-0.5, 0.5, density.dim)[None]
    values = dict(density.constrain(start))
    posterior = run(svgd, features, response, num_heads=1, num_steps=5, init=values)
    for _ in range(5):
        start = start + 1e-3 * density.value_and_score(start)[1]
    expected = density.constrain(start)
    ours = posterior.network_samples()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value)


def test_the_posterior_says_where_the_heads_go(data):
    posterior = run(SVGD(network, particle_plate="head"), *data, num_runs=2)
    assert posterior.draws_are == "heads"
    assert posterior.attrs["particle_plate"] == "head"
    assert posterior.attrs["particle_plate_axes"] == {"query_weight": 0, "key_scale": 0}
    assert posterior.draws["query_weight"].shape == (2, NUM_HEADS, 2)
    assert posterior.draws["key_scale"].shape == (2, NUM_HEADS)
    assert posterior.point_estimates["readout"].shape == (2, NUM_HEADS)
    assert posterior.sample_stats["lp"].shape == (2, NUM_HEADS)
    density = LogDensity(network, *data)
    values = posterior.network_samples()
    networks = density.unconstrain({site.name: values[site.name] for site in density.sites})
    lp = density.value_and_score(networks)[0]
    torch.testing.assert_close(posterior.sample_stats["lp"], lp[:, None].expand(2, NUM_HEADS))


def test_an_unknown_plate_is_refused(data):
    with pytest.raises(ValueError, match=r"no latent site stands in a plate named 'layer'.*head"):
        run(SVGD(network, particle_plate="layer"), *data)
