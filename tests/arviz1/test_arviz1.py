"""Tests on ArviZ 1, in an environment of its own that has neither torch nor Pyro.

Reads the netCDF files that the main suite wrote into the folder ``BAYESATTN_NETCDF_DIR``.
"""

import importlib.util
import os
from pathlib import Path

import arviz
import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr

mpl.use("Agg")

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(Path(os.environ.get("BAYESATTN_NETCDF_DIR", ROOT / "out" / "none")).glob("*.nc"))


def load_by_path():
    spec = importlib.util.spec_from_file_location(
        "arviz_tree", ROOT / "inference" / "arviz_tree.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


arviz_tree = load_by_path()


@pytest.fixture
def tree():
    rng = np.random.default_rng(0)
    return arviz_tree.build_tree(
        {
            "posterior": {
                "query_weight": (("chain", "draw", "head"), rng.normal(size=(2, 200, 3))),
                "bias": (("chain", "draw"), rng.normal(size=(2, 200))),
            },
            "log_likelihood": {
                "intent": (("chain", "draw", "sentence"), rng.normal(-1, 0.1, size=(2, 200, 5)))
            },
            "observed_data": {"intent": (("sentence",), np.arange(5))},
        },
        coords={"head": ["a", "b", "c"]},
        attrs={"posterior": {"method": "SVGD", "draws_are": "particles"}},
    )


def test_runs_on_arviz_1_without_torch():
    assert int(arviz.__version__.split(".")[0]) >= 1
    assert importlib.util.find_spec("torch") is None


def test_the_tree_is_what_arviz_takes(tree):
    data = arviz_tree.to_arviz_object(tree)
    assert isinstance(data, xr.DataTree)
    assert data is tree
    assert list(tree["posterior"].coords["head"].values) == ["a", "b", "c"]


def test_no_effective_sample_size_unless_markov(tree):
    particles = arviz_tree.summarize(tree, markov=False, num_chains=2)
    assert not [c for c in particles.columns if "ess" in c or "mcse" in c]
    assert list(particles.index) == [*(f"query_weight[{h}]" for h in "abc"), "bias"]
    assert (particles["r_hat"] < 1.1).all()
    values = tree["posterior"]["bias"].values
    np.testing.assert_allclose(particles.loc["bias", "mean"], values.mean(), rtol=1e-12)
    markov = arviz_tree.summarize(tree, markov=True, num_chains=2)
    assert {"ess_bulk", "ess_tail", "r_hat"} <= set(markov.columns)
    ratio = arviz_tree.summarize(tree, markov=False, num_chains=2, reference=tree)["sd_ratio"]
    np.testing.assert_allclose(ratio, 1)


@pytest.mark.parametrize("tail", [0.2, 0.9])
def test_pareto_k_is_the_tail_index(tail):
    uniform = np.random.default_rng(0).uniform(size=20_000)
    weights = ((1 - uniform) ** -tail - 1) / tail
    assert abs(arviz_tree.pareto_k(np.log(weights)) - tail) < 0.12


def test_loo_takes_the_tree(tree):
    result = arviz.loo(tree, reff=1.0)
    pointwise = tree["log_likelihood"]["intent"].values
    np.testing.assert_allclose(result.elpd, pointwise.mean((0, 1)).sum(), rtol=0.05)


def test_collisions_are_refused():
    given = {"posterior": {"head": (("chain", "draw", "head"), np.zeros((1, 2, 3)))}}
    with pytest.raises(ValueError, match="bears the name of an axis"):
        arviz_tree.build_tree(given)


@pytest.mark.skipif(not FILES, reason="BAYESATTN_NETCDF_DIR holds no netCDF file")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
class TestFilesOfTheMainSuite:
    def test_posterior_is_whole(self, path):
        with arviz.from_netcdf(path) as data:
            posterior = data["posterior"].load()
        assert {"chain", "draw"} <= set(posterior.dims)
        assert all(np.isfinite(posterior[name]).all() for name in posterior.data_vars)
        assert {"method", "draws_are", "inference_library"} <= set(posterior.attrs)
        assert set(posterior.dims) == set(posterior.coords)

    def test_summary_and_plot(self, path):
        with arviz.from_netcdf(path) as data:
            data.load()
        posterior = data["posterior"]
        markov = posterior.attrs["draws_are"] == "markov"
        chains = posterior.sizes["chain"]
        table = arviz_tree.summarize(data, markov=markov, num_chains=chains)
        assert np.isfinite(table["mean"]).all()
        first = next(iter(posterior.data_vars))
        arviz.plot_dist(data, var_names=[first], backend="matplotlib")

    @pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
    def test_loo(self, path):
        with arviz.from_netcdf(path) as data:
            data.load()
        if "log_likelihood" not in data.children or data["posterior"].sizes["draw"] < 100:
            pytest.skip("no pointwise log likelihood of at least a hundred draws in this file")
        name = next(iter(data["log_likelihood"].data_vars))
        result = arviz.loo(data, var_name=name, reff=1.0)
        assert np.isfinite(result.elpd)
