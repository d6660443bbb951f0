"""What holds of every attention model: its density, and all that must not matter to it."""

import itertools
import math

import numpy as np
import pytest
import torch

from bayesattn.inference import DensitySettings, LogDensity
from tests import reference
from tests.models.cases import (
    ALIGNMENT,
    DIM,
    LIKELIHOODS,
    MODELS,
    NUM_CLASSES,
    NUM_HEADS,
    NUM_SENTENCES,
    NUM_TOKENS,
    Data,
    draw_values,
    make_data,
    make_model,
    run,
)

every_model = pytest.mark.parametrize("name", MODELS)
every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)

PRIOR_SCALES = {
    "pooling": {"query_weight": 1.0},
    "hidden": {"query_weight": 1.0, "hidden_weight": DIM**-0.5},
    "self_attention": dict.fromkeys(("query_weight", "key_weight", "value_weight"), DIM**-0.5),
}
PRIOR_SCALES["aligned"] = PRIOR_SCALES["self_attention"]
SITES = {name: {*scales, "readout_weight", "readout_bias"} for name, scales in PRIOR_SCALES.items()}
BY_HEAD = ("query_weight", "key_weight", "value_weight", "readout_weight")


def features_by_hand(name, data, values):
    """Features and attention weights of every head, by loops."""
    values = {site: value.numpy() for site, value in values.items()}
    tokens = data.tokens.double().numpy()
    mask = np.ones(tokens.shape[:2], bool) if data.mask is None else data.mask.numpy()
    if name in ("self_attention", "aligned"):
        weights = (values[f"{part}_weight"] for part in ("query", "key", "value"))
        return reference.self_attention_features(tokens, mask, *weights)
    hidden = values.get("hidden_weight")
    return reference.pooled_features(tokens, mask, values["query_weight"], hidden)


def outputs_by_hand(name, data, values):
    """Outputs of every sentence, by loops."""
    features, _ = features_by_hand(name, data, values)
    weight, bias = values["readout_weight"].numpy(), values["readout_bias"].numpy()
    return reference.read_out(features, weight, bias)


def divergences_by_hand(data, values):
    """Energy distance of queries and keys, of each sentence and head, by loops."""
    tokens = data.tokens.double().numpy()
    mask = np.ones(tokens.shape[:2], bool) if data.mask is None else data.mask.numpy()
    result = np.zeros((len(tokens), NUM_HEADS))
    for sentence, head in np.ndindex(*result.shape):
        words = tokens[sentence][mask[sentence]]
        if len(words):
            points = (words @ values[f"{part}_weight"][head].numpy() for part in ("query", "key"))
            even = [np.full(len(words), 1 / len(words))] * 2
            contrast = reference.pair_contrast(lambda x, y: np.linalg.norm(x - y), *points, *even)
            result[sentence, head] = -contrast
    return result


def log_joint_by_hand(name, likelihood, data, values):
    """Log prior and log likelihood, written out."""
    scales = PRIOR_SCALES[name] | dict.fromkeys(("readout_weight", "readout_bias"), 0.3)
    total = sum(
        reference.normal_log_density(values[site].numpy(), scale) for site, scale in scales.items()
    )
    noise = values["noise_scale"].item() if likelihood == "normal" else None
    if noise is not None:
        total += math.log(2) + reference.normal_log_density([noise], 0.7)
    outputs = outputs_by_hand(name, data, values)
    for output, target in zip(outputs, data.target.tolist(), strict=True):
        if likelihood == "categorical":
            total += output[target] - math.log(sum(math.exp(logit) for logit in output))
        elif likelihood == "bernoulli":
            total -= math.log1p(math.exp(-output[0] if target else output[0]))
        else:
            total += reference.normal_log_density([target - output[0]], noise)
    if name == "aligned":
        total -= ALIGNMENT * divergences_by_hand(data, values).sum()
    return total


def unrecorded(model, data):
    """A log density that runs the program at each call, cheap for few of them."""
    return LogDensity(model, *data, settings=DensitySettings(compile="none"))


@every_model
@pytest.mark.parametrize(
    ("likelihood", "padded"), [*((one, True) for one in LIKELIHOODS), ("categorical", False)]
)
def test_log_density_is_the_formula(name, likelihood, padded, generator):
    model = make_model(name, likelihood)
    data = make_data(generator, likelihood, padded=padded)
    density = LogDensity(model, *data)
    particles = torch.randn(3, density.dim, generator=generator)
    recorded, _ = density.value_and_score(particles)
    constrained, determinants = density.constrain(particles), density.log_determinant(particles)
    for row in range(3):
        values = {site: value[row] for site, value in constrained.items()}
        by_hand = log_joint_by_hand(name, likelihood, data, values)
        assert run(model, data, values)[1].item() == pytest.approx(by_hand, rel=1e-12)
        by_hand += determinants[row].item()
        assert recorded[row].item() == pytest.approx(by_hand, rel=1e-12)


