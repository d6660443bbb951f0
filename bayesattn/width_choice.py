"""The width of shared projections by an error that is allowed."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from bayesattn.factorization import Factorization, factorize

__all__ = ["width_for_error"]

Number = float | int


def width_for_error(
    query_weight: Float[Tensor, "..."],
    key_weight: Float[Tensor, "..."],
    error: Number,
    **settings: Any,
) -> Factorization:
    """Find the smallest width at which one layer's relative error is no larger.

    By bisection between one component and all heads side by side, which lose nothing. Errors fall
    with the width as far as the sweeps find what is there, so the width is the smallest found, not
    the smallest that there is; no width is tried whose lower bound is above the error.

    Args:
        query_weight: "head dim query_feature", of one layer.
        key_weight: "head dim key_feature".
        error: Allowed relative error.
        **settings: As for :func:`bayesattn.factorize`.

    Raises:
        ValueError: If the error is negative, or as for :func:`bayesattn.factorize`.
    """
    if not error >= 0:
        raise ValueError(f"error: expected none or more, got {error}")
    if query_weight.ndim != 3:
        raise ValueError(
            "query_weight: expected 'head dim feature' of one layer, got "
            f"{tuple(query_weight.shape)}"
        )
    low, high = 0, query_weight.shape[0] * query_weight.shape[1]
    best = factorize(query_weight, key_weight, high, **settings)
    while high - low > 1:
        width = (low + high) // 2
        # Without a sweep the bound costs next to nothing.
        found = factorize(
            query_weight, key_weight, width, **{**settings, "start": "heads", "num_iterations": 0}
        )
        if float(found.lower_bound) <= error:
            found = factorize(query_weight, key_weight, width, **settings)
        if float(found.relative_error) <= error:
            best, high = found, width
        else:
            low = width
    return best
