"""Learning rates of an optimizer, as they are at a step, for the heads of a network."""

import torch
from torch import Tensor

from bayesattn.inference.schedules import Number
from bayesattn.networks import HeadBatch, HeadPartition

__all__ = ["LearningRates"]


class LearningRates:
    """Finds the learning rate of heads in an optimizer's groups.

    Args:
        optimizer: Looked at anew at each use, since schedules change rates and groups are added.

    Raises:
        ValueError: If it climbs, so that every force would be turned around.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError(
                "optimizer: expected one that goes down the gradients, got maximize=True"
            )
        self._optimizer = optimizer

    def of(self, heads: HeadBatch) -> Number | Tensor:
        """One number, or one for each system where they differ or are on a device.

        Raises:
            ValueError: If the parameters of a partition have several rates, or none.
        """
        found = self._by_parameter()
        rates = [_single(part, found) for part in heads.partitions]
        if not any(isinstance(rate, Tensor) for rate in rates) and len(set(rates)) == 1:
            return rates[0]
        like = heads.partitions[0].parameters[0]
        dtype = torch.promote_types(like.dtype, torch.float32)
        # Filled on the device, which nothing then waits for.
        values = [
            rate.to(like.device, dtype).reshape(())
            if isinstance(rate, Tensor)
            else torch.full((), rate, dtype=dtype, device=like.device)
            for rate in rates
        ]
        return torch.stack(values)[:, None, None]

    def check(self, part: HeadPartition) -> None:
        """Refuse heads that the optimizer does not train.

        Raises:
            ValueError: So.
        """
        _rates(part, self._by_parameter())

    def _by_parameter(self) -> dict[int, Number | Tensor]:
        return {
            id(parameter): group["lr"]
            for group in self._optimizer.param_groups
            for parameter in group["params"]
        }


def _rates(part: HeadPartition, found: dict[int, Number | Tensor]) -> list[Number | Tensor]:
    missing = [parameter for parameter in part.parameters if id(parameter) not in found]
    if missing:
        raise ValueError(
            f"{part.name}: expected heads that the optimizer trains, but it does not; give "
            "heads=[...] without them, or freeze them"
        )
    return [found[id(parameter)] for parameter in part.parameters]


def _single(part: HeadPartition, found: dict[int, Number | Tensor]) -> Number | Tensor:
    first, *others = _rates(part, found)
    for other in others:
        if other is not first and (isinstance(other, Tensor) or other != first):
            raise ValueError(f"{part.name}: expected one learning rate, got {first} and {other}")
    return first
