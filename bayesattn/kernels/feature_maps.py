r"""Feature maps of particles, and what kernels on features need of their derivatives.

.. math:: J_i = \frac{\partial f}{\partial x}(x_i), \qquad
    \Delta_i = \sum_d \frac{\partial^2 f}{\partial x_d^2}(x_i)

A map acts on each particle alone. Any function that does is one; what it is differentiated by, a
map may know in closed form.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["DifferentiatedTerms", "FeatureMap", "FeatureTerms", "feature_terms"]


@runtime_checkable
class FeatureTerms(Protocol):
    """A feature map at one cloud of particles."""

    @property
    def features(self) -> Float[Tensor, "*batch particle feature"]:
        """Features of each particle."""
        ...

    def laplacian(self) -> Float[Tensor, "*batch particle feature"]:
        """Sum of the second derivatives of each feature by each coordinate of its particle."""
        ...

    def push(
        self, vectors: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch particle feature"]:
        """How the features of each particle change along a vector of its own: J_i v_i."""
        ...

    def pull(
        self, covectors: Float[Tensor, "*batch particle feature"]
    ) -> Float[Tensor, "*batch particle dim"]:
        """The gradient by each particle of its features' product with covectors: J_iᵀ c_i."""
        ...

    def gather(
        self, covectors: Float[Tensor, "*batch row particle feature"]
    ) -> Float[Tensor, "*batch row dim"]:
        """Sum over j of J_jᵀ c_ij."""
        ...

    def gather_pushed(
        self, covectors: Float[Tensor, "*batch row particle feature"]
    ) -> Float[Tensor, "*batch row feature"]:
        """Sum over j of J_j J_jᵀ c_ij."""
        ...


@runtime_checkable
class FeatureMap(Protocol):
    """A feature map that knows its own derivatives, such as :class:`FrequencySets`."""

    def __call__(
        self, particles: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch particle feature"]:
        """Features of each particle."""
        ...

    def at(self, particles: Float[Tensor, "*batch particle dim"]) -> FeatureTerms:
        """The features and their derivatives at one cloud of particles."""
        ...


def feature_terms(
    features: Callable[[Tensor], Tensor], particles: Float[Tensor, "*batch particle dim"]
) -> FeatureTerms:
    """A map at a cloud of particles, by its own derivatives where it knows them.

    Args:
        features: A :class:`FeatureMap` or any other function of each particle alone.
        particles: At which.
    """
    if isinstance(features, FeatureMap):
        return features.at(particles)
    return DifferentiatedTerms(features, particles, features(particles))


class DifferentiatedTerms(NamedTuple):
    """A function of each particle at one cloud of them, differentiated by PyTorch.

    Its Jacobians, "*batch particle feature dim", are the largest tensors.

    Attributes:
        function: From "*batch particle dim" to "*batch particle feature".
        particles: At which.
        features: Of each particle.
    """

    function: Callable[[Tensor], Tensor]
    particles: Float[Tensor, "*batch particle dim"]
    features: Float[Tensor, "*batch particle feature"]

    def laplacian(self) -> Float[Tensor, "*batch particle feature"]:
        """Sum of the second derivatives of each feature by each coordinate of its particle."""

        def bend(axis: Tensor) -> Tensor:
            direction = axis.expand_as(self.particles)

            def slope(particles: Tensor) -> Tensor:
                return _change(self.function, particles, direction)

            return _change(slope, self.particles, direction)

        return torch.func.vmap(bend)(_axes(self.particles)).sum(0)

    def push(
        self, vectors: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch particle feature"]:
        """How the features of each particle change along a vector of its own: J_i v_i."""
        return _change(self.function, self.particles, vectors)

    def pull(
        self, covectors: Float[Tensor, "*batch particle feature"]
    ) -> Float[Tensor, "*batch particle dim"]:
        """The gradient by each particle of its features' product with covectors: J_iᵀ c_i."""
        return torch.func.vjp(self.function, self.particles)[1](covectors)[0]

    def gather(
        self, covectors: Float[Tensor, "*batch row particle feature"]
    ) -> Float[Tensor, "*batch row dim"]:
        """Sum over j of J_jᵀ c_ij."""
        return torch.einsum("...ijf,...jfd->...id", covectors, self._jacobian())

    def gather_pushed(
        self, covectors: Float[Tensor, "*batch row particle feature"]
    ) -> Float[Tensor, "*batch row feature"]:
        """Sum over j of J_j J_jᵀ c_ij."""
        jacobian = self._jacobian()
        return torch.einsum("...ijf,...jfg->...ig", covectors, jacobian @ jacobian.mT)

    def _jacobian(self) -> Float[Tensor, "*batch particle feature dim"]:
        def row(axis: Tensor) -> Tensor:
            return self.pull(axis.expand_as(self.features))

        return torch.func.vmap(row, out_dims=-2)(_axes(self.features))


def _change(function: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor) -> Tensor:
    """Derivative along a direction, by reverse mode twice, which every function has."""
    values, back = torch.func.vjp(function, at)[:2]

    def pull(covectors: Tensor) -> Tensor:
        return back(covectors)[0]

    return torch.func.vjp(pull, torch.zeros_like(values))[1](direction)[0]


def _axes(like: Float[Tensor, "*batch row"]) -> Float[Tensor, "axis row"]:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
