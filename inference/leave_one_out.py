"""Expected log predictive density on the training data: leave-one-out where that is valid.

Pareto-smoothed importance sampling takes draws of the posterior, some hundred of them, as Markov
chains and guides give them. Particles are few and repel each other: for them the log pointwise
predictive density stands, which has seen what it predicts and is too high.

Source:
    Vehtari, Gelman and Gabry (2017), Practical Bayesian model evaluation using leave-one-out
    cross-validation and WAIC, arXiv:1507.04544.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import arviz
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.inference.arviz_tree import build_tree, to_arviz_object
from bayesattn.inference.common_scale import worth
from bayesattn.inference.held_out_scores import predictive_density
from bayesattn.inference.posterior import Posterior

__all__ = ["elpd_table", "pointwise"]

LEAST_DRAWS = 200
_GOOD_K = 0.7
_VALID = ("markov", "iid_guide")


def pointwise(likelihood: Mapping[str, Tensor]) -> Float[Tensor, "chain draw observation"]:
    """Lay the observations of all sites out side by side, less those that are masked."""
    flat = torch.cat([value.double().cpu().flatten(2) for value in likelihood.values()], 2)
    return flat[..., (flat != 0).any(0).any(0)]


def elpd_table(
    posteriors: Mapping[str, Posterior], notes: list[str], chunk_size: int | None = None
) -> pd.DataFrame | None:
    """Score each posterior on its training data.

    Args:
        posteriors: By name.
        notes: What the table cannot say is added here.
        chunk_size: Most draws evaluated at once.

    Returns:
        One row for each posterior whose likelihood is known, None without any. ``kind`` says
        whether ``elpd`` is ``"loo"`` or ``"lppd"``; ``lppd`` is given for all. Where two or more
        have a leave-one-out, the columns of :func:`arviz.compare` are beside it.
    """
    rows, valid = {}, {}
    for name, posterior in posteriors.items():
        values = _training_likelihood(posterior, chunk_size)
        if values is None or values.shape[2] == 0:
            continue
        density = predictive_density(values)
        rows[name] = _row("lppd", float(density.sum()), _error(density), float(density.sum()))
        draws = posterior.num_chains * posterior.num_draws
        if posterior.draws_are in _VALID and draws >= LEAST_DRAWS and len(density) > 1:
            valid[name] = _leave_one_out(values, worth(posterior) / draws)
            rows[name] = _loo_row(valid[name], rows[name]["lppd"])
            if bad := rows[name]["pareto_k_above_0.7"]:
                notes.append(
                    f"{name}: leave-one-out is not to be trusted: Pareto's k is above {_GOOD_K} at "
                    f"{bad} of {len(density)} observations"
                )
    if not rows:
        return None
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "posterior"
    return table.join(_differences(valid, notes)) if len(valid) > 1 else table


def _training_likelihood(posterior: Posterior, chunk_size: int | None) -> Tensor | None:
    if posterior.model is None or not (posterior.args or posterior.kwargs):
        return None
    try:
        return pointwise(posterior.log_likelihood(chunk_size=chunk_size))
    except ValueError:
        # Nothing observed, or no likelihood of single observations: there is nothing to score.
        return None


def _leave_one_out(values: Tensor, efficiency: float) -> Any:
    chain_draw, observed = ("chain", "draw"), values.numpy()
    tree = build_tree(
        {
            "posterior": {"joint": (chain_draw, observed.sum(-1))},
            "log_likelihood": {"pointwise": ((*chain_draw, "observation"), observed)},
        }
    )
    with warnings.catch_warnings():
        # The table has a column for Pareto's k.
        warnings.simplefilter("ignore", UserWarning)
        data = to_arviz_object(tree)
        return arviz.loo(data, var_name="pointwise", reff=efficiency, pointwise=True)


def _row(kind: str, elpd: float, error: float, lppd: float) -> dict[str, Any]:
    return {
        "kind": kind,
        "elpd": elpd,
        "se": error,
        "lppd": lppd,
        "effective_parameters": math.nan,
        "pareto_k_above_0.7": math.nan,
    }


def _loo_row(loo: Any, lppd: float) -> dict[str, Any]:
    # The names of ArviZ 1, and before that of 0.23.
    elpd, parameters = (
        (loo.elpd, loo.p) if hasattr(loo, "elpd") else (loo["elpd_loo"], loo["p_loo"])
    )
    return {
        **_row("loo", float(elpd), float(loo.se), lppd),
        "effective_parameters": float(parameters),
        "pareto_k_above_0.7": int((np.asarray(loo.pareto_k) > _GOOD_K).sum()),
    }


def _differences(valid: Mapping[str, Any], notes: list[str]) -> pd.DataFrame:
    try:
        with warnings.catch_warnings():
            # ArviZ calls pandas in ways that are going out of use.
            warnings.simplefilter("ignore")
            table: Any = arviz.compare(dict(valid))
    except ValueError as error:
        notes.append(f"no differences of elpd: {error}")
        return pd.DataFrame(index=pd.Index(valid, name="posterior"))
    return table[[name for name in ("rank", "elpd_diff", "dse", "weight") if name in table]]


def _error(density: Float[Tensor, " observation"]) -> float:
    """Standard error of the sum."""
    return float(density.std() * math.sqrt(len(density))) if len(density) > 1 else math.nan
