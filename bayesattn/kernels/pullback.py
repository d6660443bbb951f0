r"""Kernels between what particles mean rather than between their coordinates.

.. math::
    k(x, y) = \kappa(f(x), f(y)), \qquad
    K(x, y) = J(x)^\top \kappa(f(x), f(y))\, J(y), \qquad J = \frac{\partial f}{\partial x}

Features f that are equal for coordinates which a model cannot tell apart make both blind to the
difference. The number-valued k compares such particles; the matrix-valued K also moves them alike.
With :math:`g_{ij}` for the gradient of :math:`\kappa(f_j, f_i)` by :math:`f_j`, their repulsions
are

.. math::
    \sum_j J_j^\top g_{ij}, \qquad
    J_i^\top \sum_j \left[ J_j J_j^\top g_{ij} + \kappa_{ij}\, \Delta f_j \right]

Source:
    Wang et al. (2019), SVGD with matrix-valued kernels, arXiv:1910.12794, for repulsion by such
    kernels. Kernels of features: ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.autocasting import full_precision
from bayesattn.kernels.bandwidths import Number
from bayesattn.kernels.blocks import PerSite
from bayesattn.kernels.distances import geometry, widened
from bayesattn.kernels.feature_maps import FeatureTerms, feature_terms
from bayesattn.kernels.protocol import KernelTerms, ScalarKernel
from bayesattn.kernels.radial import IMQ, RBF
from bayesattn.kernels.sums import Sum, Summable

__all__ = ["Equivariant", "EquivariantTerms", "Pullback", "reads_coordinates"]

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pullback(Summable):
    r"""Number-valued kernel :math:`\kappa(f(x), f(y))` of features.

    For comparing clouds of particles, by a maximum mean discrepancy for example. In SVGD it mixes
    the scores of particles with equal features as they stand, though they point elsewhere in other
    coordinates: those of x and -x cancel. There take :class:`Equivariant`.

    Args:
        features: f, of each particle alone; a :class:`~bayesattn.kernels.FeatureMap` where it knows
            its own derivatives.
        kernel: κ, between features; RBF with the median rule by default.
    """

    features: Features
    kernel: ScalarKernel = field(default_factory=RBF)

    def __call__(self, particles: Float[Tensor, "*batch particle dim"]) -> KernelTerms:
        """Gram matrix and repulsion of one cloud of particles."""
        with full_precision(particles):
            at = feature_terms(self.features, widened(particles))
            terms = self.kernel(at.features)
            repulsion = at.gather(_pair_gradients(self.kernel, at.features))
            own = None if terms.own_slope is None else at.pull(terms.own_slope)
        return KernelTerms(
            terms.gram.to(particles.dtype),
            repulsion.to(particles.dtype),
            terms.squared_bandwidth,
            None if own is None else own.to(particles.dtype),
        )

    def gram(
        self, x: Float[Tensor, "*#batch row dim"], y: Float[Tensor, "*#batch column dim"]
    ) -> Float[Tensor, "*#batch row column"]:
        """Kernel between two clouds, with the bandwidth of ``x``."""
        rows, columns = _features(self.features, x), _features(self.features, y)
        return self.kernel.gram(rows, columns).to(x.dtype)

    def squared_bandwidth(
        self, particles: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch"]:
        """Squared bandwidth in force between the features, detached, in float32 or wider."""
        return self.kernel.squared_bandwidth(_features(self.features, particles).detach())

    def frozen(self, particles: Float[Tensor, "*batch particle dim"]) -> "Pullback":
        """The same features with a kernel that is fixed to what it is at these particles."""
        return Pullback(self.features, self.kernel.frozen(_features(self.features, particles)))


@dataclass(frozen=True)
class Equivariant:
    r"""Matrix-valued kernel :math:`J(x)^\top \kappa(f(x), f(y))\, J(y)` of features.

    SVGD with it is that of features, carried back to each particle. Scores are mixed as forces on
    features, and particles whose coordinates differ by what f does not see, an order, signs or
    another rotation, repel like copies and move the same way.

    They move where features do, and no further: what f does not see stays where it starts, and so
    does a particle at which f is stationary, such as a frequency of zero. A particle alone does
    not climb to a mode, since features that bend push it. In SVGD coordinates stay the program's,
    which are those that features know.

    Args:
        features: f, of each particle alone; a :class:`~bayesattn.kernels.FeatureMap` where it knows
            its own derivatives.
        kernel: κ, between features; RBF with the median rule by default.
    """

    features: Features
    kernel: ScalarKernel = field(default_factory=RBF)

    def __call__(self, particles: Float[Tensor, "*batch particle dim"]) -> "EquivariantTerms":
        """Gram matrix of the features, and repulsion of one cloud of particles."""
        with full_precision(particles):
            at = feature_terms(self.features, widened(particles))
            terms = self.kernel(at.features)
            bend = at.laplacian()
            pushed = at.gather_pushed(_pair_gradients(self.kernel, at.features))
            repulsion = at.pull(pushed + terms.gram @ bend)
            own = terms.gram.diagonal(dim1=-2, dim2=-1)[..., None] * bend
            if terms.own_slope is not None:
                own = own + at.push(at.pull(terms.own_slope))
            own = at.pull(own)
        squared = terms.squared_bandwidth
        dtype = particles.dtype
        return EquivariantTerms(at, terms.gram, repulsion.to(dtype), squared, own.to(dtype))

    def frozen(self, particles: Float[Tensor, "*batch particle dim"]) -> "Equivariant":
        """The same features with a kernel that is fixed to what it is at these particles."""
        return Equivariant(self.features, self.kernel.frozen(_features(self.features, particles)))


class EquivariantTerms(NamedTuple):
    """An equivariant kernel at one cloud of particles.

    Attributes:
        at: Features and their derivatives.
        gram: κ between the features of every two particles.
        repulsion: Sum over j of the divergence of K(x_j, x_i) by x_j.
        squared_bandwidth: That was in force between features.
        own_slope: Divergence of K(x_i, y) by y at y = x_i.
    """

    at: FeatureTerms
    gram: Float[Tensor, "*batch particle particle"]
    repulsion: Float[Tensor, "*batch particle dim"]
    squared_bandwidth: Float[Tensor, "*batch"] | None
    own_slope: Float[Tensor, "*batch particle dim"]

    def smooth(
        self, score: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch particle dim"]:
        """Sum over j of K(x_i, x_j) times the score at x_j."""
        with full_precision(score):
            return self.at.pull(self.gram @ self.at.push(widened(score))).to(score.dtype)

    def fluctuate(
        self, normal: Float[Tensor, "*batch particle dim"], floor: Number
    ) -> Float[Tensor, "*batch particle dim"]:
        """Make noise of covariance K / M + floor I; see :meth:`Terms.fluctuate`.

        K is held whole, particles times dim squared: for few particles of few coordinates.
        """
        axes = torch.eye(normal.shape[-2:].numel(), dtype=self.gram.dtype, device=normal.device)

        def column(axis: Tensor) -> Tensor:
            return self.smooth(axis.view(normal.shape[-2:]).expand(normal.shape))

        whole = torch.func.vmap(column, out_dims=-1)(axes).flatten(-3, -2)
        # As a number-valued kernel between coordinates, of which there are dim times M.
        between = KernelTerms(normal.shape[-1] * whole, normal)
        noise = between.fluctuate(normal.flatten(-2)[..., None], floor)
        return noise.view(normal.shape)


def reads_coordinates(kernel: object) -> bool:
    """Whether a kernel, or one that it is made of, is of features of the program's coordinates."""
    if isinstance(kernel, PerSite):
        return any(map(reads_coordinates, (kernel.kernel, *kernel.sites.values())))
    if isinstance(kernel, Sum):
        return any(map(reads_coordinates, kernel.kernels))
    return isinstance(kernel, Pullback | Equivariant)


