"""Implicit kernels: the program by loops, and the law, divergence and network of its guide."""

import math

import numpy as np
import pyro.poutine as poutine
import pytest
import torch
from torch.distributions import MultivariateNormal

from bayesattn.inference import NUTS, SVGD, SVI, DensitySettings, LogDensity
from bayesattn.inference.running import private_param_store
from bayesattn.logits.head_coupling import correlation_tril, coupled_divergence, coupled_scale_tril
from bayesattn.models import Bernoulli, ImplicitKernelAttention
from bayesattn.models.density_guides import DensityEncoder, SignedNormal
from bayesattn.models.implicit_attention import implicit_frequencies
from tests import reference
from tests.models.cases import (
    DIM,
    NUM_HEADS,
    NUM_SENTENCES,
    NUM_TOKENS,
    Data,
    draw_values,
    make_data,
    run,
)

WIDTH, FREQUENCIES, LATENT, HIDDEN = 11, 13, 3, 5
MODEL = ImplicitKernelAttention(
    NUM_HEADS,
    WIDTH,
    Bernoulli(),
    num_frequencies=FREQUENCIES,
    latent_dim=LATENT,
    hidden_dim=HIDDEN,
    frequency_scale=1.3,
    projection_scale=0.9,
    floor=1e-3,
)
SCALE = 1.3 / math.sqrt(8 * math.pi**2 * math.sqrt(WIDTH))
PRIOR_SCALES = {
    "query_weight": 0.9 * DIM**-0.5,
    "key_weight": 0.9 * DIM**-0.5,
    "value_weight": 0.9 * DIM**-0.5,
    "generator_weight": LATENT**-0.5,
    "frequency_weight": HIDDEN**-0.5,
    "density_latent": 1.0,
    "readout_weight": 0.3,
    "readout_bias": 0.3,
}
close = torch.testing.assert_close


# ---------------------------------------------------------------- the program


def attention_by_hand(data, values):
    """Weights of each sentence and head, by loops."""
    values = {site: value.numpy() for site, value in values.items()}
    weights = np.zeros((NUM_SENTENCES, NUM_HEADS, NUM_TOKENS, NUM_TOKENS))
    for n, h in np.ndindex(NUM_SENTENCES, NUM_HEADS):
        frequencies = [
            SCALE * np.tanh(z[h] @ values["generator_weight"][h]) @ values["frequency_weight"][h]
            for z in values["density_latent"][n]
        ]
        query, key = (
            data.tokens[n].numpy() @ values[f"{part}_weight"][h] for part in ("query", "key")
        )
        seen = data.mask[n].numpy()
        for i in np.flatnonzero(seen):
            for j in np.flatnonzero(seen):
                angles = [2 * math.pi * w @ (query[i] - key[j]) for w in frequencies]
                weights[n, h, i, j] = np.mean(np.cos(angles)) ** 2 + 1e-3
            weights[n, h, i] /= weights[n, h, i].sum()
    return weights


def log_joint_by_hand(data, values):
    """Log prior and log likelihood, written out."""
    total = sum(
        reference.normal_log_density(values[site].numpy(), scale)
        for site, scale in PRIOR_SCALES.items()
    )
    weights, value_weight = attention_by_hand(data, values), values["value_weight"].numpy()
    for n, target in enumerate(data.target.tolist()):
        output = values["readout_bias"].item()
        for h in range(NUM_HEADS):
            attended = weights[n, h] @ data.tokens[n].numpy() @ value_weight[h]
            mean = attended.sum(0) / max(int(data.mask[n].sum()), 1)
            output += float(mean @ values["readout_weight"][h, :, 0].numpy())
        total -= math.log1p(math.exp(-output if target else output))
    return total


@pytest.mark.parametrize("mode", ["none", pytest.param("record", marks=pytest.mark.slow)])
def test_log_density_is_the_formula(mode, generator):
    """Mutants: a power of the width for its root, frequencies of queries and keys apart."""
    data = make_data(generator, "bernoulli")
    density = LogDensity(MODEL, *data, settings=DensitySettings(compile=mode))
    particles = torch.randn(2, density.dim, generator=generator)
    found, score = density.value_and_score(particles)
    assert score.isfinite().all()
    for row in range(2):
        values = {site: value[row] for site, value in density.constrain(particles).items()}
        assert values.keys() == PRIOR_SCALES.keys()
        by_hand = log_joint_by_hand(data, values)
        assert found[row].item() == pytest.approx(by_hand, rel=1e-12)
        sites, log_joint = run(MODEL, data, values)
        assert log_joint.item() == pytest.approx(by_hand, rel=1e-12)
        close(sites["attention"], torch.tensor(attention_by_hand(data, values)))