@every_model
@every_likelihood
def test_plain_program_gives_attention_and_expectation(name, likelihood, generator):
    model, data = make_model(name, likelihood), make_data(generator, likelihood)
    values = draw_values(model, data, generator)
    sites, _ = run(model, data, values)
    _, weights = features_by_hand(name, data, values)
    torch.testing.assert_close(sites["attention"], torch.tensor(weights))
    outputs = torch.tensor(outputs_by_hand(name, data, values))
    expected = {
        "categorical": outputs.softmax(-1),
        "bernoulli": outputs[:, 0].sigmoid(),
        "normal": outputs[:, 0],
    }[likelihood]
    torch.testing.assert_close(sites["expected_target"], expected)


@every_model
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (7, 1, 3), (7, 5, 1)])
def test_sizes_of_one(name, shape, generator):
    model = make_model(name, "bernoulli", num_heads=1)
    data = Data(torch.randn(shape, generator=generator), None, torch.ones(shape[0]))
    density = unrecorded(model, data)
    particles = torch.randn(2, density.dim, generator=generator)
    value, score = density.value_and_score(particles)
    assert value.isfinite().all()
    assert score.isfinite().all()
    values = {site: value[0] for site, value in density.constrain(particles).items()}
    _, weights = features_by_hand(name, data, values)
    torch.testing.assert_close(run(model, data, values)[0]["attention"], torch.tensor(weights))


@every_model
def test_dtype_is_that_of_the_tokens(name, generator):
    model, data = make_model(name, "normal"), make_data(generator, "normal", dtype=torch.float32)
    density = LogDensity(model, *data)
    particles = torch.randn(3, density.dim, generator=generator)
    value, score = density.value_and_score(particles)
    assert {density.dtype, value.dtype, score.dtype} == {torch.float32}
    values = {site: value[0] for site, value in density.constrain(particles).items()}
    sites, _ = run(model, data, values)
    assert {value.dtype for value in sites.values()} == {torch.float32}
    by_hand = log_joint_by_hand(name, "normal", data, {k: v.double() for k, v in values.items()})
    by_hand += density.log_determinant(particles)[0].item()
    assert value[0].item() == pytest.approx(by_hand, rel=1e-5)


@every_model
def test_sentence_without_words_has_no_attention(name, generator):
    model, data = make_model(name), make_data(generator)
    values = draw_values(model, data, generator)
    sites, _ = run(model, data, values)
    assert not data.mask[0].any()
    assert (sites["attention"][0] == 0).all()
    torch.testing.assert_close(sites["expected_target"][0], values["readout_bias"].softmax(-1))


@every_model
def test_score_is_the_slope_of_the_formula(name, generator):
    model, data = make_model(name), make_data(generator)
    density = LogDensity(model, *data)
    place = torch.randn(1, density.dim, generator=generator)
    way = torch.randn(1, density.dim, generator=generator)
    _, score = density.value_and_score(place)
    ends = [density.constrain(place + step * way) for step in (1e-5, -1e-5)]
    ahead, behind = (
        log_joint_by_hand(name, "categorical", data, {s: v[0] for s, v in end.items()})
        for end in ends
    )
    assert (score * way).sum().item() == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)


@every_model
@every_likelihood
def test_padding_never_matters(name, likelihood, generator):
    model, data = make_model(name, likelihood), make_data(generator, likelihood)
    values = draw_values(model, data, generator)
    more = torch.zeros(NUM_SENTENCES, NUM_TOKENS + 6, DIM)
    more[:, :NUM_TOKENS] = data.tokens
    mask = torch.zeros(more.shape[:2], dtype=torch.bool)
    mask[:, :NUM_TOKENS] = data.mask
    junk = 100 * torch.randn(more.shape, generator=generator)
    other = Data(torch.where(mask[..., None], more, junk), mask, data.target)
    before, log_joint = run(model, data, values)
    after, log_joint_after = run(model, other, values)
    torch.testing.assert_close(log_joint_after, log_joint)
    torch.testing.assert_close(after["expected_target"], before["expected_target"])
    # Every axis of attention past sentence and head counts tokens.
    padded = torch.zeros_like(after["attention"])
    padded[(..., *(slice(NUM_TOKENS),) * (padded.ndim - 2))] = before["attention"]
    torch.testing.assert_close(after["attention"], padded)


