"""Tests of bayesattn.inference.arviz_tree on ArviZ 0.23; tests/arviz1 holds those on ArviZ 1."""

import json

import arviz
import numpy as np
import pytest
import xarray as xr
from scipy import stats

from bayesattn.inference.arviz_tree import build_tree, pareto_k, summarize, to_arviz_object


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def groups(rng, chains=2, draws=5, heads=3):
    return {
        "posterior": {
            "query_weight": (("chain", "draw", "head"), rng.normal(size=(chains, draws, heads))),
            "bias": (("chain", "draw"), rng.normal(size=(chains, draws))),
        },
        "optimization": {"ksd": (("chain", "step"), rng.normal(size=(chains, 7)))},
        "observed_data": {"intent": (("sentence",), np.arange(11))},
        "constant_data": {},
    }


def test_every_axis_has_a_coordinate_and_empty_groups_are_left_out(rng):
    tree = build_tree(groups(rng), coords={"head": ["a", "b", "c"]})
    assert sorted(tree.children) == ["observed_data", "optimization", "posterior"]
    for node in tree.children.values():
        assert set(node.dims) == set(node.coords)
    assert tree["posterior"].coords["head"].values.tolist() == ["a", "b", "c"]
    assert tree["optimization"].coords["step"].values.tolist() == list(range(7))


def test_values_and_axis_names_are_kept(rng):
    given = groups(rng)
    posterior = build_tree(given)["posterior"]
    assert posterior["query_weight"].dims == ("chain", "draw", "head")
    np.testing.assert_array_equal(posterior["query_weight"], given["posterior"]["query_weight"][1])


def test_is_inference_data_on_this_line(rng):
    data = to_arviz_object(build_tree(groups(rng)))
    if int(arviz.__version__.split(".")[0]) < 1:
        assert isinstance(data, arviz.InferenceData)
        assert set(data.groups()) == {"posterior", "optimization", "observed_data"}
    else:
        assert isinstance(data, xr.DataTree)


def test_each_group_has_draws_of_its_own(rng):
    given = {
        "posterior": {"loc": (("chain", "draw"), np.zeros((2, 5)))},
        "prior": {"loc": (("chain", "draw"), np.zeros((1, 9)))},
    }
    tree = build_tree(given, coords={"draw": [10, 20, 30, 40, 50]})
    assert tree["posterior"].coords["draw"].values.tolist() == [10, 20, 30, 40, 50]
    assert tree["prior"].coords["draw"].values.tolist() == list(range(9))


def test_attributes_are_text_numbers_and_flat_lists_or_json():
    given = {"a": "x", "b": 2, "c": 0.5, "d": ["u", "v"], "e": {"k": [1, 2]}, "f": True, "g": []}
    posterior = {"loc": (("chain", "draw"), np.zeros((1, 1)))}
    tree = build_tree({"posterior": posterior}, attrs={"posterior": given}, root_attrs=given)
    for attrs in (tree.attrs, tree["posterior"].attrs):
        assert [attrs[key] for key in "abcd"] == ["x", 2, 0.5, ["u", "v"]]
        assert json.loads(attrs["e"]) == {"k": [1, 2]}
        assert [json.loads(attrs[key]) for key in "fg"] == [True, []]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"w": (("chain", "draw", "head"), np.zeros((1, 2)))}, r"shape \(1, 2\), but the axis"),
        ({"w": (("chain", "draw", "a", "a"), np.zeros((1, 2, 3, 3)))}, "names two axes alike"),
        (
            {
                "w": (("chain", "draw", "head"), np.zeros((1, 2, 3))),
                "v": (("chain", "draw", "head"), np.zeros((1, 2, 5))),
            },
            "'head' has 3 entries for 'w' in posterior, but 5 for 'v'",
        ),
        (
            {
                "w": (("chain", "draw", "head"), np.zeros((1, 2, 3))),
                "head": (("chain", "draw"), np.zeros((1, 2))),
            },
            "'head' in posterior bears the name of an axis",
        ),
    ],
)
def test_names_that_collide_are_refused(variables, message):
    with pytest.raises(ValueError, match=message):
        build_tree({"posterior": variables})