def _features(
    features: Features, particles: Float[Tensor, "*batch particle dim"]
) -> Float[Tensor, "*batch particle feature"]:
    with full_precision(particles):
        return features(widened(particles))


def _pair_gradients(
    kernel: ScalarKernel, features: Float[Tensor, "*batch particle feature"]
) -> Float[Tensor, "*batch particle particle feature"]:
    """The gradient of k(f_j, f_i) by f_j at i, j."""
    if isinstance(kernel, Sum):
        assert kernel.weights is not None
        parts = zip(kernel.weights, kernel.kernels, strict=True)
        first, *others = (weight * _pair_gradients(part, features) for weight, part in parts)
        return sum(others, first)
    fixed = kernel.frozen(features)
    if isinstance(fixed, RBF | IMQ):
        centered, distances = geometry(features)

        def total(squared: Tensor) -> Tensor:
            return fixed.at_distances(squared, squared.mean((-2, -1)))[0].sum()

        slope = -2 * torch.func.grad(total)(distances)
        return slope[..., None] * (centered[..., :, None, :] - centered[..., None, :, :])

    def value(x: Tensor, y: Tensor) -> Tensor:
        return fixed.gram(x[..., None, :], y[..., None, :]).sum()

    of_one = torch.func.vmap(torch.func.grad(value), (-2, None), -2)
    return torch.func.vmap(of_one, (None, -2), -3)(features, features)
