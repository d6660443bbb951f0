r"""Heads as particles: between the parameters of a layer and a matrix with one row for each head.

.. math:: \theta_h = [\, W^Q_h \mid b^Q_h \mid W^K_h \mid \dots \,]
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from bayesattn.networks.head_slices import HeadSlice, Region

__all__ = ["HeadPartition"]


class HeadPartition:
    """Parts of a layer's parameters, seen as one particle for each head.

    Parameters are looked up by name at each use, so they may be loaded, moved or replaced. Frozen
    ones have particles, and gradients of zero.

    Args:
        name: What reports call it.
        module: The layer.
        slices: Parts of a particle, in order; all of as many heads.

    Raises:
        ValueError: If there is no part, the numbers of heads differ, or two parts overlap.
    """

    def __init__(self, name: str, module: nn.Module, slices: Sequence[HeadSlice]) -> None:
        counts = {part.num_heads for part in slices}
        if len(counts) != 1:
            raise ValueError(f"{name}: expected parts of one number of heads, got {sorted(counts)}")
        self.name = name
        self.module = module
        self.slices = tuple(slices)
        self.num_heads = counts.pop()
        regions = list(self.regions())
        for first, region in enumerate(regions):
            if any(region.overlaps(other) for other in regions[:first]):
                raise ValueError(
                    f"{name}: expected parts that do not overlap, got "
                    f"{self.slices[first].parameter} twice"
                )

    def __repr__(self) -> str:
        return f"HeadPartition({self.name}: {self.num_heads} heads of {self.dim})"

    @property
    def dim(self) -> int:
        """Width of a particle."""
        return sum(torch.Size(shape).numel() for shape in self.part_shapes)

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of what one particle takes of each parameter, its own axis of heads first."""
        return tuple(tuple(heads.shape[1:]) for heads in self._heads(self._parameters()))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters in which the heads' parts stand, each once."""
        return list({id(part): part for part in self._parameters()}.values())

    @property
    def requires_grad(self) -> bool:
        """Whether all of the parameters are trained."""
        return all(parameter.requires_grad for parameter in self.parameters)

    @property
    def has_gradient(self) -> bool:
        """Whether any of the parameters has a ``.grad``."""
        return any(parameter.grad is not None for parameter in self.parameters)

    def regions(self) -> Iterator[Region]:
        """What each part takes of a parameter."""
        for part in self.slices:
            parameter = _find(self.module, part.parameter)
            stop = part.start + part.num_heads * part.width
            yield Region(id(parameter), part.axis, part.start, stop)

    def particles(self) -> Float[Tensor, "_head _dim"]:
        """Return the heads, detached.

        They are a view, into which nobody should write, where a particle is one part whose entries
        stand in a row, such as rows of a weight; else a copy.

        Raises:
            ValueError: If a parameter is parametrized, sparse, or has no data.
        """
        return _rows(self._heads([parameter.detach() for parameter in self._parameters()]))

    def write(self, particles: Float[Tensor, "_head _dim"]) -> None:
        """Put the heads into the parameters, in place.

        Raises:
            ValueError: If the shape does not fit, or as for :meth:`particles`.
        """
        self._check_shape(particles)
        _write(particles, self._heads([parameter.detach() for parameter in self._parameters()]))

    def gradients(self) -> Float[Tensor, "_head _dim"]:
        """Return the heads' parts of the parameters' ``.grad``, zeros where there is none.

        A view or a copy, as :meth:`particles`.

        Raises:
            ValueError: If a gradient is sparse, or as for :meth:`particles`.
        """
        found = []
        for part, parameter in zip(self.slices, self._parameters(), strict=True):
            if parameter.grad is None:
                heads = part.heads(parameter)
                found.append(heads.new_zeros(heads.shape))
            else:
                gradient = _dense(f"gradient of {part.parameter}", parameter.grad)
                found.append(part.heads(gradient.detach()))
        return _rows(found)

    def write_gradients(self, gradients: Float[Tensor, "_head _dim"]) -> None:
        """Put the heads' gradients into the parameters' ``.grad``, in place.

        Where there is none it is made, and zero for all else that the parameter holds.

        Raises:
            ValueError: If a parameter is frozen, the shape does not fit, or as for
                :meth:`gradients`.
        """
        self._check_shape(gradients)
        found = []
        for part, parameter in zip(self.slices, self._parameters(), strict=True):
            if not parameter.requires_grad:
                raise ValueError(f"{self.name}: {part.parameter} is frozen and takes no gradient")
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(_dense(f"gradient of {part.parameter}", parameter.grad).detach())
        _write(gradients, self._heads(found))

    def _parameters(self) -> list[nn.Parameter]:
        return [_usable(_find(self.module, part.parameter), part.parameter) for part in self.slices]

    def _heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [part.heads(tensor) for part, tensor in zip(self.slices, tensors, strict=True)]

    def _check_shape(self, rows: Tensor) -> None:
        if rows.shape != (self.num_heads, self.dim):
            raise ValueError(
                f"{self.name}: expected 'head dim' {(self.num_heads, self.dim)}, "
                f"got {tuple(rows.shape)}"
            )


def _rows(parts: Sequence[Tensor]) -> Tensor:
    rows = [heads.flatten(1) for heads in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def _write(rows: Tensor, parts: Sequence[Tensor]) -> None:
    chunks = rows.detach().split([heads[0].numel() for heads in parts], 1)
    for heads, chunk in zip(parts, chunks, strict=True):
        heads.copy_(chunk.reshape(heads.shape))


def _find(module: nn.Module, name: str) -> nn.Parameter:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if parametrize.is_parametrized(owner, leaf):
        raise ValueError(f"{name}: expected a plain parameter, got a parametrized one")
    parameter = getattr(owner, leaf, None)
    if not isinstance(parameter, nn.Parameter):
        raise ValueError(f"{name}: expected a parameter, got {type(parameter).__name__}")
    return parameter


def _usable(parameter: nn.Parameter, name: str) -> nn.Parameter:
    if is_lazy(parameter) or parameter.is_meta:
        raise ValueError(f"{name}: expected a parameter with data, got none yet (lazy or meta)")
    _dense(name, parameter)
    return parameter


def _dense(name: str, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
    return tensor