def test_sizes_agree_between_groups_too():
    given = {
        "posterior": {"w": (("chain", "draw", "head"), np.zeros((1, 2, 3)))},
        "observed_data": {"y": (("head",), np.zeros(4))},
    }
    with pytest.raises(ValueError, match=r"'head' has 3 entries .* but 4 for 'y' in observed_data"):
        build_tree(given)


def test_wrong_number_of_labels_is_refused(rng):
    with pytest.raises(ValueError, match="2 labels for axis 'head', which has 3 entries"):
        build_tree(groups(rng), coords={"head": ["a", "b"]})


def summary(rng, *, markov, chains=2, draws=40, **options):
    data = to_arviz_object(build_tree(groups(rng, chains, draws)))
    return summarize(data, markov=markov, num_chains=chains, **options)


def test_no_effective_sample_size_unless_markov(rng):
    particles = summary(rng, markov=False)
    assert not [c for c in particles.columns if "ess" in c or "mcse" in c]
    assert {"ess_bulk", "ess_tail", "r_hat"} <= set(summary(rng, markov=True).columns)
    assert list(particles.index) == [
        "query_weight[0]",
        "query_weight[1]",
        "query_weight[2]",
        "bias",
    ]


def test_statistics_are_those_of_the_draws(rng):
    values = rng.normal(size=(2, 40))
    data = to_arviz_object(build_tree({"posterior": {"loc": (("chain", "draw"), values)}}))
    table = summarize(data, markov=False, num_chains=2)
    np.testing.assert_allclose(table.loc["loc", "mean"], values.mean(), rtol=1e-12)
    np.testing.assert_allclose(table.loc["loc", "sd"], values.std(ddof=1), rtol=2e-2)


def test_between_runs_r_hat_sees_runs_that_disagree(rng):
    agree = rng.normal(size=(4, 50))
    disagree = agree + 5 * np.arange(4)[:, None]
    tree = build_tree(
        {"posterior": {name: (("chain", "draw"), v) for name, v in [("a", agree), ("b", disagree)]}}
    )
    table = summarize(to_arviz_object(tree), markov=False, num_chains=4)
    assert table.loc["a", "r_hat"] < 1.1 < 2 < table.loc["b", "r_hat"]
    assert "r_hat" not in summary(rng, markov=False, chains=1)


def test_ratio_of_spread_to_a_reference(rng):
    values = rng.normal(size=(1, 500))
    wide, narrow = (
        to_arviz_object(build_tree({"posterior": {"a": (("chain", "draw"), v)}}))
        for v in (values, values / 5)
    )
    table = summarize(narrow, markov=False, num_chains=1, reference=wide)
    np.testing.assert_allclose(table.loc["a", "sd_ratio"], 0.2, rtol=1e-10)


@pytest.mark.parametrize("tail", [0.2, 0.9])
def test_pareto_k_is_the_tail_index(rng, tail):
    """Weights from a Pareto law of known index; the sign of the log weights decides which tail."""
    weights = stats.genpareto(tail).rvs(20_000, random_state=rng)
    assert abs(pareto_k(np.log(weights)) - tail) < 0.12
    table = summary(rng, markov=False, log_weights=np.log(weights))
    np.testing.assert_allclose(table["pareto_k"], pareto_k(np.log(weights)))


def test_pareto_k_is_that_of_the_worst_run(rng):
    """Pooled with a good run, whose log weights are larger, a bad one would not be seen."""
    good, bad = (
        100 + 0.1 * rng.normal(size=1000),
        np.log(stats.genpareto(1.5).rvs(1000, random_state=rng)),
    )
    assert pareto_k(np.stack([good, bad])) == pareto_k(bad) > 1
    assert pareto_k(np.concatenate([good, bad])) < 0.7


def test_pareto_k_of_few_draws_is_not_known(rng):
    assert np.isnan(pareto_k(rng.normal(size=(2, 24))))
    assert np.isfinite(pareto_k(rng.normal(size=(2, 25))))