def test_padding_never_matters(generator):
    data = make_data(generator, "bernoulli")
    values = draw_values(MODEL, data, generator)
    junk = 100 * torch.randn(data.tokens.shape, generator=generator)
    other = Data(torch.where(data.mask[..., None], data.tokens, junk), data.mask, data.target)
    (before, log_joint), (after, same) = (run(MODEL, one, values) for one in (data, other))
    close(same, log_joint)
    close(after["attention"], before["attention"])
    close(after["expected_target"], before["expected_target"])


def test_a_sentence_has_its_own_kernel_whatever_the_signs(generator):
    """Mutants: latents that sentences share, a network that is not odd."""
    data = make_data(generator, "bernoulli")
    values = draw_values(MODEL, data, generator)
    signs = torch.randint(2, (NUM_SENTENCES, FREQUENCIES, 1, 1), generator=generator) * 2.0 - 1
    moved = values["density_latent"].clone()
    moved[3] += 1.0
    turned = {"density_latent": signs * values["density_latent"]}
    before, after, other = (
        run(MODEL, data, values | new)[0]["attention"]
        for new in ({}, turned, {"density_latent": moved})
    )
    close(after, before)
    kept = torch.arange(NUM_SENTENCES) != 3
    assert torch.equal(other[kept], before[kept])
    assert (other[3] - before[3]).abs().max() > 1e-6


def test_frequencies_are_odd_in_the_latents(generator):
    latent = torch.randn(2, FREQUENCIES, NUM_HEADS, LATENT, generator=generator)
    generators = torch.randn(NUM_HEADS, LATENT, HIDDEN, generator=generator)
    outward = torch.randn(NUM_HEADS, HIDDEN, WIDTH, generator=generator)
    found = implicit_frequencies(latent, generators, outward)
    assert found.shape == (2, NUM_HEADS, FREQUENCIES, WIDTH)
    close(implicit_frequencies(-latent, generators, outward), -found)
    alone = torch.tanh(latent[1, 7, 1] @ generators[1]) @ outward[1]
    close(found[1, 1, 7], alone)


# ---------------------------------------------------------------- the guide's law


@pytest.fixture
def law(generator):
    """Of a batch; means as far from zero as scales."""
    loc = torch.randn(2, 4, LATENT, generator=generator)
    scale = torch.rand(2, 4, LATENT, generator=generator) + 0.3
    return SignedNormal(loc, scale, torch.randn(2, 4, generator=generator))


def test_density_is_that_of_two_multivariate_normals(law, generator):
    """Mutants: one sign, a sign for each head, a determinant left out."""
    values = torch.randn(5, 2, 4, LATENT, generator=generator)
    tril = coupled_scale_tril(law.scale, law.coupling)
    logs = [
        MultivariateNormal(sign * law.loc.mT, scale_tril=tril).log_prob(values.mT).sum(-1)
        for sign in (1, -1)
    ]
    close(law.log_prob(values), torch.logaddexp(*logs) - math.log(2))
    assert law.log_prob(values).shape == (5, 2)


def test_draws_are_those_of_the_density(law):
    """Moments of the mixture. Mutants: a sign for each head, uncoupled noise, half of the scale."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = law.sample((40_000,))[:, 1]
    error = 6 * draws.std(0) / len(draws) ** 0.5
    assert (draws.mean(0).abs() < error).all()
    factor = correlation_tril(law.coupling[1])
    for first in range(LATENT):
        for second in range(LATENT):
            products = draws[..., first, None] * draws[..., None, :, second]
            expected = law.loc[1, :, first, None] * law.loc[1, :, second]
            if first == second:
                deviations = law.scale[1, :, first]
                expected = expected + deviations[:, None] * (factor @ factor.mT) * deviations
            bound = 6 * products.std(0) / len(draws) ** 0.5
            assert ((products.mean(0) - expected).abs() < bound).all()


def test_larger_batches_and_gradients(law):
    wide = law.expand((7, 2)).to_event(1)
    assert (wide.batch_shape, wide.event_shape) == ((7,), (2, 4, LATENT))
    value = torch.ones(2, 4, LATENT)
    close(wide.log_prob(value), law.log_prob(value).sum().expand(7))
    with torch.random.fork_rng():
        assert wide.sample((3,)).shape == (3, 7, 2, 4, LATENT)
    parts = [part.clone().requires_grad_() for part in (law.loc, law.scale, law.coupling)]
    assert torch.autograd.gradcheck(lambda *given: SignedNormal(*given).log_prob(value), parts)


def test_divergence_in_closed_form_bounds_the_guides_own(law):
    """By at most the log of two; mutants: a divergence of one coordinate, no mixture."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = law.sample((20_000,))
    ratio = law.log_prob(draws) - torch.distributions.Normal(0.0, 1.0).log_prob(draws).sum((2, 3))
    error = 5 * ratio.std(0) / len(draws) ** 0.5
    bound = coupled_divergence(law.loc, law.scale, law.coupling)
    assert (ratio.mean(0) < bound + error).all()
    assert (ratio.mean(0) > bound - math.log(2) - error).all()
    # The signs of means so far out tell all of it.
    assert (ratio.mean(0) < bound - 0.1).any()


