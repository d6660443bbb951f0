r"""Heads as chains: Stein's force, Langevin drift and noise, in steps of their own.

.. math:: \theta_i \leftarrow \theta_i + \eta P \left[ \tfrac1M \sum_j k_{ij} d_j
    + \tfrac\alpha M R_i + \tau d_i \right] + \sqrt{2 \eta \alpha P}\, \xi_i,
    \qquad \mathrm{cov}(\xi) = K / M + \tau I

d is the descent of the loss, R the kernel's repulsion and α the temperature of the loss, T / N. The
law that this leaves invariant, as η goes to zero, is exp(-L / α), as long as kernel and P follow
neither the heads nor their gradients. P is frozen after a transient, the kernel after a burn-in,
when heads are as far apart as they will be. Noise that passes through Adam or momentum has no
temperature.

Source:
    An et al. (2020), Repulsive attention, arXiv:2009.09364, whose noise has covariance τ I.
    Noise of covariance K: Gallego and Insua (2018), arXiv:1812.00071.
    P of squared gradients: Li et al. (2016), Preconditioned SGLD, arXiv:1512.07666.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
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

__all__ = ["DiffusionState", "Phase", "SteinDiffusion", "check_diffusion", "check_resolution"]

# Roots of mean squared gradients are floored at this part of their mean over coordinates.
_FLOOR = 0.01


@dataclass(frozen=True)
class SteinDiffusion:
    r"""SPOS: Stein's force through the optimizer first, then sampling in steps of their own.

    With ``kernel=Separate(), langevin=0`` it is SGLD, heads without interaction.

    After the transient the optimizer moves everything but the heads, and its learning rate is η of
    their steps. Noise of :math:`\sqrt{2 \eta \alpha P}` is much larger than what the optimizer did
    at the same rate, so let the rate fall where heads begin to sample; they diverge at too large a
    one. The optimizer's weight decay does not reach them: give ``Repulsion`` a ``prior``.

    Args:
        warmup_steps: For each partition, steps before heads are samples: half of them the
            transient, half burn-in.
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


class Phase(IntEnum):
    """Of the heads of a partition: as the optimizer has it, in their own steps, or sampling."""

    TRANSIENT = 0
    BURN_IN = 1
    SAMPLING = 2


class DiffusionState:
    """What is measured in the warm-up and then frozen, for each partition by its name.

    Args:
        method: The settings.
    """

    def __init__(self, method: SteinDiffusion):
        self.method = method
        self.num_steps: dict[str, int] = {}
        self.counts: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.kernels: dict[str, Kernel] = {}
        self._stacked: tuple[tuple[str, ...], Kernel] | None = None

    def phase(self, name: str) -> Phase:
        """Where a partition is in its warm-up."""
        num_steps, warmup_steps = self.num_steps.get(name, 0), self.method.warmup_steps
        if num_steps >= warmup_steps:
            return Phase.SAMPLING
        return Phase.TRANSIENT if num_steps < (warmup_steps + 1) // 2 else Phase.BURN_IN

    def measure(self, names: Sequence[str], drive: Float[Tensor, "system head dim"]) -> None:
        """Take the gradients of a step of the transient into their means.

        All of its steps count alike: gradients at a mode are small, and say nothing of how far a
        step may go. Those that are not finite, or all zero, do not count.
        """
        for name, square in zip(names, drive.square().mean(-2), strict=True):
            self.num_steps[name] = self.num_steps.get(name, 0) + 1
            before = self.squares.get(name, torch.zeros_like(square))
            count = self.counts.get(name, torch.zeros_like(square[0]))
            counts = square.isfinite().all() & square.any()
            count = count + counts
            mean = before + (square - before) / count.clamp_min(1)
            self.counts[name], self.squares[name] = count, torch.where(counts, mean, before)

    def preconditioner(
        self, names: Sequence[str], like: Float[Tensor, "system head dim"]
    ) -> Float[Tensor, "system #head #dim"]:
        """P of some partitions; zero, so that they stay, where no gradient was seen."""
        if self.method.preconditioner == "none":
            return torch.ones_like(like[:, :1, :1])
        zeros = torch.zeros_like(like[0, 0])
        roots = torch.stack([self.squares.get(name, zeros) for name in names]).sqrt()
        mean = roots.mean(-1, keepdim=True)
        scale = torch.maximum(roots, _FLOOR * mean).reciprocal()
        return torch.where(mean > 0, scale, 0.0)[:, None]

    def kernel(self, names: tuple[str, ...], particles: Float[Tensor, "system head dim"]) -> Kernel:
        """The kernel of some partitions: it follows their heads until the warm-up ends."""
        if self.phase(names[0]) is not Phase.SAMPLING:
            return self.method.kernel
        for name, heads in zip(names, particles, strict=True):
            if name not in self.kernels:
                self.kernels[name] = self.method.kernel.frozen(heads)
        # Stacked once, as long as the same layers are trained.
        if self._stacked is None or self._stacked[0] != names:
            kernels = [self.kernels[name] for name in names]
            constants = [torch.stack(each) for each in zip(*map(tensors_of, kernels), strict=True)]
            self._stacked = names, with_tensors(kernels[0], constants)
        return self._stacked[1]

    def moved(
        self,
        names: tuple[str, ...],
        particles: Float[Tensor, "system head dim"],
        drive: Float[Tensor, "system head dim"],
        normal: Float[Tensor, "system head dim"],
        alpha: Number,
    ) -> HeadMotion:
        """Take a step of the heads' own; the gradient is left as it is."""
        terms = self.kernel(names, particles)(particles)
        metric = self.preconditioner(names, particles)
        parts, fluctuation = self.method.forces(terms, drive, normal, alpha)
        for name in names:
            self.num_steps[name] = self.num_steps.get(name, 0) + 1

        def move(rate: Number | Tensor) -> Tensor:
            drift = rate * metric * (parts.drive + parts.repulsion)
            return particles + drift + (2 * rate * alpha * metric) ** 0.5 * fluctuation

        return HeadMotion(parts, terms.squared_bandwidth, move=move)

    def state_dict(self) -> dict[str, Any]:
        """Tensors by the partitions' names."""
        return {
            "num_steps": dict(self.num_steps),
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
        self._stacked = None
        self.num_steps = dict(state["num_steps"])
        self.counts, self.squares = (
            {name: tensor.to(particles[name].device) for name, tensor in state[field].items()}
            for field in ("counts", "squares")
        )
        self.kernels = {
            name: with_tensors(
                self.method.kernel.frozen(particles[name]),
                [constant.to(particles[name].device) for constant in constants],
            )
            for name, constants in state["kernels"].items()
        }


def check_diffusion(
    method: SteinDiffusion, optimizer: torch.optim.Optimizer, *, is_decoupled: bool
) -> None:
    """Warn of noise that has no temperature.

    Raises:
        ValueError: If settings do not go together.
    """
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


def check_resolution(partitions: Iterable[HeadPartition]) -> None:
    """Refuse weights in which small steps are lost.

    Raises:
        ValueError: If they are narrower than float32.
    """
    for part in partitions:
        for parameter in part.parameters:
            if torch.finfo(parameter.dtype).bits < 32:
                raise ValueError(
                    f"{part.name}: steps past the optimizer are below the resolution of "
                    f"{parameter.dtype}; expected weights of float32 or wider"
                )
