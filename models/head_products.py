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
        unit: The root mean square.
    """

    query: Float[Tensor, "head dim query_feature"]
    key: Float[Tensor, "head dim key_feature"]
    unit: Float[Tensor, ""]

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

    def query_products(
        self,
        key: Float[Tensor, "component key_feature"],
        mixing: Float[Tensor, "component head"],
    ) -> Float[Tensor, "component query_feature"]:
        """Of each component's key side with all heads' products, mixed."""
        return ((mixing.mT[..., None] * (key @ self.key.mT)) @ self.query).sum(0)

    def key_products(
        self,
        query: Float[Tensor, "component query_feature"],
        mixing: Float[Tensor, "component head"],
    ) -> Float[Tensor, "component key_feature"]:
        """Of each component's query side with all heads' products, mixed."""
        return ((mixing.mT[..., None] * (query @ self.query.mT)) @ self.key).sum(0)

    def logits(
        self,
        query: Float[Tensor, "component query_feature"],
        key: Float[Tensor, "component key_feature"],
        mixing: Float[Tensor, "component head"],
        query_tokens: Float[Tensor, "query query_feature"],
        key_tokens: Float[Tensor, "key key_feature"],
    ) -> Float[Tensor, "head query key"]:
        """Of attention by components, scaled by the width that each head had, not the new one."""
        scale = self.unit * self.query.shape[1] ** -0.5
        mixed = (query_tokens @ query.mT) * mixing.mT[:, None]
        return scale * (mixed @ (key_tokens @ key.mT).mT)

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
    unit = (square / entries).sqrt()
    root = unit.sqrt()
    return ScaledProducts(query_weight / root, key_weight / root, unit)
