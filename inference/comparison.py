"""Posteriors beside a reference: how far off they are, and how far off exact draws would be."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bayesattn.inference.held_out_scores import HeldOut, held_out_predictions
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.yardstick import REFERENCE, Yardstick

if TYPE_CHECKING:
    import pandas  # noqa: ICN001 (the name that a type checker at run time can resolve)
    from matplotlib.figure import Figure

__all__ = ["Comparison", "compare"]

_LEAST_REFERENCE_DRAWS = 4
_LEAST_NULL = 20


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Posteriors beside a reference, as tables; printed, all of them, and what they leave out.

    Attributes:
        sites: One row for each (posterior, site). ``mean_error``: the worst entry's error of the
            mean, in the reference's standard deviations; ``sd_ratio_low`` and ``sd_ratio_high``:
            the range over entries of the ratio of standard deviations. Columns that end in ``_95``
            bound what 95 % of exact samplers with as many draws have.
        joint: One row for each posterior: distances between the draws of all sites at once, of
            standardized coordinates: ``sliced_w1``, and unbiased ``energy`` and ``mmd2`` (with the
            inverse multiquadric kernel at the reference's median distance), each with the mean
            (``_null``) and the 95 % point (``_95``) of what as many exact draws have. Below zero
            are draws that lie more evenly than independent ones. Where they are known, ``ksd``,
            which falls with the number of draws, its unbiased square ``ksd_squared``, ``seconds``
            and ``gradient_evaluations``.
        elpd: Expected log predictive density on the training data, None where it is not known.
        held_out: Scores on held-out data by (posterior, site), None where there are none.
        notes: What is left out or was thinned, and why.
        posteriors: What was compared, the reference first.
        predictions: Held-out predictions: site to posterior to what it predicts.
    """

    sites: "pandas.DataFrame"
    joint: "pandas.DataFrame"
    elpd: "pandas.DataFrame | None" = None
    held_out: "pandas.DataFrame | None" = None
    notes: tuple[str, ...] = ()
    posteriors: Mapping[str, Posterior] = dataclasses.field(default_factory=dict)
    predictions: Mapping[str, Mapping[str, HeldOut]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        from bayesattn.inference import comparison_tables

        return comparison_tables.as_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from bayesattn.inference import comparison_tables

        return comparison_tables.as_html(self)

    def plot_marginals(self, site: str | None = None, **options: Any) -> "Figure":
        """Draw marginal densities over the reference's; see :func:`bayesattn.plots.marginals`.

        Args:
            site: A latent site; the first that all share by default.
            **options: Such as ``coordinates`` and ``title``.
        """
        from bayesattn import plots

        site, drawn = self._drawn(site)
        return plots.marginals(drawn, site=site, reference=REFERENCE, **options)

    def plot_forest(self, site: str | None = None, **options: Any) -> "Figure":
        """Draw means and intervals side by side; see :func:`bayesattn.plots.forest`.

        Args:
            site: A latent site; the first that all share by default.
            **options: Such as ``coordinates``, ``level`` and ``title``.
        """
        from bayesattn import plots

        site, drawn = self._drawn(site)
        return plots.forest(drawn, site=site, **options)

    def plot_calibration(self, site: str | None = None, **options: Any) -> "Figure":
        """Draw how often held-out predictions are right; see :func:`bayesattn.plots.reliability`.

        Args:
            site: An observed site with classes; the first by default.
            **options: Such as ``num_bins`` and ``title``.

        Raises:
            ValueError: If class probabilities on held-out data are not known.
        """
        from bayesattn import plots

        known = {
            name: {who: part for who, part in by.items() if part.probabilities is not None}
            for name, by in self.predictions.items()
        }
        known = {name: by for name, by in known.items() if by}
        site = next(iter(known), None) if site is None else site
        if site not in known:
            raise ValueError(
                "calibration needs held_out= data with a categorical or Bernoulli site; "
                f"got {list(known)}" + ("" if site is None else f", not {site!r}")
            )
        chances = {name: part.probabilities for name, part in known[site].items()}
        labels = next(iter(known[site].values())).labels
        assert labels is not None
        return plots.reliability(
            {name: value for name, value in chances.items() if value is not None}, labels, **options
        )

    def _drawn(self, site: str | None) -> tuple[str, dict[str, Posterior]]:
        """Posteriors that have a site, and the site."""
        whole = {n: p for n, p in self.posteriors.items() if p.draws_are != "heads"}
        first = whole[REFERENCE].draws
        if site is None:
            shared = [name for name in first if all(name in p.draws for p in whole.values())]
            site = shared[0] if shared else next(iter(first))
        if site not in first:
            raise ValueError(f"site must be one of {list(first)}, got {site!r}")
        return site, {name: p for name, p in whole.items() if site in p.draws}


def compare(
    reference: Posterior,
    *,
    held_out: tuple | Mapping[str, Any] | None = None,
    sites: Sequence[str] | None = None,
    num_null: int = 200,
    max_draws: int = 1000,
    chunk_size: int | None = None,
    seed: int = 0,
    **others: Posterior,
) -> Comparison:
    """Hold posteriors against a reference, such as a long run of NUTS.

    Every error stands beside what as many independent draws of the reference would have by chance
    (see :mod:`bayesattn.inference.iid_null`), so that few draws are not taken for wrong ones.
    Markov chains are thinned to nearly independent draws before distances are taken.
    What cannot be had is left blank, with a note.

    Exchangeable sites, such as heads in any order, differ though the posteriors agree: put them in
    one order with :meth:`Posterior.match` first. Where draws are heads, what they predict and
    deterministic sites are compared, not the draws themselves.

    Args:
        reference: What is taken for right.
        held_out: The program's arguments, observations included: a tuple, or a dict of keyword
            arguments, for scores of predictions.
        sites: Latent or deterministic sites; by default all latent sites, and for heads all
            deterministic ones.
        num_null: How many times exact draws are simulated.
        max_draws: Most draws of each posterior for distances, whose time grows with their square.
        chunk_size: Most draws evaluated at once, to bound memory.
        seed: For simulations and projections.
        **others: The posteriors, by name.

    Raises:
        ValueError: If there is nothing to compare, a site has another shape than in the reference,
            or an argument does not fit.

    Example:
        ``print(compare(nuts, svgd=svgd, svi=svi))``
    """
    from bayesattn.inference import comparison_tables
    from bayesattn.inference.leave_one_out import elpd_table

    options = {"num_null": num_null, "max_draws": max_draws, "chunk_size": chunk_size, "seed": seed}
    _check(reference, others, {**options, "held_out": held_out, "sites": sites})
    every = {REFERENCE: reference, **others}
    notes: list[str] = []
    with torch.no_grad():
        yardstick = Yardstick(reference, sites, num_null, max_draws, seed, notes, chunk_size)
        chosen = {name: yardstick.chosen_sites(name, other) for name, other in others.items()}
        parts = {n: yardstick.site_rows(n, other, chosen[n]) for n, other in others.items()}
        joint = {REFERENCE: yardstick.reference_row()}
        joint |= {n: yardstick.joint_row(n, other, chosen[n]) for n, other in others.items()}
        predictions = {}
        if held_out is not None:
            args, kwargs = _arguments(held_out)
            predictions = held_out_predictions(every, args, kwargs, notes, chunk_size)
        elpd = elpd_table(every, notes, chunk_size)
    return Comparison(
        sites=comparison_tables.by_site(parts),
        joint=comparison_tables.by_posterior(joint),
        elpd=elpd,
        held_out=comparison_tables.held_out(predictions) if predictions else None,
        notes=tuple(dict.fromkeys(notes)),
        posteriors=every,
        predictions=predictions,
    )


# Names that no other posterior can bear.
RESERVED = frozenset(inspect.signature(compare).parameters) - {"others"}


def _arguments(held_out: tuple | Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return ((), dict(held_out)) if isinstance(held_out, Mapping) else (tuple(held_out), {})


def _check(
    reference: Posterior, others: Mapping[str, Posterior], options: Mapping[str, Any]
) -> None:
    taken = [name for name, value in options.items() if isinstance(value, Posterior)]
    if taken:
        raise ValueError(
            f"{taken[0]} is an option of compare, so no posterior can bear that name: rename it"
        )
    if not others:
        raise ValueError("compare needs at least one other posterior, by name, got none")
    for name, other in {REFERENCE: reference, **others}.items():
        if not isinstance(other, Posterior):
            raise ValueError(f"{name} must be a Posterior, got {type(other).__name__}")
        if name != REFERENCE and other is reference:
            raise ValueError(f"{name} is the reference itself; give another posterior")
    _check_reference(reference)
    for name in ("num_null", "max_draws"):
        if options[name] < _LEAST_NULL:
            raise ValueError(f"{name} must be at least {_LEAST_NULL}, got {options[name]}")
    sites, held_out = options["sites"], options["held_out"]
    if isinstance(sites, str) or (sites is not None and not list(sites)):
        raise ValueError(f"sites must be a list of at least one name, got {sites!r}")
    if held_out is not None and not isinstance(held_out, tuple | Mapping):
        raise ValueError(
            "held_out must be a tuple of the program's arguments, or a dict of keyword arguments, "
            f"got {type(held_out).__name__}"
        )


def _check_reference(reference: Posterior) -> None:
    draws = reference.num_chains * reference.num_draws
    if reference.draws_are == "heads" or draws < _LEAST_REFERENCE_DRAWS:
        kind = "heads" if reference.draws_are == "heads" else "draws"
        raise ValueError(
            f"reference must have at least {_LEAST_REFERENCE_DRAWS} draws of all sites, got "
            f"{draws} {kind}"
        )
    for site, values in reference.draws.items():
        if not values.isfinite().all():
            raise ValueError(f"reference must be finite, got values of {site!r} that are not")
