"""Tests of bayesattn.inference.posterior: what it holds, its ArviZ object, its summary."""

import json

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Dirichlet, Normal

from bayesattn.inference.posterior import Posterior

IS_INFERENCE_DATA = int(arviz.__version__.split(".")[0]) < 1


def network(tokens, mask, label=None, *, num_heads=3):
    """Two sites with a plate each, one without, and a deterministic one."""
    dim = tokens.shape[-1]
    with pyro.plate("head", num_heads):
        query = pyro.sample("query_weight", dist.Normal(0.0, 1.0).expand([dim]).to_event(1))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(num_heads)))
    logits = torch.einsum("std,hd->sht", tokens, query)
    weights = logits.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    pyro.deterministic("attention", weights)
    mean = torch.einsum("sht,std,h->sd", weights, tokens, share)
    with pyro.plate("sentence", len(tokens)):
        pyro.sample("label", dist.Normal(mean, 1.0).to_event(1), obs=label)


@pytest.fixture
def data(generator):
    tokens = torch.randn(7, 5, 2, generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 5, 4, 2, 5])[:, None]
    return tokens, mask, torch.randn(7, 2, generator=generator)


@pytest.fixture
def draws(generator):
    query = torch.randn(2, 11, 3, 2, generator=generator)
    return {"query_weight": query, "share": torch.rand(2, 11, 3, generator=generator).softmax(-1)}


@pytest.fixture
def fitted(draws, data):
    return Posterior(
        draws,
        method="SVGD",
        draws_are="particles",
        model=network,
        args=data,
        unconstrained=torch.zeros(2, 11, 8),
        sample_stats={"lp": torch.zeros(2, 11), "stein_norm": torch.ones(2, 11)},
        optimization={"ksd": torch.ones(2, 13), "evaluation": torch.ones(2, 4)},
        attrs={"seed": 17, "settings": {"kernel": "IMQ"}},
    )


DIMS = {"attention": ["sentence", "head", "token"], "label": ["feature"], "share": ["head"]}


def test_holds_what_it_is_given(fitted, draws):
    assert (fitted.num_chains, fitted.num_draws) == (2, 11)
    assert fitted["share"] is not None
    assert repr(fitted) == (
        "Posterior(SVGD, 2 x 11 (chain x draw) particles: query_weight(3, 2), share(3,))"
    )
    assert fitted.get_samples()["query_weight"].shape == (22, 3, 2)
    assert torch.equal(fitted.get_samples()["share"][11], draws["share"][1, 0])
    assert torch.equal(fitted.get_samples(group_by_chain=True)["share"], draws["share"])
    torch.testing.assert_close(fitted.mean()["share"], draws["share"].flatten(0, 1).mean(0))
    torch.testing.assert_close(fitted.std()["share"], draws["share"].flatten(0, 1).std(0))
    with pytest.raises(KeyError, match="no draws of site 'shares'; sites:"):
        fitted["shares"]


def test_is_detached(draws):
    leaf = draws["share"].clone().requires_grad_()
    posterior = Posterior({"share": leaf * 2}, method="SVGD", draws_are="particles")
    assert not posterior["share"].requires_grad


def test_thinning_takes_all_along(fitted):
    thin = fitted.thin(3)
    assert (thin.num_chains, thin.num_draws) == (2, 3)
    assert torch.equal(thin["share"], fitted["share"][:, [0, 5, 10]])
    assert thin.sample_stats["lp"].shape == (2, 3)
    assert thin.unconstrained.shape == (2, 3, 8)
    assert thin.optimization["ksd"].shape == (2, 13)
    assert fitted.to("cpu").attrs == fitted.attrs


def groups_of(data):
    return (
        {name.strip("/") for name in data.groups} - {""}
        if not IS_INFERENCE_DATA
        else set(data.groups())
    )


def test_arviz_object_has_named_axes_and_all_groups(fitted):
    data = fitted.to_arviz(dims=DIMS, posterior_predictive=True, prior_draws=6, seed=0)
    assert groups_of(data) == {
        "posterior",
        "unconstrained_posterior",
        "sample_stats",
        "optimization",
        "log_likelihood",
        "log_prior",
        "posterior_predictive",
        "prior",
        "prior_predictive",
        "observed_data",
        "constant_data",
    }
    sample = ("chain", "draw")
    expected = {
        "posterior": {
            "query_weight": (*sample, "head", "query_weight_axis_1"),
            "share": (*sample, "head"),
            "attention": (*sample, "sentence", "head", "token"),
        },
        "sample_stats": {"lp": sample, "stein_norm": sample},
        "optimization": {"ksd": ("chain", "step"), "evaluation": ("chain", "evaluation_step")},
        "log_likelihood": {"label": (*sample, "sentence")},
        "log_prior": {"query_weight": (*sample, "head"), "share": sample},
        "posterior_predictive": {"label": (*sample, "sentence", "feature")},
        "prior_predictive": {"label": (*sample, "sentence", "feature")},
        "observed_data": {"label": ("sentence", "feature")},
        "constant_data": {
            "tokens": ("tokens_axis_0", "tokens_axis_1", "tokens_axis_2"),
            "mask": ("mask_axis_0", "mask_axis_1"),
        },
    }
    for group, variables in expected.items():
        assert {name: v.dims for name, v in data[group].data_vars.items()} == variables, group
    for group in groups_of(data):
        assert set(data[group].dims) == set(data[group].coords)
    assert data["prior"].sizes["draw"] == 6