# ---------------------------------------------------------------- the guide


@pytest.mark.usefixtures("seeded_layers")
def test_encoder_reads_the_mean_of_the_words(generator):
    """Mutants: padding in the mean, scales that are logarithms or variances."""
    data = make_data(generator)
    encoder = DensityEncoder(DIM, NUM_HEADS, LATENT, HIDDEN)
    mean, scale, coupling = encoder(data.tokens, data.mask)
    for n in range(1, NUM_SENTENCES):
        pooled = data.tokens[n][data.mask[n]].mean(0)
        figures = encoder.layers(pooled).view(NUM_HEADS, 2 * LATENT + 1)
        close(mean[n], figures[:, :LATENT])
        close(scale[n].log(), figures[:, LATENT:-1])
        close(coupling[n], figures[:, -1])
    nothing = encoder.layers(torch.zeros(DIM)).view(NUM_HEADS, -1)
    close(mean[0], nothing[:, :LATENT])
    everything = torch.ones_like(data.mask)
    close(encoder(data.tokens), encoder(data.tokens, everything))


@pytest.mark.usefixtures("seeded_layers")
def test_guide_draws_latents_by_the_encoder(generator):
    """Mutants: another sentence's law, one draw for all frequencies."""
    data = make_data(generator, "bernoulli")
    guide = MODEL.guide(DIM)
    with private_param_store():
        trace = poutine.trace(guide).get_trace(*data)
    node = trace.nodes["density_latent"]
    assert node["value"].shape == (NUM_SENTENCES, FREQUENCIES, NUM_HEADS, LATENT)
    parts = guide.encoder(data.tokens, data.mask)
    expected = SignedNormal(*(part[:, None] for part in parts)).log_prob(node["value"]).sum(-1)
    close(node["fn"].log_prob(node["value"]), expected)
    assert (node["value"][:, 0] - node["value"][:, 1]).abs().min() > 0
    assert PRIOR_SCALES.keys() <= trace.nodes.keys()


@pytest.mark.usefixtures("seeded_layers")
def test_svi_fits_the_guide(generator):
    """The bound rises, encoders learn, and what is given stays as it was."""
    data = make_data(generator, "bernoulli")
    guide = MODEL.guide(DIM)
    before = {name: value.clone() for name, value in guide.encoder.named_parameters()}
    routine = SVI(MODEL, guide=guide, compile="none")
    settings = {"seed": 0, "progress": False, "num_samples": 3}
    posterior = routine.run(*data, num_steps=30, **settings)
    elbo = posterior.optimization["elbo"][0]
    assert elbo[-5:].mean() > elbo[:5].mean() + 50
    for name, value in guide.encoder.named_parameters():
        assert torch.equal(value, before[name])
    draws = {name: draw for name, draw in posterior.draws.items() if name != "density_latent"}
    new = torch.randn(3, 17, DIM, generator=generator)
    seen = posterior.replace(draws=draws).predict(new, seed=0)
    assert seen["attention"].shape == (1, 3, 3, NUM_HEADS, 17, 17)
    close(seen["attention"].sum(-1), torch.ones(1, 3, 3, NUM_HEADS, 17))


@pytest.mark.parametrize("routine", ["svgd", pytest.param("nuts", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::bayesattn.inference.ConvergenceWarning")
def test_other_routines_run(routine, generator):
    data = make_data(generator, "bernoulli")
    quiet = {"seed": 0, "progress": False}
    if routine == "svgd":
        svgd = SVGD(MODEL, num_particles=3, compile="none")
        posterior = svgd.run(*data, num_steps=2, **quiet)
    else:
        nuts = NUTS(MODEL, max_tree_depth=1, compile="none")
        posterior = nuts.run(*data, warmup_steps=2, num_samples=3, **quiet)
    tree = posterior.to_arviz(log_likelihood=False)
    axes = {site: found.dims[2:] for site, found in tree["posterior"].data_vars.items()}
    assert axes["density_latent"] == ("sentence", "frequency", "head", "latent")
    assert axes["attention"] == ("sentence", "head", "query", "key")
    names = {axis for dims in axes.values() for axis in dims}
    assert not [axis for axis in names if "_axis_" in axis]
    assert not names & axes.keys()
