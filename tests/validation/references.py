"""Eight posteriors with known answers: Pyro programs, their data and reference draws.

Source:
    Magnusson, Bürkner, Vehtari, posteriordb, commit 28f8d3d (BSD-3-Clause).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from tests.validation import programs

FOLDER = Path(__file__).parent / "posteriors"


class ReferencePosterior(NamedTuple):
    """A model, its data, and what its posterior is.

    Attributes:
        name: Our short name.
        model: The Pyro program; takes ``*data``.
        data: Float64 tensors.
        draws: Latent site -> (1000, *shape), constrained, in the order of the program's sites.
    """

    name: str
    model: Callable[..., None]
    data: tuple[Tensor, ...]
    draws: dict[str, Tensor]


def load(name: str) -> ReferencePosterior:
    """Read one of :data:`NAMES`."""
    entry = _ENTRIES[name]
    with np.load(FOLDER / f"{entry.posterior}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    data = {
        key.removeprefix("data_"): torch.as_tensor(value, dtype=torch.float64)
        for key, value in arrays.items()
        if key.startswith("data_")
    }
    draws = torch.as_tensor(arrays["draws"], dtype=torch.float64)
    parameters = _by_parameter(list(arrays["param_names"]), draws)
    return ReferencePosterior(name, entry.model, entry.data(data), entry.sites(parameters))


def supports(reference: ReferencePosterior) -> dict[str, Constraint]:
    """The support of each latent site, in the order of the program; checked against the draws."""
    with torch.random.fork_rng(devices=[]):
        trace = pyro.poutine.trace(reference.model).get_trace(*reference.data)
    found = {
        site: trace.nodes[site]["fn"].support
        for site in trace.stochastic_nodes
        if not site_is_subsample(trace.nodes[site])
    }
    assert list(found) == list(reference.draws), (list(found), list(reference.draws))
    return found


def unconstrained(reference: ReferencePosterior) -> Tensor:
    """The reference draws on the unconstrained scale, "draw dim", site after site."""
    columns = [
        biject_to(support).inv(reference.draws[site]).reshape(len(reference.draws[site]), -1)
        for site, support in supports(reference).items()
    ]
    return torch.cat(columns, dim=1)


def coordinate_names(reference: ReferencePosterior) -> list[str]:
    """One name for each column of :func:`unconstrained`: the site, and its index if it has one."""
    return [
        site if value.dim() == 1 else f"{site}[{index}]"
        for site, value in reference.draws.items()
        for index in range(value[0].numel())
    ]


class _Entry(NamedTuple):
    posterior: str
    model: Callable[..., None]
    data: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
    sites: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def _same(*names: str) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    return lambda parameters: {name: parameters[name] for name in names}


def _mesquite_data(data: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    long, short, canopy = data["diam1"], data["diam2"], data["canopy_height"]
    logs = [long * short * canopy, long * short, long / short]
    logs = [value.log() for value in (*logs, data["total_height"], data["density"])]
    features = torch.stack([torch.ones_like(long), *logs, data["group"]], dim=-1)
    return features, data["weight"].log()


def _kilpisjarvi_data(data: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    mean = torch.stack([data["pmualpha"], data["pmubeta"]])
    sd = torch.stack([data["psalpha"], data["psbeta"]])
    return data["x"], data["y"], mean, sd


def _eight_schools_sites(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    mu, tau = parameters["mu"], parameters["tau"]
    z = (parameters["theta"] - mu[:, None]) / tau[:, None]
    return {"mu": mu, "tau": tau, "z": z}


def _gauss_mix_sites(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    low, high = parameters["mu"].unbind(-1)
    return {"low": low, "gap": high - low, **_same("sigma", "theta")(parameters)}


_ENTRIES = {
    "eight_schools": _Entry(
        "eight_schools-eight_schools_noncentered",
        programs.eight_schools,
        lambda data: (data["y"], data["sigma"]),
        _eight_schools_sites,
    ),
    "kidiq": _Entry(
        "kidiq-kidscore_momiq",
        programs.kidiq,
        lambda data: (data["mom_iq"], data["kid_score"]),
        _same("beta", "sigma"),
    ),
    "earnings": _Entry(
        "earnings-logearn_height",
        programs.earnings,
        lambda data: (data["height"], data["earn"].log()),
        _same("beta", "sigma"),
    ),
    "kilpisjarvi": _Entry(
        "kilpisjarvi_mod-kilpisjarvi",
        programs.kilpisjarvi,
        _kilpisjarvi_data,
        _same("alpha", "beta", "sigma"),
    ),
    "sblrc": _Entry(
        "sblrc-blr",
        programs.sblrc,
        lambda data: (data["X"], data["y"]),
        _same("beta", "sigma"),
    ),
    "mesquite": _Entry(
        "mesquite-logmesquite_logvas",
        programs.mesquite,
        _mesquite_data,
        _same("beta", "sigma"),
    ),
    "gauss_mix": _Entry(
        "low_dim_gauss_mix-low_dim_gauss_mix",
        programs.gauss_mix,
        lambda data: (data["y"],),
        _gauss_mix_sites,
    ),
    "gp_regr": _Entry(
        "gp_pois_regr-gp_regr",
        programs.gp_regr,
        lambda data: (data["x"], data["y"]),
        _same("rho", "alpha", "sigma"),
    ),
}

NAMES = tuple(_ENTRIES)


def _by_parameter(names: list[str], draws: Tensor) -> dict[str, Tensor]:
    """Gather the columns beta[1], beta[2], … under beta, and leave sigma as it is."""
    columns: dict[str, list[Tensor]] = {}
    for name, column in zip(names, draws.unbind(-1), strict=True):
        columns.setdefault(name.partition("[")[0], []).append(column)
    return {
        name: torch.stack(values, dim=-1) if f"{name}[1]" in names else values[0]
        for name, values in columns.items()
    }
