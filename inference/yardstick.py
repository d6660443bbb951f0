"""One reference that posteriors are measured by: what of them can be compared, and how."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayesattn.inference.common_scale import common_clouds, nearly_independent, pooled, worth
from bayesattn.inference.distances import Distances
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.recording import RecordingError
from bayesattn.inference.site_errors import errors_by_site, site_values
from bayesattn.inference.stein_discrepancy import ksd

__all__ = ["REFERENCE", "Yardstick", "about"]

REFERENCE = "reference"


class Yardstick:
    """A reference, with what all comparisons to it share.

    Args:
        reference: What is taken for right.
        sites: To compare by; None for those that both posteriors have.
        num_null: How many times exact draws are simulated.
        max_draws: Most draws for distances.
        seed: For simulations and projections.
        notes: What is left out or thinned is added here.
        chunk_size: Most draws evaluated at once.
    """

    def __init__(
        self,
        reference: Posterior,
        sites: Sequence[str] | None,
        num_null: int,
        max_draws: int,
        seed: int,
        notes: list[str],
        chunk_size: int | None = None,
    ):
        self.reference, self.sites, self.notes = reference, sites, notes
        self.chunk_size = chunk_size
        self.num_null, self.max_draws, self.seed = num_null, max_draws, seed
        self.exact = self._thinned(REFERENCE, reference)
        self._values: dict[str, Tensor] = {}
        self._distances: list[Distances] = []

    def chosen_sites(self, name: str, other: Posterior) -> list[str]:
        """Sites to compare one posterior by.

        Raises:
            ValueError: If there are none.
        """
        first, is_heads = self.reference.draws, other.draws_are == "heads"
        if is_heads:
            self.notes.append(
                f"{name}: draws are the heads of one network, so latent sites and distances are "
                "left blank; of deterministic sites, each restart is one draw"
            )
        if self.sites is not None:
            return [site for site in self.sites if not (is_heads and site in first)]
        if is_heads:
            computable = _deterministic(other)
            return [site for site in _deterministic(self.reference) if site in computable]
        shared = [site for site in first if site in other.draws]
        if not shared:
            raise ValueError(
                f"{name} must share a site with the reference, whose sites are {list(first)}; got "
                f"{list(other.draws)}"
            )
        left_out = [site for site in (*first, *other.draws) if site not in shared]
        if left_out:
            self.notes.append(f"{name}: sites {left_out} left out, which only one of the two has")
        return shared

    def site_rows(
        self, name: str, other: Posterior, sites: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Errors of moments, by site.

        Raises:
            ValueError: If a site cannot be had, or has another shape than in the reference.
        """
        missing = [site for site in sites if site not in self._values]
        self._values |= self._values_of(REFERENCE, self.reference, missing)
        true = {site: self._values[site] for site in sites}
        found = self._values_of(name, other, sites)
        for site, values in found.items():
            expected, got = tuple(true[site].shape[2:]), tuple(values.shape[2:])
            if expected != got:
                raise ValueError(
                    f"site {site!r} of {name} must have shape {expected} as in the reference, got "
                    f"{got}"
                )
        settings: dict[str, Any] = {"num_null": self.num_null, "seed": self.seed}
        return errors_by_site(true, found, exact=self.reference, draws=other, **settings)

    def reference_row(self) -> dict[str, Any]:
        """What the reference's run says of itself, and how many of its draws distances use."""
        row = {**about(self.reference), "draws": self.exact.num_chains * self.exact.num_draws}
        return row | self._stein_discrepancy(self.exact)

    def joint_row(self, name: str, other: Posterior, sites: Sequence[str]) -> dict[str, Any]:
        """Distances between joint draws, and what the run says of itself."""
        row = about(other)
        latent = [site for site in sites if site in self.exact.draws and site in other.draws]
        if other.draws_are == "heads" or not latent:
            return row
        thin = self._thinned(name, other)
        clouds = common_clouds(self.exact, thin, None if self.sites is None else latent)
        if clouds.num_constant:
            self.notes.append(
                f"{name}: {clouds.num_constant} entries that do not vary in the reference left out"
            )
        if not clouds.reference.shape[1]:
            return row
        row |= {"draws": len(clouds.draws), "dims": clouds.reference.shape[1]}
        figures = self._distances_to(clouds.reference).figures(clouds.draws)
        return {**row, "scale": clouds.scale, **figures, **self._stein_discrepancy(thin)}

    def _stein_discrepancy(self, posterior: Posterior) -> dict[str, float]:
        """In the reference's standard deviations; nothing where the program does not give it."""
        line = self.reference.unconstrained
        if line is None or posterior.model is None or not (posterior.args or posterior.kwargs):
            return {}
        scale = pooled(line).std(0)
        if not (scale > 0).all() or self.sites is not None:
            return {}
        try:
            found = ksd(posterior, scale=scale, num_bootstrap=1, chunk_size=self.chunk_size)
        except (ValueError, RecordingError):
            return {}
        return {"ksd": found.ksd, "ksd_squared": found.squared}

    def _thinned(self, name: str, posterior: Posterior) -> Posterior:
        thin = nearly_independent(posterior, self.max_draws)
        total, kept = (p.num_chains * p.num_draws for p in (posterior, thin))
        is_chain = posterior.draws_are == "markov"
        if kept < total:
            worthy = f", worth {worth(posterior):.0f} independent ones," if is_chain else ""
            self.notes.append(f"{name}: {total} draws{worthy} thinned to {kept} for distances")
        return thin

    def _values_of(
        self, name: str, posterior: Posterior, sites: Sequence[str]
    ) -> dict[str, Tensor]:
        try:
            return site_values(posterior, sites, self.max_draws)
        except ValueError as error:
            raise ValueError(f"sites {list(sites)} cannot be had of {name}: {error}") from error

    def _distances_to(self, cloud: Tensor) -> Distances:
        """Nulls are simulated once where several posteriors share all sites."""
        for known in self._distances:
            if torch.equal(known.reference, cloud):
                return known
        self._distances.append(Distances(cloud, self.num_null, self.seed))
        return self._distances[-1]


def about(posterior: Posterior) -> dict[str, Any]:
    """What a posterior says of itself."""
    known = {name: posterior.attrs.get(name) for name in ("seconds", "gradient_evaluations")}
    return {
        "method": posterior.method,
        "draws_are": posterior.draws_are,
        "draws": posterior.num_chains * posterior.num_draws,
        **{name: math.nan if value is None else float(value) for name, value in known.items()},
    }


def _deterministic(posterior: Posterior) -> list[str]:
    """Deterministic sites at the training arguments, none where these are not known."""
    if posterior.model is None or not (posterior.args or posterior.kwargs):
        return []
    return [name for name, site in posterior.training_sites.items() if site.kind == "deterministic"]
