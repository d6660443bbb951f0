r"""Logits of attention: how well a query and a key go together, before any normalization.

.. math:: s_{ij} = q'_i \cdot k'_j + a_i + b_j

Whatever has this form, with :math:`q'` a function of the query alone and so on, reduces to
attention by dot products with a bias for each query and each key, and so to the fused routines of
:mod:`bayesattn.fused`. A softmax over keys does not see :math:`a`; one over queries does. Sums of
exponentials of this form reduce likewise: over copies of the keys, or through features that stand
between queries and keys.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bayesattn.contraction import inner_products

__all__ = ["ConditionalLogits", "EdgeLogits", "FactoredLogits", "Logits", "ReducedLogits"]

_ALL = slice(None)
# So many terms, each pair's with each feature, are summed as they are.
_FEW = 2**22


class ReducedLogits(NamedTuple):
    """Logits as inner products with biases; None where there is no bias.

    Attributes:
        query: What asks.
        key: What is asked.
        query_bias: Added to all logits of a query.
        key_bias: Added to all logits of a key.
        scale: Factor of the inner products.
        copies: Keys and their biases are so many sets, one after the other; a key's logit is the
            logsumexp over its copies.
    """

    query: Float[Tensor, "*_batch query _dim"]
    key: Float[Tensor, "*_batch copied_key _dim"]
    query_bias: Float[Tensor, "*_batch query"] | None = None
    key_bias: Float[Tensor, "*_batch copied_key"] | None = None
    scale: float = 1.0
    copies: int = 1

    def values(self, queries: slice = _ALL) -> Float[Tensor, "*_batch chosen key"]:
        """The logits of some queries and all keys."""
        query = self.query[..., queries, :]
        values = inner_products(query if self.scale == 1.0 else query * self.scale, self.key)
        if self.key_bias is not None:
            values = values + self.key_bias[..., None, :]
        if self.copies > 1:
            values = values.unflatten(-1, (self.copies, -1)).logsumexp(-2)
        if self.query_bias is not None:
            values = values + self.query_bias[..., queries, None]
        return values


class FactoredLogits(NamedTuple):
    r"""Logits through a few features, in time linear in the sequence.

    .. math:: s_{ij} = \log \sum_m e^{A_{im} + B_{mj}}

    Attributes:
        query: A, the features being what is asked.
        key: B, the features being what asks.
    """

    query: ReducedLogits
    key: ReducedLogits

    def values(self, queries: slice = _ALL) -> Float[Tensor, "*_batch chosen key"]:
        """The logits of some queries and all keys."""
        from_query, to_key = self.query.values(queries), self.key.values()
        if from_query.numel() * to_key.shape[-1] <= _FEW:
            return (from_query[..., :, None, :] + to_key.mT[..., None, :, :]).logsumexp(-1)
        # The largest term of each query and each key stands apart, so that no sum overflows. Pairs
        # whose features hardly meet are cut off where numbers end: at some e^-87 of these in single
        # precision.
        tops = [from_query.detach().amax(-1, keepdim=True), to_key.detach().amax(-2, keepdim=True)]
        terms = [part - top for part, top in zip((from_query, to_key), tops, strict=True)]
        sums = inner_products(terms[0].exp(), terms[1].mT.exp())
        return sums.clamp_min(torch.finfo(sums.dtype).tiny).log() + tops[0] + tops[1]


class Logits(nn.Module):
    """A choice of logits. A subclass defines ``reduce``, or ``forward`` where only that exists.

    Modules have no parameters unless they say so; those with parameters have them for each head,
    on the third axis from the right.

    Attributes:
        is_factored: Whether they reduce to sums of several exponentials; then weights cannot be
            dropped where they are not formed.
    """

    is_factored: bool = False

    def reduce(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> ReducedLogits | FactoredLogits | None:
        """The logits as inner products with biases, or None where they have no such form."""
        return None

    def reduce_over_keys(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> ReducedLogits | FactoredLogits | None:
        """As ``reduce``, but biases of queries, which a softmax over keys does not see, lack."""
        return self.reduce(query, key)

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
        return reduced.values()


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


class ConditionalLogits(EdgeLogits):
    """Logits that depend on all queries and keys of a sequence, or on chance.

    A subclass defines ``given``. Attention asks it once for each call, so that one draw serves all
    pairs.

    Attributes:
        pools_tokens: Whether the logits of a pair depend on some other tokens; then padding must
            be told.
        sees_all_tokens: Whether on all of them; then a causal mask would hide what they tell.
    """

    pools_tokens: bool = True
    sees_all_tokens: bool = True

    def given(
        self,
        query: Float[Tensor, "*_batch query _dim"],
        key: Float[Tensor, "*_batch key _dim"],
        query_mask: Bool[Tensor, "*_batch _query"] | None = None,
        key_mask: Bool[Tensor, "*_batch _key"] | None = None,
    ) -> EdgeLogits:
        """The logits as they are for these queries and keys.

        Args:
            query: What asks.
            key: What is asked.
            query_mask: With the head axis, to broadcast; True where there is no padding.
            key_mask: Likewise.

        Raises:
            TypeError: If a subclass does not define it.
        """
        raise TypeError(f"{type(self).__name__} must define given")

    def forward(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> Float[Tensor, "*_batch query key"]:
        """The logits of all pairs, without padding."""
        return self.given(query, key)(query, key)

    def on_edges(
        self,
        query: Float[Tensor, "head query dim"],
        key: Float[Tensor, "head key dim"],
        edges: Int[Tensor, "2 edge"],
    ) -> Float[Tensor, "head edge"]:
        """The logits of each edge of one graph."""
        return self.given(query, key).on_edges(query, key, edges)
