"""Attention is the posterior of a mixture: one program for softmax, one for doubly normalized."""

import functools
import itertools

import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

import bayesattn as ba
from bayesattn.inference import DensitySettings, LogDensity
from bayesattn.models import KeysFromQueries, NormMixing, QueriesFromKeys, UniformMixing
from bayesattn.normalizations import DoublyNormalized, doubly_normalized
from tests.models.mixture_cases import (
    BATCH,
    HEADS,
    KEYS,
    MASKS,
    QUERIES,
    VARIANTS,
    hardest_masks,
    log_joint_by_enumeration,
    log_prior_of,
    make_masks,
    make_problem,
    pairs_of,
    start,
    step,
    trace_of,
)

close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
every_mask = pytest.mark.parametrize("kind", MASKS)


def logits(query, key, variance, *, query_norms=0.0, key_norms=0.0):
    """s_ij = q.k / variance, less shares of the squared norms over twice the variance."""
    product = torch.einsum("...id,...jd->...ij", query, key) / variance
    norms = query_norms * query.square().sum(-1)[..., :, None]
    return product - (norms + key_norms * key.square().sum(-1)[..., None, :]) / (2 * variance)


def enumerated(model, data, masks, state):
    """Posterior over assignments by trying each; zero where masks forbid it."""
    table = log_joint_by_enumeration(model, data, masks, state)
    seen = pairs_of(masks, table.shape)
    return torch.where(seen, table.softmax(model.component_axis), 0.0)


@every_mask
@pytest.mark.parametrize("variance", [None, 0.7])
def test_the_posterior_over_keys_is_softmax_attention(kind, variance, generator):
    """Mutants: shares without norms; a variance that is not the inverse scale."""
    data, masks = make_problem(generator), make_masks(kind, generator)
    model = QueriesFromKeys(variance=variance)
    expected = ba.attention_weights(*data[:2], scale=variance and 1 / variance, **masks)
    close(enumerated(model, data, masks, {}), expected)
    for ours in (model.responsibilities, model.weights):
        close(ours({}, *data, **masks), expected)
    trace = trace_of(model, data, masks, {})
    close(trace.nodes["weights"]["value"], expected)
    output = ba.attention(*data, scale=variance and 1 / variance, **masks)
    close(trace.nodes["output"]["value"], output)


@every_mask
def test_equal_shares_are_a_bias_of_the_keys(kind, generator):
    data, masks = make_problem(generator), make_masks(kind, generator)
    model = QueriesFromKeys(variance=0.7, mixing=UniformMixing())
    biased = functools.partial(logits, variance=0.7, key_norms=1.0)
    expected = ba.attention_weights(*data[:2], logits=biased, **masks)
    close(enumerated(model, data, masks, {}), expected)
    close(model.weights({}, *data, **masks), expected)


@every_mask
@pytest.mark.parametrize("mixing", [NormMixing(), UniformMixing()], ids=["norms", "equal"])
def test_responsibilities_of_queries_are_doubly_normalized_attention(kind, mixing, generator):
    """Columns by the program's posterior, rows by their sums; one M-step is the output."""
    data, masks = make_problem(generator), make_masks(kind, generator)
    query, key, value = data
    model = KeysFromQueries(mixing=mixing)
    state = model.initial_state(*data, **masks)
    assert torch.equal(state["center"], query)
    of_norms = 0.0 if isinstance(mixing, NormMixing) else 1.0
    ours = functools.partial(logits, variance=query.shape[-1] ** 0.5, query_norms=of_norms)
    choices = {"logits": ours, "normalization": DoublyNormalized(), **masks}
    expected = ba.attention_weights(query, key, **choices)

    shares = enumerated(model, data, masks, state)
    seen = pairs_of(masks, shares.shape)
    close(model.responsibilities(state, *data, **masks), shares)
    close(shares.sum(-2), seen.any(-2).double())
    close(shares / shares.sum(-1, keepdim=True).clamp_min(1e-300), expected)
    close(model.weights(state, *data, **masks), expected)
    close(doubly_normalized(ours(query, key), seen), expected)

    moved = step(model, state, data, masks)
    live = seen.any(-1)
    close(moved["center"][live], ba.attention(query, key, key, **choices)[live])
    assert torch.equal(moved["center"][~live], query[~live])
    trace = trace_of(model, data, masks, state)
    close(trace.nodes["weights"]["value"], expected)
    close(trace.nodes["output"]["value"], ba.attention(query, key, value, **choices))