def test_arviz_object_has_the_values(fitted, draws, data):
    tokens, mask, label = data
    tree = fitted.to_arviz(dims=DIMS, prior_draws=400, seed=0)
    np.testing.assert_array_equal(tree["posterior"]["share"], draws["share"])
    logits = torch.einsum("std,cnhd->cnsht", tokens, draws["query_weight"])
    weights = logits.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    np.testing.assert_allclose(tree["posterior"]["attention"], weights, rtol=1e-10)
    mean = torch.einsum("cnsht,std,cnh->cnsd", weights, tokens, draws["share"])
    by_hand = Normal(mean, 1.0).log_prob(label).sum(-1)
    np.testing.assert_allclose(tree["log_likelihood"]["label"], by_hand, rtol=1e-10)
    prior = Normal(0.0, 1.0).log_prob(draws["query_weight"]).sum(-1)
    np.testing.assert_allclose(tree["log_prior"]["query_weight"], prior, rtol=1e-10)
    prior = Dirichlet(torch.ones(3)).log_prob(draws["share"])
    np.testing.assert_allclose(tree["log_prior"]["share"], prior, rtol=1e-10)
    np.testing.assert_array_equal(tree["constant_data"]["mask"], mask)
    np.testing.assert_array_equal(tree["observed_data"]["label"], label)
    np.testing.assert_allclose(tree["prior"]["query_weight"].std(), 1, atol=0.05)
    np.testing.assert_allclose(tree["prior"]["share"].sum("head"), 1, rtol=1e-10)


def test_attributes_say_what_draws_are(fitted):
    attrs = fitted.to_arviz()["posterior"].attrs
    assert attrs["method"] == "SVGD"
    assert attrs["draws_are"] == "particles"
    assert attrs["inference_library"] == "bayesattn"
    assert attrs["seed"] == 17
    assert json.loads(attrs["settings"]) == {"kernel": "IMQ"}


def test_coordinates_are_labels(fitted):
    data = fitted.to_arviz(dims=DIMS, coords={"head": ["a", "b", "c"], "token": list("vwxyz")})
    assert data["posterior"].coords["head"].values.tolist() == ["a", "b", "c"]
    assert data["posterior"].coords["token"].values.tolist() == list("vwxyz")
    with pytest.raises(ValueError, match="2 labels for axis 'head', which has 3 entries"):
        fitted.to_arviz(coords={"head": ["a", "b"]})


class Labelled:
    """A program that names its own axes."""

    def __init__(self):
        self.dims = {"attention": ["sentence", "head", "token"], "query_weight": ["feature"]}
        self.coords = {"head": ["a", "b", "c"]}

    def __call__(self, tokens, mask, label=None):
        network(tokens, mask, label)


def test_a_program_can_name_its_axes(fitted):
    data = fitted.replace(model=Labelled()).to_arviz(dims={"attention": ["word"]})
    assert data["posterior"]["query_weight"].dims[2:] == ("head", "feature")
    assert data["posterior"]["attention"].dims[2:] == ("sentence", "head", "word")
    assert data["posterior"].coords["head"].values.tolist() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"attention": ["sentence", "head", "sentence"]}, "two axes of the name"),
        ({"attention": ["a", "b", "c", "d"]}, r"'attention' has 3 axes .* but the names"),
        ({"attention": ["token", "head", "sentence"]}, "'token' has 7 entries|'sentence' has"),
        ({"share": ["share"]}, "'share' in posterior bears the name of an axis"),
        ({"atention": ["sentence"]}, r"names axes of \['atention'\], but there are only"),
    ],
)
def test_names_of_axes_that_do_not_fit_are_refused(fitted, dims, message):
    with pytest.raises(ValueError, match=message):
        fitted.to_arviz(dims=dims)


