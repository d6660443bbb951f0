r"""What a program needs to know of the products of a layer's heads: inner products, never a tensor.

.. math:: \lVert T \rVert^2 = \sum_h \langle W_{Q,h} W_{Q,h}^\top,\, W_{K,h} W_{K,h}^\top \rangle,
    \qquad c_{rh} = a_r^\top T_h\, b_r = \sum_d (W_{Q,h} a_r)_d\, (W_{K,h} b_r)_d
"""

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

__all__ = ["ScaledProducts", "scaled_products"]

Number = float | int


class ScaledProducts(NamedTuple):
    """The products of heads, in units of their root mean square over all entries.

    Attributes:
        query: Weights of queries.
        key: Weights of keys.
    """

    query: Float[Tensor, "head dim query_feature"]
    key: Float[Tensor, "head dim key_feature"]

    @property
    def num_entries(self) -> int:
        """Entries of all products; their squared norm too, in these units."""
        return self.query.shape[0] * self.query.shape[-1] * self.key.shape[-1]

    def inner_products(
        self,
        query: Float[Tensor, "component query_feature"],
        key: Float[Tensor, "component key_feature"],
    ) -> Float[Tensor, "component head"]:
        """Of each component with each head's product."""
        return ((self.query @ query.mT) * (self.key @ key.mT)).sum(-2).mT

    def log_likelihood(self, explained: Float[Tensor, ""], tolerance: Number) -> Float[Tensor, ""]:
        """Log density, in nats, of the products around an approximation.

        Args:
            explained: By how much the approximation lowers the squared norm of what is left.
            tolerance: Standard deviation of each entry.
        """
        constant = self.num_entries * math.log(2 * math.pi * tolerance**2)
        return -(constant + (self.num_entries - explained) / tolerance**2) / 2


def scaled_products(
    query_weight: Float[Tensor, "..."], key_weight: Float[Tensor, "..."]
) -> ScaledProducts:
    """Bring the products of heads to unit root mean square.

    Args:
        query_weight: "head dim query_feature".
        key_weight: "head dim key_feature".

    Raises:
        ValueError: If the weights are not of the same heads and widths.
    """
    if query_weight.ndim != 3 or query_weight.shape[:2] != key_weight.shape[:2]:
        raise ValueError(
            "query_weight, key_weight: expected 'head dim feature' of the same heads and widths, "
            f"got {tuple(query_weight.shape)} and {tuple(key_weight.shape)}"
        )
    square = ((query_weight @ query_weight.mT) * (key_weight @ key_weight.mT)).sum()
    entries = query_weight.shape[0] * query_weight.shape[-1] * key_weight.shape[-1]
    root = (square / entries).sqrt().sqrt()
    return ScaledProducts(query_weight / root, key_weight / root)
