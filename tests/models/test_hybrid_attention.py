"""Hybrid attention is the mean of a program of two readings, and its share can be inferred."""

import functools
import itertools

import pytest
import torch

import bayesattn as ba
from bayesattn.inference import EM, DensitySettings, LogDensity
from bayesattn.models import HybridAttention
from bayesattn.normalizations import HybridNormalized
from tests.models.mixture_cases import (
    BATCH,
    HEADS,
    KEYS,
    MASKS,
    QUERIES,
    VALUE_DIM,
    make_masks,
    make_problem,
    pairs_of,
    step,
    trace_of,
)

close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
MODEL = HybridAttention(3.0, 1.5, value_variance=0.7)


def make_data(generator, lead=(BATCH, HEADS), queries=QUERIES, keys=KEYS):
    """Queries, keys, values and outputs."""
    data = make_problem(generator, lead, queries, keys)
    return *data, torch.randn(*lead, queries, VALUE_DIM, generator=generator)


def make_share(generator, lead=(BATCH, HEADS)):
    shape = (lead[-1], 1) if lead else ()
    return {"share": torch.rand(shape, generator=generator)}


def enumerated(data, masks, state):
    """Log density of each output, its reading and its assignment: "2 key *problem query"."""
    shape = data[0].shape[:-1]
    rows = []
    for reading, key in itertools.product(range(2), range(data[1].shape[-2])):
        told = {"reading": torch.full(shape, float(reading)), "assignment": torch.full(shape, key)}
        trace = trace_of(MODEL, data, masks, state | told)
        sites = (*told, "observed_output")
        rows.append(sum(trace.nodes[name]["log_prob"] for name in sites))
    return torch.stack(rows).unflatten(0, (2, -1))


@pytest.mark.parametrize("kind", MASKS)
def test_weights_are_those_of_the_layer(kind, generator):
    """Mutants: the two readings in the other order; padded queries that count."""
    data, masks = make_data(generator), make_masks(kind, generator)
    state = make_share(generator)
    layer = HybridNormalized(HEADS)
    layer.share_logit.data = state["share"][:, 0].logit()
    with torch.no_grad():
        expected = ba.attention_weights(*data[:2], normalization=layer, **masks)
        output = ba.attention(*data[:3], normalization=layer, **masks)
    close(MODEL.weights(state, *data, **masks), expected)
    trace = trace_of(MODEL, data, masks, state)
    close(trace.nodes["weights"]["value"], expected)
    close(trace.nodes["output"]["value"], output)
    seen = pairs_of(masks, expected.shape)
    bound = state["share"] / seen.sum(-1).amax(-1, keepdim=True)
    assert (expected.sum(-2) >= bound - 1e-12)[seen.any(-2)].all()


def test_the_mean_of_an_output_is_hybrid_attention(generator):
    """Over all readings and assignments, by their probabilities in the program."""
    data, state = make_data(generator), make_share(generator)
    shape, mean = data[0].shape[:-1], 0.0
    for reading, key in itertools.product(range(2), range(KEYS)):
        told = {"reading": torch.full(shape, float(reading)), "assignment": torch.full(shape, key)}
        nodes = trace_of(MODEL, data, {}, state | told).nodes
        probability = (nodes["reading"]["log_prob"] + nodes["assignment"]["log_prob"]).exp()
        mean = mean + probability[..., None] * nodes["observed_output"]["fn"].mean
    close(mean, trace_of(MODEL, data, {}, state).nodes["output"]["value"])


@pytest.mark.parametrize("lead", [(BATCH, HEADS), (HEADS,), ()], ids=["batch", "heads", "one"])
def test_closed_forms_are_those_of_the_program(lead, generator):
    data, state = make_data(generator, lead), make_share(generator, lead)
    masks = make_masks("padding and pairs", generator) if len(lead) == 2 else {}
    table = enumerated(data, masks, state)
    live = pairs_of(masks, (*data[0].shape[:-1], KEYS)).any(-1)
    ours = MODEL.e_step(state, *data, **masks)
    close(ours[live], table.logsumexp(1).softmax(0)[1][live])
    prior = trace_of(MODEL, data, masks, state).nodes["share"]["log_prob"]
    total = torch.where(live, table.flatten(0, 1).logsumexp(0), 0.0).sum() + prior.sum()
    value = MODEL.log_density(state, *data, **masks)
    assert value.shape == lead[-1:]
    close(value.sum(), total)
    density = LogDensity(MODEL, *data, settings=DensitySettings(compile="none"), **masks)
    row = density.unconstrain({"share": state["share"][None]})
    theirs = density.value_and_score(row)[0] - density.log_determinant(row)
    close(total[None], theirs)


def test_the_m_step_is_where_the_density_of_all_readings_has_no_slope(generator):
    data, masks = make_data(generator), make_masks("padding", generator)
    state = make_share(generator)
    table = enumerated(data, masks, state).logsumexp(1)
    moved = step(MODEL, state, data, masks)
    share = moved["share"].requires_grad_()
    again = enumerated(data, masks, {"share": share}).logsumexp(1)
    live = pairs_of(masks, (BATCH, HEADS, QUERIES, KEYS)).any(-1)
    expected = torch.where(live, table.softmax(0).detach() * again, 0.0).sum()
    prior = trace_of(MODEL, data, masks, {"share": share}).nodes["share"]["log_prob"].sum()
    (slope,) = torch.autograd.grad(expected + prior, share)
    close(slope, torch.zeros_like(slope), atol=1e-9)


def test_shares_are_found_by_em(generator):
    """From outputs of 300 queries a head, to five standard deviations of what they tell."""
    query, key, value = make_problem(generator, (HEADS,), 300, KEYS)
    query, key, value = 4 * query, 4 * key, 9 * value
    model = HybridAttention(1.0 + 1e-9, 1.0 + 1e-9)
    truth = torch.tensor([[0.1], [0.5], [0.8]])
    outputs = trace_of(model, (query, key, value), {}, {"share": truth}).nodes["observed_output"]
    data = (query, key, value, outputs["value"])
    posterior = EM(model, compile="none").run(*data, num_steps=200, seed=0, progress=False)
    curve = posterior.optimization["log_density"][0]
    assert (curve.diff() >= -1e-9).all()
    found = posterior.draws["share"][0, 0].clone().requires_grad_()
    value = model.log_density({"share": found}, *data).sum()
    (slope,) = torch.autograd.grad(value, found, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), found)
    deviation = (-curvature) ** -0.5
    assert ((found - truth).abs() < 5 * deviation).all()
    # It is told by the data: the start fails for a head whose share is not near a half.
    assert abs(0.5 - truth[0]) > 5 * deviation[0]


def test_errors(generator):
    data = make_data(generator)
    with pytest.raises(ValueError, match="softmax_concentration must be above one, got 1"):
        HybridAttention(softmax_concentration=1)
    with pytest.raises(ValueError, match="value_variance must be positive, got 0"):
        HybridAttention(value_variance=0)
    with pytest.raises(ValueError, match="outputs must be one for each query, as wide as values"):
        MODEL.weights(make_share(generator), *data[:3], data[3][..., :-1])
    with pytest.raises(ValueError, match="outputs must be given for closed forms"):
        MODEL.log_density(make_share(generator), *data[:3])
