"""What one call of an attention layer handed to attention, and what came out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bayesattn.functional import attention_weights
from bayesattn.masking import combine_masks, with_infinities

__all__ = ["AttentionCall", "Record", "are_one_tensor"]

_MASKS = ("attn_mask", "query_mask", "key_mask", "is_causal")


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
        is_self_attention: Whether the queries are those of the same tokens as the first keys, one
            by one, so that what is padding among the keys is padding among the queries.
    """

    query: Float[Tensor, "batch head query dim"]
    key: Float[Tensor, "batch key_head key dim"]
    value: Float[Tensor, "batch key_head key value_dim"]
    head_outputs: Float[Tensor, "batch head query value_dim"]
    settings: dict[str, Any]
    is_self_attention: bool = False

    def weights(self) -> Float[Tensor, "batch head query key"]:
        """Form the weights, before dropout; zeros for a query that sees no key."""
        return attention_weights(self.query, self.key, **self.settings)

    def key_of_each_head(self) -> Float[Tensor, "batch head key dim"]:
        """Keys, repeated where several heads of queries share one of keys."""
        sharing = self.query.shape[1] // self.key.shape[1]
        return self.key if sharing == 1 else self.key.repeat_interleave(sharing, dim=1)

    def cloud_masks(
        self,
    ) -> tuple[Bool[Tensor, "batch head query"], Bool[Tensor, "batch head key"]]:
        """Which queries and which keys are no padding: those that see one, or that some query sees.

        In self-attention a query whose key is padding is padding too. Elsewhere only a mask of the
        queries can tell, and without one all queries that see a key take part.
        """
        query, key = self.query, self.key
        shape = (*query.shape[:3], key.shape[2])
        given: dict[str, Any] = {name: self.settings.get(name) for name in _MASKS}
        given["is_causal"] = bool(given["is_causal"])
        if given["attn_mask"] is not None:
            given["attn_mask"] = with_infinities(given["attn_mask"])
        pairs = combine_masks(shape, **given, device=query.device).pairs()
        if pairs is None:
            full = torch.ones((), dtype=torch.bool, device=query.device)
            return full.expand(shape[:3]), full.expand(*shape[:2], shape[3])
        # A mask of keys alone has one row for all queries.
        seeing = pairs.any(-1).expand(shape[:3])
        seen = pairs.any(-2).expand(*shape[:2], shape[3])
        return (seeing & seen[..., : shape[2]] if self.is_self_attention else seeing), seen


Record = Callable[[AttentionCall], None]


def are_one_tensor(query: Tensor, key: Tensor) -> bool:
    """Whether queries and keys come from the same tokens: one tensor, or views alike of one."""
    if query is key:
        return True
    alike = query.shape == key.shape and query.stride() == key.stride()
    return alike and query.dtype == key.dtype and query.data_ptr() == key.data_ptr() != 0
