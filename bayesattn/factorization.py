r"""Projections that heads share, from the projections that each head has.

.. math:: W_{Q,h}^\top W_{K,h} \approx W_Q^\top \operatorname{diag}(m_h)\, W_K

This is a canonical polyadic decomposition of the heads' products, stacked. They are never formed:
all that is needed are inner products with them, which the two sides give.

Source:
    Cordonnier, Loukas and Jaggi (2020), arXiv:2006.16362, section 4. Starts, bounds, and errors
    weighed by the tokens' second moments are ours.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.accelerated_sweeps import best_fit
from bayesattn.alternating_least_squares import Factors, HeadProducts
from bayesattn.argument_checks import (
    check_choice,
    check_count,
    check_not_negative,
    check_type,
)
from bayesattn.autocasting import full_precision
from bayesattn.factor_errors import lower_bounds, nested_errors, residual_errors
from bayesattn.factor_gauge import balanced, by_energy
from bayesattn.factor_starts import START_NAMES, start_factors
from bayesattn.token_weighting import weighed_products

__all__ = ["Factorization", "factorize", "product_errors"]

Number = float | int


class Factorization(NamedTuple):
    """Shared projections, and how near they are.

    Components are ordered by their energy, as errors are weighed. Mixing is as large as in a fresh
    layer, queries and keys are balanced, and of each component the largest entries of mixing and
    query weight are positive: what could be rescaled, permuted or flipped at no change is fixed.

    Attributes:
        query_weight: Of queries.
        mixing: Of each head.
        key_weight: Of keys.
        relative_error: Frobenius norm of all heads' residuals, over that of their products; or of
            the logits of tokens with the given moments. Of weights rounded to their type.
        head_errors: Of each head.
        lower_bound: Below which no relative error of this width comes.
        nested_errors: Relative error by the first component, the first two, and so on.
        history: Relative error after each sweep from the start that was taken; the last stands on
            where other layers needed more. A difference of squares, which tells nothing below the
            root of rounding.
        starts: Which start was taken for each layer, leading axes flattened.
        converged: Whether three sweeps lowered no layer's error by more than the tolerance.
    """

    query_weight: Float[Tensor, "*layer component query_feature"]
    mixing: Float[Tensor, "*layer head component"]
    key_weight: Float[Tensor, "*layer component key_feature"]
    relative_error: Float[Tensor, "*layer"]
    head_errors: Float[Tensor, "*layer head"]
    lower_bound: Float[Tensor, "*layer"]
    nested_errors: Float[Tensor, "*layer component"]
    history: Float[Tensor, "*layer sweep"]
    starts: tuple[str, ...]
    converged: bool

    def layer(self, place: int) -> "Factorization":
        """Return that of one layer of a batch."""
        tensors = {n: part[place] for n, part in self._asdict().items() if isinstance(part, Tensor)}
        count = len(self.starts) // len(self.query_weight)
        first = place % len(self.query_weight) * count
        return self._replace(**tensors, starts=self.starts[first : first + count])

    def head_weights(
        self,
    ) -> tuple[
        Float[Tensor, "*layer head component query_feature"],
        Float[Tensor, "*layer head component key_feature"],
    ]:
        """Weights of heads side by side that compute the same, each as wide as all components."""
        query = self.mixing[..., None] * self.query_weight[..., None, :, :]
        num_heads = self.mixing.shape[-2]
        return query, torch.stack([self.key_weight] * num_heads, -3)

    def truncated(self, width: int) -> Factors:
        """The components of the largest energy, as they are: nested widths, not refitted.

        Their relative error is the ``width``-th of ``nested_errors``.

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
    num_restarts: int = 1,
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
        num_restarts: Number of random starts; ten sweeps from each, and then from the best.
        num_iterations: Most sweeps.
        tolerance: Stop once no layer's relative error falls by more in three sweeps.
        query_moment: "*#layer query_feature query_feature", or of all layers alike: second moment
            of what asks, to weigh errors by; see :func:`bayesattn.networks.input_moments`.
        key_moment: Likewise, of what is asked.
        seed: Of the random and algebraic starts; global random state is not touched.

    Raises:
        TypeError: If weights are no tensors.
        ValueError: If shapes, types, sizes or names do not fit, weights or moments are not finite,
            or moments are none.
    """
    check_type("query_weight", query_weight, Tensor)
    _check(width, start, num_restarts, num_iterations, tolerance)
    with full_precision(query_weight):
        weighed = weighed_products(query_weight, key_weight, query_moment, key_moment)
        products = weighed.products
        names = START_NAMES if start == "best" else (start,)
        if start == "best" and width >= _full_width(products):
            names, num_iterations = ("heads",), 0
        starts = list(_starts(products, width, names, num_restarts, seed))
        fit = best_fit(products, starts, num_iterations, float(tolerance))
        found = by_energy(fit.factors)
        nested = nested_errors(products, found)
        bounds = lower_bounds(products)
        bound = bounds[:, width - 1] if width <= bounds.shape[1] else bounds.new_zeros(len(bounds))
        factors = weighed.rescaled(balanced(weighed.unweighed(found), query_weight.shape[-2]))
    weights = Factors(*(part.to(query_weight.dtype) for part in factors))
    # Of what is returned, rounded as it is; in float64, which autocast leaves alone.
    relative, by_head = residual_errors(products, weighed.weighed(weights))
    nested[:, -1] = relative
    parts = (*weights, relative, by_head, bound, nested, fit.history)
    batch = query_weight.shape[:-3]
    shaped = [part.reshape((*batch, *part.shape[1:])) for part in parts]
    return Factorization(*shaped, starts=fit.starts, converged=fit.has_settled)


def _full_width(products: HeadProducts) -> int:
    """Components that heads apart have, of any layer."""
    dim = products.query.shape[1] // products.num_heads
    return products.num_heads * min(dim, products.query.shape[-1], products.key.shape[-1])


def _starts(
    products: HeadProducts, width: int, names: tuple[str, ...], num_restarts: int, seed: int
) -> Iterator[tuple[str, Factors]]:
    for name in names:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(num_restarts if name == "random" else 1):
            factors = start_factors(name, products, width, generator)
            if factors is not None:
                yield name, factors
            elif len(names) == 1:
                raise ValueError(
                    f"start: {name!r} needs a width of at most the number of features "
                    f"{min(products.query.shape[-1], products.key.shape[-1])}, got {width}"
                )


def product_errors(
    query_weight: Float[Tensor, "..."],
    key_weight: Float[Tensor, "..."],
    factors: Factors,
    *,
    query_moment: Float[Tensor, "..."] | None = None,
    key_moment: Float[Tensor, "..."] | None = None,
) -> tuple[Float[Tensor, "*layer"], Float[Tensor, "*layer head"]]:
    """Relative errors, and those of heads, of any shared projections.

    Args:
        query_weight: As for :func:`factorize`.
        key_weight: Likewise.
        factors: Shared projections of as many layers.
        query_moment: As for :func:`factorize`.
        key_moment: Likewise.

    Raises:
        ValueError: As :func:`factorize` does.
    """
    weighed = weighed_products(query_weight, key_weight, query_moment, key_moment)
    batch = query_weight.shape[:-3]
    flat = Factors(*(part.reshape(-1, *part.shape[len(batch) :]) for part in factors))
    relative, by_head = residual_errors(weighed.products, weighed.weighed(flat))
    return relative.reshape(batch), by_head.reshape(*batch, -1)


def _check(
    width: int, start: str, num_restarts: int, num_iterations: int, tolerance: Number
) -> None:
    check_count("width", width)
    check_count("num_restarts", num_restarts)
    check_count("num_iterations", num_iterations, least=0)
    check_not_negative("tolerance", tolerance)
    check_choice("start", start, (*START_NAMES, "best"))
