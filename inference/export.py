"""A posterior as a tree of ArviZ groups: what goes into which group, under which names."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from bayesattn.inference import prediction
from bayesattn.inference.arviz_tree import build_tree
from bayesattn.inference.axis_names import AxisNames, placeholder
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.replay import Replay
from bayesattn.inference.variables import Labels, array, variable_name

__all__ = ["known_dims", "tree"]

SAMPLES = ("chain", "draw")

Groups = dict[str, dict[str, tuple[Sequence[str], np.ndarray]]]


def tree(
    posterior: Posterior,
    *,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    sites: Sequence[str] | None = None,
    deterministic: bool | None = None,
    log_likelihood: bool | None = None,
    posterior_predictive: bool = False,
    prior_draws: int = 0,
    likelihood_sites: Iterable[str] = (),
    seed: int | None = None,
    chunk_size: int | None = None,
    root_attrs: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    """Lay a posterior out in groups; arguments are those of :meth:`Posterior.to_arviz`."""

    def required() -> Replay:
        return posterior.replay((), {}, seed=seed, chunk_size=chunk_size)

    program = _program_of(posterior, required)
    labels = _labels(posterior, program, dims)
    if program is None and (deterministic or log_likelihood or prior_draws):
        program = required()
    groups = _draw_groups(posterior, program, labels, sites, deterministic)
    groups |= _figure_groups(posterior, labels)
    if program is not None:
        groups |= _density_groups(posterior, program, labels, log_likelihood, likelihood_sites)
    if posterior_predictive:
        replicates = posterior.posterior_predictive(seed=seed, chunk_size=chunk_size)
        groups["posterior_predictive"] = labels.variables(replicates, SAMPLES)
    if prior_draws and program is not None:
        groups |= _prior_groups(posterior, program, labels, prior_draws)
    if program is not None:
        groups |= _data_groups(program, labels)
    labels.names.check_all_used()
    _check_coords(coords or {}, groups)
    about = {
        "method": posterior.method,
        "draws_are": posterior.draws_are,
        "inference_library": "bayesattn",
        "inference_library_version": metadata.version("bayesattn"),
    }
    return build_tree(
        groups,
        coords={**getattr(posterior.model, "coords", {}), **(coords or {})},
        attrs={"posterior": {**about, **posterior.attrs}},
        root_attrs=root_attrs,
    )


def known_dims(
    posterior: Posterior, dims: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[str | None]]:
    """Names of the axes of all that the posterior holds, None where an axis has none."""
    program = _program_of(posterior, lambda: posterior.replay((), {}))
    labels = _labels(posterior, program, dims)
    is_heads = posterior.draws_are == "heads"
    variables = {
        **labels.variables(posterior.sample_stats, SAMPLES, are_statistics=True),
        **labels.variables(posterior.point_estimates, ("chain",)),
        **labels.variables(posterior.draws, SAMPLES, are_slices=is_heads),
    }
    held = {**posterior.sample_stats, **posterior.point_estimates, **posterior.draws}
    result = {}
    for name in held:
        axes, values = variables[variable_name(name)]
        own = axes[1 if name in posterior.point_estimates else 2 :]
        unnamed = [placeholder(name, axis) for axis in range(values.ndim)]
        result[name] = [None if axis in unnamed else axis for axis in own]
    return result


def _check_coords(coords: Mapping[str, Sequence[Any]], groups: Groups) -> None:
    """Refuse labels that the caller gives for axes that do not exist."""
    known = {dim for variables in groups.values() for dims, _ in variables.values() for dim in dims}
    unknown = sorted(coords.keys() - known)
    if unknown:
        raise ValueError(f"coords labels the axes {unknown}, but there are only {sorted(known)}")


def _labels(
    posterior: Posterior, program: Replay | None, dims: Mapping[str, Sequence[str]] | None
) -> Labels:
    sources = [posterior.site_dims, getattr(posterior.model, "dims", {})]
    names = AxisNames(dims or {}, sources, posterior.particle_plate)
    return Labels(names, {} if program is None else program.sites)


def _program_of(posterior: Posterior, required: Callable[[], Replay]) -> Replay | None:
    """The program at its training arguments, or None where they or the program are not known."""
    if posterior.model is None:
        return None
    try:
        return required()
    except ValueError:
        if posterior.args or posterior.kwargs:
            raise
        return None


def _draw_groups(
    posterior: Posterior,
    program: Replay | None,
    labels: Labels,
    sites: Sequence[str] | None,
    deterministic: bool | None,
) -> Groups:
    computable = [] if program is None else program.names("deterministic")
    known = [*posterior.draws, *computable]
    if isinstance(sites, str):
        raise ValueError(f"sites must be a list of names, got the text {sites!r}")
    unknown = [name for name in sites or () if name not in known]
    if unknown:
        raise ValueError(f"there are no sites {unknown} to export, only {known}")
    wanted = known if sites is None else sites
    chosen = [name for name in computable if name in wanted]
    computed = {}
    if program is not None and chosen and deterministic is not False:
        computed = posterior.by_chain(prediction.predict(program, chosen))
    is_heads = posterior.draws_are == "heads"
    groups: Groups = {
        "posterior": labels.variables(
            {name: value for name, value in posterior.draws.items() if name in wanted},
            SAMPLES,
            are_slices=is_heads,
        )
    }
    estimates = dict(posterior.point_estimates)
    if is_heads:
        # One value per network, not per head.
        estimates |= {name: value.squeeze(1) for name, value in computed.items()}
    else:
        groups["posterior"] |= labels.variables(computed, SAMPLES)
    groups["point_estimate"] = labels.variables(estimates, ("chain",))
    return groups


def _figure_groups(posterior: Posterior, labels: Labels) -> Groups:
    groups: Groups = {
        "sample_stats": labels.variables(posterior.sample_stats, SAMPLES, are_statistics=True)
    }
    if posterior.unconstrained is not None:
        position = ((*SAMPLES, "coordinate"), array(posterior.unconstrained))
        groups["unconstrained_posterior"] = {"position": position}
    longest = max((value.shape[1] for value in posterior.optimization.values()), default=0)
    groups["optimization"] = {
        name: (("chain", "step" if len(value[0]) == longest else f"{name}_step"), array(value))
        for name, value in posterior.optimization.items()
    }
    return groups


def _density_groups(
    posterior: Posterior,
    program: Replay,
    labels: Labels,
    log_likelihood: bool | None,
    likelihood_sites: Iterable[str],
) -> Groups:
    has_data = bool(program.names("observed")) or bool(likelihood_sites)
    if log_likelihood is False or (log_likelihood is None and not has_data):
        return {}
    try:
        likelihood = prediction.log_likelihood(program, likelihood_sites)
    except ValueError as error:
        if log_likelihood:
            raise
        warnings.warn(f"log likelihood left out: {error}", RuntimeWarning, stacklevel=4)
        return {}
    densities = {"log_likelihood": likelihood, "log_prior": prediction.log_prior(program)}
    return {
        group: labels.variables(posterior.by_chain(values), SAMPLES, are_densities=True)
        for group, values in densities.items()
    }


def _prior_groups(posterior: Posterior, program: Replay, labels: Labels, num_draws: int) -> Groups:
    prior = program.prior(num_draws)
    values = {name: value[None] for name, value in prediction.prior_predict(prior).items()}
    # Where draws are heads, the names of their axes lack the plate's.
    names = AxisNames(labels.names.given, [getattr(posterior.model, "dims", {})])
    whole = Labels(names, prior.sites)
    observed = prior.names("observed")
    return {
        "prior": whole.variables({n: v for n, v in values.items() if n not in observed}, SAMPLES),
        "prior_predictive": whole.variables({n: values[n] for n in observed}, SAMPLES),
    }


def _data_groups(program: Replay, labels: Labels) -> Groups:
    observed = {name: labels.sites[name].value for name in program.names("observed")}
    constants = {
        f"{name}_argument" if name in labels.sites else name: torch.as_tensor(value)
        for name, value in program.arguments.items()
        if isinstance(value, Tensor | np.ndarray)
        and all(value is not data for data in observed.values())
    }
    return {
        "observed_data": labels.variables(observed, ()),
        "constant_data": labels.variables(constants, ()),
    }
