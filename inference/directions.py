r"""Where a kernel between particles sends them: along their drives, and away from each other.

.. math::
    \mathrm{stein}_i = \frac1M \sum_j \left[ K(x_i, x_j)\, d_j + \nabla_{x_j} K(x_j, x_i) \right],
    \qquad
    \mathrm{wasserstein}_i = d_i + \frac{\sum_j \nabla_{x_j} k(x_j, x_i)}{\sum_j k(x_i, x_j)}

The drive d is the score of the target. Stein's direction mixes the drives of all particles; that of
a density estimate leaves each particle its own, and adds minus the score of the estimate.

Source:
    Liu and Wang (2016), Stein variational gradient descent, arXiv:1608.04471, eq. 8.
    D'Angelo and Fortuin (2021), Repulsive deep ensembles are Bayesian, arXiv:2106.11642, eq. 12.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.kernels import Terms

__all__ = ["Direction", "DirectionParts", "stein_direction", "wasserstein_direction"]


class DirectionParts(NamedTuple):
    """A direction's two summands.

    Attributes:
        drive: Along the score.
        repulsion: Away from the other particles.
    """

    drive: Float[Tensor, "*batch particle dim"]
    repulsion: Float[Tensor, "*batch particle dim"]


@runtime_checkable
class Direction(Protocol):
    """From a kernel at a cloud of particles and their drives to where they go."""

    def __call__(self, terms: Terms, drive: Float[Tensor, "*batch particle dim"]) -> DirectionParts:
        """Both parts of the direction."""
        ...


def stein_direction(terms: Terms, drive: Float[Tensor, "*batch particle dim"]) -> DirectionParts:
    """Steepest descent of KL to the target, in the kernel's function space.

    Args:
        terms: Of the kernel at the particles.
        drive: Score of the target at each particle.
    """
    num_particles = drive.shape[-2]
    # In place, since these are the largest tensors that there are.
    return DirectionParts(terms.smooth(drive).div_(num_particles), terms.repulsion / num_particles)


def wasserstein_direction(
    terms: Terms, drive: Float[Tensor, "*batch particle dim"]
) -> DirectionParts:
    """Steepest descent of KL in Wasserstein space, the particles' density estimated by a kernel.

    Args:
        terms: Of a radial, positive kernel at the particles, or of blocks of such.
        drive: Score of the target at each particle.
    """
    # A block-diagonal kernel divides each block by its own mass.
    mass = terms.smooth(torch.ones_like(drive))
    return DirectionParts(drive, terms.repulsion / mass)
