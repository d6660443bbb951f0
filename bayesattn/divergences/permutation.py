r"""Permutation test: whether two clouds are further apart than chance splits of their union are.

.. math:: p = \frac{1 + \#\{b : T(\pi_b) \ge T\}}{1 + B}, \qquad T = s^\top K s, \quad
    s_i = \begin{cases} 1/n & \text{queries} \\ -1/m & \text{keys} \end{cases}

Each :math:`\pi_b` deals the labels "query" and "key" anew among the points that take part, n and m
of them as before. If all deals were equally likely, :math:`P(p \le \alpha) \le \alpha`, whatever
the law of the points. Queries and keys of one sentence are functions of the same tokens, in pairs,
and tokens depend on each other; so this is a test of the two clouds as sets, and p says how rare
the split at hand is among the splits of these very points, not more. Of many heads some are below
:math:`\alpha` by chance.

Source:
    Phipson and Smyth (2010), Permutation p-values should never be zero, arXiv:1603.05766, for p;
    Gretton et al. (2012), A kernel two-sample test, JMLR 13, lemma 6, for the form.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bayesattn.autocasting import full_precision
from bayesattn.divergences.energy import Energy
from bayesattn.divergences.kernel_discrepancy import MMD, with_pooled_median
from bayesattn.divergences.point_clouds import (
    Divergence,
    PointClouds,
    Weights,
    weighted_clouds,
)

__all__ = ["PermutationTest", "permutation_test"]

# Labels that are held at once.
_ENTRIES = 2**22


class PermutationTest(NamedTuple):
    """A statistic, and what chance gives in its place.

    Attributes:
        statistic: Of the clouds as they are.
        null: Of random splits of their union; ties with the statistic are exact.
    """

    statistic: Float[Tensor, "*batch"]
    null: Float[Tensor, "draw *batch"]

    @property
    def p_value(self) -> Float[Tensor, "*batch"]:
        """Part of the splits, the one at hand among them, whose statistic is as large as its.

        NaN where the statistic is.
        """
        # A split that has none counts as larger, lest p be too small.
        as_large = (~(self.null < self.statistic)).sum(0)
        part = (1 + as_large).to(self.null.dtype) / (1 + len(self.null))
        return torch.where(self.statistic.isnan(), torch.nan, part)

    def mean(self, axis: int = 0) -> "PermutationTest":
        """The test of the mean statistic over a batch axis, such as that of sentences.

        Splits are drawn within each sentence, never across, so it asks of a head whether queries
        and keys of one sentence differ, however much sentences do.
        """
        axis = range(self.statistic.ndim)[axis]
        statistic, size = self.statistic.mean(axis), self.statistic.abs().mean(axis)
        return _with_ties(statistic, self.null.mean(axis + 1), size)


@torch.no_grad()
def permutation_test(
    query: Float[Tensor, "*#batch query dim"],
    key: Float[Tensor, "*#batch key dim"],
    query_mask: Bool[Tensor, "*#batch query"] | None = None,
    key_mask: Bool[Tensor, "*#batch key"] | None = None,
    weights: Weights | None = None,
    *,
    statistic: Divergence | None = None,
    num_permutations: int = 200,
    seed: int | torch.Generator = 0,
) -> PermutationTest:
    """Test whether two clouds are further apart than random splits of their union.

    It takes for granted that all splits are equally likely. Queries and keys of one sentence come
    in pairs, from the same tokens: clouds that differ by a shift of each pair are then nearer than
    most splits, and p is near one. It says how rare a split is among those of these very points.

    Args:
        query: First cloud.
        key: Second cloud.
        query_mask: True takes part; what does not is not permuted either.
        key_mask: True takes part.
        weights: None. Points of unequal weights cannot change places.
        statistic: A divergence, squared MMD by default. MMD and energy distance, as V-statistics,
            take one Gram matrix of the points of all batch elements, held at once, for all
            permutations; any other divergence is evaluated anew for each of them.
        num_permutations: How many are drawn, for each batch element its own; p is no less than one
            over one more.
        seed: A whole number for the same permutations at every call; a generator for new ones.

    Returns:
        Its ``p_value`` is that of each batch element; ``.mean(0).p_value`` that of all sentences
        together, where these are the first axis.

    Raises:
        ValueError: As :func:`~bayesattn.divergences.weighted_clouds` does; if there are weights; or
            if there is no permutation.
    """
    if weights is not None and any(side is not None for side in weights):
        raise ValueError("weights: expected None, for equal weights, in a permutation test")
    if num_permutations < 1:
        raise ValueError(f"num_permutations: expected at least one, got {num_permutations}")
    clouds = weighted_clouds(query, key, query_mask, key_mask)
    statistic = MMD() if statistic is None else statistic
    with full_precision(clouds.query):
        gram = _gram(statistic, clouds)
        evaluate = _by_masks(statistic, clouds) if gram is None else _by_products(gram, clouds)
        is_query = torch.cat([clouds.query_mask, torch.zeros_like(clouds.key_mask)], -1)
        observed, spread = evaluate(is_query[None])
        parts = []
        for splits in _random_splits(clouds, num_permutations, seed):
            values, size = evaluate(splits)
            spread = torch.maximum(spread, size)
            parts.append(values)
    return _with_ties(observed[0], torch.cat(parts), spread)


def _with_ties(statistic: Tensor, null: Tensor, size: Tensor) -> PermutationTest:
    """Take for the statistic what is no further from it than rounding at some size may bring it.

    The same split of the points, or one that mirrors it, must not lose its tie.
    """
    is_tie = (null - statistic).abs() <= 16 * torch.finfo(null.dtype).eps * size
    return PermutationTest(statistic, torch.where(is_tie, statistic, null))


# From labels, True for a query, "draw *batch point", to statistics "draw *batch", and how large are
# the numbers "*batch" that they were rounded among.
_Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


def _gram(statistic: Divergence, clouds: PointClouds) -> Tensor | None:
    """Of all points, queries before keys: the matrix whose quadratic form the statistic is."""
    points = torch.cat([clouds.query, clouds.key], -2)
    if isinstance(statistic, MMD) and not statistic.unbiased:
        return with_pooled_median(statistic.kernel, clouds).gram(points, points)
    if isinstance(statistic, Energy) and not statistic.unbiased:
        # From differences, as the divergence itself takes them.
        return -torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return None


def _by_products(gram: Tensor, clouds: PointClouds) -> _Evaluate:
    live = _live(clouds)
    # Signs sum to zero, so that means drop out of the form, and with them most of its rounding.
    share = live.to(gram.dtype) / live.sum(-1, keepdim=True)
    rows, columns = (gram * share[..., None, :]).sum(-1, keepdim=True), share[..., None, :] @ gram
    gram = gram - rows - columns + columns @ share[..., None]
    largest = gram.abs().amax((-2, -1))
    sides = (clouds.query_mask, clouds.key_mask)
    per_query, per_key = (1 / mask.sum(-1, keepdim=True).to(gram.dtype) for mask in sides)

    def evaluate(is_query: Tensor) -> tuple[Tensor, Tensor]:
        signs = torch.where(is_query, per_query, torch.where(live, -per_key, 0.0)).movedim(0, -2)
        return ((signs @ gram) * signs).sum(-1).movedim(-1, 0).clamp_min(0.0), largest

    return evaluate


def _by_masks(statistic: Divergence, clouds: PointClouds) -> _Evaluate:
    points, live = torch.cat([clouds.query, clouds.key], -2), _live(clouds)

    def evaluate(is_query: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.stack([statistic(points, points, some, live & ~some) for some in is_query])
        return values, values.abs().amax(0)

    return evaluate


def _random_splits(
    clouds: PointClouds, count: int, seed: int | torch.Generator
) -> Iterator[Tensor]:
    """Labels, True for a query, "draw *batch point", some draws at a time."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    live, last = _live(clouds), clouds.query_mask.sum(-1)[..., None] - 1
    live, last = live.to(generator.device), last.to(generator.device)
    some = max(1, _ENTRIES // live.numel())
    for first in range(0, count, some):
        shape = (min(some, count - first), *live.shape)
        places = torch.rand(
            shape, generator=generator, dtype=torch.float64, device=generator.device
        )
        # Queries are the points in the first places; who takes no part comes after all.
        places = torch.where(live, places, torch.inf)
        bound = places.sort(-1).values.take_along_dim(last[None], -1)
        yield (places <= bound).to(clouds.query.device)


def _live(clouds: PointClouds) -> Tensor:
    return torch.cat([clouds.query_mask, clouds.key_mask], -1)
