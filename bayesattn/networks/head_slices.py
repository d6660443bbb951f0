r"""Where the heads' parts of an attention layer's parameters stand.

.. math:: \theta_h = W[\, s + h w : s + (h + 1) w \,]

Heads lie side by side along one axis of a parameter: the rows of a ``Linear``'s weight, the columns
of a ``Conv1D``'s or of an output projection's, the entries of a bias; several projections may share
one parameter, each from a start of its own.
"""

from typing import NamedTuple

from jaxtyping import Shaped
from torch import Tensor

__all__ = ["ROLES", "HeadLayout", "HeadSlice", "ProjectionSlices", "Region"]

# What a projection is for. The output's bias belongs to no head.
ROLES = ("query", "key", "value", "output")


class HeadSlice(NamedTuple):
    """The heads' parts of one parameter.

    Attributes:
        parameter: Dotted name within the layer.
        axis: Along which the heads lie.
        start: First index of the first head.
        width: Indices of each head.
        num_heads: Number of heads.
    """

    parameter: str
    axis: int
    start: int
    width: int
    num_heads: int

    def heads(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "_head _width ..."]:
        """View the heads' parts of a tensor of the parameter's shape, the heads' axes first.

        Raises:
            ValueError: If the tensor has no such parts.
        """
        size = self.num_heads * self.width
        if tensor.ndim <= self.axis or tensor.shape[self.axis] < self.start + size:
            raise ValueError(
                f"{self.parameter}: expected axis {self.axis} to hold {self.num_heads} heads of "
                f"{self.width} from {self.start}, got shape {tuple(tensor.shape)}"
            )
        part = tensor.narrow(self.axis, self.start, size)
        part = part.unflatten(self.axis, (self.num_heads, self.width))
        return part.movedim((self.axis, self.axis + 1), (0, 1))

    def grouped(self, num_groups: int) -> "HeadSlice":
        """Runs of heads as one: those that share a key and value, in order.

        Raises:
            ValueError: If the heads do not divide into so many groups.
        """
        if self.num_heads % num_groups:
            raise ValueError(
                f"{self.parameter}: expected a multiple of {num_groups} heads, got {self.num_heads}"
            )
        width = self.width * (self.num_heads // num_groups)
        return self._replace(width=width, num_heads=num_groups)


class Region(NamedTuple):
    """What is taken of a parameter.

    Attributes:
        parameter: Its identity.
        axis: Along which it is cut.
        start: First index.
        stop: Index after the last.
    """

    parameter: int
    axis: int
    start: int
    stop: int

    def overlaps(self, other: "Region") -> bool:
        """Whether another takes some of the same; of one axis only."""
        is_same = self[:2] == other[:2]
        return is_same and self.start < other.stop and other.start < self.stop


class ProjectionSlices(NamedTuple):
    """The heads' parts of one projection.

    Attributes:
        weight: Of its weight.
        bias: Of its bias, if it has one whose parts belong to heads.
    """

    weight: HeadSlice
    bias: HeadSlice | None = None


# Projections of a layer by their roles, as many as there are. There may be fewer heads of keys and
# values than of queries; the query heads that share one then stand in a run.
HeadLayout = dict[str, ProjectionSlices]
