r"""Means over pairs of points from two clouds: V-statistics, and unbiased U-statistics.

.. math:: C = \mathbb E f(x, x') + \mathbb E f(y, y') - 2 \, \mathbb E f(x, y)

Over all pairs, a point with itself included, :math:`C` compares the two empirical laws. Over pairs
of distinct points it is, where weights are equal, an unbiased estimate for the laws that the points
were drawn from.

Source:
    Gretton et al. (2012), A kernel two-sample test, JMLR 13, lemma 6.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.divergences.point_clouds import PointClouds
from bayesattn.divergences.value_checks import has_values

__all__ = ["contrast"]


def contrast(
    clouds: PointClouds,
    query_query: Float[Tensor, "*batch query query"],
    key_key: Float[Tensor, "*batch key key"],
    query_key: Float[Tensor, "*batch query key"],
    *,
    unbiased: bool,
) -> Float[Tensor, "*batch"]:
    """Mean within the queries plus mean within the keys, less twice the mean between them.

    Args:
        clouds: Their weights.
        query_query: A symmetric function of every two queries.
        key_key: The same of every two keys.
        query_key: The same of every query and key.
        unbiased: Leave out the pairs of a point with itself.

    Raises:
        ValueError: If a cloud has no pair of distinct points that such a mean needs.
    """
    between = _weighted_sum(query_key, clouds.query_weights, clouds.key_weights)
    if not unbiased:
        queries = _weighted_sum(query_query, clouds.query_weights, clouds.query_weights)
        return (
            queries + _weighted_sum(key_key, clouds.key_weights, clouds.key_weights) - 2 * between
        )
    queries = _mean_of_distinct("query", query_query, clouds.query_weights)
    return queries + _mean_of_distinct("key", key_key, clouds.key_weights) - 2 * between


def _weighted_sum(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    # No matrix product, which autocast would narrow.
    return (rows * (values * columns[..., None, :]).sum(-1)).sum(-1)


def _mean_of_distinct(name: str, values: Tensor, weights: Tensor) -> Tensor:
    # Each point's weight beside those of all others, summed over them rather than one less it.
    others = 1 - torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    total = _weighted_sum(others, weights, weights)
    if has_values() and not (total > 0).all():
        raise ValueError(
            f"{name}: an unbiased estimate needs two points with weight in each cloud, got one; "
            "use unbiased=False"
        )
    return _weighted_sum(values * others, weights, weights) / total
