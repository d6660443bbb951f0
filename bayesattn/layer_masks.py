r"""Masks of PyTorch's attention layers, put into the convention of :mod:`bayesattn.functional`.

In the layers True is left out; in our functions True takes part. A float mask is added to the
logits in both; as a padding mask it is two things: minus infinity is padding, anything else a bias
of its key. Keys that a layer appends to the sequence are seen by every query, also by causal ones:

.. math:: m_{ij} = [\lnot\text{attn\_mask}_{ij}] \, [\lnot\text{key\_padding\_mask}_j] \,
    [j \le i \text{ if causal}] \text{ for } j < n, \qquad m_{ij} = 1 \text{ for } j \ge n
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.nn import functional as F

from bayesattn.masking import with_infinities

__all__ = ["AttentionMasks", "LayerShape", "attention_masks", "is_causal_mask"]


class LayerShape(NamedTuple):
    """Sizes that a layer's masks must fit.

    Attributes:
        batch: Number of sequences; None for one sequence without a batch axis.
        heads: Number of heads.
        queries: Number of queries.
        keys: Number of keys, without those appended.
        appended: Number of keys that the layer appends.
        earlier: How many of the keys are of tokens before the first query.
    """

    batch: int | None
    heads: int
    queries: int
    keys: int
    appended: int = 0
    earlier: int = 0


class AttentionMasks(NamedTuple):
    """Arguments of :func:`bayesattn.attention`, by its names; True takes part."""

    attn_mask: Shaped[Tensor, "#batch #head #query _key"] | None
    query_mask: Bool[Tensor, "batch query"] | None
    key_mask: Bool[Tensor, "batch _key"] | None
    is_causal: bool


def attention_masks(
    shape: LayerShape,
    *,
    attn_mask: Shaped[Tensor, "..."] | None = None,
    key_padding_mask: Shaped[Tensor, "..."] | None = None,
    query_padding_mask: Shaped[Tensor, "..."] | None = None,
    is_causal: bool = False,
    device: torch.device | None = None,
) -> AttentionMasks:
    """Check a layer's masks and put them into our convention.

    Args:
        shape: Sizes of the layer's inputs.
        attn_mask: "query key", or "batch·head query key" with a sequence's heads in a run.
        key_padding_mask: "batch key"; without the batch axis where the inputs have none.
        query_padding_mask: "batch query", likewise.
        is_causal: On top of the masks, query i sees the earlier keys, keys 0 to i of the rest, and
            those appended.
        device: Where a causal mask is made.

    Raises:
        ValueError: If a mask is neither boolean nor float, or does not fit the shape.
    """
    pairs = None if attn_mask is None else _read_pairs(attn_mask, shape)
    key_mask = query_mask = None
    if key_padding_mask is not None:
        key_mask, bias = _read_padding("key_padding_mask", key_padding_mask, shape, shape.keys)
        pairs = pairs if bias is None else _both(bias[:, None, None], pairs)
    if query_padding_mask is not None:
        # A bias of a query moves all its logits alike: what is left of it is the padding.
        told = with_infinities(query_padding_mask)
        query_mask, _ = _read_padding("query_padding_mask", told, shape, shape.queries)
    if is_causal and (shape.appended or shape.earlier):
        if shape.queries > 1 or shape.keys > shape.earlier + 1:
            seen = torch.ones(shape.queries, shape.keys, dtype=torch.bool, device=device)
            pairs = _both(seen.tril(shape.earlier), pairs)
        is_causal = False
    pairs, key_mask = (_append(mask, shape.appended) for mask in (pairs, key_mask))
    pairs = pairs if pairs is None or pairs.ndim == 4 else pairs[None, None]
    return AttentionMasks(pairs, query_mask, key_mask, is_causal)


def is_causal_mask(mask: Shaped[Tensor, "..."] | None, size: int) -> bool:
    """Whether a layer's mask says "query i of ``size`` sees keys 0 to i", and nothing else."""
    if mask is None or mask.shape != (size, size):
        return False
    later = torch.ones(size, size, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, later)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(later, -torch.inf))


def _read_pairs(mask: Tensor, shape: LayerShape) -> Tensor:
    _check_type("attn_mask", mask)
    flat = ((shape.batch or 1) * shape.heads, shape.queries, shape.keys)
    if mask.shape not in (flat, flat[1:]):
        raise ValueError(
            f"attn_mask: expected 'query key' {flat[1:]} or 'batch·head query key' {flat}, "
            f"got {tuple(mask.shape)}"
        )
    mask = ~mask if mask.dtype == torch.bool else mask
    return mask if mask.ndim == 2 else mask.unflatten(0, (-1, shape.heads))


def _read_padding(
    name: str, mask: Tensor, shape: LayerShape, size: int
) -> tuple[Tensor, Tensor | None]:
    _check_type(name, mask)
    expected = (size,) if shape.batch is None else (shape.batch, size)
    if mask.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(mask.shape)}")
    mask = mask if mask.ndim == 2 else mask[None]
    if mask.dtype == torch.bool:
        return ~mask, None
    unpadded = mask > -torch.inf
    return unpadded, torch.where(unpadded, mask, 0.0)


def _check_type(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{name}: expected bool, True left out, or float, got {mask.dtype}")


def _both(mask: Tensor, other: Tensor | None) -> Tensor:
    if other is None:
        return mask
    if mask.dtype == other.dtype == torch.bool:
        return mask & other
    if mask.dtype == torch.bool:
        return torch.where(mask, other, -torch.inf)
    return torch.where(other, mask, -torch.inf) if other.dtype == torch.bool else mask + other


def _append(mask: Tensor | None, size: int) -> Tensor | None:
    if mask is None or size == 0:
        return mask
    # What takes part is True in a boolean mask, and nothing added in a float one.
    return F.pad(mask, (0, size), value=float(mask.dtype == torch.bool))
