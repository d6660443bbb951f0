r"""Projections that heads share, from the projections that each head has.

.. math:: W_{Q,h}^\top W_{K,h} \approx W_Q^\top \operatorname{diag}(m_h)\, W_K

This is a canonical polyadic decomposition of the heads' products, stacked. They are never formed:
all that is needed are inner products with them, which the two sides give.

Source:
    Cordonnier, Loukas and Jaggi (2020), arXiv:2006.16362, section 4. Starts, bounds, and errors
    weighed by the tokens' second moments are ours.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.alternating_least_squares import (
    Factors,
    HeadProducts,
    explained_norms,
    extrapolated,
    sweep,
)
from bayesattn.factor_starts import START_NAMES, start_factors, unfolding_spectra

__all__ = ["Factorization", "factorize"]

Number = float | int

# Of the second moments' mean; directions that no token takes weigh this much.
_LEAST_MOMENT = 1e-6
# How far ahead a sweep starts, in steps of the last.
_NEAREST, _FARTHEST = 0.3, 1.0
_IDLE_SWEEPS = 3
# Sweeps from each start before the best goes on alone.
_TRIAL_SWEEPS = 10


class Factorization(NamedTuple):
    """Shared projections, and how near they are.

    Components are ordered by their energy. Mixing is as large as in a fresh layer, queries and keys
    are balanced, and of each component the largest entries of mixing and query weight are positive:
    what could be rescaled, permuted or flipped at no change is fixed.

    Attributes:
        query_weight: Of queries.
        mixing: Of each head.
        key_weight: Of keys.
        relative_error: Frobenius norm of all heads' residuals, over that of their products; or of
            the logits of tokens with the given moments.
        head_errors: Of each head.
        lower_bound: Below which no relative error of this width comes.
        history: Relative error after each sweep from the start that was taken; the last stands on
            where other layers needed more.
        starts: Which start was taken for each layer, leading axes flattened.
        converged: Whether three sweeps lowered no layer's error by more than the tolerance.
    """

    query_weight: Float[Tensor, "*layer component query_feature"]
    mixing: Float[Tensor, "*layer head component"]
    key_weight: Float[Tensor, "*layer component key_feature"]
    relative_error: Float[Tensor, "*layer"]
    head_errors: Float[Tensor, "*layer head"]
    lower_bound: Float[Tensor, "*layer"]
    history: Float[Tensor, "*layer sweep"]
    starts: tuple[str, ...]
    converged: bool

    def layer(self, place: int) -> "Factorization":
        """Return that of one layer of a batch."""
        parts = [part[place] if isinstance(part, Tensor) else part for part in self]
        return Factorization(*parts)._replace(starts=self.starts[place : place + 1])  # type: ignore[arg-type]

    def truncated(self, width: int) -> "Factors":
        """The components of the largest energy, as they are: nested widths, not refitted.

        Raises:
            ValueError: If there are not so many.
        """
        if not 1 <= width <= self.query_weight.shape[-2]:
            raise ValueError(
                f"width: expected 1 to {self.query_weight.shape[-2]} components, got {width}"
            )
        return Factors(
            self.query_weight[..., :width, :],
            self.mixing[..., :width],
            self.key_weight[..., :width, :],
        )


def factorize(
    query_weight: Float[Tensor, "..."],
    key_weight: Float[Tensor, "..."],
    width: int,
    *,
    start: str = "best",
    num_iterations: int = 100,
    tolerance: Number = 1e-6,
    query_moment: Float[Tensor, "..."] | None = None,
    key_moment: Float[Tensor, "..."] | None = None,
    seed: int = 0,
) -> Factorization:
    """Find projections that heads share, of a given width.

    Sweeps of alternating least squares with momentum, in the weights' type and at least float32;
    no sweep raises the error, and errors are told in float64. At the width of all heads side by
    side nothing is lost.

    Args:
        query_weight: "*layer head dim query_feature", of one layer or a batch of them.
        key_weight: "*layer head dim key_feature"; repeat those that several heads share.
        width: Number of shared components.
        start: "heads" (each head's singular vectors), "algebraic" (exact where heads share no more
            components than the width, and the width is no more than the features), "random", or
            "best": ten sweeps from each, and then from the best.
        num_iterations: Most sweeps.
        tolerance: Stop once no layer's relative error falls by more in three sweeps.
        query_moment: "*layer query_feature query_feature", or of all layers alike: second moment of
            what asks, to weigh errors by; see :func:`bayesattn.networks.input_moments`.
        key_moment: Likewise, of what is asked.
        seed: Of the random and algebraic starts; global random state is not touched.

    Raises:
        ValueError: If shapes, sizes or names do not fit, or weights or moments are not finite.
    """
    _check(query_weight, key_weight, width, start, num_iterations)
    batch = query_weight.shape[:-3]
    dtype = torch.promote_types(query_weight.dtype, torch.float32)
    sides = [
        weight.detach().to(dtype).flatten(0, -4) if batch else weight.detach().to(dtype)[None]
        for weight in (query_weight, key_weight)
    ]
    roots = [
        None if moment is None else _root(name, moment, side, len(batch))
        for name, moment, side in (
            ("query_moment", query_moment, sides[0]),
            ("key_moment", key_moment, sides[1]),
        )
    ]
    weighed = [
        side if root is None else (side.double() @ root[0][:, None]).to(dtype)
        for side, root in zip(sides, roots, strict=True)
    ]
    products = HeadProducts(*weighed)
    names = START_NAMES if start == "best" else (start,)
    is_exact = width >= products.query.shape[1]
    if is_exact and start == "best":
        names, num_iterations = ("heads",), 0
    factors, history, chosen, converged = _fitted(
        products, width, names, num_iterations, float(tolerance), seed
    )
    head_errors, relative = _errors(products, factors)
    bound = _bound(products, width)
    rows = [
        row if root is None else (row.double() @ root[1]).to(dtype)
        for row, root in zip((factors.query, factors.key), roots, strict=True)
    ]
    dim = query_weight.shape[-2]
    factors = _gauged(Factors(rows[0], factors.mixing, rows[1]), dim)
    parts = (*factors, relative, head_errors, torch.minimum(bound, relative), history)
    query, mixing, key, *told = (part.reshape((*batch, *part.shape[1:])) for part in parts)
    weights = [part.to(query_weight.dtype) for part in (query, mixing, key)]
    return Factorization(*weights, *told, starts=chosen, converged=converged)


def _fitted(
    products: HeadProducts,
    width: int,
    names: tuple[str, ...],
    num_iterations: int,
    tolerance: float,
    seed: int,
) -> tuple[Factors, Tensor, tuple[str, ...], bool]:
    """Factors from the best start of each layer, errors by sweep, and whether they settled."""
    whole = products.squared_norms().double().sum(-1)
    trials = {}
    for name in names:
        generator = torch.Generator().manual_seed(seed)
        start = start_factors(name, products, width, generator)
        if start is not None:
            count = num_iterations if len(names) == 1 else min(_TRIAL_SWEEPS, num_iterations)
            trials[name] = _swept(products, start, whole, count, tolerance)
    if not trials:
        raise ValueError(
            f"start: {names[0]!r} needs a width of at most the number of features "
            f"{min(products.query.shape[-1], products.key.shape[-1])}, got {width}"
        )
    last = torch.stack([errors[:, -1] for _, errors in trials.values()])
    best = last.argmin(0)
    chosen = tuple(list(trials)[place] for place in best.tolist())
    picked = [_pick([f[part] for f, _ in trials.values()], best) for part in range(3)]
    longest = max(errors.shape[1] for _, errors in trials.values())
    history = _pick([_lengthened(errors, longest) for _, errors in trials.values()], best)
    factors = Factors(*picked)
    left = num_iterations - (longest - 1)
    if len(trials) > 1 and left > 0:
        factors, more = _swept(products, factors, whole, left, tolerance)
        history = torch.cat([history, more[:, 1:]], 1)
    return factors, history, chosen, _has_settled(history, tolerance)


def _swept(
    products: HeadProducts, factors: Factors, whole: Tensor, count: int, tolerance: float
) -> tuple[Factors, Tensor]:
    """Sweep, each time from a point ahead on the last way; from where it was if that is worse."""
    errors = [_relative(whole, explained_norms(products, factors).sum(-1))]
    before, ahead = factors, whole.new_full(whole.shape, _FARTHEST)
    for _ in range(count):
        found, lost = _tried(products, extrapolated(before, factors, ahead), whole)
        is_worse = lost > errors[-1]
        if bool(is_worse.any()):
            plain, plain_lost = _tried(products, factors, whole)
            found = Factors(
                *(
                    torch.where(is_worse[:, None, None], *parts)
                    for parts in zip(plain, found, strict=True)
                )
            )
            lost = torch.where(is_worse, plain_lost, lost)
        ahead = torch.where(is_worse, ahead / 2, ahead * 1.15).clamp(_NEAREST, _FARTHEST)
        before, factors = factors, found
        errors.append(lost)
        if _has_settled(torch.stack(errors, 1), tolerance):
            break
    return factors, torch.stack(errors, 1)


def _has_settled(errors: Tensor, tolerance: float) -> bool:
    """Whether no layer gained more in the last sweeps; one alone may be a momentum's first."""
    if errors.shape[1] <= _IDLE_SWEEPS:
        return bool((errors[:, -1] == 0).all())
    return bool((errors[:, -1 - _IDLE_SWEEPS] - errors[:, -1] <= tolerance).all())


