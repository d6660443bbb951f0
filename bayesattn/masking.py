r"""Masks of attention, put together once: which keys each query may see, and which queries count.

.. math:: m_{ij} = [\text{attn\_mask}_{ij}] \, [\text{key\_mask}_j] \, [\text{query\_mask}_i] \,
    [j \le i \text{ if causal}]

True takes part, in all of them. A float ``attn_mask`` is a bias of the logits, and minus infinity
in it forbids.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from bayesattn.contraction import inside_transform

__all__ = [
    "LOWEST_BIAS",
    "Masks",
    "combine_masks",
    "masked_softmax",
    "refuse_leaks",
    "with_infinities",
]

# What is added to logits to forbid a pair where minus infinity is avoided; less is no bias.
LOWEST_BIAS = -1e4


class Masks(NamedTuple):
    """What the masks come to; each broadcasts to "*batch head query key", None where there is none.

    Attributes:
        keys: Which keys each query may see.
        queries: Which queries are not padding, with a last axis of size one.
        bias: What is added to the logits.
    """

    keys: Bool[Tensor, "*_batch _query _key"] | None
    queries: Bool[Tensor, "*_batch _query 1"] | None
    bias: Float[Tensor, "*_batch _query _key"] | None

    def pairs(self) -> Bool[Tensor, "*_batch _query _key"] | None:
        """Which pairs of a query and a key take part."""
        if self.keys is None or self.queries is None:
            return self.queries if self.keys is None else self.keys
        return self.keys & self.queries


def combine_masks(
    shape: tuple[int, ...],
    *,
    attn_mask: Shaped[Tensor, "..."] | None = None,
    query_mask: Shaped[Tensor, "..."] | None = None,
    key_mask: Shaped[Tensor, "..."] | None = None,
    is_causal: bool = False,
    device: torch.device | None = None,
) -> Masks:
    """Check the masks against the shape of the logits and combine them.

    Args:
        shape: Shape of the logits, "*batch head query key".
        attn_mask: "*batch head query key", boolean or float.
        query_mask: "*batch query", boolean, without the head axis.
        key_mask: "*batch key", boolean, without the head axis.
        is_causal: Query i sees keys 0 to i only, counted from the start of both.
        device: Where the causal mask is made.

    Raises:
        ValueError: If a mask has the wrong type or does not broadcast to the logits.
    """
    *batch, num_queries, num_keys = shape
    keys = bias = None
    if attn_mask is not None:
        _check_attn_mask(attn_mask, shape)
        is_boolean = attn_mask.dtype == torch.bool
        keys = attn_mask if is_boolean else attn_mask > -torch.inf
        bias = None if is_boolean else attn_mask
    if is_causal:
        earlier = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril()
        keys = earlier if keys is None else keys & earlier
    if key_mask is not None:
        _check_padding("key", key_mask, batch, num_keys)
        unpadded = _beside_heads(key_mask.unsqueeze(-2), batch)
        keys = unpadded if keys is None else keys & unpadded
    queries = None
    if query_mask is not None:
        _check_padding("query", query_mask, batch, num_queries)
        queries = _beside_heads(query_mask.unsqueeze(-1), batch)
    return Masks(keys, queries, bias)


def masked_softmax(
    logits: Float[Tensor, "*#batch query key"], mask: Bool[Tensor, "*#batch #query #key"] | None
) -> Float[Tensor, "*#batch query key"]:
    """Softmax over the keys that take part; zeros, not NaN, in a row where none does."""
    if mask is None:
        return torch.softmax(logits, dim=-1)
    # A finite filling keeps rows without a key finite, and with them all gradients.
    lowest = torch.finfo(logits.dtype).min
    weights = torch.softmax(torch.where(mask, logits, lowest), dim=-1)
    return torch.where(mask, weights, 0.0)


def with_infinities(mask: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """A mask in which what stands for minus infinity is minus infinity.

    A softmax over keys hardly sees the difference. One over queries does: there a bias of a key
    cancels, however low it is.
    """
    if not mask.is_floating_point():
        return mask
    return torch.where(mask > LOWEST_BIAS, mask, -torch.inf)


def refuse_leaks(mask: Shaped[Tensor, "..."], num_queries: int, num_keys: int, reason: str) -> None:
    """Refuse a mask that lets no query see a later key, but some query see several.

    Under it a normalization over queries tells earlier queries of later ones. Of several masks, one
    is enough. Where code is recorded or transformed, there are no values to look at.

    Raises:
        ValueError: For the reason; a RuntimeError in compiled code.
    """
    if num_queries != num_keys or mask.shape[-2:] != (num_queries, num_keys):
        return
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and (inside_transform() or is_fake(mask)):
        return
    seen = mask if mask.dtype == torch.bool else mask > LOWEST_BIAS
    later = seen.triu(1).any(-1).any(-1)
    several = (seen.sum(-1) > 1).any(-1)
    leaks = (several & ~later).any()
    if is_compiling:
        torch._assert_async(~leaks, reason)  # pyright: ignore[reportPrivateImportUsage]
    elif leaks:
        raise ValueError(reason)


def _beside_heads(mask: Tensor, batch: list[int]) -> Tensor:
    return mask.unsqueeze(-3) if batch else mask


def _check_attn_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attn_mask: expected bool or float, got {mask.dtype}")
    if not _broadcasts(mask.shape[-2:], shape[-2:], grow=False) or not _broadcasts(
        mask.shape[:-2], shape[:-2], grow=True
    ):
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to the logits' {tuple(shape)}, "
            f"got {tuple(mask.shape)}"
        )


def _check_padding(name: str, mask: Tensor, batch: list[int], size: int) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"{name}_mask: expected bool, True takes part, got {mask.dtype}")
    if mask.shape[-1:] != (size,) or not _broadcasts(mask.shape[:-1], batch[:-1], grow=False):
        raise ValueError(
            f"{name}_mask: expected '*batch {name}' without the head axis, to broadcast to "
            f"{(*batch[:-1], size)}, got {tuple(mask.shape)}"
        )


def _broadcasts(shape: Sequence[int], target: Sequence[int], *, grow: bool) -> bool:
    try:
        result = torch.broadcast_shapes(tuple(shape), tuple(target))
    except RuntimeError:
        return False
    return grow or tuple(result) == tuple(target)
