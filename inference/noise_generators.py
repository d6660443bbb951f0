"""Generators of noise on the devices where it is needed, alike in all processes of a group."""

import secrets
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["NoiseGenerators"]


class NoiseGenerators:
    """Draws standard normal noise on the device of what it is for.

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

    def normal(self, like: Tensor) -> Tensor:
        """Draw noise of the shape and type of a tensor."""
        generator = self._generator(like.device)
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)

    def state_dict(self) -> dict[str, Any]:
        """The seed, and where each device's generator stands."""
        states = {str(device): made.get_state() for device, made in self._generators.items()}
        return {"seed": self.seed, "states": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; devices that it does not know begin with its seed."""
        self.seed, self._generators = state["seed"], {}
        for device, known in state["states"].items():
            self._generator(torch.device(device)).set_state(known.cpu())

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]
