r"""Block-diagonal kernels: each site of a program is compared by a kernel of its own.

.. math:: K(x, y) = \mathrm{diag}(k_1(x_1, y_1) I, \ldots, k_S(x_S, y_S) I)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.kernels.bandwidths import Number
from bayesattn.kernels.protocol import Kernel, Terms
from bayesattn.kernels.radial import IMQ

__all__ = ["BlockTerms", "Blocks", "PerSite"]


@dataclass(frozen=True)
class PerSite:
    """Each site its own kernel with its own bandwidth, whatever the other sites do.

    In many dimensions all whole particles are about equally far apart, and those of one site are
    not. The price: no kernel sees how sites depend on each other, and sites that do come out as
    independent and too narrow, as in mean-field inference: two of correlation .9 with less than
    half of their standard deviations.

    Args:
        kernel: Of each site that has no other; IMQ with the median rule by default.
        sites: Name of a site to its kernel.

    Source:
        Wang, Zeng and Liu (2018), Stein variational message passing for continuous graphical
        models, arXiv:1711.07168. Differs from the paper: a site's kernel sees that site alone, not
        its neighbors in the graph.
    """

    kernel: Kernel = field(default_factory=IMQ)
    sites: Mapping[str, Kernel] = field(default_factory=dict)
    _resolved: dict[tuple, "Blocks"] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def over(self, widths: Mapping[str, int]) -> "Blocks":
        """The kernel of particles made of these sites, one object for equal widths.

        Args:
            widths: Name of each site to the number of its coordinates, in their order.

        Raises:
            ValueError: If a site that a kernel was given for is not among them.
        """
        unknown = sorted(set(self.sites) - set(widths))
        if unknown:
            raise ValueError(
                f"PerSite sites: kernels were given for {unknown}, but a particle's sites are "
                f"{list(widths)}"
            )
        key = tuple(widths.items())
        if key not in self._resolved:
            kernels = [self.sites.get(name, self.kernel) for name in widths]
            self._resolved[key] = Blocks(kernels, tuple(widths.values()))
        return self._resolved[key]


@dataclass(frozen=True)
class Blocks:
    """Block-diagonal kernel of particles whose coordinates fall into slices.

    Args:
        kernels: One for each slice.
        widths: Numbers of coordinates of the slices, in their order.

    Raises:
        ValueError: If there are not as many widths as kernels, or one is not positive.
    """

    kernels: Sequence[Kernel]
    widths: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernels", tuple(self.kernels))
        object.__setattr__(self, "widths", tuple(self.widths))
        if not self.kernels or len(self.kernels) != len(self.widths) or min(self.widths) < 1:
            raise ValueError(
                f"Blocks widths: expected a positive one for each of {len(self.kernels)} kernels, "
                f"got {self.widths}"
            )

    def __call__(self, particles: Float[Tensor, "*batch particle dim"]) -> "BlockTerms":
        """Terms of each block.

        Raises:
            ValueError: If the widths do not add up to the particles' dimension.
        """
        parts = zip(self.kernels, self._parts(particles), strict=True)
        return BlockTerms(tuple(kernel(part) for kernel, part in parts))

    def frozen(self, particles: Float[Tensor, "*batch particle dim"]) -> "Blocks":
        """The same blocks of kernels that are fixed to what they are at these particles."""
        parts = zip(self.kernels, self._parts(particles), strict=True)
        return Blocks([kernel.frozen(part) for kernel, part in parts], self.widths)

    def _parts(self, particles: Tensor) -> tuple[Tensor, ...]:
        if particles.shape[-1] != sum(self.widths):
            raise ValueError(
                f"Blocks widths: expected a sum of {particles.shape[-1]}, the particles' "
                f"dimension, got {self.widths}"
            )
        return particles.split(self.widths, -1)


class BlockTerms(NamedTuple):
    """A block-diagonal kernel at one cloud of particles.

    Attributes:
        blocks: Terms of each block.
    """

    blocks: tuple[Terms, ...]

    @property
    def repulsion(self) -> Float[Tensor, "*batch particle dim"]:
        """Of each block, side by side."""
        return torch.cat([block.repulsion for block in self.blocks], -1)

    @property
    def squared_bandwidth(self) -> Float[Tensor, "*batch"] | None:
        """Mean over the blocks that have one."""
        squares = [block.squared_bandwidth for block in self.blocks]
        known = [square for square in squares if square is not None]
        return torch.stack(known).mean(0) if known else None

    @property
    def own_slope(self) -> Float[Tensor, "*batch particle dim"] | None:
        """Of each block, side by side; None where all are zero."""
        slopes = [block.own_slope for block in self.blocks]
        if all(slope is None for slope in slopes):
            return None
        parts = zip(self.blocks, slopes, strict=True)
        return torch.cat([torch.zeros_like(b.repulsion) if s is None else s for b, s in parts], -1)

    def smooth(
        self, score: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch particle dim"]:
        """Sum over j of K(x_i, x_j) times the score at x_j."""
        return torch.cat([b.smooth(part) for b, part in self._with(score)], -1)

    def fluctuate(
        self, normal: Float[Tensor, "*batch particle dim"], floor: Number
    ) -> Float[Tensor, "*batch particle dim"]:
        """Make noise of covariance K / M + floor I; see :meth:`Terms.fluctuate`."""
        return torch.cat([b.fluctuate(part, floor) for b, part in self._with(normal)], -1)

    def _with(self, tensor: Tensor) -> list[tuple[Terms, Tensor]]:
        widths = [block.repulsion.shape[-1] for block in self.blocks]
        return list(zip(self.blocks, tensor.split(widths, -1), strict=True))
