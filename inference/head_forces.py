r"""Forces between the heads of a network, in units of the loss that it is trained by.

.. math:: -\tilde g_i = \mathrm{drive}_i + \alpha\, \mathrm{repulsion}_i, \qquad
    d_i = -\frac{\partial L}{\partial \theta_i} + \frac1N \nabla \log p(\theta_i)

Stein's force mixes the drives d of the heads by a kernel, :math:`\frac1M \sum_j k_{ij} d_j`, and
pushes them apart; that of a density estimate leaves each head its own drive. With the loss L a mean
over N examples, α = T / N makes them follow the posterior p^(1/T).

Heads with the same circuits are one function, however far apart their weights are:
see :mod:`bayesattn.networks.circuits`.

Source:
    An et al. (2020), Repulsive attention, arXiv:2009.09364.
    D'Angelo and Fortuin (2021), Repulsive deep ensembles are Bayesian, arXiv:2106.11642.
"""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.inference.directions import (
    Direction,
    stein_direction,
    wasserstein_direction,
)
from bayesattn.kernels import IMQ, RBF, Kernel
from bayesattn.networks import Circuits, HeadBatch, circuit_products, head_circuits

__all__ = [
    "CircuitForce",
    "ForceParts",
    "HeadForce",
    "SteinForce",
    "WassersteinForce",
    "check_kernel",
]


class ForceParts(NamedTuple):
    """What a force does to a batch of particle systems.

    Attributes:
        drive: Along the descent of the loss.
        repulsion: Away from the other heads, not yet times α.
        squared_bandwidth: Of the kernel; None where there is no such figure.
    """

    drive: Float[Tensor, "system head dim"]
    repulsion: Float[Tensor, "system head dim"]
    squared_bandwidth: Float[Tensor, " system"] | None


@runtime_checkable
class HeadForce(Protocol):
    """From heads and the descents of their loss to where they go."""

    def __call__(
        self,
        heads: HeadBatch,
        particles: Float[Tensor, "system head dim"],
        drive: Float[Tensor, "system head dim"],
    ) -> ForceParts:
        """Both parts of the force.

        Args:
            heads: What the particles are.
            particles: In float32 or wider.
            drive: d, minus the gradient of the loss, and the prior's part.
        """
        ...


class _WeightForce:
    """What forces share whose distances are between the heads' weights."""

    kernel: Kernel
    direction: ClassVar[Direction]

    def __call__(
        self,
        heads: HeadBatch,
        particles: Float[Tensor, "system head dim"],
        drive: Float[Tensor, "system head dim"],
    ) -> ForceParts:
        """Both parts of the force; see :class:`HeadForce`."""
        terms = self.kernel(particles)
        return ForceParts(*type(self).direction(terms, drive), terms.squared_bandwidth)


@dataclass(frozen=True)
class SteinForce(_WeightForce):
    """Steepest descent in the kernel's function space: SVGD, as the paper has it.

    In many dimensions the heads are about equally far from each other. The paper's bandwidth then
    gives other heads a weight of 1 / (M + 1), the median rule 1 / e and more, so that gradients of
    the heads become nearly one. Heads that start at one place stay there, whatever their gradients,
    such as queries that are all zero at first; under :class:`WassersteinForce` they part.

    Args:
        kernel: Between heads in the space of their weights; RBF with the paper's bandwidth.

    Raises:
        ValueError: If it is no kernel.
    """

    kernel: Kernel = field(default_factory=lambda: RBF("paper"))
    direction: ClassVar[Direction] = staticmethod(stein_direction)

    def __post_init__(self) -> None:
        check_kernel("SteinForce", self.kernel)


@dataclass(frozen=True)
class WassersteinForce(_WeightForce):
    """Descent in Wasserstein space with a density estimate: a repulsive ensemble.

    Args:
        kernel: RBF or IMQ; RBF with the median rule by default.

    Raises:
        ValueError: If the kernel is another.
    """

    kernel: RBF | IMQ = field(default_factory=RBF)
    direction: ClassVar[Direction] = staticmethod(wasserstein_direction)

    def __post_init__(self) -> None:
        _check_radial("WassersteinForce", self.kernel)


@dataclass(frozen=True)
class CircuitForce:
    """As :class:`WassersteinForce`, but with distances between the heads' circuits.

    For partitions of two roles, queries with keys or values with outputs, without biases or with
    those of both: ``head_partitions(model, ("query", "key"), joint=True)``. Distances are the same
    in every gauge, and the push of a head turns with rotations of its own weights. Rotary
    embeddings stand between queries and keys; the circuits are then those of a query and a key at
    one place.

    Stein's force has no such form: it adds up what other heads' weights feel, and weights of two
    heads are in gauges of their own.

    Args:
        kernel: RBF or IMQ, between circuits.

    Raises:
        ValueError: If the kernel is another.
    """

    kernel: RBF | IMQ = field(default_factory=RBF)

    def __post_init__(self) -> None:
        _check_radial("CircuitForce", self.kernel)

    def __call__(
        self,
        heads: HeadBatch,
        particles: Float[Tensor, "system head dim"],
        drive: Float[Tensor, "system head dim"],
    ) -> ForceParts:
        """Both parts of the force; see :class:`HeadForce`.

        Raises:
            ValueError: If a particle is not made of two projections of one width.
        """
        with torch.enable_grad():
            moved = particles.detach().requires_grad_()
            distances, norms = _squared_distances(
                head_circuits(heads, moved), head_circuits(heads, particles.detach())
            )
            density, squared = self.kernel.at_distances(distances, norms.mean(-1))
            (push,) = torch.autograd.grad(density.sum(-1).log().sum(), moved)
        return ForceParts(drive, -push, squared)


def _squared_distances(
    moved: Circuits, fixed: Circuits
) -> tuple[Float[Tensor, "system head other_head"], Float[Tensor, "system head"]]:
    """Between circuits, as functions of the first ones alone, and the squared norms of all."""
    products = circuit_products(moved, fixed)
    own = products.diagonal(dim1=-2, dim2=-1)
    norms = own.detach()
    # The squared norm's value and gradient from its linear part, and exact zeros on the diagonal.
    squared = (2 * own - norms)[..., :, None] + norms[..., None, :] - 2 * products
    return squared.clamp_min(0.0), norms


def check_kernel(name: str, kernel: Kernel) -> None:
    """Refuse what is no kernel between particles.

    Raises:
        ValueError: With the name of what takes it, and what came.
    """
    if isinstance(kernel, type) or not isinstance(kernel, Kernel):
        raise ValueError(f"{name} kernel: expected a kernel, such as RBF(), got {kernel!r}")


def _check_radial(name: str, kernel: RBF | IMQ) -> None:
    if not isinstance(kernel, RBF | IMQ):
        raise ValueError(f"{name} kernel: estimates a density, so RBF or IMQ, got {kernel!r}")
