r"""Shares of a mixture's components: equal, by their norms as attention has it, or learned.

.. math:: \log \pi_i = \text{const}, \qquad
          \log \pi_i = \frac{\lVert q_i \rVert^2}{2 \sigma^2} + \text{const}, \qquad
          \pi \sim \mathrm{Dirichlet}(\alpha, \dots, \alpha)

Under normal laws around the components, the second makes the logits of a component the dot product,
less what all components have in common; the first leaves a bias :math:`-\lVert q_i\rVert^2 / 2
\sigma^2`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["DirichletMixing", "Mixing", "NormMixing", "UniformMixing"]


class Mixing(ABC):
    """Shares of components before the data are seen."""

    @abstractmethod
    def logits(
        self,
        component: Float[Tensor, "*problem component dim"],
        variance: Float[Tensor, "*#problem 1 1"],
    ) -> Float[Tensor, "*problem component"]:
        """Logits of the shares around the given components, before any of them moves."""


@dataclass(frozen=True)
class UniformMixing(Mixing):
    """Equal shares."""

    def logits(
        self,
        component: Float[Tensor, "*problem component dim"],
        variance: Float[Tensor, "*#problem 1 1"],
    ) -> Float[Tensor, "*problem component"]:
        """Zeros."""
        return torch.zeros_like(component[..., 0])


@dataclass(frozen=True)
class NormMixing(Mixing):
    """Shares by half the squared norm over the variance, which turn distances to dot products."""

    def logits(
        self,
        component: Float[Tensor, "*problem component dim"],
        variance: Float[Tensor, "*#problem 1 1"],
    ) -> Float[Tensor, "*problem component"]:
        """Half the squared norms over the variance."""
        return component.square().sum(-1) / (2 * variance.squeeze(-1))


@dataclass(frozen=True)
class DirichletMixing(Mixing):
    """Learned shares under a symmetric Dirichlet prior, at the latent site ``mixing``.

    Attributes:
        concentration: Of each component; above one, so that no share is zero at the mode.
    """

    concentration: int | float = 2.0

    def __post_init__(self) -> None:
        if not self.concentration > 1:
            raise ValueError(f"concentration must be above one, got {self.concentration}")

    def logits(
        self,
        component: Float[Tensor, "*problem component dim"],
        variance: Float[Tensor, "*#problem 1 1"],
    ) -> Float[Tensor, "*problem component"]:
        """Zeros: the prior's mode."""
        return torch.zeros_like(component[..., 0])

    def mode(
        self,
        counts: Float[Tensor, "*problem component"],
        is_present: Bool[Tensor, "*problem component"],
    ) -> Float[Tensor, "*problem component"]:
        """Shares of highest posterior density given how many data each component accounts for.

        Data see the shares of present components relative to each other; what these have together,
        and each absent component, stays at the prior's mode.
        """
        size = counts.shape[-1]
        raised = torch.where(is_present, counts + (self.concentration - 1), 0.0)
        present = is_present.to(counts).mean(-1, keepdim=True)
        relative = raised / raised.sum(-1, keepdim=True).clamp_min(torch.finfo(counts.dtype).tiny)
        return torch.where(is_present, present * relative, 1 / size)
