r"""Bijections from the reals onto supports: PyTorch's, and onto triangular and definite matrices.

.. math:: x = L(u), \quad L_{ii} = e^{u_{ii}}, \quad L_{ij} = u_{ij} \;(i > j), \qquad S = L L^\top

.. math:: \log |\det \partial L / \partial u| = \sum_i u_{ii}, \qquad
          \log |\det \partial S / \partial L| = n \log 2 + \sum_{i=1}^n (n - i + 1) \, u_{ii}

PyTorch maps square matrices onto these two supports, in which the entries above the diagonal are
lost, so that there is no density on its side.

Source:
    Muirhead (1982), Aspects of Multivariate Statistical Theory, theorem 2.1.9.
"""

import math
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.transforms import IndependentTransform

__all__ = ["PositiveDefiniteBijection", "TriangularBijection", "bijection"]


def bijection(support: Any) -> Transform:
    """Return the bijection from the reals onto a support.

    Raises:
        NotImplementedError: If none is known.
    """
    if support is constraints.lower_cholesky:
        return TriangularBijection()
    if support is constraints.positive_definite:
        return PositiveDefiniteBijection()
    if isinstance(support, constraints.independent):
        return IndependentTransform(
            bijection(support.base_constraint), support.reinterpreted_batch_ndims
        )
    return biject_to(support)


class TriangularBijection(Transform):
    """Onto lower triangular matrices with a positive diagonal, from their entries row by row."""

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        size = _matrix_size(x.shape[-1])
        rows, columns = torch.tril_indices(size, size, device=x.device)
        place = torch.zeros(size, size, dtype=torch.long, device=x.device)
        place = place.index_put((rows, columns), torch.arange(len(rows), device=x.device))
        below = torch.ones(size, size, device=x.device).tril(-1).bool()
        entries = torch.where(below, x[..., place], torch.zeros((), dtype=x.dtype, device=x.device))
        return entries + torch.diag_embed(x[..., _diagonal(size, x)].exp())

    def _inverse(self, y: Tensor) -> Tensor:
        size = y.shape[-1]
        rows, columns = torch.tril_indices(size, size, device=y.device)
        entries = y[..., rows, columns]
        return torch.where(rows == columns, entries.log(), entries)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the entries on and below the diagonal."""
        return x[..., _diagonal(y.shape[-1], x)].sum(-1)

    def forward_shape(self, shape: Any) -> Size:
        """Shape of the matrices."""
        size = _matrix_size(shape[-1])
        return Size([*shape[:-1], size, size])

    def inverse_shape(self, shape: Any) -> Size:
        """Shape of the vectors."""
        return Size([*shape[:-2], shape[-1] * (shape[-1] + 1) // 2])


class PositiveDefiniteBijection(TriangularBijection):
    """Onto positive definite matrices, from the entries of their Cholesky factors row by row."""

    codomain = constraints.positive_definite

    def _call(self, x: Tensor) -> Tensor:
        factor = super()._call(x)
        return factor @ factor.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return super()._inverse(torch.linalg.cholesky(y))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the entries on and below the diagonal."""
        size = y.shape[-1]
        powers = torch.arange(size, 0, -1, dtype=x.dtype, device=x.device) + 1
        return size * math.log(2) + (powers * x[..., _diagonal(size, x)]).sum(-1)


def _diagonal(size: int, like: Tensor) -> Tensor:
    """Places of the diagonal's entries among those of a triangle, row by row."""
    rows = torch.arange(size, device=like.device)
    return rows * (rows + 3) // 2


def _matrix_size(entries: int) -> int:
    return (math.isqrt(8 * entries + 1) - 1) // 2
