"""Tests of bayesattn.inference.storage: what is read is what was written."""

import json
import os
import pickle
from pathlib import Path

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from bayesattn.inference import storage
from bayesattn.inference.posterior import Posterior

SUFFIXES = ["nc", "safetensors"]


def regression(features, response=None):
    with pyro.plate("feature", features.shape[-1]):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    mean = pyro.deterministic("mean", features @ weight)
    with pyro.plate("row", len(features)):
        pyro.sample("response", dist.Normal(mean, 1.0), obs=response)


@pytest.fixture
def data(generator):
    return torch.randn(7, 3, generator=generator), torch.randn(7, generator=generator)


@pytest.fixture
def fitted(data, generator):
    """Exact draws of a conjugate regression, with all that a posterior can hold."""
    features, response = data
    precision = features.T @ features + torch.eye(3)
    noise = torch.randn(2, 150, 3, generator=generator)
    cholesky = torch.linalg.cholesky(precision.inverse())
    draws = precision.inverse() @ features.T @ response + noise @ cholesky.T
    return Posterior(
        {"weight": draws},
        method="SVI",
        draws_are="iid_guide",
        model=regression,
        args=data,
        unconstrained=draws.clone(),
        sample_stats={"lp": torch.randn(2, 150, generator=generator)},
        optimization={"elbo": torch.randn(2, 9, generator=generator)},
        attrs={"seed": 17, "problems": [], "settings": {"guide": ["normal", 1]}, "ok": True},
    )


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value)


def assert_same(loaded, posterior):
    assert (loaded.method, loaded.draws_are) == (posterior.method, posterior.draws_are)
    for field in ("draws", "sample_stats", "optimization", "point_estimates"):
        same(getattr(loaded, field), getattr(posterior, field))
    if posterior.unconstrained is None:
        assert loaded.unconstrained is None
    else:
        same({"u": loaded.unconstrained}, {"u": posterior.unconstrained})
    assert loaded.attrs == posterior.attrs


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(fitted, tmp_path, suffix):
    fitted.save(tmp_path / f"fit.{suffix}")
    loaded = Posterior.load(tmp_path / f"fit.{suffix}")
    assert_same(loaded, fitted)
    assert loaded.site_dims["weight"] == ("feature",)
    assert loaded.to_arviz()["posterior"]["weight"].dims == ("chain", "draw", "feature")
    assert [path.name for path in tmp_path.iterdir()] == [f"fit.{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_program_is_needed_to_predict(fitted, data, tmp_path, suffix):
    path = str(tmp_path / f"fit.{suffix}")
    fitted.save(path)
    bare, whole = Posterior.load(path), Posterior.load(path, model=regression)
    for call in (bare.predict, bare.log_likelihood, bare.posterior_predictive):
        with pytest.raises(
            ValueError, match=r"has no model.*Posterior\.load\(path, model=\.\.\.\)"
        ):
            call(*data)
    torch.testing.assert_close(whole.predict(data[0], sites=["mean"]), fitted.predict())
    torch.testing.assert_close(whole.log_likelihood(*data), fitted.log_likelihood())
    with pytest.raises(ValueError, match="knows no training arguments: give some"):
        whole.log_likelihood()
    assert_same(whole.thin(10), fitted.thin(10))


names = st.sampled_from(["weight", "net.weight", "scope/bias", "Größe", "log odds"])
shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)
dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
sites = st.dictionaries(names, st.tuples(shapes, dtypes), min_size=1, max_size=3)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=25)
@given(
    chains=st.integers(1, 3),
    draws=st.integers(1, 4),
    sites=sites,
    stats=sites,
    steps=st.integers(1, 3),
)
def test_any_shape_and_dtype_round_trips(
    tmp_path_factory, suffix, chains, draws, sites, stats, steps
):
    generator = torch.Generator().manual_seed(0)

    def values(spec, *lead):
        return {
            name: (10 * torch.randn(*lead, *shape, generator=generator)).to(dtype)
            for name, (shape, dtype) in spec.items()
        }

    posterior = Posterior(
        values(sites, chains, draws),
        method="SVGD",
        draws_are="particles",
        sample_stats=values({f"{name}_stat": spec for name, spec in stats.items()}, chains, draws),
        optimization={"log density": torch.ones(chains, steps), "ksd": torch.ones(chains, 5)},
        point_estimates=values({f"{name}_estimate": spec for name, spec in sites.items()}, chains),
    )
    path = tmp_path_factory.mktemp("round") / f"fit.{suffix}"
    posterior.save(path)
    assert_same(Posterior.load(path), posterior)


def test_heads_round_trip(tmp_path, generator):
    posterior = Posterior(
        {"query_weight": torch.randn(4, 3, 2, generator=generator)},
        method="SVGD",
        draws_are="heads",
        point_estimates={"readout": torch.randn(4, 5, generator=generator)},
        attrs={"particle_plate": "head", "particle_plate_axes": {"query_weight": 1}},
    )
    for suffix in SUFFIXES:
        posterior.save(tmp_path / f"fit.{suffix}")
        loaded = Posterior.load(tmp_path / f"fit.{suffix}")
        assert_same(loaded, posterior)
        same(loaded.network_samples(), posterior.network_samples())


