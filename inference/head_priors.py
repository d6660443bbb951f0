r"""A prior's share of the descent of a loss that is a mean over N examples.

.. math:: \frac1N \nabla \log p(\theta)
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

__all__ = ["HeadPrior"]


class HeadPrior:
    """A law of the heads' weights.

    Args:
        law: Broadcasts to "system head dim".
        num_data: N.

    Raises:
        ValueError: If N is not known.
    """

    def __init__(self, law: Distribution, num_data: int | None):
        if num_data is None:
            raise ValueError("prior: its share of the gradient is 1 / num_data, but that is None")
        self._law, self._num_data = _unvalidated(law), num_data

    def drive(
        self, particles: Float[Tensor, "system head dim"]
    ) -> Float[Tensor, "system head dim"]:
        """Up the prior's log density, over N."""
        with torch.enable_grad():
            moved = particles.detach().requires_grad_()
            (score,) = torch.autograd.grad(self._law.log_prob(moved).sum(), moved)
        return score / self._num_data


def _unvalidated(law: Distribution) -> Distribution:
    """The same law without looks at its values, each of which would wait for the device."""
    law = copy.copy(law)
    law._validate_args = False
    for name, part in vars(law).items():
        if isinstance(part, Distribution):
            setattr(law, name, _unvalidated(part))
    return law
