"""SVGD, NUTS and SVI against eight reference posteriors, in Laplace coordinates.

Each routine has its gate: how far means and standard deviations may be from the reference's. The
gates are known to close: before training they are missed, and so they are in raw coordinates on a
badly scaled posterior.
"""

from typing import Literal

import pytest
from torch import Tensor

from bayesattn.inference import NUTS, SVGD, SVI, ConvergenceWarning
from tests.validation.references import (
    NAMES,
    ReferencePosterior,
    coordinate_names,
    load,
    unconstrained,
)
from tests.validation.scores import (
    Gate,
    Scores,
    by_moments,
    by_quantiles,
    effective_sample_size,
    iid_gate,
)

SEEDS = range(5)
# gauss_mix has 1000 observations; it takes ten times as long as the others.
QUICK_NAMES = [name for name in NAMES if name != "gauss_mix"]


def missed_by_svgd(reference: ReferencePosterior, draws: Tensor) -> str:
    """Say what of SVGD's gate particles miss; empty if they pass.

    The tail of tau in eight schools is hard for 100 particles: its width has a gate of its own.
    """
    scores = by_moments(draws, unconstrained(reference))
    if reference.name != "eight_schools":
        return missed(Gate(0.15, 0.85, 1.10), scores)
    tau = coordinate_names(reference).index("tau")
    others = [i for i in range(len(scores.shift)) if i != tau]
    return missed(
        Gate(0.3, 0.8, 1.15), Scores(scores.shift[others], scores.ratio[others])
    ) + missed(Gate(0.3, 0.7, 1.6), Scores(scores.shift[[tau]], scores.ratio[[tau]]))


def missed(gate: Gate, scores: Scores) -> str:
    return "" if gate.passes(scores) else f"{scores} misses {gate}\n"


def svgd_particles(reference: ReferencePosterior, svgd: SVGD, num_steps: int, seed: int) -> Tensor:
    posterior = svgd.run(*reference.data, num_steps=num_steps, seed=seed, progress=False)
    return posterior.unconstrained[0]


@pytest.mark.parametrize("name", QUICK_NAMES)
def test_svgd_passes_its_gate(name):
    reference = load(name)
    svgd = SVGD(reference.model, coordinates="laplace")
    assert not missed_by_svgd(reference, svgd_particles(reference, svgd, 600, seed=0))


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [600, 1800])
@pytest.mark.parametrize("name", NAMES)
def test_svgd_passes_its_gate_from_every_seed_and_for_longer(name, num_steps):
    """Also from one with three times the steps: a pass by stopping early is none."""
    reference = load(name)
    svgd = SVGD(reference.model, coordinates="laplace")
    seeds = SEEDS if num_steps == 600 else SEEDS[:1]
    runs = [svgd_particles(reference, svgd, num_steps, seed) for seed in seeds]
    assert not "".join(missed_by_svgd(reference, particles) for particles in runs)


@pytest.mark.slow
def test_svgd_finds_the_heavy_tail_by_quantiles():
    """Quantiles of eight schools, which a few particles far out in tau's tail do not move."""
    reference = load("eight_schools")
    svgd = SVGD(reference.model, coordinates="laplace")
    particles = svgd_particles(reference, svgd, 1800, seed=0)
    assert not missed(Gate(0.3, 0.8, 1.3), by_quantiles(particles, unconstrained(reference)))


@pytest.mark.parametrize("name", NAMES)
def test_untrained_particles_miss_the_gate_of_svgd(name):
    reference = load(name)
    assert all(missed_by_svgd(reference, particles) for particles in untrained(reference, "raw"))


@pytest.mark.parametrize("name", ["eight_schools", "sblrc", "mesquite"])
def test_laplace_approximation_alone_misses_the_gate_of_svgd(name):
    """Where the mode is not the mean; elsewhere 100 draws of it miss by chance only."""
    reference = load(name)
    starts = untrained(reference, "laplace")
    assert all(missed_by_svgd(reference, particles) for particles in starts)


def untrained(reference: ReferencePosterior, coordinates: Literal["raw", "laplace"]) -> Tensor:
    svgd = SVGD(reference.model, coordinates=coordinates)
    runs = svgd.run(*reference.data, num_steps=1, num_runs=10, seed=0, progress=False)
    return runs.unconstrained


def missed_by_nuts(reference: ReferencePosterior, draws: Tensor) -> str:
    """Say what draws "chain draw dim" miss: 200 effective ones, or what exact ones would pass.

    Means and standard deviations have effective sample sizes of their own, the second smaller. At
    this level exact draws would fail the test of some posterior in one of a hundred suites.
    """
    deviation = (draws - draws.mean(dim=(0, 1))).square()
    sizes = [effective_sample_size(values).min().item() for values in (draws, deviation)]
    if not min(sizes) >= 1 or sizes[0] < 200:
        return f"effective sample sizes {sizes}"
    exact = unconstrained(reference)
    of_means, of_squares = (iid_gate(exact, size, level=0.999) for size in sizes)
    gate = of_squares._replace(shift=of_means.shift)
    return missed(gate, by_moments(draws.flatten(0, 1), exact))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nuts_passes_its_gate(name):
    reference = load(name)
    nuts = NUTS(reference.model, coordinates="laplace")
    posterior = nuts.run(
        *reference.data, warmup_steps=500, num_samples=1000, seed=0, progress=False
    )
    assert not missed_by_nuts(reference, posterior.unconstrained)


@pytest.mark.slow
def test_nuts_in_raw_coordinates_is_flagged_and_misses_its_gate():
    reference = load("kilpisjarvi")
    nuts = NUTS(reference.model, max_tree_depth=5)
    with pytest.warns(ConvergenceWarning):
        posterior = nuts.run(
            *reference.data, warmup_steps=50, num_samples=150, seed=0, progress=False
        )
    assert missed_by_nuts(reference, posterior.unconstrained)


def svi_shift(
    name: str, num_steps: int, coordinates: Literal["raw", "laplace"] = "laplace"
) -> float:
    """The largest error of a mean under mean-field variational inference."""
    reference = load(name)
    svi = SVI(reference.model, coordinates=coordinates, num_elbo_particles=10)
    posterior = svi.run(
        *reference.data, num_steps=num_steps, num_samples=10_000, seed=0, progress=False
    )
    return by_moments(posterior.unconstrained[0], unconstrained(reference)).worst_shift


def svi_bound(name: str) -> float:
    return 0.5 if name == "eight_schools" else 0.15


CURVED = ("eight_schools", "kilpisjarvi", "mesquite")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "mesquite")) for name in NAMES]
)
def test_svi_passes_its_gate(name):
    assert svi_shift(name, 1000) <= svi_bound(name)


@pytest.mark.parametrize("name", CURVED)
def test_untrained_guide_misses_the_gate_of_svi(name):
    """Where the mode is not the mean; elsewhere the Laplace coordinates have done all the work."""
    assert svi_shift(name, 1) > svi_bound(name)


@pytest.mark.slow
def test_svi_in_raw_coordinates_misses_its_gate():
    assert svi_shift("kilpisjarvi", 1000, coordinates="raw") > 1
