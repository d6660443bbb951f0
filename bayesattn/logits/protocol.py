r"""Logits of attention: how well a query and a key go together, before any normalization.

.. math:: s_{ij} = q'_i \cdot k'_j + a_i + b_j

Whatever has this form, with :math:`q'` a function of the query alone and so on, reduces to
attention by dot products with a bias for each query and each key, and so to the fused routines of
:mod:`bayesattn.fused`. A softmax over keys does not see :math:`a`; one over queries does.
"""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from bayesattn.contraction import inner_products

__all__ = ["EdgeLogits", "Logits", "ReducedLogits"]


class ReducedLogits(NamedTuple):
    """Logits as inner products with biases; None where there is no bias.

    Attributes:
        query: What asks.
        key: What is asked.
        query_bias: Added to all logits of a query.
        key_bias: Added to all logits of a key.
        scale: Factor of the inner products.
    """

    query: Float[Tensor, "*_batch query _dim"]
    key: Float[Tensor, "*_batch key _dim"]
    query_bias: Float[Tensor, "*_batch query"] | None = None
    key_bias: Float[Tensor, "*_batch key"] | None = None
    scale: float = 1.0


class Logits(nn.Module):
    """A choice of logits. A subclass defines ``reduce``, or ``forward`` where only that exists.

    Modules have no parameters unless they say so; those with parameters have them for each head,
    on the third axis from the right.
    """

    def reduce(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> ReducedLogits | None:
        """The logits as inner products with biases, or None where they have no such form."""
        return None

    def forward(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> Float[Tensor, "*_batch query key"]:
        """The logits of all pairs.

        Raises:
            TypeError: If a subclass defines neither this nor ``reduce``.
        """
        reduced = self.reduce(query, key)
        if reduced is None:
            raise TypeError(f"{type(self).__name__} must define reduce or forward")
        scaled = reduced.query if reduced.scale == 1.0 else reduced.query * reduced.scale
        values = inner_products(scaled, reduced.key)
        if reduced.query_bias is not None:
            values = values + reduced.query_bias[..., :, None]
        return values if reduced.key_bias is None else values + reduced.key_bias[..., None, :]


class EdgeLogits(Logits):
    """Logits that do not reduce, but are known pair by pair. A subclass defines ``on_edges``.

    It defines ``forward`` too, where it is to serve attention of all pairs.
    """

    def on_edges(
        self,
        query: Float[Tensor, "head query dim"],
        key: Float[Tensor, "head key dim"],
        edges: Int[Tensor, "2 edge"],
    ) -> Float[Tensor, "head edge"]:
        """The logits of each edge: of the query ``edges[1]`` and the key ``edges[0]``.

        Raises:
            TypeError: If a subclass does not define it.
        """
        raise TypeError(f"{type(self).__name__} must define on_edges")
