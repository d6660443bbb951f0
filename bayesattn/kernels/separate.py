r"""The kernel of particles that do not interact.

.. math:: k(x_i, x_j) = M \delta_{ij}

With it SVGD is gradient ascent of each particle, and stochastic particle optimization is Langevin
dynamics of each.
"""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from bayesattn.kernels.bandwidths import Number

__all__ = ["Separate", "SeparateTerms"]


@dataclass(frozen=True)
class Separate:
    """Each particle alone: weight M, the number of particles, for itself, and none for others."""

    def __call__(self, particles: Float[Tensor, "*batch particle dim"]) -> "SeparateTerms":
        """No repulsion, and scores that are not mixed."""
        # Zeros that take no memory.
        return SeparateTerms(particles.new_zeros(()).expand_as(particles))

    def frozen(self, particles: Float[Tensor, "*batch particle dim"]) -> "Separate":
        """The same kernel, which has nothing to freeze."""
        return self


class SeparateTerms(NamedTuple):
    """Particles that do not interact, at one cloud of them.

    Attributes:
        repulsion: Zero.
    """

    repulsion: Float[Tensor, "*batch particle dim"]

    @property
    def squared_bandwidth(self) -> Float[Tensor, "*batch"]:
        """Zero: no other particle is near enough."""
        return self.repulsion[..., 0, 0]

    @property
    def own_slope(self) -> None:
        """Zero."""
        return

    def smooth(
        self, score: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch particle dim"]:
        """M times each particle's own score."""
        return score.shape[-2] * score

    def fluctuate(
        self, normal: Float[Tensor, "*batch particle dim"], floor: Number
    ) -> Float[Tensor, "*batch particle dim"]:
        """Make noise of covariance (1 + floor) I; see :meth:`Terms.fluctuate`."""
        return (1 + floor) ** 0.5 * normal