def _tried(products: HeadProducts, factors: Factors, whole: Tensor) -> tuple[Factors, Tensor]:
    found, explained = sweep(products, factors)
    return found, _relative(whole, explained.sum(-1))


def _relative(whole: Tensor, explained: Tensor) -> Tensor:
    lost = (whole - explained).clamp(min=0)
    return (lost / torch.where(whole > 0, whole, 1.0)).sqrt()


def _pick(parts: list[Tensor], best: Tensor) -> Tensor:
    return torch.stack(parts)[best, torch.arange(len(best), device=best.device)]


def _lengthened(errors: Tensor, length: int) -> Tensor:
    return torch.cat([errors, errors[:, -1:].expand(-1, length - errors.shape[1])], 1)


def _errors(products: HeadProducts, factors: Factors) -> tuple[Tensor, Tensor]:
    """Relative errors of heads and layers; by orthogonal factors, so that no digit cancels."""
    query, key = (products.by_head(side.double()) for side in (products.query, products.key))
    mixed = -factors.mixing.double()[..., None] * factors.query.double()[:, None]
    shared = factors.key.double()[:, None].expand(-1, products.num_heads, -1, -1)
    left = torch.linalg.qr(torch.cat([query, mixed], 2).mT, mode="r")[1]
    right = torch.linalg.qr(torch.cat([key, shared], 2).mT, mode="r")[1]
    lost = (left @ right.mT).square().sum((-2, -1))
    whole = ((query @ query.mT) * (key @ key.mT)).sum((-2, -1))
    of_all = (lost.sum(-1) / torch.where(whole.sum(-1) > 0, whole.sum(-1), 1.0)).sqrt()
    return (lost / torch.where(whole > 0, whole, 1.0)).sqrt(), of_all