@every_mask
def test_values_that_are_read_out_are_the_limit_of_a_wide_block(kind, generator):
    """The M-step of a value block of any width averages the values under its responsibilities."""
    data, masks = make_problem(generator), make_masks(kind, generator)
    model = KeysFromQueries(value_variance=1e14)
    state = model.initial_state(*data, **masks)
    seen = pairs_of(masks, (BATCH, HEADS, QUERIES, KEYS))
    moved = step(model, state, data, masks)
    expected = ba.attention(*data, normalization=DoublyNormalized(), **masks)
    close(moved["value_center"][seen.any(-1)], expected[seen.any(-1)])
    close(state["value_center"], expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_closed_forms_are_those_of_the_program(name, generator):
    """Responsibilities and evidence against trying every assignment."""
    model, data = VARIANTS[name], make_problem(generator)
    masks = hardest_masks(model, generator)
    state = start(model, data, masks, generator)
    close(model.responsibilities(state, *data, **masks), enumerated(model, data, masks, state))
    table = log_joint_by_enumeration(model, data, masks, state)
    seen = pairs_of(masks, table.shape).any(model.component_axis)
    evidence = table.logsumexp(model.component_axis)
    if model.component_axis == -2 or model.cue_scale is None:
        evidence = torch.where(seen, evidence, 0.0)
    total = model.log_density(state, *data, **masks)
    assert total.shape == (BATCH, HEADS)
    close(total.sum(), evidence.sum() + log_prior_of(model, data, masks, state))


@pytest.mark.parametrize(
    "name",
    [
        "KeysFromQueries, flat, by norms",
        "KeysFromQueries, priors, learned",
        "KeysFromQueries, values with priors, latent variance",
        "QueriesFromKeys, data, all latent",
        "QueriesFromKeys, cues, equal",
    ],
)
def test_routines_see_the_same_density(name, generator):
    model, data = VARIANTS[name], make_problem(generator)
    masks = hardest_masks(model, generator)
    state = start(model, data, masks, generator)
    density = LogDensity(model, *data, settings=DensitySettings(compile="none"), **masks)
    assert {site.name for site in density.sites} == state.keys()
    row = density.unconstrain({site: value[None] for site, value in state.items()})
    theirs = density.value_and_score(row)[0] - density.log_determinant(row)
    close(model.log_density(state, *data, **masks).sum()[None], theirs)


@pytest.mark.parametrize(
    "model", [KeysFromQueries(value_variance=0.5), QueriesFromKeys(mixing=UniformMixing())]
)
def test_evidence_is_the_sum_over_all_assignments(model, generator):
    """3 data of 2 components: eight runs of the program."""
    sizes = (2, 3) if isinstance(model, KeysFromQueries) else (3, 2)
    data = make_problem(generator, (), *sizes, dim=2, value_dim=5)
    state = model.initial_state(*data)
    runs = []
    for chosen in itertools.product(range(2), repeat=3):
        told = state | {"assignment": torch.tensor(chosen)}
        runs.append(trace_of(model, data, {}, told).log_prob_sum())
    close(model.log_density(state, *data), torch.stack(runs).logsumexp(0))


@pytest.mark.parametrize("program", [KeysFromQueries, QueriesFromKeys])
def test_pyro_itself_finds_these_posteriors(program, generator):
    """Its own enumeration, in parallel over plates; no code of this library but the program."""
    data, masks = make_problem(generator), make_masks("padding and pairs", generator)
    model = program(mixing=UniformMixing())
    state = model.initial_state(*data, **masks)
    told = poutine.condition(model, state)
    marginals = TraceEnum_ELBO(max_plate_nesting=3).compute_marginals(
        told, lambda *args, **kwargs: None, *data, **masks
    )
    posterior = marginals["assignment"].logits.softmax(-1)
    posterior = posterior if model.component_axis == -1 else posterior.mT
    seen = pairs_of(masks, posterior.shape)
    close(torch.where(seen, posterior, 0.0), model.responsibilities(state, *data, **masks))
