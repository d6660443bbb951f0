"""Tests of bayesattn.inference.comparison: its figures, their nulls, and what is left blank."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure

from bayesattn import calibration
from bayesattn.inference import NUTS, SVGD, compare
from bayesattn.inference.common_scale import effective_draws, nearly_independent
from bayesattn.inference.distances import Distances
from bayesattn.inference.iid_null import figure_null, moment_null, random_splits
from bayesattn.inference.posterior import Posterior

DIM = 3


def classifier(features, label=None):
    """Two sites, a deterministic one, and labels of two values."""
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([DIM]).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    logits = pyro.deterministic("logits", scale * features @ weight)
    with pyro.plate("row", len(features)):
        pyro.sample("label", dist.Bernoulli(logits=logits), obs=label)


@pytest.fixture
def data(generator):
    features = torch.randn(31, DIM, generator=generator)
    label = (torch.rand(31, generator=generator) < features[:, 0].sigmoid()).double()
    return features, label


def posterior(weight, scale, *, kind="iid_guide", line=True, **options):
    """Draws that are given as "draw entry", in one chain."""
    draws = {"weight": weight[None], "scale": scale[None]}
    place = torch.cat([weight, scale.log()[:, None]], 1)[None] if line else None
    return Posterior(draws, method="made", draws_are=kind, unconstrained=place, **options)


def exact_draws(count, generator, **options):
    """Correlated, of means and spreads far from zero and one."""
    noise = torch.randn(count, DIM + 1, generator=generator)
    mixed = noise @ torch.tensor(
        [[2.0, 1.0, 0.0, 0.0], [0.0, 0.5, 0.3, 0.0], [0.0, 0.0, 7.0, 0.2], [0.0, 0.0, 0.0, 0.4]]
    )
    return posterior(mixed[:, :DIM] + 5.0, mixed[:, DIM].exp(), **options)


def changed(given, *, shift=0.0, factor=1.0):
    """Move and narrow in units of each coordinate's spread."""
    place = given.unconstrained[0]
    mean, sd = place.mean(0), place.std(0)
    place = mean + factor * (place - mean) + shift * sd
    return posterior(place[:, :DIM], place[:, DIM].exp())


# Figures


def test_moments_are_those_of_plain_formulas(generator):
    reference, other = exact_draws(400, generator), exact_draws(57, generator)
    table = compare(reference, other=other).sites
    assert list(table.index) == [("other", "weight"), ("other", "scale")]
    true, found = (p["weight"][0].numpy() for p in (reference, other))
    sd = true.std(0, ddof=1)
    row = table.loc["other", "weight"]
    assert row["entries"] == DIM
    worst = np.abs((found.mean(0) - true.mean(0)) / sd).max()
    np.testing.assert_allclose(row["mean_error"], worst)
    ratio = found.std(0, ddof=1) / sd
    np.testing.assert_allclose(row["sd_ratio_low"], ratio.min())
    np.testing.assert_allclose(row["sd_ratio_high"], ratio.max())
    assert row["sd_ratio_low_95"] < 1 < row["sd_ratio_high_95"]


def pair_distances(x, y):
    return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))


