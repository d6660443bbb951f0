"""Running code compiled, without what the compiler changes for a process."""

from contextlib import contextmanager

import torch
from torch.distributions import Distribution


def in_one_graph(function, *args):
    """Result of the function traced by torch.compile, which fails where the graph would break."""
    with undone_compilation():
        return torch.compile(function, fullgraph=True, backend="aot_eager")(*args)


@contextmanager
def undone_compilation():
    """Put back what compiling changes.

    The first compilation of a process turns off the validation of all distributions.
    """
    validates = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(validates)
        torch._dynamo.reset()
