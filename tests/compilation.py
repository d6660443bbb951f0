"""Running a function compiled, as one graph and without what the compiler changes for a process."""

import torch
from torch.distributions import Distribution


def in_one_graph(function, *args):
    """Result of the function traced by torch.compile, which fails where it would break the graph.

    The first compilation of a process turns off the validation of all distributions.
    """
    validates = Distribution._validate_args
    try:
        return torch.compile(function, fullgraph=True, backend="aot_eager")(*args)
    finally:
        Distribution.set_default_validate_args(validates)
        torch._dynamo.reset()
