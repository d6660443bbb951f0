"""How messages name the shapes of tensors."""

from collections.abc import Mapping

from torch import Tensor

__all__ = ["shapes_of"]


def shapes_of(parts: Mapping[str, Tensor]) -> str:
    """Names and shapes, such as ``query (2, 3), key (5, 3)``.

    Call it where an error is raised only: code that is compiled for any size has no text of it.
    """
    return ", ".join(f"{name} {tuple(part.shape)}" for name, part in parts.items())
