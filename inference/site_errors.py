"""Errors of the means and spreads of single sites, beside what exact draws would have."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from bayesattn.inference.common_scale import nearly_independent, pooled, varying, worth
from bayesattn.inference.iid_null import moment_errors, moment_null, random_splits
from bayesattn.inference.posterior import Posterior

__all__ = ["errors_by_site", "site_values"]


def site_values(posterior: Posterior, sites: Iterable[str], most: int) -> dict[str, Tensor]:
    """Draws of latent sites, and deterministic sites at (some of) the draws.

    Args:
        posterior: Whose sites; where draws are heads, only deterministic ones can be had.
        sites: Names.
        most: Deterministic sites are computed at no more draws than this.
    """
    sites = list(sites)
    is_heads = posterior.draws_are == "heads"
    known = {} if is_heads else posterior.draws
    computed = [name for name in sites if name not in known]
    found = {}
    if computed:
        few = posterior if is_heads else nearly_independent(posterior, most)
        found = few.predict(sites=computed, seed=0)
    return {name: known[name] if name in known else found[name] for name in sites}


def errors_by_site(
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    *,
    exact: Posterior,
    draws: Posterior,
    num_null: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    r"""Compare moments site by site, over the entries that vary in the reference.

    Args:
        reference: Site to values, chain draw \*shape.
        other: The same sites of another posterior.
        exact: The reference, for how much its draws are worth.
        draws: The other posterior, likewise.
        num_null: Splits to simulate a null by.
        seed: For the splits.
    """
    rows = {}
    for name, values in reference.items():
        true, found = pooled(values), pooled(other[name])
        kept = varying(true)
        if not kept.any():
            rows[name] = {"entries": 0.0}
            continue
        true, found = true[:, kept], found[:, kept]
        row = {"entries": float(kept.sum())}
        errors = moment_errors(found, true)
        splits = random_splits(
            len(true),
            num_draws=min(len(found), worth(draws)),
            num_reference=min(len(true), worth(exact)),
            num_null=num_null,
            seed=seed,
        )
        null = moment_null(true, splits)
        row |= {"mean_error": float(errors.mean), "mean_error_95": float(null.mean.quantile(0.95))}
        row |= {
            "sd_ratio_low": float(errors.lowest_ratio),
            "sd_ratio_high": float(errors.highest_ratio),
            "sd_ratio_low_95": float(null.lowest_ratio.quantile(0.025)),
            "sd_ratio_high_95": float(null.highest_ratio.quantile(0.975)),
        }
        rows[name] = row
    return rows