def test_distances_are_those_of_plain_formulas(generator):
    reference, other = exact_draws(83, generator), exact_draws(19, generator)
    row = compare(reference, other=other).joint.loc["other"]
    x, y = (p.unconstrained[0].numpy() for p in (reference, other))
    x, y = (x - x.mean(0)) / x.std(0, ddof=1), (y - x.mean(0)) / x.std(0, ddof=1)
    within, between = [pair_distances(z, z) for z in (x, y)], pair_distances(y, x)
    pairs = [len(z) * (len(z) - 1) for z in (x, y)]
    energy = 2 * between.mean() - sum(d.sum() / n for d, n in zip(within, pairs, strict=True))
    np.testing.assert_allclose(row["energy"], energy, rtol=1e-9)
    # The median squared distance of the reference is the kernel's squared bandwidth.
    squared = within[0][np.triu_indices(len(x), 1)] ** 2
    median = np.sort(squared)[(len(squared) - 1) // 2]
    kernels = [1 / np.sqrt(1 + d**2 / median) for d in (*within, between)]
    means = [(k.sum() - len(k)) / n for k, n in zip(kernels, pairs, strict=False)]
    np.testing.assert_allclose(row["mmd2"], sum(means) - 2 * kernels[2].mean(), rtol=1e-9)
    assert (row["draws"], row["dims"], row["scale"]) == (19, DIM + 1, "unconstrained")


def test_distances_are_constrained_without_a_common_line(generator):
    reference, other = exact_draws(83, generator), exact_draws(19, generator)
    matched = other.replace(unconstrained=None)
    joint = compare(reference, on_line=other, matched=matched).joint
    assert list(joint["scale"])[1:] == ["unconstrained", "constrained"]
    chosen = compare(reference, sites=["scale"], other=other)
    assert (chosen.joint.loc["other", "dims"], chosen.joint.loc["other", "scale"]) == (
        1,
        "constrained",
    )
    assert list(chosen.sites.index) == [("other", "scale")]


def test_common_sites_count_and_others_are_noted(generator):
    reference = exact_draws(83, generator)
    other = Posterior(
        {"scale": reference["scale"], "extra": torch.ones(1, 83)},
        method="made",
        draws_are="particles",
    )
    result = compare(reference, other=other)
    assert list(result.sites.index) == [("other", "scale")]
    assert "other: sites ['weight', 'extra'] left out, which only one of the two has" in str(result)


# Nulls


def test_null_is_that_of_the_law_itself(generator):
    """Splits of 200 draws against fresh pairs of clouds, at a number of draws beyond the half."""
    num_reference, num_draws = 200, 150
    fresh = torch.randn(150, num_reference + num_draws, 2, generator=generator)
    figure = Distances(fresh[0, :num_reference], 20, 0)._distances
    splits = random_splits(num_reference, num_draws=num_draws, num_null=300, seed=0)
    assert splits.query.shape[1] < num_draws
    for name in ("sliced_w1", "energy", "mmd2"):
        function, power, _ = figure[name]
        true = function(fresh[:, :num_draws], fresh[:, num_draws:])
        null = figure_null(fresh[-1, :num_reference], splits, function, power)
        errors = true.std() / math.sqrt(len(true))
        assert abs(null.mean() - true.mean()) < 5 * errors, name
        np.testing.assert_allclose(null.quantile(0.95), true.quantile(0.95), rtol=0.35)


def test_moment_null_is_that_of_the_law_itself(generator):
    values = torch.randn(500, 3, generator=generator) * torch.tensor([1.0, 9.0, 0.1]) + 4
    splits = random_splits(500, num_draws=50, num_null=2000, seed=0)
    null = moment_null(values, splits)
    # The largest of three normal errors, and the smallest of three ratios.
    error = math.sqrt(1 / 50 + 1 / 500)
    np.testing.assert_allclose(null.mean.quantile(0.95), 2.39 * error, rtol=0.07)
    np.testing.assert_allclose(
        null.lowest_ratio.quantile(0.025), 1 - 2.39 * error / math.sqrt(2), rtol=0.07
    )
    assert (null.lowest_ratio <= null.highest_ratio).all()


def test_exact_draws_stay_below_the_null_and_wrong_ones_do_not(generator):
    reference = exact_draws(200, generator)
    cloud = reference.unconstrained[0]
    cloud = (cloud - cloud.mean(0)) / cloud.std(0)
    yardstick = Distances(cloud, 200, 0)
    below = {"sliced_w1": 0, "energy": 0, "mmd2": 0}
    trials = 50
    for _ in range(trials):
        draws = exact_draws(40, generator).unconstrained[0]
        place = reference.unconstrained[0]
        row = yardstick.figures((draws - place.mean(0)) / place.std(0))
        for name in below:
            below[name] += row[name] <= row[f"{name}_95"]
    # One reference serves all trials, so that its own error is common to them.
    assert all(40 <= count <= 50 for count in below.values()), below
    exact = exact_draws(60, generator)
    wrong = {"shifted": changed(exact, shift=1.0), "narrow": changed(exact, factor=0.4)}
    table = compare(reference, exact=exact, **wrong)
    for name in wrong:
        for figure in below:
            row = table.joint.loc[name]
            assert row[figure] > 1.5 * row[f"{figure}_95"], (name, figure)
    site = table.sites.loc["narrow", "weight"]
    assert site["sd_ratio_high"] < site["sd_ratio_low_95"]
    site = table.sites.loc["shifted", "weight"]
    assert site["mean_error"] > 2 * site["mean_error_95"]
    assert "*" in str(table)


def test_markov_chains_are_thinned_until_neighbors_are_independent(generator):
    noise = torch.randn(2, 600, 4, generator=generator)
    chain = torch.zeros(2, 600, 4)
    for step in range(600):
        chain[:, step] = 0.8 * chain[:, step - 1] + 0.6 * noise[:, step]
    markov = Posterior({"x": chain}, method="walk", draws_are="markov", unconstrained=chain)
    # (1 - .8) / (1 + .8) of 1200 draws.
    assert 80 < effective_draws(markov) < 220
    thin = nearly_independent(markov, 1000)
    # Neighbors were correlated by .8, and are by .05 and its error.
    assert 600 / 20 < thin.num_draws < 600 / 8
    neighbors = thin["x"][:, :-1] * thin["x"][:, 1:]
    assert neighbors.mean().abs() < 0.05 + 3 / math.sqrt(neighbors.numel())
    assert nearly_independent(markov.replace(draws_are="particles"), 1000).num_draws == 500
    other = Posterior({"x": noise[:1, :40]}, method="made", draws_are="iid_guide")
    result = compare(markov, other=other)
    assert result.joint.loc["reference", "draws"] == 2 * thin.num_draws
    assert f"independent ones, thinned to {2 * thin.num_draws} for distances" in str(result)


# Predictions


def fitted(data, generator, count=300, kind="iid_guide", **options):
    weight = 0.3 * torch.randn(count, DIM, generator=generator) + torch.tensor([1.0, 0.0, 0.0])
    scale = (0.2 * torch.randn(count, generator=generator)).exp()
    return posterior(weight, scale, kind=kind, model=classifier, args=data, **options)


def test_predictions_are_scored(data, generator):
    features, label = data
    train, test = (features[:20], label[:20]), (features[20:], label[20:])
    reference = fitted(train, generator, attrs={"seconds": 3.5, "gradient_evaluations": 1234})
    other = fitted(train, generator, count=60, kind="particles")
    result = compare(reference, other=other, held_out=test)
    assert result.held_out is not None
    row = result.held_out.loc["other", "label"]
    logits = other.predict(features[20:], sites=["logits"])["logits"][0]
    chance = logits.sigmoid().mean(0)
    density = torch.where(label[20:] > 0, chance, 1 - chance).log()
    np.testing.assert_allclose(row["log_score"], density.mean())
    np.testing.assert_allclose(row["log_score_se"], density.std() / math.sqrt(11))
    classes = torch.stack([1 - chance, chance], -1)
    right = calibration.accuracy(classes, label[20:].long())
    np.testing.assert_allclose(row["accuracy"], right)
    error = calibration.expected_calibration_error(classes, label[20:].long())
    np.testing.assert_allclose(row["calibration_error"], error)
    assert result.joint.loc["reference", "gradient_evaluations"] == 1234
    assert math.isnan(result.joint.loc["other", "seconds"])
    assert isinstance(result.plot_calibration(num_bins=4), Figure)


# Pareto's k is large for such draws, which were made up.
@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_leave_one_out_only_where_it_is_valid(data, generator):
    import arviz

    reference, few = fitted(data, generator), fitted(data, generator, 60, kind="particles")
    second = fitted(data, generator)
    table = compare(reference, few=few, second=second).elpd
    assert table is not None
    assert list(table["kind"]) == ["loo", "lppd", "loo"]
    loo = arviz.loo(reference.to_arviz(), reff=1.0)
    np.testing.assert_allclose(table.loc["reference", "elpd"], loo["elpd_loo"])
    np.testing.assert_allclose(table.loc["reference", "se"], loo["se"])
    values = few.log_likelihood()["label"][0]
    lppd = (values.logsumexp(0) - math.log(60)).sum()
    np.testing.assert_allclose(table.loc["few", ["elpd", "lppd"]].astype(float), [lppd, lppd])
    gap = abs(table.loc["reference", "elpd"] - table.loc["second", "elpd"])
    np.testing.assert_allclose(table["elpd_diff"].max(), gap)
    assert math.isnan(table.loc["few", "elpd_diff"])


def test_leave_one_out_that_fails_is_noted(data, generator):
    features, label = data
    label = torch.cat([1 - label[:1], label[1:]])
    features = torch.cat([30 * features[:1], features[1:]])
    reference = fitted((features, label), generator)
    result = compare(reference, few=fitted((), generator, 60, kind="particles"))
    assert result.elpd is not None
    bad = int(result.elpd.loc["reference", "pareto_k_above_0.7"])
    assert bad > 0
    assert f"above 0.7 at {bad} of 31 observations" in str(result)


def test_stein_discrepancy_where_the_program_is_known(data, generator):
    from bayesattn.inference import ksd

    reference, other = fitted(data, generator), fitted(data, generator, 60, kind="particles")
    joint = compare(reference, other=other, bare=other.replace(model=None)).joint
    scale = reference.unconstrained[0].std(0)
    found = ksd(other, scale=scale)
    np.testing.assert_allclose(joint.loc["other", "ksd"], found.ksd)
    np.testing.assert_allclose(joint.loc["other", "ksd_squared"], found.squared)
    assert math.isnan(joint.loc["bare", "ksd"])


def test_masked_observations_do_not_count(data, generator):
    features, label = data

    def masked(features, label=None, kept=None):
        with pyro.poutine.mask(mask=True if kept is None else kept):
            classifier(features, label)

    kept = torch.arange(31) < 12
    every = {
        name: fitted((), torch.Generator().manual_seed(seed)).replace(model=masked)
        for seed, name in enumerate(("reference", "other"))
    }
    some = compare(**every, held_out=(features, label, kept)).held_out
    by_name = {"features": features[:12], "label": label[:12]}
    few = compare(**every, held_out=by_name).held_out
    assert some is not None
    assert few is not None
    np.testing.assert_allclose(some, few)


# What cannot be had


def test_what_is_missing_is_blank(generator):
    reference = exact_draws(60, generator)
    one = reference.thin(1).replace(draws_are="point")
    result = compare(reference, one=one)
    row = result.joint.loc["one"]
    assert np.isfinite(row["sliced_w1"])
    assert np.isfinite(row["sliced_w1_95"])
    blank = ["energy", "energy_null", "mmd2_95", "ksd", "seconds", "gradient_evaluations"]
    assert row[blank].isna().all()
    assert math.isnan(result.sites.loc["one", "weight"]["sd_ratio_low"])
    assert result.elpd is None
    assert result.held_out is None
    for text in (str(result), result._repr_html_()):
        assert "nan" not in text.lower()


def test_constant_entries_are_left_out(generator):
    reference = exact_draws(60, generator, line=False)
    reference["weight"][..., 1] = 3.0
    result = compare(reference, other=exact_draws(40, generator, line=False))
    assert result.sites.loc["other", "weight"]["entries"] == DIM - 1
    assert result.joint.loc["other", "dims"] == DIM
    assert "other: 1 entries that do not vary in the reference left out" in str(result)


def test_heads_are_compared_by_what_they_predict(generator):
    def network(features, label=None):
        with pyro.plate("head", 3):
            query = pyro.sample("query_weight", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        mean = pyro.deterministic("mean", (features @ query.mT).tanh().sum(-1))
        with pyro.plate("row", len(features)):
            pyro.sample("label", dist.Normal(mean, 1.0), obs=label)

    features, label = (torch.randn(7, *rest, generator=generator) for rest in ((2,), ()))
    query = torch.randn(2, 30, 3, 2, generator=generator)
    common = {"method": "made", "model": network, "args": (features, label)}
    reference = Posterior({"query_weight": query}, draws_are="iid_guide", **common)
    axes = {"particle_plate": "head", "particle_plate_axes": {"query_weight": 0}}
    heads = Posterior({"query_weight": query[:, 0]}, draws_are="heads", attrs=axes, **common)
    result = compare(reference, heads=heads, held_out=(features, label))
    assert list(result.sites.index) == [("heads", "mean")]
    mean = reference.predict(sites=["mean"])["mean"].flatten(0, 1)
    restarts = heads.predict(sites=["mean"])["mean"].flatten(0, 1)
    worst = ((restarts.mean(0) - mean.mean(0)) / mean.std(0)).abs().max()
    np.testing.assert_allclose(result.sites.loc["heads", "mean"]["mean_error"], worst)
    assert math.isnan(result.joint.loc["heads", "energy"])
    assert result.held_out is not None
    assert np.isfinite(result.held_out.loc["heads", "label"]["log_score"])
    assert "heads: draws are the heads of one network" in str(result)
    assert isinstance(result.plot_forest(), Figure)


def test_pictures_show_all_that_have_the_site(generator):
    reference, other = exact_draws(60, generator), exact_draws(40, generator)
    lone = Posterior({"scale": other["scale"]}, method="made", draws_are="particles")
    result = compare(reference, other=other, lone=lone)

    def legend(figure):
        return [text.get_text() for text in figure.legends[0].get_texts()]

    assert legend(result.plot_marginals()) == ["reference", "other", "lone"]
    assert legend(result.plot_forest("weight")) == ["reference", "other"]
    with pytest.raises(ValueError, match="site must be one of"):
        result.plot_marginals("wait")
    with pytest.raises(ValueError, match="calibration needs held_out= data"):
        result.plot_calibration()


# Errors


def refused(message, *args, **kwargs):
    with pytest.raises(ValueError, match=message):
        compare(*args, **kwargs)


def test_refuses(generator, data, unchecked_types):
    reference, other = exact_draws(60, generator), exact_draws(40, generator)
    refused("needs at least one other posterior, by name, got none", reference)
    refused("seed is an option of compare, so no posterior can bear", reference, seed=other)
    refused("other is the reference itself", reference, other=reference)
    refused("other must be a Posterior, got int", reference, other=3)
    refused(r"num_null must be at least 20, got 1", reference, other=other, num_null=1)
    refused("sites must be a list of at least one name, got 'x'", reference, other=other, sites="x")
    refused("reference must have at least 4 draws of all sites, got 3", other.thin(3), x=other)
    alien = Posterior({"bias": torch.zeros(1, 5)}, method="made", draws_are="particles")
    refused(
        r"alien must share a site .* \['weight', 'scale'\]; got \['bias'\]", reference, alien=alien
    )
    short = Posterior({"weight": torch.zeros(1, 5, 2)}, method="made", draws_are="particles")
    refused(
        r"'weight' of short must have shape \(3,\) as in the reference, got \(2,\)",
        reference,
        short=short,
    )
    refused(
        r"sites \['wait'\] cannot be had of reference: .*no model",
        reference,
        other=other,
        sites=["wait"],
    )
    refused("held_out must be a tuple", reference, other=other, held_out=torch.ones(3))
    refused(
        "held_out must be arguments of the program with observations: reference: .*no model",
        reference,
        other=other,
        held_out=data,
    )
    broken = exact_draws(60, generator)
    broken["weight"][0, 3, 1] = math.nan
    refused("reference must be finite, got values of 'weight' that are not", broken, other=other)


# Recovery


@pytest.mark.slow
# The chain is short.
@pytest.mark.filterwarnings("ignore:NUTS")
def test_svgd_beside_nuts(data):
    nuts = NUTS(classifier).run(
        *data, warmup_steps=100, num_samples=300, seed=0, progress=False, num_chains=1
    )
    many, few = (
        SVGD(classifier, num_particles=40).run(*data, num_steps=steps, seed=0, progress=False)
        for steps in (300, 1)
    )
    result = compare(nuts, many=many, few=few)
    assert result.joint.loc["few", "energy"] > 3 * result.joint.loc["few", "energy_95"]
    assert result.joint.loc["many", "energy"] < 2 * result.joint.loc["many", "energy_95"]
    assert result.sites.loc["many", "weight"]["mean_error"] < 0.4
    assert result.elpd is not None
    assert list(result.elpd["kind"]) == ["loo", "lppd", "lppd"]
