"""What is to be done with the heads of a network in one step of its optimizer."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.inference.directions import DirectionParts
from bayesattn.inference.head_forces import HeadForce
from bayesattn.inference.schedules import Number
from bayesattn.networks import HeadBatch

__all__ = ["HeadMotion", "Move", "RepulsionInfo", "forced"]

# From the learning rate of the optimizer's step to where heads are after it.
Move = Callable[[Number | Tensor], Float[Tensor, "system head dim"]]


class RepulsionInfo(NamedTuple):
    """Figures of one partition at one step, on its device.

    Attributes:
        drive: Norm of what goes down the loss and up the prior, after the kernel has mixed it; the
            root mean square over heads.
        repulsion: Likewise of the push away from other heads, times α.
        bandwidth: Of the kernel; NaN where it has none, zero where heads do not interact.
    """

    drive: Float[Tensor, "..."]
    repulsion: Float[Tensor, "..."]
    bandwidth: Float[Tensor, "..."]

    @property
    def ratio(self) -> Float[Tensor, "..."]:
        """Repulsion over drive."""
        return self.repulsion / self.drive


class HeadMotion(NamedTuple):
    """What is to be done with a batch of heads.

    Attributes:
        parts: Drive, and repulsion times α.
        squared_bandwidth: Of the kernel; None where there is no such figure.
        gradient: What the optimizer is to go by instead of the gradient.
        move: What is to be done after the optimizer's step; None for nothing.
    """

    parts: DirectionParts
    squared_bandwidth: Float[Tensor, " system"] | None
    gradient: Float[Tensor, "system head dim"]
    move: Move | None = None

    @property
    def info(self) -> RepulsionInfo:
        """Figures of each system."""
        drive, repulsion = (part.norm(dim=-1).square().mean(-1).sqrt() for part in self.parts)
        squared = self.squared_bandwidth
        missing = torch.full_like(drive, torch.nan)
        return RepulsionInfo(drive, repulsion, missing if squared is None else squared.sqrt())


def forced(
    force: HeadForce,
    heads: HeadBatch,
    particles: Float[Tensor, "system head dim"],
    drive: Float[Tensor, "system head dim"],
    alpha: Number,
    *,
    is_decoupled: bool,
) -> HeadMotion:
    """Follow a force by the optimizer's rule.

    Args:
        force: On the heads.
        heads: What the particles are.
        particles: Of the heads.
        drive: Descent of the loss.
        alpha: Weight of the repulsion.
        is_decoupled: Whether the repulsion is no part of the gradient, and moves heads afterwards.
    """
    along, away, squared = force(heads, particles, drive)
    parts = DirectionParts(along, alpha * away)
    if not is_decoupled:
        return HeadMotion(parts, squared, gradient=(parts.drive + parts.repulsion).neg_())
    return HeadMotion(
        parts,
        squared,
        gradient=-parts.drive,
        move=lambda rate: heads.particles() + rate * parts.repulsion,
    )
