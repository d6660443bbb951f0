"""Observed values, checked against the supports of their distributions."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.distributions.constraints import Constraint

from bayesattn.inference.prior_run import unwrapped

__all__ = ["check_observations"]


def check_observations(sites: Mapping[str, Any]) -> None:
    """Refuse observations that no value of the latents makes possible, as half a success.

    Entries that a mask takes out are not looked at, nor NaN, which the log density reports, nor
    supports that other values may move, such as those of uniform distributions.

    Args:
        sites: Observed sites of a Pyro trace, by name.

    Raises:
        ValueError: With the site, the count and the first such value.
    """
    for name, site in sites.items():
        distribution, value = unwrapped(site["fn"]), site["value"]
        if not _has_fixed_support(distribution) or not isinstance(value, Tensor):
            continue
        support = site["fn"].support
        inside = support.check(value)
        missing = value.reshape(*inside.shape, -1).isnan().any(-1)
        impossible = ~inside & ~missing & _unmasked(site)
        if impossible.any():
            first = value.expand(*impossible.shape, *value.shape[inside.ndim :])[impossible][0]
            raise ValueError(
                f"at the observed site {name!r}, {int(impossible.sum())} of {impossible.numel()} "
                f"values are none that a {type(distribution).__name__} takes, the first of them "
                f"{first.tolist()}; expected {support}"
            )


def _has_fixed_support(distribution: Any) -> bool:
    """Whether the support is the same whatever the parameters, shapes apart."""
    return isinstance(distribution, Categorical) or isinstance(
        getattr(type(distribution), "support", None), Constraint
    )


def _unmasked(site: Any) -> Tensor:
    """Where the log density counts a site: by its handlers' masks, and its distribution's own."""
    masks, distribution = [site["mask"]], site["fn"]
    while hasattr(distribution, "base_dist"):
        masks.append(getattr(distribution, "_mask", None))
        distribution = distribution.base_dist
    counted = torch.ones((), dtype=torch.bool, device=site["value"].device)
    for mask in masks:
        counted = counted if mask is None else counted & mask
    return counted
