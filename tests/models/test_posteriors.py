"""Posteriors of every attention model by every routine: what ArviZ is given, and predictions."""

import pytest
import torch

from bayesattn.inference import NUTS, SVGD, SVI
from tests.models.cases import (
    DIM,
    LIKELIHOODS,
    MODELS,
    NUM_CLASSES,
    NUM_HEADS,
    NUM_SENTENCES,
    NUM_TOKENS,
    WIDTH,
    make_data,
    make_model,
)

AXES = {
    "pooling": {
        "query_weight": ["head", "feature"],
        "readout_weight": ["head", "feature", "class"],
        "attention": ["sentence", "head", "token"],
    },
    "hidden": {
        "query_weight": ["head", "hidden"],
        "hidden_weight": ["hidden", "feature"],
        "readout_weight": ["head", "feature", "class"],
        "attention": ["sentence", "head", "token"],
    },
    "self_attention": {
        "query_weight": ["head", "feature", "component"],
        "key_weight": ["head", "feature", "component"],
        "value_weight": ["head", "feature", "component"],
        "readout_weight": ["head", "component", "class"],
        "attention": ["sentence", "head", "query", "key"],
    },
}
AXES["aligned"] = AXES["self_attention"] | {"divergence": ["sentence", "head"]}
SIZES = {
    "head": NUM_HEADS,
    "feature": DIM,
    "hidden": WIDTH,
    "component": WIDTH,
    "class": NUM_CLASSES,
    "sentence": NUM_SENTENCES,
    **dict.fromkeys(("token", "query", "key"), NUM_TOKENS),
}

every_model = pytest.mark.parametrize("name", MODELS)
every_routine = pytest.mark.parametrize("routine", ["particles", "heads", "svi", "nuts"])


def short_run(routine, model, data):
    """A posterior after two steps, too few for a recording to pay."""
    length = {"seed": 0, "progress": False, "num_steps": 2}
    if routine == "particles":
        return SVGD(model, num_particles=3, compile="none").run(*data, num_runs=2, **length)
    if routine == "heads":
        return SVGD(model, particle_plate="head", compile="none").run(*data, num_runs=2, **length)
    if routine == "svi":
        return SVI(model, guide="normal").run(*data, num_samples=3, **length)
    length["warmup_steps"] = length.pop("num_steps")
    nuts = NUTS(model, max_tree_depth=1, compile="none")
    return nuts.run(*data, num_samples=3, num_chains=2, **length)


def axes_by_group(idata):
    """For each group, the names of the axes of its variables, and all labels that are none."""
    groups = [group.strip("/") for group in idata.groups() if group.strip("/")]
    return {group: {n: v.dims for n, v in idata[group].data_vars.items()} for group in groups}


@every_model
@every_routine
@pytest.mark.filterwarnings("ignore::bayesattn.inference.ConvergenceWarning")
def test_arviz_gets_a_name_for_every_axis(name, routine, generator):
    posterior = short_run(routine, make_model(name), make_data(generator))
    idata = posterior.to_arviz(posterior_predictive=True, prior_draws=2)
    groups = axes_by_group(idata)
    named = {"chain", "draw", "step", "coordinate", *SIZES}
    assert {axis for g in groups.values() for dims in g.values() for axis in dims} <= named
    axes = AXES[name] | {"readout_bias": ["class"], "expected_target": ["sentence", "class"]}
    in_plate = {"query_weight", "key_weight", "value_weight"}
    for site, labels in axes.items():
        group, lead = "posterior", ("chain", "draw")
        if routine == "heads" and site in in_plate:
            labels = labels[1:]
        elif routine == "heads":
            group, lead = "point_estimate", ("chain",)
        assert groups[group][site] == (*lead, *labels)
        assert groups["prior"][site] == ("chain", "draw", *axes[site])
        assert idata[group][site].shape[len(lead) :] == tuple(SIZES[label] for label in labels)
    assert groups["constant_data"] == {
        "tokens": ("sentence", "token", "feature"),
        "mask": ("sentence", "token"),
    }
    assert groups["observed_data"] == {"target": ("sentence",)}
    for group in ("log_likelihood", "posterior_predictive", "prior_predictive"):
        assert groups[group] == {"target": ("chain", "draw", "sentence")}


@every_model
@pytest.mark.parametrize("routine", ["particles", "heads"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_predictions_for_new_sentences(name, routine, likelihood, generator):
    model = make_model(name, likelihood, batch_size=2)
    posterior = short_run(routine, model, make_data(generator, likelihood))
    new = torch.randn(11, 17, DIM, generator=generator), torch.ones(11, 17, dtype=torch.bool)
    predicted = posterior.predict(*new, sites=["attention", "expected_target", "target"], seed=0)
    lead = (2, 1) if routine == "heads" else (2, 3)
    pair = (17,) if name in ("pooling", "hidden") else (17, 17)
    outcome = (NUM_CLASSES,) if likelihood == "categorical" else ()
    assert predicted["attention"].shape == (*lead, 11, NUM_HEADS, *pair)
    assert predicted["expected_target"].shape == (*lead, 11, *outcome)
    assert predicted["target"].shape == (*lead, 11)
    sums = predicted["attention"].sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@every_model
def test_minibatches_leave_nothing_out_of_the_posterior(name, generator):
    data = make_data(generator)
    posterior = short_run("particles", make_model(name, batch_size=2), data)
    whole = posterior.replace(model=make_model(name))
    figures, expected = posterior.log_likelihood()["target"], whole.log_likelihood()["target"]
    assert figures.shape == (2, 3, NUM_SENTENCES)
    torch.testing.assert_close(figures, expected)
    groups = axes_by_group(posterior.to_arviz())
    assert groups["constant_data"].keys() == {"tokens", "mask"}


@every_model
def test_nuts_refuses_minibatches(name, generator):
    with pytest.raises(ValueError, match=r"NUTS needs the full data.*\['sentence'\]"):
        short_run("nuts", make_model(name, batch_size=2), make_data(generator))


@every_model
def test_heads_are_matched_with_their_readout(name, generator):
    data = make_data(generator)
    posterior = short_run("particles", make_model(name), data)
    matched = posterior.match("head", blocks={"readout_weight": 0})
    turned = matched.sample_stats["head_permutation"] != torch.arange(NUM_HEADS)
    assert turned.any()
    before, after = (p.predict(sites=["expected_target"]) for p in (posterior, matched))
    torch.testing.assert_close(before, after)


def test_sites_outside_of_the_heads_are_shared_by_them(generator):
    posterior = short_run("heads", make_model("hidden", "normal"), make_data(generator, "normal"))
    assert posterior.draws.keys() == {"query_weight"}
    assert posterior.draws["query_weight"].shape == (2, NUM_HEADS, WIDTH)
    outside = {"hidden_weight", "readout_weight", "readout_bias", "noise_scale"}
    assert posterior.point_estimates.keys() == outside
