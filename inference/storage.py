"""Posteriors in files: netCDF, which ArviZ opens, and safetensors; never pickle.

A file appears whole or not at all: it is written beside its place and then moved there.
"""

import contextlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import xarray as xr
from torch import Tensor

from bayesattn.inference import export
from bayesattn.inference.atomic_files import check_place, replaced
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.variables import variable_name

__all__ = ["load", "save"]

FORMAT = 1
SUFFIXES = (".nc", ".safetensors")
# What a posterior holds, and the group that ArviZ keeps it in.
_GROUPS = {
    "draws": "posterior",
    "sample_stats": "sample_stats",
    "optimization": "optimization",
    "point_estimates": "point_estimate",
}


def save(posterior: Posterior, path: Path, **arviz: Any) -> None:
    """Write a posterior; arguments are those of :meth:`Posterior.save`.

    Raises:
        ValueError: If the suffix is not one of ours, or options are given for safetensors.
        OSError: If nothing can be written there; checked before anything is computed.
    """
    _check_suffix(path)
    check_place(path)
    about = json.dumps(_description(posterior, arviz.get("dims")), default=_plain)
    if path.suffix == ".safetensors":
        if arviz:
            raise ValueError(f"only netCDF files take {sorted(arviz)}")
        with replaced(path) as partial:
            safetensors.torch.save_file(_tensors(posterior), partial, {"bayesattn": about})
        return
    tree = _tree(posterior, about, arviz)
    with replaced(path) as partial:
        tree.to_netcdf(partial, engine="h5netcdf")


def load(path: Path) -> dict[str, Any]:
    """Read the arguments of a posterior, less its model and training arguments.

    Raises:
        ValueError: If the file is not one of ours.
    """
    _check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_netcdf
    try:
        about, tensors = read(path)
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        found = f"it has no entry {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not a posterior that bayesattn saved: {found}") from error
    if about["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {about['format']}, but this version reads up to {FORMAT}; install "
            "a newer bayesattn"
        )
    fields = {key: about[key] for key in ("method", "draws_are", "site_dims", "attrs")}
    for field, names in about["names"].items():
        fields[field] = {
            name: tensors[f"{field}/{name}"].to(getattr(torch, dtype))
            for name, dtype in names.items()
        }
    if "unconstrained" in tensors:
        fields["unconstrained"] = tensors["unconstrained"]
    return fields


def _description(posterior: Posterior, dims: Any) -> dict[str, Any]:
    attrs = dict(posterior.attrs)
    site_dims: Mapping[str, Any] = posterior.site_dims
    if posterior.model is not None:
        with contextlib.suppress(ValueError):
            site_dims = export.known_dims(posterior, dims)
            if posterior.shared_discrete:
                attrs["shared_discrete"] = posterior.shared_discrete
    return {
        "format": FORMAT,
        "method": posterior.method,
        "draws_are": posterior.draws_are,
        "site_dims": site_dims,
        "attrs": attrs,
        "names": {
            field: {
                name: str(value.dtype).removeprefix("torch.")
                for name, value in getattr(posterior, field).items()
            }
            for field in _GROUPS
        },
    }


def _tensors(posterior: Posterior) -> dict[str, Tensor]:
    tensors = {
        f"{field}/{name}": value
        for field in _GROUPS
        for name, value in getattr(posterior, field).items()
    }
    if posterior.unconstrained is not None:
        tensors["unconstrained"] = posterior.unconstrained
    # The format refuses tensors that share memory.
    return {
        name: value.cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }


def _tree(posterior: Posterior, about: str, arviz: Mapping[str, Any]) -> xr.DataTree:
    options = {"deterministic": False, "log_likelihood": False, **arviz}
    try:
        return export.tree(posterior, root_attrs={"bayesattn": about}, **options)
    except ValueError as error:
        if arviz:
            raise
        # A name that does not fit must not cost a run.
        warnings.warn(
            f"saved without names of axes and without data: {error}", RuntimeWarning, stacklevel=4
        )
        plain = posterior.replace(model=None, site_dims={})
        return export.tree(plain, root_attrs={"bayesattn": about})


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})["bayesattn"])
        return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_netcdf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        about = json.loads(tree.attrs["bayesattn"])
        tensors = {
            f"{field}/{name}": _tensor(tree[_GROUPS[field]][variable_name(name)])
            for field, names in about["names"].items()
            for name in names
        }
        if "unconstrained_posterior" in tree.children:
            tensors["unconstrained"] = _tensor(tree["unconstrained_posterior"]["position"])
    return about, tensors


def _tensor(variable: Any) -> Tensor:
    return torch.from_numpy(variable.values.copy())


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path must end in one of {SUFFIXES}, got {path.name!r}")


def _plain(value: Any) -> Any:
    """What JSON has no form for, as it can have one."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    return str(value)
