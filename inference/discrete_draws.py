r"""Discrete sites drawn exactly, given all continuous ones and the data.

.. math:: z \sim p(z \mid x, y) \propto p(z, y \mid x)

Source:
    Obermeyer et al. (2019), Tensor variable elimination for plated factor graphs, arXiv:1902.03210;
    forward elimination and backward sampling are Pyro's.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pyro.ops.einsum.torch_log
import pyro.poutine as poutine
import torch
from pyro.infer.discrete import _sample_posterior_from_trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from bayesattn.inference.enumeration import enumerated, marked

__all__ = ["draw_discrete"]


def draw_discrete(
    program: Callable[[], Any], names: Collection[str], first_available_dim: int
) -> dict[str, Tensor]:
    """Draw discrete sites from their conditional distribution.

    Args:
        program: A Pyro program whose continuous sites have their values.
        names: Which sites.
        first_available_dim: First tensor dimension, from the right, left of all plates.
    """
    with poutine.block():
        trace: Any = poutine.trace(enumerated(program, first_available_dim)).get_trace()
    trace = prune_subsample_sites(trace)
    trace.compute_log_prob()
    trace.pack_tensors()
    draw: Any = poutine.trace(_sample_posterior_from_trace)
    with _plain_logarithm():
        nodes = draw.get_trace(marked(program), trace, 1, False).nodes
    return {name: nodes[name]["value"] for name in names}


@contextlib.contextmanager
def _plain_logarithm() -> Iterator[None]:
    """Let Pyro's elimination use a logarithm that transforms know, as no gradient is wanted."""
    module: Any = pyro.ops.einsum.torch_log
    original = module.safe_log
    module.safe_log = torch.log
    try:
        yield
    finally:
        module.safe_log = original
