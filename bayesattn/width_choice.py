"""The width of shared projections by an error that is allowed."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.alternating_least_squares import HeadProducts
from bayesattn.argument_checks import check_not_negative, check_type
from bayesattn.autocasting import full_precision
from bayesattn.factor_errors import lower_bounds, over
from bayesattn.factorization import Factorization, factorize
from bayesattn.head_decomposition import head_factors
from bayesattn.token_weighting import weighed_products

__all__ = ["width_for_error"]

Number = float | int

# Bounds and errors are told to this part of themselves at least.
_MARGIN = 1e-6


def width_for_error(
    query_weight: Float[Tensor, "..."],
    key_weight: Float[Tensor, "..."],
    error: Number,
    **settings: Any,
) -> Factorization:
    """Find the smallest width at which one layer's relative error is no larger.

    By bisection between the lower bound and the width at which heads apart are near enough; both
    are known without a sweep. Errors fall with the width as far as the sweeps find what is there,
    so the width is the smallest found, not the smallest that there is. Where the start that is
    asked for finds less than heads apart, those are taken.

    Args:
        query_weight: "head dim query_feature", of one layer.
        key_weight: "head dim key_feature".
        error: Allowed relative error.
        **settings: As for :func:`bayesattn.factorize`.

    Raises:
        ValueError: If the error is negative, or as for :func:`bayesattn.factorize`.
    """
    check_not_negative("error", error)
    check_type("query_weight", query_weight, Tensor)
    if query_weight.ndim != 3:
        raise ValueError(
            "query_weight: expected 'head dim feature' of one layer, got "
            f"{tuple(query_weight.shape)}"
        )
    moments = {name: settings.get(name) for name in ("query_moment", "key_moment")}
    with full_precision(query_weight):
        products = weighed_products(query_weight, key_weight, **moments).products
        bounds, apart = lower_bounds(products)[0], _errors_apart(products)
    # Errors of growing widths fall: one more than those that are too large.
    low = int((bounds > error * (1 + _MARGIN)).sum())
    high = min(1 + int((apart > error * (1 - _MARGIN)).sum()), len(apart))
    best = None
    while high - low > 1:
        width = (low + high) // 2
        found = _found(query_weight, key_weight, width, settings)
        if float(found.relative_error) <= error:
            best, high = found, width
        else:
            low = width
    if best is None:
        best = _found(query_weight, key_weight, high, settings)
        if float(best.relative_error) > error:
            best = factorize(query_weight, key_weight, high, **{**settings, "start": "heads"})
    return best


def _found(query: Tensor, key: Tensor, width: int, settings: dict[str, Any]) -> Factorization:
    if settings.get("start") == "algebraic" and width > min(query.shape[-1], key.shape[-1]):
        settings = {**settings, "start": "heads"}
    return factorize(query, key, width, **settings)


def _errors_apart(products: HeadProducts) -> Float[Tensor, " width"]:
    """Relative errors of heads' singular vectors at width one, two, and so on, of one layer."""
    factors = head_factors(
        *(products.by_head(side.double()) for side in (products.query, products.key))
    )
    squares = factors.values[0].square().flatten().sort(descending=True).values
    tails = squares.flip(0).cumsum(0).flip(0)
    return over(torch.cat([tails[1:], tails.new_zeros(1)]), tails[:1]).sqrt()
