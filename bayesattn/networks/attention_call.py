"""What one call of an attention layer handed to attention, and what came out."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from bayesattn.functional import attention_weights

__all__ = ["AttentionCall", "Record"]


class AttentionCall(NamedTuple):
    """One call of a layer, within its graph of gradients.

    There may be fewer heads of keys and values than of queries. Sequences without a batch axis are
    a batch of one.

    Attributes:
        query: Projected queries, rotated where the layer does so.
        key: Projected keys, those appended or cached included.
        value: Projected values.
        head_outputs: Of attention, dropout included, before the output projection.
        settings: Masks, ``scale``, ``enable_gqa``, ``logits`` and ``normalization`` by their names
            in :func:`bayesattn.attention_weights`; in masks True takes part.
    """

    query: Float[Tensor, "batch head query dim"]
    key: Float[Tensor, "batch key_head key dim"]
    value: Float[Tensor, "batch key_head key value_dim"]
    head_outputs: Float[Tensor, "batch head query value_dim"]
    settings: dict[str, Any]

    def weights(self) -> Float[Tensor, "batch head query key"]:
        """Form the weights, before dropout; zeros for a query that sees no key."""
        return attention_weights(self.query, self.key, **self.settings)


Record = Callable[[AttentionCall], None]
