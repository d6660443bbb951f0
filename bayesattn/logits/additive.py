r"""Logits of graph attention networks, which need no products of queries and keys.

.. math:: s_{ij} = \mathrm{LeakyReLU}(a^q \cdot q_i + a^k \cdot k_j)

Source:
    Veličković et al. (2018), Graph attention networks, arXiv:1710.10903, eq. 3.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bayesattn.logits.protocol import EdgeLogits

__all__ = ["AdditiveLogits"]

# A whole number is a number too, which run-time type checks do not take for a float.
Number = float | int


class AdditiveLogits(EdgeLogits):
    r"""Logits of graph attention networks, a bent sum of what query and key bring by themselves.

    .. math:: s_{ij} = \mathrm{LeakyReLU}(a^q \cdot q_i + a^k \cdot k_j)

    Args:
        num_heads: Each head has its own :math:`a`.
        dim: Width of a head.
        negative_slope: Of the LeakyReLU, below zero.

    Attributes:
        query_vector: :math:`a^q`, for each head.
        key_vector: :math:`a^k`, for each head.

    Source:
        Veličković et al. (2018), Graph attention networks, arXiv:1710.10903, eq. 3. There queries
        and keys are one projection, and so are the values.
    """

    def __init__(self, num_heads: int, dim: int, *, negative_slope: Number = 0.2):
        super().__init__()
        if num_heads < 1 or dim < 1:
            raise ValueError(
                f"num_heads and dim must be positive, got num_heads={num_heads}, dim={dim}"
            )
        self.num_heads, self.dim, self.negative_slope = num_heads, dim, float(negative_slope)
        self.query_vector = nn.Parameter(torch.empty(num_heads, dim))
        self.key_vector = nn.Parameter(torch.empty(num_heads, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vectors as Glorot does."""
        nn.init.xavier_uniform_(self.query_vector)
        nn.init.xavier_uniform_(self.key_vector)

    def forward(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> Float[Tensor, "*_batch query key"]:
        """The logits of all pairs."""
        from_query, from_key = self._parts(query, key)
        return self._bent(from_query[..., :, None] + from_key[..., None, :])

    def on_edges(
        self,
        query: Float[Tensor, "head query dim"],
        key: Float[Tensor, "head key dim"],
        edges: Int[Tensor, "2 edge"],
    ) -> Float[Tensor, "head edge"]:
        """The logits of each edge, for which nothing as wide as a head is gathered."""
        from_query, from_key = self._parts(query, key)
        return self._bent(from_query.index_select(1, edges[1]) + from_key.index_select(1, edges[0]))

    def extra_repr(self) -> str:
        """The sizes."""
        return f"num_heads={self.num_heads}, dim={self.dim}, negative_slope={self.negative_slope}"

    def _parts(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        vectors = (self.query_vector, self.key_vector)
        from_query, from_key = (
            (part * vector[:, None].to(part.dtype)).sum(
                -1, dtype=torch.promote_types(part.dtype, torch.float32)
            )
            for part, vector in zip((query, key), vectors, strict=True)
        )
        return from_query, from_key

    def _bent(self, values: Tensor) -> Tensor:
        return F.leaky_relu(values, self.negative_slope)