def _bound(products: HeadProducts, width: int) -> Tensor:
    """Part of the products that the subspaces of a width cannot hold."""
    bounds = []
    for spectrum in unfolding_spectra(products):
        spectrum = spectrum.clamp(min=0)
        whole = spectrum.sum(-1)
        tail = spectrum[:, : max(spectrum.shape[1] - width, 0)].sum(-1)
        bounds.append((tail / torch.where(whole > 0, whole, 1.0)).sqrt())
    return torch.maximum(*bounds)


def _gauged(factors: Factors, dim: int) -> Factors:
    """The same components, ordered by energy, with sizes and signs fixed."""
    query, mixing, key = factors
    norms = [query.norm(dim=-1), mixing.norm(dim=-2), key.norm(dim=-1)]
    energy = norms[0] * norms[1] * norms[2]
    usual = (mixing.shape[1] * dim / mixing.shape[2]) ** 0.5
    side = (energy / usual).sqrt()
    scales = [
        torch.where(energy > 0, size / torch.where(norm > 0, norm, 1.0), 0.0)
        for size, norm in (
            (side, norms[0]),
            (torch.full_like(side, usual), norms[1]),
            (side, norms[2]),
        )
    ]
    of_query, of_mixing = _sign(query), _sign(mixing.mT)
    order = energy.argsort(dim=-1, descending=True, stable=True)
    rows = [
        (part * (scale * sign)[..., None]).gather(
            1, order[..., None].expand(-1, -1, part.shape[-1])
        )
        for part, scale, sign in (
            (query, scales[0], of_query),
            (mixing.mT, scales[1], of_mixing),
            (key, scales[2], of_query * of_mixing),
        )
    ]
    return Factors(rows[0], rows[1].mT.contiguous(), rows[2])


def _sign(rows: Tensor) -> Tensor:
    largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))[..., 0]
    return torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


def _root(name: str, moment: Tensor, side: Tensor, num_axes: int) -> tuple[Tensor, Tensor]:
    """Symmetric root of a second moment, and its inverse."""
    size = side.shape[-1]
    if moment.ndim not in (2, 2 + num_axes) or moment.shape[-2:] != (size, size):
        raise ValueError(f"{name}: expected {size} x {size}, got shape {tuple(moment.shape)}")
    if not bool(moment.isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got some that are not")
    wide = moment.detach().double().reshape(-1, size, size).expand(len(side), -1, -1)
    if not torch.allclose(wide, wide.mT, rtol=1e-5, atol=1e-5 * float(wide.abs().max())):
        raise ValueError(f"{name}: expected a symmetric matrix, got one that is not")
    values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    least = _LEAST_MOMENT * values.mean(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    root = values.clamp(min=least).sqrt()[:, None]
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT


def _check(query: Tensor, key: Tensor, width: int, start: str, num_iterations: int) -> None:
    shapes = {"query_weight": query, "key_weight": key}
    if query.ndim < 3 or key.ndim != query.ndim or query.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            "query_weight, key_weight: expected 'head dim feature' of the same heads and widths, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if 0 in query.shape or 0 in key.shape:
        raise ValueError(f"query_weight: expected no empty axis, got {tuple(query.shape)}")
    for name, weight in shapes.items():
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got some that are not")
    if width < 1:
        raise ValueError(f"width: expected at least 1, got {width}")
    if num_iterations < 0:
        raise ValueError(f"num_iterations: expected none or more, got {num_iterations}")
    if start not in (*START_NAMES, "best"):
        names = ", ".join(map(repr, (*START_NAMES, "best")))
        raise ValueError(f"start: expected one of {names}, got {start!r}")