def test_arviz_opens_netcdf(fitted, data, tmp_path):
    """Into BAYESATTN_NETCDF_DIR, where it is set, for the tests on the other line of ArviZ."""
    folder = Path(os.environ.get("BAYESATTN_NETCDF_DIR") or tmp_path)
    for draws_are in ("iid_guide", "markov"):
        path = folder / f"{draws_are}.nc"
        fitted.replace(draws_are=draws_are).save(path, log_likelihood=True, deterministic=True)
        opened = arviz.from_netcdf(path)
        np.testing.assert_array_equal(opened["posterior"]["weight"], fitted["weight"])
        np.testing.assert_array_equal(opened["constant_data"]["features"], data[0])
        assert opened["posterior"].attrs["draws_are"] == draws_are
        mean = fitted["weight"] @ data[0].T
        np.testing.assert_allclose(opened["posterior"]["mean"], mean, rtol=1e-10)
        by_hand = Normal(mean, 1.0).log_prob(data[1])
        np.testing.assert_allclose(opened["log_likelihood"]["response"], by_hand, rtol=1e-10)
        assert "mean" not in Posterior.load(path).draws
        opened.close()


def test_arviz_writes_what_we_give_it(fitted, tmp_path):
    fitted.to_arviz().to_netcdf(str(tmp_path / "theirs.nc"))
    again = arviz.from_netcdf(str(tmp_path / "theirs.nc"))
    np.testing.assert_array_equal(again["posterior"]["weight"], fitted["weight"])
    again.close()
    with pytest.raises(ValueError, match="is not a posterior that bayesattn saved"):
        Posterior.load(tmp_path / "theirs.nc")


def test_a_name_that_does_not_fit_costs_no_run(fitted, tmp_path):
    """A site that bears its plate's name cannot be exported, but is saved all the same."""
    odd = fitted.replace(site_dims={"weight": ("weight",)})
    with pytest.raises(ValueError, match="bears the name of an axis"):
        odd.to_arviz()
    with pytest.warns(RuntimeWarning, match="saved without names of axes and without data"):
        odd.save(tmp_path / "odd.nc")
    assert_same(Posterior.load(tmp_path / "odd.nc"), odd)


def test_a_program_that_fails_costs_no_run(fitted, tmp_path):
    def broken(features, response=None):
        raise RuntimeError("no longer")

    posterior = fitted.replace(model=broken)
    with pytest.warns(RuntimeWarning, match="the model failed on .*no longer"):
        posterior.save(tmp_path / "fit.nc")
    assert_same(Posterior.load(tmp_path / "fit.nc"), fitted)
    posterior.save(tmp_path / "fit.safetensors")
    assert_same(Posterior.load(tmp_path / "fit.safetensors"), fitted)


def test_a_shared_discrete_site_is_remembered(tmp_path, generator):
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        sign = pyro.sample("sign", dist.Bernoulli(0.5))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal((2 * sign - 1) * loc, 1.0), obs=y)

    y = torch.randn(4, generator=generator)
    Posterior(
        {"loc": torch.ones(1, 5)}, method="SVI", draws_are="iid_guide", model=model, args=(y,)
    ).save(tmp_path / "fit.safetensors")
    loaded = Posterior.load(tmp_path / "fit.safetensors", model=model)
    with pytest.raises(ValueError, match=r"'sign'.* summed out given the training data"):
        loaded.predict(y[:2], sites=["sign"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_places_that_cannot_be_written_are_refused_at_once(fitted, tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        fitted.save(tmp_path / "missing" / f"fit.{suffix}")
    (tmp_path / f"folder.{suffix}").mkdir()
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        fitted.save(tmp_path / f"folder.{suffix}")
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if not os.access(locked, os.W_OK):
        with pytest.raises(PermissionError, match="is not writable"):
            fitted.save(locked / f"fit.{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_fails_while_writing_names_the_path(fitted, tmp_path, suffix):
    path = tmp_path / f"{'long' * 60}.{suffix}"
    with pytest.raises(OSError, match=rf"^cannot write {path}: ") as caught:
        fitted.save(path)
    assert "partial" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_appears_whole_or_not_at_all(fitted, tmp_path, monkeypatch, suffix):
    path = tmp_path / f"fit.{suffix}"
    fitted.save(path)
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(xr.DataTree, "to_netcdf", full_disk)
    monkeypatch.setattr(storage.safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        fitted.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_other_suffixes_and_options_are_refused(fitted, tmp_path):
    for call in (fitted.save, Posterior.load):
        with pytest.raises(ValueError, match=r"must end in one of .* got 'fit\.pkl'"):
            call(tmp_path / "fit.pkl")
    with pytest.raises(ValueError, match=r"only netCDF files take \['log_likelihood'\]"):
        fitted.save(tmp_path / "fit.safetensors", log_likelihood=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_others_are_refused(tmp_path, suffix):
    path = tmp_path / f"fit.{suffix}"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Posterior.load(path)
    path.write_bytes(pickle.dumps({"weight": [1.0]}))
    with pytest.raises(ValueError, match="is not a posterior that bayesattn saved"):
        Posterior.load(path)
    if suffix == "nc":
        xr.Dataset({"a": ("x", [1.0])}).to_netcdf(path, engine="h5netcdf")
    else:
        safetensors.torch.save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"bayesattn saved: it has no entry 'bayesattn'$"):
        Posterior.load(path)


def test_files_of_a_later_version_are_refused(tmp_path):
    about = json.dumps({"format": 99})
    safetensors.torch.save_file({}, tmp_path / "fit.safetensors", {"bayesattn": about})
    with pytest.raises(ValueError, match="has format 99, but this version reads up to 1"):
        Posterior.load(tmp_path / "fit.safetensors")
