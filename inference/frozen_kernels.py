"""Tensors inside of kernels, so that graphs can take them as inputs rather than bake them in."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["tensors_of", "with_tensors"]


def tensors_of(kernel: Any) -> list[Tensor]:
    """Tensors among the fields of a kernel, and of the kernels in it."""
    if isinstance(kernel, Tensor):
        return [kernel]
    return [tensor for part in _parts(kernel).values() for tensor in tensors_of(part)]


def with_tensors(kernel: Any, tensors: Iterable[Tensor]) -> Any:
    """The same kernel with other tensors, in the order of :func:`tensors_of`."""
    return _rebuilt(kernel, iter(tensors))


def _rebuilt(kernel: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(kernel, Tensor):
        return next(tensors)
    parts = {name: _rebuilt(part, tensors) for name, part in _parts(kernel).items()}
    if not parts:
        return kernel
    if dataclasses.is_dataclass(kernel):
        return dataclasses.replace(kernel, **parts)  # type: ignore[type-var] (an instance)
    return tuple(parts.values())


def _parts(kernel: Any) -> dict[str, Any]:
    if isinstance(kernel, tuple | list):
        return {str(index): part for index, part in enumerate(kernel)}
    if not dataclasses.is_dataclass(kernel):
        return {}
    return {field.name: getattr(kernel, field.name) for field in dataclasses.fields(kernel)}
