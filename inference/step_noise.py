"""Noise that is a function of a seed, the step and its place: alike in all processes of a group."""

import secrets

import numpy as np
import torch
from torch import Tensor, distributed

__all__ = ["StepNoise"]


class StepNoise:
    """Draws standard normal noise on the device of what it is for, and keeps no state.

    Args:
        seed: Fresh if None; where processes form a group, that of the first one.
        device: On which the processes of a group exchange it.
    """

    def __init__(self, seed: int | None, device: torch.device):
        seed = secrets.randbits(62) if seed is None else seed
        if distributed.is_available() and distributed.is_initialized():
            shared = torch.tensor(seed, device=device)
            distributed.broadcast(shared, 0)
            seed = int(shared)
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def normal(self, like: Tensor, step: int, place: int) -> Tensor:
        """Draw noise of the shape and type of a tensor.

        Args:
            like: On any device.
            step: Number of the step.
            place: Tells apart what is drawn at one step.
        """
        device = like.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        mixed = np.random.SeedSequence([self.seed % 2**64, step, place])
        generator = self._generators[device].manual_seed(int(mixed.generate_state(1)[0]))
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device)
