"""What a diffusion of heads measures in its warm-up and then keeps as it is."""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.inference.frozen_kernels import tensors_of, with_tensors
from bayesattn.inference.head_diffusion import SteinDiffusion
from bayesattn.inference.head_motion import HeadMotion
from bayesattn.inference.schedules import Number
from bayesattn.kernels import Kernel

__all__ = ["DiffusionState", "Phase"]

# Roots of mean squared gradients are floored at this part of their mean over coordinates.
_FLOOR = 0.1
_MOST_KEPT = 16


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
        # Of partitions that move together: stacked once, as long as the same ones do.
        self._stacked: dict[tuple[str, ...], Kernel] = {}
        self._metrics: dict[tuple[str, ...], Tensor] = {}

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
        if names not in self._stacked:
            kernels = [self.kernels[name] for name in names]
            constants = [torch.stack(each) for each in zip(*map(tensors_of, kernels), strict=True)]
            _keep(self._stacked, names, with_tensors(kernels[0], constants))
        return self._stacked[names]

    def moved(
        self,
        names: tuple[str, ...],
        particles: Float[Tensor, "system head dim"],
        drive: Float[Tensor, "system head dim"],
        normal: Float[Tensor, "system head dim"],
        alpha: Number,
    ) -> HeadMotion:
        """Take a step of the heads' own; the optimizer sees no gradient of theirs, nor clips it."""
        terms = self.kernel(names, particles)(particles)
        if names not in self._metrics:
            _keep(self._metrics, names, self.preconditioner(names, particles))
        metric = self._metrics[names]
        parts, fluctuation = self.method.forces(terms, drive, normal, alpha)
        for name in names:
            self.num_steps[name] = self.num_steps.get(name, 0) + 1

        def move(rate: Number | Tensor) -> Tensor:
            rate = self.method.step_size * rate
            drift = rate * metric * (parts.drive + parts.repulsion)
            return particles + drift + (2 * rate * alpha * metric) ** 0.5 * fluctuation

        nothing = torch.zeros_like(drive)
        return HeadMotion(parts, terms.squared_bandwidth, gradient=nothing, move=move)

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
        self._stacked, self._metrics = {}, {}
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


def _keep(kept: dict[tuple[str, ...], Any], names: tuple[str, ...], value: Any) -> None:
    """Add to what is kept, of which there is no end where layers are dropped by chance."""
    if len(kept) >= _MOST_KEPT:
        kept.clear()
    kept[names] = value
