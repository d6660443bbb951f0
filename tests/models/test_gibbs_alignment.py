"""Tests of bayesattn.models.gibbs_alignment, alone and in a program of self-attention."""

import functools
import itertools
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import init_to_value
from torch import nn
from torch.nn import functional as F

from bayesattn.divergences import (
    MMD,
    Adversarial,
    Balanced,
    BuresWasserstein,
    ConditionalTransport,
    Energy,
    EntropicTransport,
    SinkhornDivergence,
    SlicedWasserstein,
    energy_distance,
)
from bayesattn.inference import (
    NUTS,
    SVGD,
    SVI,
    DensitySettings,
    GraphCache,
    LogDensity,
    Posterior,
)
from bayesattn.inference.running import private_param_store, seeded
from bayesattn.kernels import RBF
from bayesattn.models import AlignmentFactor, Bernoulli, MultiHeadSelfAttention
from tests.models.cases import (
    DIM,
    NUM_HEADS,
    NUM_SENTENCES,
    NUM_TOKENS,
    WIDTH,
    Data,
    draw_values,
    make_data,
    make_model,
    run,
)
from tests.validation.scores import effective_sample_size

QUIET = {"seed": 0, "progress": False}


class Critic(nn.Module):
    """Energy distance of what a small network sees of queries and keys."""

    def __init__(self, is_frozen=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.features = nn.Linear(WIDTH, 2)
        self.features.requires_grad_(not is_frozen)

    def forward(self, query, key, query_mask=None, key_mask=None, weights=None):
        seen = (self.features(points).tanh() for points in (query, key))
        return energy_distance(*seen, query_mask, key_mask, weights)


@dataclass(frozen=True)
class Scaled:
    """A divergence that holds another."""

    divergence: object
    factor: float = 2.0

    def __call__(self, *clouds):
        return self.factor * self.divergence(*clouds)


def frozen(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(NUM_HEADS, WIDTH).requires_grad_(False)


DIVERGENCES = {
    "mmd": MMD,
    "energy": Energy,
    "sliced": lambda: SlicedWasserstein(7),
    "transport": ConditionalTransport,
    "fused transport": lambda: ConditionalTransport(cost="squared", route="fused"),
    "entropic": lambda: EntropicTransport(epsilon=0.1, num_iterations=20),
    "sinkhorn": lambda: SinkhornDivergence(epsilon=0.1, num_iterations=20),
    "moments": BuresWasserstein,
    "balanced": lambda: Balanced(Energy()),
    "frozen critic": Critic,
    "frozen transport": lambda: frozen(ConditionalTransport.learned),
    "frozen adversary": lambda: frozen(Adversarial),
}


def aligned(divergence, weight, **settings):
    return make_model("self_attention", alignment=AlignmentFactor(divergence, weight), **settings)


def penalized_loss(values, data, weight):
    """NLL + λ Σ D - log prior of self-attention, D the energy distance, by PyTorch's own parts."""
    total = torch.zeros(())
    for tokens, mask, target in zip(*data, strict=True):
        words, features = tokens[mask], []
        for head in range(NUM_HEADS):
            query, key, value = (
                words @ values[f"{part}_weight"][head] for part in ("query", "key", "value")
            )
            if len(words) == 0:
                features.append(torch.zeros(WIDTH))
                continue
            attended = F.scaled_dot_product_attention(query[None], key[None], value[None])[0]
            features.append(attended.mean(0))
            pairs = ((query, key), (query, query), (key, key))
            between, *within = (torch.cdist(*pair).mean() for pair in pairs)
            total = total + weight * (2 * between - sum(within))
        logits = torch.einsum("hf,hfo->o", torch.stack(features), values["readout_weight"])
        total = total + F.cross_entropy((logits + values["readout_bias"])[None], target[None])
    for site, value in values.items():
        scale = 0.3 if site.startswith("readout") else DIM**-0.5
        total = total - torch.distributions.Normal(0.0, scale).log_prob(value).sum()
    return total


def test_delta_guide_has_the_penalized_loss_and_its_gradient(generator):
    """Kills: any other sign, scale or reduction of the factor."""
    data, weight = make_data(generator), 0.7
    model = aligned(Energy(), weight)
    values = draw_values(model, data, generator)
    guide = AutoDelta(model, init_loc_fn=init_to_value(values=values))
    with private_param_store(), seeded(0):
        loss = Trace_ELBO().differentiable_loss(model, guide, *data)
        loss.backward()
        gradients = {site: getattr(guide, site).grad for site in values}
    leaves = {site: value.requires_grad_() for site, value in values.items()}
    by_hand = penalized_loss(leaves, data, weight)
    torch.testing.assert_close(loss.detach(), by_hand.detach(), rtol=1e-12, atol=0.0)
    expected = torch.autograd.grad(by_hand, list(leaves.values()))
    for site, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(gradients[site], gradient, rtol=1e-9, atol=1e-12)


def test_minibatches_of_both_plates_average_to_the_full_density(generator):
    """Kills: a factor outside of its plate, which no scale reaches."""
    data, further = make_data(generator, num_sentences=4), make_data(generator, num_sentences=3)
    arguments = (*data, *further[:2])
    full = LogDensity(aligned(Energy(), 0.7), *arguments)
    part = LogDensity(aligned(Energy(), 0.7, batch_size=2), *arguments)
    assert part.program.subsamples == {"sentence": (4, 2), "unlabeled": (3, 2)}
    particles = torch.randn(2, full.dim, generator=generator)
    pairs = [list(itertools.combinations(range(size), 2)) for size in (4, 3)]
    estimates = [
        part.value_and_score(
            particles, {"sentence": torch.tensor(first), "unlabeled": torch.tensor(second)}
        )
        for first, second in itertools.product(*pairs)
    ]
    values, scores = (torch.stack(figures) for figures in zip(*estimates, strict=True))
    assert (values.std(0) > 0.01).all()
    torch.testing.assert_close((values.mean(0), scores.mean(0)), full.value_and_score(particles))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_weight_of_zero_is_the_plain_model_bit_for_bit(name, generator):
    data, weight = make_data(generator), torch.zeros(())
    density = LogDensity(aligned(DIVERGENCES[name](), weight), *data)
    plain = LogDensity(make_model("self_attention"), *data)
    particles = torch.randn(3, plain.dim, generator=generator)
    for ours, expected in zip(
        density.value_and_score(particles), plain.value_and_score(particles), strict=True
    ):
        assert torch.equal(ours, expected)
    weight.fill_(1.0)
    assert not torch.equal(density.value_and_score(particles)[0], ours)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_recorded_graph_is_the_program(name, generator):
    """At each particle; with padding, and a sentence without words."""
    data, divergence = make_data(generator), DIVERGENCES[name]()
    model = aligned(divergence, torch.tensor([0.7, 0.2]))
    density = LogDensity(model, *data)
    particles = torch.randn(2, density.dim, generator=generator)
    value, score = density.value_and_score(particles)
    for row in range(2):
        leaf = particles[row].clone().requires_grad_()
        pieces = leaf.split([site.stop - site.start for site in density.sites])
        values = {s.name: x.reshape(s.shape) for s, x in zip(density.sites, pieces, strict=True)}
        sites, log_joint = run(model, data, values)
        torch.testing.assert_close(value[row], log_joint.detach())
        torch.testing.assert_close(score[row], torch.autograd.grad(log_joint, leaf)[0])
        given = sites["divergence"]
        assert (given[0] == 0).all()
        for sentence in range(1, NUM_SENTENCES):
            words = data.tokens[sentence][data.mask[sentence]]
            query, key = (words @ values[f"{part}_weight"] for part in ("query", "key"))
            torch.testing.assert_close(given[sentence], divergence(query, key))


ROUTINES = {
    "particles": lambda model, data: SVGD(model, num_particles=3).run(*data, num_steps=2, **QUIET),
    "heads": lambda model, data: SVGD(model, particle_plate="head").run(
        *data, num_steps=2, **QUIET
    ),
    "svi": lambda model, data: SVI(model).run(*data, num_steps=2, num_samples=3, **QUIET),
    "nuts": lambda model, data: NUTS(model, max_tree_depth=1).run(
        *data, warmup_steps=2, num_samples=3, **QUIET
    ),
}


@pytest.mark.parametrize(
    ("name", "routine"),
    [
        *(("mmd", routine) for routine in ROUTINES),
        # The others under vmap are compared above.
        *(
            pytest.param(name, "nuts", marks=pytest.mark.slow)
            for name in ("fused transport", "balanced", "frozen adversary")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::bayesattn.inference.ConvergenceWarning")
def test_every_routine_runs_with_it(name, routine, generator):
    data = make_data(generator, "bernoulli", num_sentences=5)
    model = aligned(DIVERGENCES[name](), 0.5, likelihood="bernoulli")
    posterior = ROUTINES[routine](model, data)
    found = posterior.predict(sites=["divergence"])["divergence"]
    assert found.shape[2:] == (5, NUM_HEADS)
    assert found.isfinite().all()


def with_default(critic):
    def divergence(query, key, query_mask=None, key_mask=None, weights=None, net=critic):
        return net(query, key, query_mask, key_mask, weights)

    return divergence


class Slotted:
    """A divergence without a dictionary of attributes."""

    __slots__ = ("critic",)

    def __init__(self, critic):
        self.critic = critic

    def __call__(self, *clouds):
        return self.critic(*clouds)


def _own_tensor(parameter):
    """No parameter, but learned if it is."""
    return parameter.detach().clone().requires_grad_(parameter.requires_grad)


HIDING_PLACES = {
    "module": lambda critic: critic,
    "field": Scaled,
    "list": lambda critic: Scaled([{"inside": critic}]),
    "default": with_default,
    "slot": Slotted,
    "partial": lambda critic: functools.partial(Scaled(Energy()), critic=critic),
    "closure": lambda critic: lambda *clouds: critic(*clouds),
    "method": lambda critic: critic.forward,
    "transport": lambda critic: ConditionalTransport(navigator=critic),
    "kernel": lambda critic: MMD(RBF(next(critic.parameters()))),
    "tensor of a kernel": lambda critic: MMD(RBF(_own_tensor(next(critic.parameters())))),
}


@pytest.mark.parametrize("place", HIDING_PLACES)
def test_learned_critics_are_refused_and_frozen_ones_are_not(place):
    divergence = HIDING_PLACES[place](Critic(is_frozen=False))
    with pytest.raises(ValueError, match=r"divergence: .*optimized, never sampled.*freeze it"):
        AlignmentFactor(divergence)
    divergence = HIDING_PLACES[place](Critic())
    assert AlignmentFactor(divergence).divergence is divergence


@pytest.mark.parametrize(
    ("divergence", "message"),
    [
        (Energy(unbiased=True), "divergence: .* unbiased estimate"),
        (ConditionalTransport(debiased=True), "divergence: .* debiased conditional transport"),
        (Scaled(MMD(unbiased=True)), "divergence: .* unbiased estimate"),
        (functools.partial(energy_distance, unbiased=True), "divergence: .* unbiased estimate"),
        (SlicedWasserstein(seed=torch.Generator()), "divergence: .* draws from a generator"),
        ("energy", "divergence: expected one of bayesattn.divergences, .* got 'energy'"),
        (MMD, r"divergence: expected an object, such as MMD\(...\), got the class"),
    ],
)
def test_energies_that_are_none_are_refused(divergence, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        AlignmentFactor(divergence)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-0.1, r"not negative, got -0\.1"),
        (float("nan"), "not negative, got nan"),
        (float("inf"), "finite numbers .* got inf"),
        (True, "weight: expected finite numbers .* got True"),
        (torch.tensor([0.1, -0.1]), r"not negative, got tensor\(\[ 0\.1"),
        (torch.tensor(torch.nan), "not negative, got nan"),
        (torch.tensor(1), r"shape \(\) or \(head,\), got torch\.int64 of shape \(\)"),
        (torch.ones(2, 1), r"shape \(\) or \(head,\), got torch\.float32 of shape \(2, 1\)"),
        (nn.Parameter(torch.ones(())), "normalizer hangs on the weight .*weight_for_target"),
    ],
)
def test_weights_are_refused(weight, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        AlignmentFactor(Energy(), weight)


def test_one_weight_a_head_and_no_other_number(generator):
    data = make_data(generator, "bernoulli", num_sentences=5)
    model = aligned(Energy(), torch.ones(NUM_HEADS + 1), likelihood="bernoulli")
    with (
        torch.random.fork_rng(),
        pytest.raises(ValueError, match="weight: expected one a head, "),
    ):
        poutine.trace(model).get_trace(*data)


def with_weight(draw_weight):
    """A program that comes by the weight itself."""

    def program(tokens, mask, target):
        aligned(Energy(), draw_weight())(tokens, mask, target)

    return program


def test_weight_that_is_inferred_or_learned_is_refused(generator):
    """The ELBO would bring it to zero: it lacks the normalizer."""
    data = make_data(generator)
    latent = with_weight(lambda: pyro.sample("weight", dist.LogNormal(torch.zeros(()), 1.0)))
    density = LogDensity(latent, *data)
    with pytest.raises(ValueError, match="normalizer hangs on the weight"):
        density.value_and_score(torch.zeros(1, density.dim))
    parameter = with_weight(lambda: pyro.param("weight", torch.ones(())))
    with pytest.raises(ValueError, match="normalizer hangs on the weight"):
        SVI(parameter).run(*data, num_steps=2, **QUIET)


def test_weight_as_a_tensor_is_data_to_a_recorded_graph(generator):
    """Kills: a weight that a recording bakes in."""
    data, graphs = make_data(generator), GraphCache()
    settings = DensitySettings(graphs=graphs)

    def program(tokens, mask, target, weight):
        aligned(Energy(), weight)(tokens, mask, target)

    def value(model, *more):
        density = LogDensity(model, *data, *more, settings=settings)
        return density.value_and_score(particles)[0]

    density = LogDensity(make_model("self_attention"), *data)
    particles = torch.randn(2, density.dim, generator=generator)
    plain = density.value_and_score(particles)[0]
    slope = plain - value(program, torch.tensor(1.0))
    for weight in (0.0, 0.3, 2.0):
        expected = plain - weight * slope
        torch.testing.assert_close(value(program, torch.tensor(weight)), expected)
    assert graphs.num_recordings == 1
    torch.testing.assert_close(value(program, 0.3), plain - 0.3 * slope)
    assert graphs.num_recordings == 2
    held = torch.tensor(1.0)
    model = aligned(Energy(), held)
    for weight in (0.5, 3.0):
        held.fill_(weight)
        torch.testing.assert_close(value(model), plain - weight * slope)
    assert graphs.num_recordings == 3


def test_changes_of_a_frozen_critic_are_seen(generator):
    data, critic = make_data(generator), Critic()
    density = LogDensity(aligned(critic, 1.0), *data)
    particles = torch.randn(1, density.dim, generator=generator)
    before = density.value_and_score(particles)[0]
    with torch.no_grad():
        critic.features.weight.mul_(0.5)
    plain = LogDensity(aligned(critic, 1.0), *data, settings=DensitySettings(compile="none"))
    after = density.value_and_score(particles)[0]
    assert (after - before).abs() > 1e-3
    torch.testing.assert_close(after, plain.value_and_score(particles)[0])


def test_predictions_and_likelihoods_leave_it_out(generator):
    data = make_data(generator)
    model, plain = aligned(Energy(), 0.7), make_model("self_attention")
    posterior = SVGD(model, num_particles=3, compile="none").run(*data, num_steps=2, **QUIET)
    without = posterior.replace(model=plain)
    likelihood = posterior.log_likelihood()
    assert likelihood.keys() == {"target"}
    torch.testing.assert_close(likelihood, without.log_likelihood())
    both = posterior.log_likelihood(likelihood_sites=["alignment"])
    divergence = posterior.predict(sites=["divergence"])["divergence"]
    torch.testing.assert_close(both["alignment"], -0.7 * divergence.sum(-1))
    new = torch.randn(3, 4, DIM, generator=generator)
    predicted = posterior.predict(new, seed=0)
    assert predicted.pop("divergence").shape == (1, 3, 3, NUM_HEADS)
    torch.testing.assert_close(predicted, without.predict(new, seed=0))
    with torch.random.fork_rng():
        assert "alignment" not in poutine.trace(model).get_trace(new).nodes
        assert "alignment" in poutine.trace(model).get_trace(*data).nodes


def test_unlabeled_sentences_enter_as_others_do(generator):
    """Kills: a plate that the unlabeled share, a mask that is not theirs."""
    data, further = make_data(generator), make_data(generator, num_sentences=5)
    further = Data(further.tokens[:, :3], further.mask[:, :3], None)
    model = aligned(Energy(), 0.7)
    values = draw_values(model, data, generator)
    _, plain = run(make_model("self_attention"), data, values)
    sites, log_joint = run(model, (*data, *further[:2]), values)
    alone, _ = run(model, further._replace(target=data.target[:5]), values)
    assert sites["unlabeled_divergence"].shape == (5, NUM_HEADS)
    torch.testing.assert_close(sites["unlabeled_divergence"], alone["divergence"])
    total = sites["divergence"].sum() + sites["unlabeled_divergence"].sum()
    torch.testing.assert_close(log_joint, plain - 0.7 * total)


def test_unlabeled_sentences_alone_enter_predictions_of_none(generator):
    data, further = make_data(generator), make_data(generator, num_sentences=5)
    posterior = SVGD(aligned(Energy(), 0.7), num_particles=3, compile="none").run(
        *data, further.tokens, num_steps=2, **QUIET
    )
    assert "unlabeled_divergence" in posterior.predict()
    assert "unlabeled_divergence" not in posterior.predict(*data[:2])
    groups = posterior.to_arviz()
    named = groups["constant_data"]["unlabeled_tokens"].dims
    assert named == ("unlabeled", "unlabeled_token", "feature")
    assert groups["posterior"]["unlabeled_divergence"].dims == (
        "chain",
        "draw",
        "unlabeled",
        "head",
    )


def test_refuses_unlabeled_sentences_that_do_not_fit(generator, unchecked_types):
    data, model = make_data(generator), aligned(Energy(), 0.7)
    wide, tokens = torch.zeros(2, 3, DIM + 1), data.tokens
    with torch.random.fork_rng():
        with pytest.raises(ValueError, match="unlabeled_tokens enter alignment only"):
            make_model("self_attention")(*data, tokens)
        with pytest.raises(ValueError, match=r"unlabeled_tokens must be as wide .* 3, got 4"):
            model(*data, wide)
        with pytest.raises(ValueError, match=r"unlabeled_tokens must be floating .* \(5, 3\)"):
            model(*data, tokens[0])
        with pytest.raises(ValueError, match=r"unlabeled_mask must be boolean, .* = \(7, 5\)"):
            model(*data, tokens, data.mask[:5])


def test_padding_has_no_gradient_whatever_stands_there(generator):
    """Kills: a mask after the arithmetic, through which NaN comes back."""
    mask = make_data(generator).mask
    shape = (NUM_SENTENCES, NUM_HEADS, NUM_TOKENS, 2)
    query, key = torch.randn(2, *shape, generator=generator)
    query[~mask[:, None].expand(shape[:-1])] = torch.nan
    query, key = query.requires_grad_(), key.requires_grad_()
    factor = AlignmentFactor(Energy(), 0.7)
    with pyro.plate("sentence", NUM_SENTENCES):
        trace = poutine.trace(factor).get_trace(query, key, mask, mask)
    trace.log_prob_sum().backward()
    assert trace.nodes["divergence"]["value"].isfinite().all()
    for gradient in (query.grad, key.grad):
        is_word = mask[:, None, :, None].expand(shape)
        assert (gradient[~is_word] == 0).all()
        assert gradient.isfinite().all()
        # A single word has one query and one key, apart; equal words would pull no way.
        assert (gradient[1:].abs().sum((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("masked", [(True, False), (False, True)])
def test_one_side_alone_may_be_masked(masked, generator):
    query, key = torch.randn(2, 3, NUM_HEADS, 5, 2, generator=generator)
    mask = torch.arange(5) < torch.tensor([[0], [2], [5]])
    masks = [mask if is_masked else None for is_masked in masked]
    with pyro.plate("sentence", 3):
        given = AlignmentFactor(Energy()).note(query, key, *masks)
    assert (given[0] == 0).all()
    for sentence in (1, 2):
        own = mask[sentence]
        points = [
            points[sentence][:, own] if is_masked else points[sentence]
            for points, is_masked in zip((query, key), masked, strict=True)
        ]
        torch.testing.assert_close(given[sentence], energy_distance(*points))


def test_layers_have_a_plate_or_a_prefix(generator):
    clouds = torch.randn(2, 3, 5, NUM_HEADS, 7, 2, generator=generator)
    factor = AlignmentFactor(MMD(), 0.7)

    def program():
        with pyro.plate("layer", 3, dim=-2), pyro.plate("sentence", 5):
            factor(*clouds)
        with pyro.plate("sentence_below", 5):
            factor(*clouds[:, 0], prefix="below_")

    trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    sums = -0.7 * MMD()(*clouds).sum(-1)
    torch.testing.assert_close(trace.nodes["alignment"]["log_prob"], sums)
    torch.testing.assert_close(trace.nodes["below_alignment"]["log_prob"], sums[0])
    assert trace.nodes["below_divergence"]["value"].shape == (5, NUM_HEADS)


def test_mean_falls_with_the_weight_by_the_variance(generator):
    """Weighted draws are a law of which d/dλ E[D] = -Var(D) holds exactly.

    Kills: a factor of other divergences than those that are noted.
    """
    data, weight = make_data(generator, "bernoulli"), torch.zeros(())
    model = aligned(Energy(), weight, likelihood="bernoulli", num_heads=1)
    density = LogDensity(model, *data)
    rows = 0.5 * torch.randn(300, density.dim, generator=generator)
    draws = {name: value[None] for name, value in density.constrain(rows).items()}
    about = {"method": "weighted", "draws_are": "iid_guide", "model": model, "args": data}
    total = Posterior(draws, **about).predict(sites=["divergence"])["divergence"].sum((-2, -1))[0]

    def moments(value):
        weight.fill_(value)
        log_ratio = density.value_and_score(rows)[0] + 2 * rows.square().sum(-1)
        chances = log_ratio.softmax(0)
        mean = chances @ total
        return mean, chances @ (total - mean).square()

    means = []
    for value in (0.0, 0.3, 1.0):
        (ahead, _), (behind, _), (mean, variance) = map(
            moments, (value + 1e-4, value - 1e-4, value)
        )
        slope = (ahead - behind) / 2e-4
        assert slope.item() == pytest.approx(-variance.item(), rel=1e-5)
        means.append(mean)
    assert means[0] > means[1] > means[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::bayesattn.inference.ConvergenceWarning")
def test_weight_lowers_the_posterior_mean_of_the_divergence(generator):
    """By NUTS, beside importance sampling of the posterior without the factor."""
    tokens = torch.randn(11, 5, 2, generator=generator) + torch.tensor([1.5, 0.0])
    target = (tokens[..., 1].amax(1) > 1.0).to(tokens)
    found = []
    for weight in (0.0, 0.1):
        factor = AlignmentFactor(Energy(), weight)
        routine = NUTS(MultiHeadSelfAttention(1, 2, Bernoulli(), alignment=factor))
        posterior = routine.run(tokens, None, target, warmup_steps=60, num_samples=200, **QUIET)
        total = posterior.predict(sites=["divergence"])["divergence"].sum((-2, -1))
        found.append((total, effective_sample_size(total[..., None])[0]))
    (plain, plain_size), (aligned, aligned_size) = found
    error = (plain.var() / plain_size + aligned.var() / aligned_size).sqrt()
    assert aligned.mean() < plain.mean() - 4 * error
    ratios = (-0.1 * plain.flatten()).softmax(0)
    predicted = ratios @ plain.flatten()
    # The draws are worth as many as are independent, and these as their even weights.
    worth = plain_size / plain.numel() / ratios.square().sum()
    spread = (ratios @ (plain.flatten() - predicted).square() / worth).sqrt()
    assert (aligned.mean() - predicted).abs() < 4 * (error.square() + spread.square()).sqrt()
