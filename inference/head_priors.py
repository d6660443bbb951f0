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
        if not isinstance(law, Distribution):
            raise ValueError(f"prior: expected a distribution, such as Normal(0., 1.), got {law!r}")
        if num_data is None:
            raise ValueError("prior: its share of the gradient is 1 / num_data, but that is None")
        self._law, self._num_data = _unvalidated(law), num_data

    def check(self, particles: Float[Tensor, "system head dim"]) -> None:
        """Refuse a law that is not one of weights.

        Raises:
            ValueError: If it has other axes, or no density that changes with the weights.
        """
        try:
            self.drive(particles)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"prior: expected a law of numbers or of 'system head dim' "
                f"{tuple(particles.shape)}, with a density that has a slope, got {self._law}: "
                f"{error}"
            ) from error

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
