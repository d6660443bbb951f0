"""Arrays with named axes as an ArviZ object, on either line of ArviZ.

ArviZ 0.23 has its own ``InferenceData``, ArviZ 1 uses xarray's ``DataTree``; both read the tree
that :func:`build_tree` makes. This module knows arrays only, neither torch nor Pyro.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import arviz
import numpy as np
import pandas as pd
import xarray as xr

__all__ = ["Variables", "build_tree", "pareto_k", "summarize", "to_arviz_object"]

Variables = Mapping[str, tuple[Sequence[str], np.ndarray]]

# The tail is a fifth of the weights, to which ArviZ fits nothing unless it has five.
_FEWEST_WEIGHTS = 25

SAMPLE_DIMS = frozenset({"chain", "draw", "step"})


def build_tree(
    groups: Mapping[str, Variables],
    *,
    coords: Mapping[str, Sequence[Any]] | None = None,
    attrs: Mapping[str, Mapping[str, Any]] | None = None,
    root_attrs: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    """Lay variables out as a tree of ArviZ groups, with a coordinate for every axis.

    Args:
        groups: Group to variable to (axis names, array); empty groups are left out.
        coords: Labels along axes; other axes are numbered from zero.
        attrs: Group to its attributes. What is neither text, number nor a flat list becomes JSON.
        root_attrs: Attributes of the tree itself.

    Raises:
        ValueError: If an axis name stands for two sizes or names a variable too, if a variable has
            another number of axes than names, or labels of another number than entries.
    """
    _check_names(groups)
    datasets = {"/": xr.Dataset(attrs=_plain_attrs(root_attrs or {}))}
    for group, variables in groups.items():
        if not variables:
            continue
        sizes = {
            dim: size
            for dims, array in variables.values()
            for dim, size in zip(dims, np.shape(array), strict=True)
        }
        datasets[f"/{group}"] = xr.Dataset(
            {name: (tuple(dims), np.asarray(array)) for name, (dims, array) in variables.items()},
            coords={dim: _labels(dim, size, coords or {}) for dim, size in sizes.items()},
            attrs=_plain_attrs((attrs or {}).get(group, {})),
        )
    return xr.DataTree.from_dict(datasets)


def to_arviz_object(tree: xr.DataTree) -> Any:
    """Return what the installed ArviZ takes: ``InferenceData`` before version 1, the tree since."""
    # Not `hasattr(arviz, "InferenceData")`: ArviZ 1 still answers to that name.
    if int(arviz.__version__.split(".")[0]) >= 1:
        return tree
    return arviz.from_datatree(tree)


def summarize(
    data: Any,
    *,
    markov: bool,
    num_chains: int,
    log_weights: np.ndarray | None = None,
    reference: Any = None,
    **options: Any,
) -> pd.DataFrame:
    """Summarize a posterior by figures that mean something for its kind of draws.

    Effective sample sizes and Monte-Carlo errors are functions of the order of the draws, so they
    are given for Markov chains only. Between independent runs R-hat shows whether they agree, not
    whether they are right: particles that collapse alike agree too.

    Args:
        data: An ArviZ object with a posterior group.
        markov: Whether the draws of a chain follow each other.
        num_chains: How many chains or independent runs there are.
        log_weights: Log of target over proposal at each draw of a guide, for Pareto's k of the
            worst run.
        reference: ArviZ object of another posterior of the same sites, for ratios of spread.
        **options: For :func:`arviz.summary`, such as ``var_names``.

    Returns:
        One row per entry of a site. For Markov chains :func:`arviz.summary` whole; else its
        statistics, of a single point its value alone; ``r_hat`` where there are several runs;
        ``sd_ratio`` to the reference (below one: too narrow) and ``pareto_k`` of the guide (above
        0.7: not to be trusted) where given.
    """
    options = {"round_to": "none", **options}
    # Entries that never vary, such as weights of padding, have no R-hat; that is no news.
    with np.errstate(invalid="ignore", divide="ignore"):
        return _table(data, markov, num_chains, log_weights, reference, options)


def pareto_k(log_weights: np.ndarray) -> float:
    """Tail index of importance weights, which says how far a guide is from its target.

    Args:
        log_weights: Log of target over proposal at independent draws; draws are the last axis, and
            leading axes are runs, each with a guide of its own.

    Returns:
        Pareto's k of the worst run; above 0.7 the weights have no usable mean, and the guide misses
        mass. Zero where all weights of a run are equal; NaN where 25 draws are not there to tell.

    Source:
        Yao et al. (2018), Yes, but did it work? Evaluating variational inference, arXiv:1802.02538.
    """
    weights = np.asarray(log_weights, dtype=float)
    return float(np.max([_tail_index(row) for row in weights.reshape(-1, weights.shape[-1])]))


def _table(
    data: Any,
    markov: bool,
    num_chains: int,
    log_weights: np.ndarray | None,
    reference: Any,
    options: Mapping[str, Any],
) -> pd.DataFrame:
    draws = data["posterior"].sizes["draw"]
    with warnings.catch_warnings():
        if draws * num_chains == 1:
            # Spreads of a single point, which are left out below.
            warnings.simplefilter("ignore", RuntimeWarning)
        table: Any = arviz.summary(data, kind="all" if markov else "stats", **options)
    # ArviZ's R-hat splits each chain in two and needs two draws in each half.
    if not markov and num_chains > 1 and draws >= 4:
        table["r_hat"] = arviz.summary(data, kind="diagnostics", **options)["r_hat"]
    if reference is not None:
        spread: Any = arviz.summary(reference, kind="stats", **options)["sd"]
        table["sd_ratio"] = table["sd"] / spread.reindex(table.index)
    if draws * num_chains == 1:
        table = table[["mean"]]
    if log_weights is not None:
        table["pareto_k"] = pareto_k(log_weights)
    return table


def _tail_index(flat: np.ndarray) -> float:
    if np.ptp(flat) < 1e-8:
        return 0.0
    if len(flat) < _FEWEST_WEIGHTS:
        return float("nan")
    if int(arviz.__version__.split(".")[0]) < 1:
        return float(arviz.psislw(flat)[1])
    from arviz_stats.base import array_stats  # pyright: ignore[reportMissingImports]

    # ArviZ 1 takes the log likelihoods of leave-one-out here: log weights with the sign turned.
    return float(array_stats.psislw(-flat)[1])


def _check_names(groups: Mapping[str, Variables]) -> None:
    """Refuse an axis name with two sizes, or one that is a variable too."""
    seen: dict[str, tuple[int, str]] = {}
    for group, variables in groups.items():
        for name, (dims, array) in variables.items():
            shape = np.shape(array)
            if len(dims) != len(shape):
                raise ValueError(
                    f"{name!r} in {group} has shape {shape}, but the axis names {list(dims)}"
                )
            if len(set(dims)) < len(dims):
                raise ValueError(f"{name!r} in {group} names two axes alike: {list(dims)}")
            for dim, size in zip(dims, shape, strict=True):
                # Every group has draws of its own, all other axes are shared.
                key = f"{group}/{dim}" if dim in SAMPLE_DIMS else dim
                known, first = seen.setdefault(key, (size, f"{name!r} in {group}"))
                if known != size:
                    raise ValueError(
                        f"axis {dim!r} has {known} entries for {first}, but {size} for {name!r} in "
                        f"{group}; give one of them another name with dims="
                    )
    dims = {key.split("/")[-1] for key in seen}
    for group, variables in groups.items():
        for name in variables:
            if name in dims:
                raise ValueError(
                    f"{name!r} in {group} bears the name of an axis; give the axis another name "
                    "with dims=, or rename the site"
                )


def _labels(dim: str, size: int, coords: Mapping[str, Sequence[Any]]) -> np.ndarray:
    if dim not in coords:
        return np.arange(size)
    labels = np.asarray(coords[dim])
    if labels.shape == (size,):
        return labels
    if dim in SAMPLE_DIMS:
        return np.arange(size)
    raise ValueError(f"coords has {len(labels)} labels for axis {dim!r}, which has {size} entries")


def _plain_attrs(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what every file format gives back as it was, and write the rest as JSON."""
    return {
        name: value if _is_plain(value) else json.dumps(value, default=str)
        for name, value in attrs.items()
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return {type(entry) for entry in value} in ({str}, {int}, {float})
    return isinstance(value, str | int | float | np.number) and not isinstance(value, bool)