def test_only_the_chosen_sites(fitted):
    data = fitted.to_arviz(sites=["share"], log_likelihood=False)
    assert list(data["posterior"].data_vars) == ["share"]
    assert "log_likelihood" not in groups_of(data)
    data = fitted.to_arviz(deterministic=False)
    assert list(data["posterior"].data_vars) == ["query_weight", "share"]
    with pytest.raises(ValueError, match=r"no sites \['shore'\] to export"):
        fitted.to_arviz(sites=["shore"])


def test_without_a_model_what_is_known_is_given(fitted):
    bare = fitted.replace(model=None, args=())
    assert groups_of(bare.to_arviz()) == {
        "posterior",
        "unconstrained_posterior",
        "sample_stats",
        "optimization",
    }
    for wanted in ({"log_likelihood": True}, {"deterministic": True}, {"prior_draws": 3}):
        with pytest.raises(ValueError, match="has no model"):
            bare.to_arviz(**wanted)


def test_a_likelihood_that_cannot_be_had_is_left_out_aloud(generator):
    def model(y):
        sign = pyro.sample("sign", dist.Bernoulli(0.5))
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal((2 * sign - 1) * loc, 1.0), obs=y)

    y = torch.randn(4, generator=generator)
    posterior = Posterior(
        {"loc": torch.ones(1, 5)}, method="SVI", draws_are="iid_guide", model=model, args=(y,)
    )
    with pytest.warns(RuntimeWarning, match="log likelihood left out: .*no pointwise"):
        assert "log_likelihood" not in groups_of(posterior.to_arviz())
    with pytest.raises(ValueError, match="no pointwise"):
        posterior.to_arviz(log_likelihood=True)


def heads_posterior(data, generator, **fields):
    return Posterior(
        {"query_weight": torch.randn(4, 3, 2, generator=generator)},
        method="SVGD",
        draws_are="heads",
        model=network,
        args=data,
        sample_stats={"lp": torch.zeros(4, 3)},
        point_estimates={"share": torch.rand(4, 3, generator=generator).softmax(-1)},
        attrs={"particle_plate": "head", "particle_plate_axes": {"query_weight": 0}},
        **fields,
    )


@pytest.mark.parametrize("site_dims", [{}, {"query_weight": ("feature",)}])
def test_heads_are_draws_and_networks_point_estimates(data, generator, site_dims):
    posterior = heads_posterior(data, generator, site_dims=site_dims)
    dims = {**DIMS, "query_weight": ["head", "feature"]}
    tree = posterior.to_arviz(dims=dims, prior_draws=5)
    assert tree["posterior"]["query_weight"].dims == ("chain", "draw", "feature")
    assert tree["point_estimate"]["share"].dims == ("chain", "head")
    assert tree["point_estimate"]["attention"].dims == ("chain", "sentence", "head", "token")
    assert tree["log_likelihood"]["label"].sizes == {"chain": 4, "draw": 1, "sentence": 7}
    assert tree["prior"]["query_weight"].dims == ("chain", "draw", "head", "feature")
    assert tree["prior"]["query_weight"].sizes["head"] == 3


