"""Whether values of masks and weights are looked at, for which a GPU would be waited for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from bayesattn.contraction import inside_transform

__all__ = ["known_values", "looks_at_values"]

_ARE_KNOWN = ContextVar("masks and weights are known to be right", default=False)


def looks_at_values() -> bool:
    """Whether values can be looked at, and are not known to be right."""
    return not (inside_transform() or torch.compiler.is_compiling() or _ARE_KNOWN.get())


@contextmanager
def known_values() -> Iterator[None]:
    """Within it, each cloud is known to have points, of equal weight; not to be compiled."""
    token = _ARE_KNOWN.set(True)
    try:
        yield
    finally:
        _ARE_KNOWN.reset(token)
