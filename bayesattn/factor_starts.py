r"""Where the factorization of heads' products starts: heads apart, algebra, or chance.

Heads apart are decomposed each by itself, and share nothing. The algebraic start is exact where
heads share :math:`\tilde D \le D` components: mixtures of their products, on the subspaces that
hold them all, then have common eigenvectors,

.. math:: C_\alpha C_\beta^{-1} = A^\top \operatorname{diag}\Bigl(
    \frac{\sum_h \alpha_h m_{hr}}{\sum_h \beta_h m_{hr}}\Bigr) A^{-\top}, \qquad
    C_\alpha = \sum_h \alpha_h W_{Q,h}^\top W_{K,h}

Source:
    Leurgans, Ross and Abel (1993), A decomposition for three-way arrays, SIAM J. Matrix Anal. Appl.
    14; the idea is Jennrich's, in Harshman (1970).
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from bayesattn.alternating_least_squares import Factors, HeadProducts, fitted_mixing
from bayesattn.factor_errors import unfolding_grams
from bayesattn.head_decomposition import head_factors

__all__ = ["START_NAMES", "start_factors"]

START_NAMES = ("heads", "algebraic", "random")
# Random mixtures that the algebraic start tries; it takes the best conditioned.
_NUM_MIXTURES = 8
# Squared singular values so much smaller than the largest are rounding.
_NO_RANK = 1e-13


def start_factors(
    name: str, products: HeadProducts, width: int, generator: torch.Generator
) -> Factors | None:
    """Return a start of a name, or None where there is none of this width.

    Chance is the same for all layers, so that a layer's start is the same alone and in a batch.
    """
    if name == "heads":
        return _heads_apart(products, width)
    if name == "random":
        return _random(products, width, generator)
    return _algebraic(products, width, generator)


def _heads_apart(products: HeadProducts, width: int) -> Factors:
    left, values, right = head_factors(
        products.by_head(products.query), products.by_head(products.key)
    )
    num_heads, rank = values.shape[1:]
    count = min(width, num_heads * rank)
    largest, places = values.flatten(1).topk(count)
    rows = [
        side.flatten(1, 2).gather(1, places[..., None].expand(-1, -1, side.shape[-1]))
        for side in (left, right)
    ]
    own = one_hot(places // rank, num_heads).mT
    factors = Factors(rows[0], own * largest[:, None], rows[1])
    return _widened(factors, width)


def _random(products: HeadProducts, width: int, generator: torch.Generator) -> Factors:
    rows = [
        torch.randn(width, side.shape[-1], generator=generator, dtype=torch.float64).expand(
            len(side), -1, -1
        )
        for side in (products.query, products.key)
    ]
    mixing = products.query.new_zeros(len(products.query), products.num_heads, width)
    return fitted_mixing(
        products, Factors(rows[0].to(products.query), mixing, rows[1].to(products.key))
    )


def _algebraic(products: HeadProducts, width: int, generator: torch.Generator) -> Factors | None:
    if width > min(products.query.shape[-1], products.key.shape[-1]):
        return None
    spectra = [torch.linalg.eigh(gram) for gram in unfolding_grams(products)]
    shares = torch.randn(
        _NUM_MIXTURES + 1, products.num_heads, generator=generator, dtype=torch.float64
    )
    rows: list[tuple[Tensor, Tensor]] = []
    for layer in range(len(products.query)):
        bases = [vectors[layer] for _, vectors in spectra]
        # Where heads share less than the width, a pencil of the width would be singular.
        rank = max(1, min(width, *(_rank(values[layer]) for values, _ in spectra)))
        query, key = (
            side[layer].double().unflatten(0, (products.num_heads, -1)) @ basis[:, -rank:]
            for side, basis in zip((products.query, products.key), bases, strict=True)
        )
        own, other = _common_vectors(query, key, shares)
        rows.append((bases[0][:, -rank:] @ own, bases[1][:, -rank:] @ other))
    padded = [
        torch.stack([pad(row.mT, (0, 0, 0, width - row.shape[1])) for row in side])
        for side in zip(*rows, strict=True)
    ]
    mixing = products.query.new_zeros(len(rows), products.num_heads, width)
    start = Factors(padded[0].to(products.query), mixing, padded[1].to(products.key))
    return fitted_mixing(products, start)


def _rank(squares: Tensor) -> int:
    return int((squares > squares[-1].clamp(min=0) * _NO_RANK).sum())


def _common_vectors(query: Tensor, key: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors, as columns, on which all heads' products on their subspaces are diagonal."""
    # On the CPU, whose least squares take matrices of any rank; they are as small as the width.
    first, *others = (
        ((share[:, None, None] * query).mT @ key).sum(0).cpu() for share in shares.to(query.device)
    )
    spectra = [torch.linalg.svdvals(other) for other in others]
    best = max(range(len(others)), key=lambda i: float(spectra[i][-1] / spectra[i][0]))
    pencil = torch.linalg.lstsq(others[best].mT, first.mT).solution.mT
    own = _real_basis(*torch.linalg.eig(pencil))
    other = torch.linalg.lstsq(own, others[best]).solution.mT
    return own.to(query.device), other.to(query.device)


def _real_basis(values: Tensor, vectors: Tensor) -> Tensor:
    """Real and imaginary parts of each complex pair in place of its two vectors."""
    is_second = values.imag < 0
    basis = torch.where(is_second[..., None, :], vectors.imag, vectors.real)
    return basis / basis.norm(dim=-2, keepdim=True).clamp(min=1e-300)


def _widened(factors: Factors, width: int) -> Factors:
    """Components of zeros up to a width."""
    missing = width - factors.query.shape[1]
    return Factors(
        pad(factors.query, (0, 0, 0, missing)),
        pad(factors.mixing, (0, missing)),
        pad(factors.key, (0, 0, 0, missing)),
    )
