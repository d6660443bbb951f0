r"""What of shared projections could be rescaled, flipped or permuted at no change, fixed.

.. math:: a_r m_{hr} b_r^\top = (\alpha a_r)\, \frac{m_{hr}}{\alpha \beta}\, (\beta b_r)^\top
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.alternating_least_squares import Factors

__all__ = ["balanced", "by_energy"]


def by_energy(factors: Factors) -> Factors:
    """The components in the order of their Frobenius norms, largest first."""
    order = _energy(factors).argsort(dim=-1, descending=True, stable=True)
    query, mixing, key = (
        rows.gather(1, order[..., None].expand_as(rows))
        for rows in (factors.query, factors.mixing.mT, factors.key)
    )
    return Factors(query, mixing.mT.contiguous(), key)


def balanced(factors: Factors, dim: int) -> Factors:
    """The same components, with sizes and signs fixed.

    Mixing is as large as in a fresh layer whose heads were ``dim`` wide, queries and keys are as
    large as each other, and the largest entries of a query's and a mixing's component are positive.
    """
    rows = (factors.query, factors.mixing.mT, factors.key)
    energy = _energy(factors)
    usual = (factors.mixing.shape[1] * dim / factors.mixing.shape[2]) ** 0.5
    side = (energy / usual).sqrt()
    signs = [_sign(rows[0]), _sign(rows[1])]
    signs.append(signs[0] * signs[1])
    query, mixing, key = (
        row * torch.where(energy > 0, sign * size / _norms(row), 0.0)[..., None]
        for row, sign, size in zip(rows, signs, (side, usual, side), strict=True)
    )
    return Factors(query, mixing.mT.contiguous(), key)


def _energy(factors: Factors) -> Float[Tensor, "layer component"]:
    return factors.query.norm(dim=-1) * factors.mixing.norm(dim=-2) * factors.key.norm(dim=-1)


def _norms(rows: Tensor) -> Tensor:
    norms = rows.norm(dim=-1)
    return torch.where(norms > 0, norms, 1.0)


def _sign(rows: Tensor) -> Tensor:
    largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))[..., 0]
    return torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)
