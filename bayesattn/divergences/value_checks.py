"""Whether values of masks and weights are looked at, for which a GPU would be waited for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from bayesattn.contraction import inside_transform

__all__ = ["has_values", "known_values", "looks_at_values"]

_ARE_KNOWN = ContextVar("masks and weights are known to be right", default=False)


def has_values() -> bool:
    """Whether tensors have values, neither compiled nor inside a transform of ``torch.func``."""
    return not (inside_transform() or torch.compiler.is_compiling())


def looks_at_values() -> bool:
    """Whether there are values, and masks and weights are not known to be right."""
    return has_values() and not _ARE_KNOWN.get()


@contextmanager
def known_values() -> Iterator[None]:
    """Within it, each cloud is known to have points, of equal weight; not to be compiled."""
    token = _ARE_KNOWN.set(True)
    try:
        yield
    finally:
        _ARE_KNOWN.reset(token)