@pytest.mark.skipif(not IS_INFERENCE_DATA, reason="ArviZ 1 has no from_pyro")
def test_agrees_with_from_pyro(data):
    """On a plain model, ArviZ's own conversion of a Pyro sampler is an oracle."""

    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(x * slope, scale), obs=y)

    x, y = data[0][:, 0, 0], data[2][:, 0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pyro.clear_param_store()
        mcmc = pyro.infer.MCMC(
            pyro.infer.NUTS(model), num_samples=20, warmup_steps=20, disable_progbar=True
        )
        mcmc.run(x, y)
        theirs = arviz.from_pyro(mcmc, dims={"y": ["row"]})
    samples = mcmc.get_samples(group_by_chain=True)
    ours = Posterior(
        samples, method="NUTS", draws_are="markov", model=model, args=(x, y)
    ).to_arviz()
    for group in ("posterior", "log_likelihood", "observed_data"):
        assert set(ours[group].data_vars) == set(theirs[group].data_vars)
        for name, variable in theirs[group].data_vars.items():
            np.testing.assert_allclose(ours[group][name], variable, rtol=1e-6, err_msg=name)
    assert ours["log_likelihood"]["y"].dims == theirs["log_likelihood"]["y"].dims


def test_leave_one_out_of_a_conjugate_normal(generator):
    """With exact draws, ArviZ's estimate from our log likelihood is near the closed form."""
    y = torch.randn(20, generator=generator)

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    variance = 1 / (1 + len(y))
    draws = variance * y.sum() + variance**0.5 * torch.randn(1, 4000, generator=generator)
    data = Posterior(
        {"loc": draws}, method="exact", draws_are="iid_guide", model=model, args=(y,)
    ).to_arviz()
    loo = arviz.loo(data, reff=1.0)
    others = (y.sum() - y) / len(y)
    exact = Normal(others, (1 + 1 / len(y)) ** 0.5).log_prob(y).sum()
    assert float(loo.elpd_loo if IS_INFERENCE_DATA else loo.elpd) == pytest.approx(
        float(exact), abs=0.1
    )


def test_summary_of_particles_has_no_effective_sample_size(fitted):
    table = fitted.summary()
    assert not [c for c in table.columns if "ess" in c or "mcse" in c]
    assert "r_hat" in table
    assert len(table) == 3 * 2 + 3
    np.testing.assert_allclose(table.loc["share[0]", "mean"], fitted["share"][..., 0].mean())
    assert "attention" in fitted.summary(sites=["attention"]).index[0]
    assert (
        "r_hat"
        not in fitted.replace(
            **{
                name: {k: v[:1] for k, v in getattr(fitted, name).items()}
                for name in ("draws", "sample_stats", "optimization")
            },
            unconstrained=None,
        ).summary()
    )


def test_summary_of_markov_chains_is_whole(fitted):
    table = fitted.replace(draws_are="markov").summary()
    assert {"ess_bulk", "ess_tail", "r_hat", "mcse_mean"} <= set(table.columns)


def test_summary_of_a_guide_has_the_tail_of_its_weights(generator):
    x = torch.randn(1, 4000, generator=generator)
    narrow, target = Normal(0.0, 0.5), Normal(0.0, 1.0)

    def summary(guide):
        draws = guide.mean + guide.stddev * x
        stats = {"lp": target.log_prob(draws), "log_q": guide.log_prob(draws)}
        return Posterior(
            {"loc": draws}, method="SVI", draws_are="iid_guide", sample_stats=stats
        ).summary()["pareto_k"]["loc"]

    # Weights exp(1.5 z^2) of a standard normal z have the tail index 3 / 4.
    assert summary(target) == 0
    assert abs(summary(narrow) - 0.75) < 0.2


def test_summary_beside_a_reference(fitted):
    wide = fitted.replace(draws={**fitted.draws, "query_weight": 4 * fitted["query_weight"]})
    ratio = fitted.summary(reference=wide)["sd_ratio"]
    np.testing.assert_allclose(ratio.filter(like="query_weight"), 0.25, rtol=1e-10)
    np.testing.assert_allclose(ratio.filter(like="share"), 1, rtol=1e-10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draws": {}}, "needs draws of at least one site, got none"),
        ({"draws": {"a": torch.zeros(2)}}, r"must be \(chain, draw, \*shape\)"),
        (
            {"draws": {"a": torch.zeros(2, 3), "b": torch.zeros(2, 5)}},
            r"'a' starts with \(2, 3\), but 'b' has shape \(2, 5\)",
        ),
        ({"draws": {"a": torch.zeros(2, 0)}}, r"at least one draw, got .* \(2, 0\)"),
        ({"draws_are": "samples"}, "draws_are must be one of .* got 'samples'"),
        ({"sample_stats": {"lp": torch.zeros(3, 2)}}, r"'lp' must start with .* \(2, 3\)"),
        ({"unconstrained": torch.zeros(6, 2)}, "'unconstrained' must start with"),
        (
            {"optimization": {"elbo": torch.zeros(7, 3)}},
            "'elbo' must start with an axis of 2 chains",
        ),
        ({"point_estimates": {"w": torch.zeros(())}}, "'w' must start with an axis of 2 chains"),
        ({"draws_are": "heads"}, r"must say each site's axis; it has \[\] for the sites \['a'\]"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    given = {"draws": {"a": torch.zeros(2, 3)}, "method": "SVGD", "draws_are": "particles"}
    with pytest.raises(ValueError, match=message):
        Posterior(**{**given, **fields})


def test_a_reference_must_have_the_same_sites(fitted):
    lacking = fitted.replace(draws={"share": fitted["share"]})
    other = fitted.replace(draws={**fitted.draws, "share": fitted["share"][..., None]})
    for reference, name in ((lacking, "query_weight"), (other, "share")):
        with pytest.raises(ValueError, match=rf"reference must have the same sites.*'{name}'"):
            fitted.summary(reference=reference)
    lacking.summary(reference=fitted)


def test_labels_of_unknown_axes_are_refused(fitted):
    with pytest.raises(ValueError, match=r"coords labels the axes \['grp'\], but .*'chain'"):
        fitted.to_arviz(coords={"grp": ["a"]})


def test_sites_are_not_a_text(fitted):
    for call in (fitted.summary, fitted.to_arviz, fitted.predict):
        with pytest.raises(ValueError, match="sites must be a list of names, got the text 'share'"):
            call(sites="share")