@every_model
def test_order_of_the_heads_does_not_matter(name, generator):
    model, data = make_model(name, num_heads=5), make_data(generator)
    values = draw_values(model, data, generator)
    order = torch.tensor([3, 0, 4, 1, 2])
    turned = {site: value[order] if site in BY_HEAD else value for site, value in values.items()}
    before, log_joint = run(model, data, values)
    after, log_joint_after = run(model, data, turned)
    torch.testing.assert_close(log_joint_after, log_joint)
    torch.testing.assert_close(after["attention"], before["attention"][:, order])
    without_readout = turned | {"readout_weight": values["readout_weight"]}
    assert (run(model, data, without_readout)[1] - log_joint).abs() > 1e-6


@pytest.mark.parametrize(
    ("name", "site"),
    [(name, site) for name in MODELS for site in BY_HEAD if site in SITES[name]],
)
def test_a_head_has_its_own_attention(name, site, generator):
    model, data = make_model(name, num_heads=3), make_data(generator)
    values = draw_values(model, data, generator)
    moved = values[site].clone()
    moved[1] += 1.0
    (before, _), (after, _) = (run(model, data, values | new) for new in ({}, {site: moved}))
    assert torch.equal(after["attention"][:, [0, 2]], before["attention"][:, [0, 2]])
    changes = (after["attention"][:, 1] != before["attention"][:, 1]).any()
    assert changes == (site in ("query_weight", "key_weight"))
    assert not torch.equal(after["expected_target"], before["expected_target"])


@every_model
def test_minibatches_average_to_the_full_density(name, generator):
    data = make_data(generator, "normal", num_sentences=5)
    full = unrecorded(make_model(name, "normal"), data)
    part = LogDensity(make_model(name, "normal", batch_size=2), *data)
    particles = torch.randn(3, full.dim, generator=generator)
    pairs = [torch.tensor(pair) for pair in itertools.combinations(range(5), 2)]
    estimates = [part.value_and_score(particles, {"sentence": pair}) for pair in pairs]
    values, scores = (torch.stack(figures) for figures in zip(*estimates, strict=True))
    assert (values.std(0) > 0.01).all()
    torch.testing.assert_close((values.mean(0), scores.mean(0)), full.value_and_score(particles))


@every_model
def test_batches_no_larger_than_the_data(name, generator):
    data = make_data(generator)
    model = make_model(name, batch_size=NUM_SENTENCES + 4)
    density, full = (unrecorded(one, data) for one in (model, make_model(name)))
    assert density.program.subsamples == {}
    particles = torch.randn(2, density.dim, generator=generator)
    torch.testing.assert_close(density.value_and_score(particles), full.value_and_score(particles))


@every_model
@every_likelihood
def test_target_is_drawn_where_it_is_not_observed(name, likelihood, generator):
    model, data = make_model(name, likelihood), make_data(generator, likelihood)
    values = draw_values(model, data, generator)
    times = 300
    many = Data(data.tokens.repeat(times, 1, 1), data.mask.repeat(times, 1), None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sites, _ = run(model, many, values)
    target, expected = sites["target"], sites["expected_target"]
    assert target.shape == (times * NUM_SENTENCES,)
    if likelihood == "categorical":
        target = torch.nn.functional.one_hot(target, NUM_CLASSES).to(expected)
    variance = values["noise_scale"] ** 2 if likelihood == "normal" else expected * (1 - expected)
    error = (target - expected).unflatten(0, (times, -1)).mean(0).abs()
    # Of at most 91 means none should be five standard errors off.
    assert (error <= 5 * (variance / times).sqrt().max()).all()


@every_model
@every_likelihood
def test_dims_name_each_axis_of_each_site(name, likelihood, generator):
    model, data = make_model(name, likelihood), make_data(generator, likelihood)
    values = draw_values(model, data, generator)
    named = run(model, data, values)[0] | {"tokens": data.tokens, "mask": data.mask}
    assert SITES[name] <= named.keys()
    assert ("divergence" in named) == (name == "aligned")
    named.pop("alignment", None)
    sizes = {"sentence": NUM_SENTENCES, "token": NUM_TOKENS, "feature": DIM, "head": NUM_HEADS}
    for site in named.keys() - {"target"}:
        labels = model.dims[site]
        assert len(labels) == named[site].ndim
        for label, size in zip(labels, named[site].shape, strict=True):
            assert sizes.setdefault(label, size) == size
    # Neither Pyro nor ArviZ lets one name stand for an axis and a site.
    assert not sizes.keys() & named.keys()
    allowed = {"hidden", "query", "key", "component", "class", "output"}
    assert sizes.keys() <= allowed | {"sentence", "token", "feature", "head"}
