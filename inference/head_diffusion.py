r"""Heads as chains: Stein's force, Langevin drift and noise, in steps of their own.

.. math:: \theta_i \leftarrow \theta_i + \eta P \left[ \tfrac1M \sum_j k_{ij} d_j
    + \tfrac\alpha M R_i + \tau d_i \right] + \sqrt{2 \eta \alpha P}\, \xi_i,
    \qquad \mathrm{cov}(\xi) = K / M + \tau I

d is the descent of the loss, R the kernel's repulsion and α the temperature of the loss, T / N. The
law that this leaves invariant, as η goes to zero, is exp(-L / α), as long as kernel and P follow
neither the heads nor their gradients: both are frozen after a transient. Noise that passes through
Adam or momentum has no temperature.

Source:
    An et al. (2020), Repulsive attention, arXiv:2009.09364, whose noise has covariance τ I.
    Noise of covariance K: Gallego and Insua (2018), arXiv:1812.00071.
    P of squared gradients: Li et al. (2016), Preconditioned SGLD, arXiv:1512.07666.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.inference.directions import DirectionParts, stein_direction
from bayesattn.inference.frozen_kernels import tensors_of, with_tensors
from bayesattn.inference.head_forces import SteinForce
from bayesattn.inference.head_motion import HeadMotion
from bayesattn.inference.langevin import Noise, diffusion
from bayesattn.inference.routine import check_choice, check_count, check_positive
from bayesattn.inference.schedules import Number
from bayesattn.kernels import RBF, Kernel, Terms
from bayesattn.networks import HeadPartition

__all__ = ["DiffusionState", "SteinDiffusion", "check_diffusion"]

# Roots of mean squared gradients are floored at this part of their mean over coordinates.
_FLOOR = 0.01


@dataclass(frozen=True)
class SteinDiffusion:
    """SPOS: Stein's force through the optimizer first, then sampling in steps of their own.

    With ``kernel=Separate(), langevin=0`` it is SGLD, heads without interaction.

    Args:
        warmup_steps: Steps of the transient. After it the optimizer still moves everything else,
            while its learning rate is η of the heads' own steps.
        kernel: Between heads in the space of their weights; RBF with the paper's bandwidth.
        langevin: τ.
        noise: ``"exact"``, or ``"paper"``, under which few heads vary too little.
        preconditioner: P: ``"rms"``, one over the root mean square of each coordinate's gradients
            in the whole transient, which all heads of a partition share; or ``"none"``.
        faithful: As in the paper's code instead: the noise is added to the gradient and goes
            through the optimizer, from the first step on, and nothing is frozen. It has a
            temperature only under plain stochastic gradient descent, and none under Adam.

    Raises:
        ValueError: On settings that do not go together.
    """

    warmup_steps: int
    kernel: Kernel = field(default_factory=lambda: RBF("paper"))
    langevin: Number = 1.0
    noise: Noise = "exact"
    preconditioner: Literal["rms", "none"] = "rms"
    faithful: bool = False

    def __post_init__(self) -> None:
        check_count("warmup_steps", self.warmup_steps, least=0)
        check_choice("noise", self.noise, ("exact", "paper"))
        check_choice("preconditioner", self.preconditioner, ("rms", "none"))
        if self.langevin != 0:
            check_positive("langevin", self.langevin)
        if self.faithful and self.warmup_steps:
            raise ValueError(
                f"faithful=True has no transient: expected warmup_steps=0, got {self.warmup_steps}"
            )
        if self.preconditioner == "rms" and not (self.warmup_steps or self.faithful):
            raise ValueError(
                "preconditioner='rms' is measured in the transient: expected warmup_steps of at "
                "least 1, got 0; or take preconditioner='none'"
            )

    @property
    def force(self) -> SteinForce:
        """What the transient goes by."""
        return SteinForce(self.kernel)

    def forces(
        self,
        terms: Terms,
        drive: Float[Tensor, "system head dim"],
        normal: Float[Tensor, "system head dim"],
        alpha: Number,
    ) -> tuple[DirectionParts, Float[Tensor, "system head dim"]]:
        """Drift, in its two parts, and noise over the root of 2 η α P.

        Args:
            terms: Of the kernel at the heads.
            drive: d.
            normal: Standard normal noise.
            alpha: α.
        """
        parts = stein_direction(terms, drive)
        slope, fluctuation = diffusion(terms, normal, noise=self.noise, langevin=self.langevin)
        repulsion = parts.repulsion if slope is None else parts.repulsion + slope
        along = parts.drive + self.langevin * drive
        return DirectionParts(along, alpha * repulsion), fluctuation

    def through_optimizer(
        self,
        particles: Float[Tensor, "system head dim"],
        drive: Float[Tensor, "system head dim"],
        normal: Float[Tensor, "system head dim"],
        alpha: Number,
        rate: Number | Tensor,
    ) -> HeadMotion:
        """Add to the gradient what stochastic gradient descent at this rate makes the noise of."""
        terms = self.kernel(particles)
        parts, fluctuation = self.forces(terms, drive, normal, alpha)
        rate = torch.as_tensor(rate)
        scale = torch.where(rate > 0, 2 * alpha / rate, 0.0).to(particles.device) ** 0.5
        gradient = -(parts.drive + parts.repulsion + scale * fluctuation)
        return HeadMotion(parts, terms.squared_bandwidth, gradient=gradient)


class DiffusionState:
    """What was measured in the transient and is frozen after it, for each partition by its name.

    Args:
        method: The settings.
    """

    def __init__(self, method: SteinDiffusion):
        self.method = method
        self.counts: dict[str, int] = {}
        self.squares: dict[str, Tensor] = {}
        self.kernels: dict[str, Kernel] = {}
        self._frozen: dict[tuple[str, ...], tuple[Kernel, Tensor]] = {}

    def measure(self, names: Sequence[str], drive: Float[Tensor, "system head dim"]) -> None:
        """Take the gradients of a step of the transient into their means.

        All of its steps count alike: gradients at a mode are small, and say nothing of how far a
        step may go.
        """
        for name, square in zip(names, drive.square().mean(-2), strict=True):
            self.counts[name] = self.counts.get(name, 0) + 1
            before = self.squares.get(name, square)
            self.squares[name] = before.lerp(square, 1 / self.counts[name])

    def preconditioner(
        self, names: Sequence[str], like: Float[Tensor, "system head dim"]
    ) -> Float[Tensor, "system #head #dim"]:
        """P of some partitions; one where no gradient was seen."""
        missing = torch.ones_like(like[0, 0])
        if self.method.preconditioner == "none":
            return missing.expand(len(names), 1, -1)
        roots = torch.stack([self.squares.get(name, missing) for name in names]).sqrt()
        floor = _FLOOR * roots.mean(-1, keepdim=True) + torch.finfo(roots.dtype).tiny
        return torch.maximum(roots, floor).reciprocal()[:, None]

    def frozen(
        self, names: tuple[str, ...], particles: Float[Tensor, "system head dim"]
    ) -> tuple[Kernel, Float[Tensor, "system #head #dim"]]:
        """Kernel and P as they were when the transient ended, for some partitions at once."""
        if names not in self._frozen:
            metric = self.preconditioner(names, particles)
            self._frozen[names] = self._kernel(names, particles), metric
        return self._frozen[names]

    def moved(
        self,
        names: tuple[str, ...],
        particles: Float[Tensor, "system head dim"],
        drive: Float[Tensor, "system head dim"],
        normal: Float[Tensor, "system head dim"],
        alpha: Number,
    ) -> HeadMotion:
        """Take a step of the heads' own, with what was frozen; the gradient is left as it is."""
        kernel, metric = self.frozen(names, particles)
        terms = kernel(particles)
        parts, fluctuation = self.method.forces(terms, drive, normal, alpha)

        def move(rate: Number | Tensor) -> Tensor:
            drift = rate * metric * (parts.drive + parts.repulsion)
            return particles + drift + (2 * rate * alpha * metric) ** 0.5 * fluctuation

        return HeadMotion(parts, terms.squared_bandwidth, move=move)

    def state_dict(self) -> dict[str, Any]:
        """Tensors by the partitions' names."""
        return {
            "counts": dict(self.counts),
            "squares": dict(self.squares),
            "kernels": {name: tensors_of(kernel) for name, kernel in self.kernels.items()},
        }

    def load_state_dict(
        self, state: Mapping[str, Any], particles: Mapping[str, Float[Tensor, "_head _dim"]]
    ) -> None:
        """Go on from a state.

        Args:
            state: Of :meth:`state_dict`.
            particles: Heads of each partition, whose types and devices the tensors take.
        """
        self._frozen = {}
        self.counts = dict(state["counts"])
        self.squares = {
            name: square.to(particles[name].device) for name, square in state["squares"].items()
        }
        self.kernels = {
            name: with_tensors(
                self.method.kernel.frozen(particles[name]),
                [constant.to(particles[name].device) for constant in constants],
            )
            for name, constants in state["kernels"].items()
        }

    def _kernel(self, names: tuple[str, ...], particles: Tensor) -> Kernel:
        for name, heads in zip(names, particles, strict=True):
            if name not in self.kernels:
                self.kernels[name] = self.method.kernel.frozen(heads)
        kernels = [self.kernels[name] for name in names]
        constants = [torch.stack(parts) for parts in zip(*map(tensors_of, kernels), strict=True)]
        return with_tensors(kernels[0], constants)


def check_diffusion(
    method: SteinDiffusion,
    partitions: Iterable[HeadPartition],
    optimizer: torch.optim.Optimizer,
    *,
    is_decoupled: bool,
) -> None:
    """Refuse weights whose steps would be lost, and warn of noise that has no temperature.

    Raises:
        ValueError: If weights are narrower than float32, or settings do not go together.
    """
    for part in partitions:
        for parameter in part.parameters:
            if torch.finfo(parameter.dtype).bits < 32:
                raise ValueError(
                    f"{part.name}: steps of a diffusion are below the resolution of "
                    f"{parameter.dtype}; expected weights of float32 or wider"
                )
    if not method.faithful:
        return
    if is_decoupled:
        raise ValueError("faithful=True goes through the optimizer: expected decoupled=False")
    is_plain = type(optimizer) is torch.optim.SGD and not any(
        group["momentum"] or group["weight_decay"] for group in optimizer.param_groups
    )
    if not is_plain:
        warnings.warn(
            "SteinDiffusion(faithful=True): noise that goes through "
            f"{type(optimizer).__name__} is not calibrated, and samples no posterior",
            stacklevel=4,
        )
