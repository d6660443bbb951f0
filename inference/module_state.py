"""Parameters and buffers in the places where modules hold them: named, listed, and replaced."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Place", "module_tensors", "places", "replaced", "substituted_tensors"]


def module_tensors(modules: Mapping[str, torch.nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of the given modules by their dotted names."""
    return {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def substituted_tensors(
    modules: Mapping[str, torch.nn.Module], replacements: Mapping[int, Tensor]
) -> contextlib.AbstractContextManager[None]:
    """Put other tensors in the place of parameters and buffers, tied ones included, and back.

    Args:
        modules: Modules to look through.
        replacements: ``id`` of a present tensor to what stands in for it.
    """
    parts = dict.fromkeys(part for module in modules.values() for part in module.modules())
    present = [(place, id(place.table[place.key])) for place in places(parts)]
    return replaced([(place, replacements[i]) for place, i in present if i in replacements])


class Place(NamedTuple):
    """Where a module holds a parameter or buffer.

    Attributes:
        table: Its parameters or its buffers.
        key: The name there.
    """

    table: dict[str, Any]
    key: str


def places(parts: Iterable[torch.nn.Module]) -> Iterator[Place]:
    """Where the given modules themselves hold parameters and buffers, in a fixed order."""
    for part in parts:
        for table in (part._parameters, part._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    yield Place(table, key)


@contextlib.contextmanager
def replaced(stand_ins: Sequence[tuple[Place, Tensor]]) -> Iterator[None]:
    """Put tensors in places, and what was there back."""
    before = [(place, place.table[place.key]) for place, _ in stand_ins]
    try:
        for place, tensor in stand_ins:
            place.table[place.key] = tensor
        yield
    finally:
        for place, tensor in before:
            place.table[place.key] = tensor
