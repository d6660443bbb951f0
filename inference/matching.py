r"""One order for exchangeable heads in all draws.

.. math:: \min_{\pi_s, \mu} \sum_s \sum_k \| f_{s, \pi_s(k)} - \mu_k \|^2

over a permutation of the heads for each draw and a mean for each slot, by turns.

Source:
    Stephens (2000), Dealing with label switching in mixture models, JRSS B 62; the assignment is
    SciPy's.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayesattn.inference.posterior import Posterior

__all__ = ["match_heads", "matched"]

_MAX_PASSES = 100


def match_heads(
    features: Float[Tensor, "chain draw head feature"],
) -> Int[Tensor, "chain draw head"]:
    """Find the order of the heads of each draw in which they resemble those of all others most.

    Args:
        features: What heads are told apart by, in comparable units.

    Returns:
        For each draw a permutation: entry k is the head that belongs in slot k; the first draw
        keeps its order. Each pass lowers the sum of squares, down to a local minimum.
    """
    rows = features.detach().flatten(0, 1).double().cpu().numpy()
    order = np.tile(np.arange(rows.shape[1]), (len(rows), 1))
    total = rows[0].copy()
    for index in range(1, len(rows)):
        order[index] = _assign(total / index, rows[index])
        total += rows[index][order[index]]
    for _ in range(_MAX_PASSES):
        mean = np.take_along_axis(rows, order[:, :, None], 1).mean(0)
        better = np.stack([_assign(mean, row) for row in rows])
        if np.array_equal(better, order):
            break
        order = better
    order = order[:, np.argsort(order[0])]
    found = torch.from_numpy(order).to(features.device)
    return found.unflatten(0, features.shape[:2])


def matched(
    posterior: Posterior,
    plate: str,
    *,
    by: Sequence[str] | None = None,
    blocks: Mapping[str, int] | None = None,
) -> Posterior:
    """Put the slices of a plate in one order; arguments are those of :meth:`Posterior.match`.

    Raises:
        ValueError: If no site is in the plate, ``by`` names another site, or a block does not fit.
    """
    blocks = blocks or {}
    are_draws = plate == posterior.particle_plate
    axes = dict.fromkeys(posterior.draws, 0) if are_draws else _axes(posterior, plate)
    if not axes:
        raise ValueError(f"no site is in a plate {plate!r}; sites: {list(posterior.draws)}")
    deciding = list(axes) if by is None else list(by)
    if not deciding or not set(deciding) <= axes.keys():
        raise ValueError(f"by must name sites in the plate {plate!r}, of {list(axes)}; got {by}")
    slices = (posterior.draws[name].movedim(axes[name] + 2, 2) for name in deciding)
    if are_draws:
        # A chain is one draw of the network: (chain, 1, head, ...).
        slices = (posterior.draws[name].unsqueeze(1) for name in deciding)
    permutation = match_heads(torch.cat([_features(value) for value in slices], -1))
    if are_draws:
        return _with_draws_ordered(posterior, permutation[:, 0], blocks)
    draws = {
        name: _ordered(value, permutation, axes[name] + 2) if name in axes else value
        for name, value in posterior.draws.items()
    }
    draws |= _ordered_blocks(
        {name: value for name, value in posterior.draws.items() if name not in axes},
        permutation,
        blocks,
    )
    name = f"{plate}_permutation"
    earlier = posterior.sample_stats.get(name)
    total = permutation if earlier is None else earlier.gather(-1, permutation)
    return posterior.replace(
        draws=draws,
        sample_stats={**posterior.sample_stats, name: total},
        # Its layout is the routine's own, so that it cannot follow.
        unconstrained=None,
        site_dims={**posterior.site_dims, name: (plate,)},
    )


def _with_draws_ordered(
    posterior: Posterior, permutation: Tensor, blocks: Mapping[str, int]
) -> Posterior:
    """Reorder draws that are heads themselves, and what their network has in blocks of heads."""
    name = f"{posterior.particle_plate}_permutation"
    earlier = posterior.sample_stats.get(name)

    def ordered(value: Tensor) -> Tensor:
        return _ordered(value, permutation, 1)

    unconstrained = posterior.unconstrained
    return posterior.replace(
        draws={name: ordered(value) for name, value in posterior.draws.items()},
        unconstrained=None if unconstrained is None else ordered(unconstrained),
        sample_stats={
            **{name: ordered(value) for name, value in posterior.sample_stats.items()},
            name: permutation if earlier is None else ordered(earlier),
        },
        point_estimates={
            **posterior.point_estimates,
            **_ordered_blocks(posterior.point_estimates, permutation, blocks),
        },
    )


def _axes(posterior: Posterior, plate: str) -> dict[str, int]:
    """Where each site has the plate, counted from the left of its own shape."""
    axes = {}
    sites = {} if posterior.model is None else posterior.training_sites
    for name, value in posterior.draws.items():
        if name in sites:
            names = sites[name].axis_names
        else:
            known = list(posterior.site_dims.get(name, ()))
            names = [None] * (value.ndim - 2 - len(known)) + known
        if plate in names:
            axes[name] = names.index(plate)
    return axes


def _features(slices: Float[Tensor, "chain draw head *shape"]) -> Tensor:
    """What tells the heads of a site apart, on the site's own scale so that sites count alike."""
    spread = slices.double().std()
    return slices.reshape(*slices.shape[:3], -1) / (spread if spread > 0 else 1.0)


def _ordered(value: Tensor, permutation: Int[Tensor, "*lead head"], axis: int) -> Tensor:
    """Take the entries of an axis in another order for each leading index."""
    place = permutation.ndim - 1
    moved = value.movedim(axis, place)
    index = permutation.to(value.device).reshape(
        permutation.shape + (1,) * (moved.ndim - permutation.ndim)
    )
    return moved.take_along_dim(index, place).movedim(place, axis)


def _ordered_blocks(
    values: Mapping[str, Tensor],
    permutation: Int[Tensor, "*lead head"],
    blocks: Mapping[str, int],
) -> dict[str, Tensor]:
    """Reorder equal blocks along an axis of each named site."""
    lead, num_heads = permutation.ndim - 1, permutation.shape[-1]
    result = {}
    for name, axis in blocks.items():
        if name not in values:
            raise ValueError(
                f"blocks must name sites outside of the plate, {list(values)}; got {name!r}"
            )
        value = values[name]
        shape = tuple(value.shape[lead:])
        if not -len(shape) <= axis < len(shape) or shape[axis] % num_heads:
            raise ValueError(
                f"blocks[{name!r}] must be an axis of {shape} that divides into {num_heads} "
                f"blocks, got {axis}"
            )
        place = lead + axis % len(shape)
        split = value.unflatten(place, (num_heads, -1))
        result[name] = _ordered(split, permutation, place).flatten(place, place + 1)
    return result


def _assign(mean: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """Head for each slot: the squares are fixed, so that least is largest inner product."""
    # Half of the import time of this package, for what few sessions use.
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(mean @ heads.T, maximize=True)[1]
