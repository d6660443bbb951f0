r"""A kernel in other linear coordinates, which moves particles as steps in those would.

.. math:: K(x, y) = B\, k(B^{-1} x, B^{-1} y)\, B^\top

Source:
    Wang, Tang, Bajaj and Liu (2019), Stein variational gradient descent with matrix-valued kernels,
    arXiv:1910.12794, with a constant preconditioner.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.autocasting import full_precision
from bayesattn.kernels.bandwidths import Number
from bayesattn.kernels.distances import widened
from bayesattn.kernels.protocol import KernelTerms, ScalarKernel

__all__ = ["Preconditioned", "PreconditionedTerms"]

Scale = Float[Tensor, "dim dim"] | Float[Tensor, " dim"]


@dataclass(frozen=True)
class Preconditioned:
    r"""Matrix-valued kernel :math:`B\, k(B^{-1} x, B^{-1} y)\, B^\top`.

    Args:
        kernel: k, between particles in the coordinates :math:`B^{-1} x`.
        scale: B, a lower triangular matrix or the diagonal of a diagonal one, such as a Cholesky
            factor of the target's covariance, roughly.

    Raises:
        ValueError: If the scale is neither a vector nor a square matrix.
    """

    kernel: ScalarKernel
    scale: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.scale.shape)
        if len(shape) not in (1, 2) or shape[0] != shape[-1]:
            raise ValueError(
                "Preconditioned scale: expected a lower triangular matrix or the vector of a "
                f"diagonal, got shape {shape}"
            )

    def __call__(self, particles: Float[Tensor, "*batch particle dim"]) -> "PreconditionedTerms":
        """Terms of the kernel in its own coordinates, and the way back from them."""
        return PreconditionedTerms(self.kernel(self._inverse(particles)), self.scale.detach())

    def frozen(self, particles: Float[Tensor, "*batch particle dim"]) -> "Preconditioned":
        """The same kernel with bandwidth and location fixed to what they are at particles."""
        return Preconditioned(self.kernel.frozen(self._inverse(particles)), self.scale)

    def _inverse(self, particles: Tensor) -> Tensor:
        wide = widened(particles)
        scale = self.scale.detach().to(wide)
        if scale.ndim == 1:
            inner = wide / scale
        else:
            inner = torch.linalg.solve_triangular(scale, wide.mT, upper=False).mT
        return inner.to(particles.dtype)


class PreconditionedTerms(NamedTuple):
    """A preconditioned kernel at one cloud of particles.

    Attributes:
        inner: Terms of k in the coordinates w, where x = B w.
        scale: B.
    """

    inner: KernelTerms
    scale: Scale

    @property
    def repulsion(self) -> Float[Tensor, "*batch particle dim"]:
        """B times the repulsion in inner coordinates."""
        return self._out(self.inner.repulsion)

    @property
    def squared_bandwidth(self) -> Float[Tensor, "*batch"] | None:
        """That was in force in inner coordinates."""
        return self.inner.squared_bandwidth

    @property
    def own_slope(self) -> Float[Tensor, "*batch particle dim"] | None:
        """B times that in inner coordinates."""
        slope = self.inner.own_slope
        return None if slope is None else self._out(slope)

    def smooth(
        self, score: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch particle dim"]:
        """Sum over j of K(x_i, x_j) times the score at x_j."""
        scale = self.scale.to(score)
        inner = score * scale if scale.ndim == 1 else score @ scale
        return self._out(self.inner.smooth(inner))

    def fluctuate(
        self, normal: Float[Tensor, "*batch particle dim"], floor: Number
    ) -> Float[Tensor, "*batch particle dim"]:
        """Make noise of covariance K / M + floor I; see :meth:`Terms.fluctuate`.

        The principal axes of particles and of coordinates are those of the covariance, too.
        """
        gram = widened(self.inner.gram)
        spread, axes = _outer_spectrum(self.scale.to(gram))
        with full_precision(normal):
            shared, particles = torch.linalg.eigh(gram / gram.shape[-1])
            variance = shared.clamp_min(0.0)[..., :, None] * spread + floor
            noise = particles @ (variance.sqrt() * widened(normal))
            return (noise if axes is None else noise @ axes.mT).to(normal.dtype)

    def _out(self, inner: Tensor) -> Tensor:
        scale = self.scale.to(inner)
        return inner * scale if scale.ndim == 1 else inner @ scale.mT


def _outer_spectrum(scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues and eigenvectors of B Bᵀ; no vectors where they are the coordinates' own."""
    if scale.ndim == 1:
        return scale.square(), None
    axes, singular, _ = torch.linalg.svd(scale)
    return singular.square(), axes
