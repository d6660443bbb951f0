r"""What a Pyro program says at the draws of its posterior: predictions and pointwise log densities.

.. math:: \tilde y^{(s)} \sim p(\tilde y \mid x^{(s)}), \qquad \log p(y_i \mid x^{(s)})

Discrete sites that inference summed out are drawn given the draw and the data for predictions, and
summed out again for likelihoods.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pyro.distributions.util import scale_and_mask
from torch import Tensor

from bayesattn.inference import enumeration
from bayesattn.inference.replay import Replay

__all__ = ["log_likelihood", "log_prior", "predict", "prior_predict", "resample_observed"]


def predict(replay: Replay, sites: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Values of sites in one run per draw.

    Args:
        replay: The program at the draws.
        sites: Which ones; by default all deterministic sites and all that are neither observed nor
            in the draws.

    Raises:
        ValueError: If a site is unknown, or there is none to predict.
    """
    chosen = replay.names("deterministic", "free") if sites is None else sites
    _check_sites(replay, chosen)
    if not chosen:
        raise ValueError(
            "at these arguments the model has no deterministic or unobserved sites to predict; "
            f"name some with sites=, of {list(replay.sites)}"
        )
    return replay.map(_values_of(chosen), summed_out=_summed_out(replay))


def resample_observed(replay: Replay, sites: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Values of sites where the observed sites are drawn anew: replicates of the data.

    Args:
        replay: The program at the draws, with its observations.
        sites: Which ones; by default all observed sites.

    Raises:
        ValueError: If a site is unknown, or nothing is observed.
    """
    observed = replay.names("observed")
    if not observed:
        raise ValueError(
            "no site is observed at these arguments, so there is nothing to draw anew; use predict"
        )
    chosen = observed if sites is None else sites
    _check_sites(replay, chosen)
    return replay.map(_values_of(chosen), resample=observed, summed_out=_summed_out(replay))


def prior_predict(replay: Replay) -> dict[str, Tensor]:
    """Values of all sites but factors, where everything is drawn from the program itself."""
    chosen = replay.names("free", "deterministic", "observed")
    return replay.map(_values_of(chosen), resample=replay.names("observed"))


def log_likelihood(replay: Replay, likelihood_sites: Iterable[str] = ()) -> dict[str, Tensor]:
    """Log likelihood of each observation at each draw, in nats: unscaled, zero where masked.

    Args:
        replay: The program at the draws, with its observations.
        likelihood_sites: Names of :func:`pyro.factor` sites that are likelihoods too.

    Returns:
        Observed site to ``(row, *batch_shape)``; event axes are summed.

    Raises:
        ValueError: If nothing is observed, if a named site is no factor, or if the likelihood hangs
            on a site whose values are not known.
    """
    factors = likelihood_sites if isinstance(likelihood_sites, str) else list(likelihood_sites)
    _check_sites(replay, factors)
    known = replay.names("factor", "observed")
    wrong = [name for name in factors if name not in known]
    if wrong:
        raise ValueError(
            f"likelihood_sites must name pyro.factor sites, {replay.names('factor')}; got {wrong}"
        )
    chosen = [n for n in known if n in factors or replay.sites[n].kind == "observed"]
    if not chosen:
        raise ValueError(
            "no site is observed at these arguments, so there is no likelihood; name factors that "
            f"are likelihoods with likelihood_sites=, of {replay.names('factor')}"
        )
    unknown = [name for name in replay.names("free") if name not in replay.summable]
    if unknown:
        raise ValueError(
            f"sites {unknown} are neither observed nor in the draws, so the likelihood given the "
            "draws alone is not known"
        )
    if not replay.names("free"):
        return replay.map(lambda trace: {name: _log_prob(trace.nodes[name]) for name in chosen})
    axis = replay.first_free_axis
    return replay.map(
        lambda trace: enumeration.pointwise_log_likelihood(trace, tuple(chosen)),
        handler=lambda model: enumeration.enumerated(model, axis),
    )


def log_prior(replay: Replay) -> dict[str, Tensor]:
    """Log prior density of each given site at each draw, in nats, scaled and masked as it counts.

    Returns:
        Site to ``(row, *batch_shape)``, less the sites whose prior hangs on a discrete site that is
        summed out.
    """
    axis = replay.first_free_axis

    def densities(trace: Any) -> dict[str, Tensor]:
        nodes = {name: trace.nodes[name] for name in replay.names("given")}
        terms = {name: _log_prob(node, node["scale"]) for name, node in nodes.items()}
        return {name: term for name, term in terms.items() if term.ndim < -axis}

    return replay.map(densities, handler=lambda model: enumeration.enumerated(model, axis))


def _values_of(names: Sequence[str]) -> Any:
    return lambda trace: {name: trace.nodes[name]["value"] for name in names}


def _log_prob(node: Mapping[str, Any], scale: Any = 1.0) -> Tensor:
    return scale_and_mask(node["fn"].log_prob(node["value"]), scale, node["mask"])


def _summed_out(replay: Replay) -> list[str]:
    """Discrete sites on which the observations bear, so that the program cannot just draw them."""
    return replay.summable if replay.names("observed", "factor") else []


def _check_sites(replay: Replay, names: Iterable[str]) -> None:
    if isinstance(names, str):
        raise ValueError(f"sites must be a list of names, got the text {names!r}")
    unknown = [name for name in names if name not in replay.sites]
    if unknown:
        raise ValueError(f"the model has no sites {unknown}; its sites are {list(replay.sites)}")
