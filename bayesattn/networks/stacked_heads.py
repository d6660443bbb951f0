"""Partitions of one size as a batch of particle systems, so that all layers move at once."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.networks.partition import HeadPartition

__all__ = ["HeadBatch", "head_batches"]


class HeadBatch:
    """Partitions of one number of heads and one width, in one dtype and on one device.

    What is computed from their particles is computed in float32, or wider where they are.

    Args:
        partitions: At least one.
    """

    def __init__(self, partitions: Sequence[HeadPartition]) -> None:
        self.partitions = tuple(partitions)
        self.names = tuple(partition.name for partition in partitions)

    def particles(self) -> Float[Tensor, "system head dim"]:
        """Return a copy of the heads."""
        return self._stacked([partition.particles() for partition in self.partitions])

    def gradients(self) -> Float[Tensor, "system head dim"]:
        """Return a copy of the heads' gradients, zeros where there is none."""
        return self._stacked([partition.gradients() for partition in self.partitions])

    def write(self, particles: Float[Tensor, "system head dim"]) -> None:
        """Put the heads into their parameters, in place."""
        for partition, rows in zip(self.partitions, particles, strict=True):
            partition.write(rows)

    def write_gradients(self, gradients: Float[Tensor, "system head dim"]) -> None:
        """Put the heads' gradients into their parameters' ``.grad``, in place."""
        for partition, rows in zip(self.partitions, gradients, strict=True):
            partition.write_gradients(rows)

    def parts(
        self, particles: Float[Tensor, "system head dim"]
    ) -> list[Float[Tensor, "system head width ..."]]:
        """Cut particles into what they take of each parameter, in its own shape.

        Raises:
            ValueError: If the partitions' parts differ in shape.
        """
        shapes = {partition.part_shapes for partition in self.partitions}
        if len(shapes) != 1:
            raise ValueError(
                f"{', '.join(self.names)}: expected partitions whose parts have one shape, "
                f"got {sorted(shapes)}"
            )
        (found,) = shapes
        sizes = [torch.Size(shape).numel() for shape in found]
        chunks = particles.split(sizes, -1)
        return [chunk.unflatten(-1, shape) for chunk, shape in zip(chunks, found, strict=True)]

    def _stacked(self, rows: Sequence[Tensor]) -> Tensor:
        wide = torch.promote_types(rows[0].dtype, torch.float32)
        return torch.stack([row.to(wide) for row in rows])


def head_batches(partitions: Iterable[HeadPartition]) -> list[HeadBatch]:
    """Group partitions by their numbers of heads, widths, dtypes and devices, in their order."""
    groups: dict[tuple, list[HeadPartition]] = {}
    for partition in partitions:
        first = partition.parameters[0]
        key = (partition.num_heads, partition.dim, first.dtype, first.device)
        groups.setdefault(key, []).append(partition)
    return [HeadBatch(group) for group in groups.values()]
