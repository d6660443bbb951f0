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
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.argument_checks import check_choice, check_count, check_positive
from bayesattn.inference.directions import DirectionParts, stein_direction
from bayesattn.inference.head_forces import SteinForce, check_kernel
from bayesattn.inference.head_motion import HeadMotion
from bayesattn.inference.langevin import Noise, diffusion
from bayesattn.inference.schedules import Number
from bayesattn.kernels import RBF, Kernel, Terms

__all__ = ["SteinDiffusion", "check_diffusion"]


@dataclass(frozen=True)
class SteinDiffusion:
    r"""SPOS: Stein's force through the optimizer first, then sampling in steps of their own.

    With ``kernel=Separate(), langevin=0`` it is SGLD, heads without interaction.

    After the transient the optimizer moves everything but the heads, and its learning rate, times a
    factor, is η of their steps. Noise of :math:`\sqrt{2 \eta \alpha P}` is much larger than what
    the optimizer did at the same rate, so let the rate fall where heads begin to sample; they
    diverge at too large a one. The optimizer's weight decay does not reach them: give
    ``Repulsion`` a ``prior``.

    Args:
        warmup_steps: For each partition, steps before heads are samples: half of them the
            transient, half burn-in.
        kernel: Between heads in the space of their weights; RBF with the paper's bandwidth.
        langevin: τ.
        noise: ``"exact"``, or ``"paper"``, under which few heads vary too little.
        preconditioner: P: ``"rms"``, one over the root mean square of each coordinate's gradients
            in the whole transient, which all heads of a partition share; or ``"none"``.
        step_size: η over the optimizer's learning rate.
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
    step_size: Number = 1.0
    faithful: bool = False

    def __post_init__(self) -> None:
        check_kernel("SteinDiffusion", self.kernel)
        check_count("warmup_steps", self.warmup_steps, least=0)
        check_choice("noise", self.noise, ("exact", "paper"))
        check_choice("preconditioner", self.preconditioner, ("rms", "none"))
        check_positive("step_size", self.step_size)
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


def check_diffusion(
    method: SteinDiffusion,
    optimizer: torch.optim.Optimizer,
    *,
    is_decoupled: bool,
    has_prior: bool,
) -> None:
    """Warn of noise that has no temperature, and of a posterior that there may not be.

    Raises:
        ValueError: If settings do not go together.
    """
    if not method.faithful:
        if not has_prior:
            warnings.warn(
                "SteinDiffusion with a flat prior: weights that the loss does not hold wander off "
                "without end, as queries and keys may; give prior=Normal(0., scale)",
                stacklevel=4,
            )
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
