r"""Weighted sums of kernels.

.. math:: k(x, y) = \sum_n w_n k_n(x, y)
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.kernels.bandwidths import Number
from bayesattn.kernels.protocol import KernelTerms, ScalarKernel

__all__ = ["Sum", "Summable"]


class Summable:
    """A kernel that the plus sign adds to another."""

    def __add__(self, other: ScalarKernel) -> "Sum":
        if not isinstance(self, ScalarKernel) or not isinstance(other, ScalarKernel):
            return NotImplemented
        return Sum((self, other))


class Sum(Summable):
    """Weighted sum of number-valued kernels; ``a + b`` is one with weights of one.

    Args:
        kernels: At least one; each keeps its own bandwidth.
        weights: Of each kernel, positive; one by default.

    Raises:
        ValueError: Without kernels; if weights do not fit them or are not positive.
    """

    def __init__(self, kernels: Sequence[ScalarKernel], weights: Sequence[Number] | None = None):
        self.kernels = tuple(kernels)
        self.weights = (1.0,) * len(self.kernels) if weights is None else tuple(weights)
        if not self.kernels:
            raise ValueError("Sum kernels: expected at least one kernel, got none")
        if len(self.weights) != len(self.kernels):
            raise ValueError(
                f"Sum weights: expected one for each of {len(self.kernels)} kernels, got "
                f"{len(self.weights)}"
            )
        if not all(0.0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"Sum weights: expected positive numbers, got {self.weights}")

    def __repr__(self) -> str:
        return f"Sum(kernels={self.kernels}, weights={self.weights})"

    def __call__(self, particles: Float[Tensor, "*batch particle dim"]) -> KernelTerms:
        """Gram matrix and repulsion of one cloud of particles."""
        terms = [kernel(particles) for kernel in self.kernels]
        squares = [part.squared_bandwidth for part in terms]
        return KernelTerms(
            self._sum([part.gram for part in terms]),
            self._sum([part.repulsion for part in terms]),
            self._mean([square for square in squares if square is not None]),
        )

    def gram(
        self, x: Float[Tensor, "*#batch row dim"], y: Float[Tensor, "*#batch column dim"]
    ) -> Float[Tensor, "*#batch row column"]:
        """Kernel between two clouds; what depends on particles is that of ``x``."""
        return self._sum([kernel.gram(x, y) for kernel in self.kernels])

    def squared_bandwidth(
        self, particles: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch"]:
        """Mean of the kernels' squared bandwidths: a figure to watch, which nothing is made of."""
        return self._mean([kernel.squared_bandwidth(particles) for kernel in self.kernels])

    def frozen(self, particles: Float[Tensor, "*batch particle dim"]) -> "Sum":
        """The same sum of kernels that are fixed to what they are at these particles."""
        return Sum([kernel.frozen(particles) for kernel in self.kernels], self.weights)

    def _sum(self, parts: list[Tensor]) -> Tensor:
        return sum(weight * part for weight, part in zip(self.weights, parts, strict=True))

    @staticmethod
    def _mean(squares: list[Tensor]) -> Tensor:
        return torch.stack(squares).mean(0)
