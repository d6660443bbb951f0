r"""Sweeps of alternating least squares that fit shared projections to the products of heads.

.. math:: \min_{A, B, M} \sum_h \lVert W_{Q,h}^\top W_{K,h}
    - A^\top \operatorname{diag}(m_h)\, B \rVert_F^2

Each of the three is the solution of normal equations in the two others, whose right-hand sides are
made of :math:`W_{Q,h} A^\top` and :math:`W_{K,h} B^\top`: the products of the heads are never
formed. A sweep takes :math:`10 H d D \tilde D` operations beside two solutions of width
:math:`\tilde D`.

Source:
    Kolda and Bader (2009), Tensor decompositions and applications, section 3.4; the structure of
    the products as in Cordonnier et al. (2020), arXiv:2006.16362, section 4. Each solution stays
    near the last one by a proximal term, so that collinear components cost no descent; ours.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.head_decomposition import squared_product_norms

__all__ = [
    "Factors",
    "HeadProducts",
    "explained_norms",
    "extrapolated",
    "fitted_mixing",
    "sweep",
]


class Factors(NamedTuple):
    """Shared projections of a batch of layers.

    Attributes:
        query: Of queries.
        mixing: Of each head.
        key: Of keys.
    """

    query: Float[Tensor, "layer component query_feature"]
    mixing: Float[Tensor, "layer head component"]
    key: Float[Tensor, "layer component key_feature"]


class HeadProducts:
    """The products of a batch of layers' heads, by their two sides.

    Args:
        query: Weights of queries.
        key: Weights of keys.

    Attributes:
        query: With heads in one run of rows.
        key: Likewise.
        num_heads: Number of heads.
    """

    def __init__(
        self,
        query: Float[Tensor, "layer head dim query_feature"],
        key: Float[Tensor, "layer head dim key_feature"],
    ) -> None:
        self.query, self.key = query.flatten(1, 2), key.flatten(1, 2)
        self.num_heads = query.shape[1]

    def by_head(self, rows: Float[Tensor, "layer row column"]) -> Float[Tensor, "layer head ..."]:
        """Give each head its rows."""
        return rows.unflatten(1, (self.num_heads, -1))

    @cached_property
    def squared_norms(self) -> Float[Tensor, "layer head"]:
        """Squared Frobenius norm of each head's product, in float64."""
        sides = self.by_head(self.query.double()), self.by_head(self.key.double())
        return squared_product_norms(*sides)

    def inner_products(self, factors: Factors) -> Float[Tensor, "layer head component"]:
        """Of each head's product with each component, which is not mixed."""
        both = (self.query @ factors.query.mT) * (self.key @ factors.key.mT)
        return self.by_head(both).sum(2)


def sweep(products: HeadProducts, factors: Factors) -> tuple[Factors, Float[Tensor, "layer head"]]:
    """Renew queries, keys and mixing in turn, each by least squares given the others.

    Returns:
        Factors, with unit rows of queries and keys; and what the fit explains of each head's
        squared norm, which is never less than by the factors before.
    """
    query, mixing, key = factors
    of_key = products.key @ key.mT
    right = _mixed(products, of_key, mixing).mT @ products.query
    query, mixing = _unit(_proximal(_gram(key) * _gram(mixing.mT), right, query), mixing)
    of_query = products.query @ query.mT
    right = _mixed(products, of_query, mixing).mT @ products.key
    key, mixing = _unit(_proximal(_gram(query) * _gram(mixing.mT), right, key), mixing)
    of_key = products.key @ key.mT
    return _with_mixing(query, key, products.by_head(of_query * of_key).sum(2), mixing)


def extrapolated(before: Factors, factors: Factors, ahead: Float[Tensor, " layer"]) -> Factors:
    """Go on in the direction of the last step, so many steps of it ahead for each layer.

    Source:
        Mitchell, Ye and De Sterck (2020), Nesterov acceleration of alternating least squares for
        canonical tensor decomposition, Numer. Linear Algebra Appl. 27; of its restarts the one by
        the objective.
    """
    return Factors(
        *(
            new + ahead.to(new.dtype)[:, None, None] * (new - old)
            for old, new in zip(before, factors, strict=True)
        )
    )


def explained_norms(products: HeadProducts, factors: Factors) -> Float[Tensor, "layer head"]:
    """What of each head's squared norm is gone from its residual; negative if it grew."""
    gram = _gram(factors.query) * _gram(factors.key)
    return _explained(products.inner_products(factors), factors.mixing, gram)


def fitted_mixing(products: HeadProducts, factors: Factors) -> Factors:
    """Factors with the best mixing for their queries and keys."""
    query, mixing = _unit(factors.query, torch.zeros_like(factors.mixing))
    key, mixing = _unit(factors.key, mixing)
    inner = products.inner_products(Factors(query, mixing, key))
    return _with_mixing(query, key, inner, mixing)[0]


def _with_mixing(
    query: Tensor, key: Tensor, inner: Tensor, before: Tensor
) -> tuple[Factors, Tensor]:
    gram = _gram(query) * _gram(key)
    mixing = _proximal(gram, inner.mT, before.mT).mT.contiguous()
    return Factors(query, mixing, key), _explained(inner, mixing, gram)


def _explained(inner: Tensor, mixing: Tensor, gram: Tensor) -> Tensor:
    wide = mixing.double()
    return (2 * wide * inner.double() - wide * (wide @ gram)).sum(-1)


def _mixed(products: HeadProducts, side: Tensor, mixing: Tensor) -> Tensor:
    return (products.by_head(side) * mixing.unsqueeze(2)).flatten(1, 2)


def _gram(rows: Tensor) -> Tensor:
    # In double precision, where collinear rows leave a matrix that can be factorized.
    rows = rows.double()
    return rows @ rows.mT


def _proximal(gram: Tensor, right: Tensor, before: Tensor) -> Tensor:
    """Solve G x = b as nearly as rounding allows, and stay at the last x where it does not tell."""
    eps, tiny = torch.finfo(right.dtype).eps, torch.finfo(torch.float64).tiny
    ridge = eps * gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] + tiny**0.5
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + ridge * identity)
    return torch.cholesky_solve(right.double() + ridge * before.double(), factor).to(right.dtype)


def _unit(rows: Tensor, mixing: Tensor) -> tuple[Tensor, Tensor]:
    """Give rows unit norm, and their norms to the mixing; rows of zeros stay."""
    norms = rows.norm(dim=-1)
    scale = torch.where(norms > 0, norms, 1.0)
    return rows / scale[..., None], mixing * norms[..., None, :]
