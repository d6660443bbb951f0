r"""Weighted sums of kernels.

.. math:: k(x, y) = \sum_n w_n k_n(x, y)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Sum(Summable):
    """Weighted sum of number-valued kernels; ``a + b`` is one with weights of one.

    Args:
        kernels: At least one; each keeps its own bandwidth.
        weights: Of each kernel, positive; one by default.

    Raises:
        ValueError: Without kernels; if weights do not fit them or are not positive.
    """

    kernels: Sequence[ScalarKernel]
    weights: Sequence[Number] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernels", tuple(self.kernels))
        weights = [1.0] * len(self.kernels) if self.weights is None else self.weights
        object.__setattr__(self, "weights", tuple(weights))
        if not self.kernels:
            raise ValueError("Sum kernels: expected at least one kernel, got none")
        if len(weights) != len(self.kernels):
            raise ValueError(
                f"Sum weights: expected one for each of {len(self.kernels)} kernels, got "
                f"{len(weights)}"
            )
        if not all(0.0 < weight < math.inf for weight in weights):
            raise ValueError(f"Sum weights: expected positive numbers, got {self.weights}")

    def __call__(self, particles: Float[Tensor, "*batch particle dim"]) -> KernelTerms:
        """Gram matrix and repulsion of one cloud of particles."""
        terms = [kernel(particles) for kernel in self.kernels]
        known = [term.squared_bandwidth for term in terms if term.squared_bandwidth is not None]
        zero = torch.zeros_like(particles)
        slopes = [zero if term.own_slope is None else term.own_slope for term in terms]
        return KernelTerms(
            self._sum([term.gram for term in terms]),
            self._sum([term.repulsion for term in terms]),
            torch.stack(known).mean(0) if known else None,
            None if all(term.own_slope is None for term in terms) else self._sum(slopes),
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
        return torch.stack([kernel.squared_bandwidth(particles) for kernel in self.kernels]).mean(0)

    def frozen(self, particles: Float[Tensor, "*batch particle dim"]) -> "Sum":
        """The same sum of kernels that are fixed to what they are at these particles."""
        return Sum([kernel.frozen(particles) for kernel in self.kernels], self.weights)

    def _sum(self, parts: Sequence[Tensor]) -> Tensor:
        assert self.weights is not None
        first, *others = (weight * part for weight, part in zip(self.weights, parts, strict=True))
        for part in others:
            first = first + part
        return first
