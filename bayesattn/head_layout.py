r"""From a layer's tensors to head-first ones, and back.

.. math:: [q_1 | \dots | q_H] = X W^\top + b

A layer takes sequences with the batch axis second, first, or without one; its features are the
heads' side by side.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from bayesattn.shape_messages import shapes_of

__all__ = ["append_positions", "batched", "merge_heads", "project", "sequence_sizes", "split_heads"]


def project(
    query: Shaped[Tensor, "..."],
    key: Shaped[Tensor, "..."],
    value: Shaped[Tensor, "..."],
    weights: Float[Tensor, "_three_widths _feature"] | Sequence[Tensor],
    bias: Float[Tensor, " _three_widths"] | None,
) -> Sequence[Tensor]:
    """Project queries, keys and values, in one product where they are one tensor.

    Args:
        query: "... feature".
        key: Likewise.
        value: Likewise.
        weights: Those of the three, stacked or one by one.
        bias: Those of the three, stacked.
    """
    if query is key and key is value and isinstance(weights, Tensor):
        return F.linear(query, weights, bias).chunk(3, -1)
    weights = weights.chunk(3) if isinstance(weights, Tensor) else weights
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return tuple(map(F.linear, (query, key, value), weights, biases))


def split_heads(
    features: Shaped[Tensor, "*_axes _feature"], num_heads: int, *, batch_first: bool
) -> Shaped[Tensor, "_batch {num_heads} _sequence _dim"]:
    """Give every head its features; a sequence without a batch axis becomes a batch of one."""
    heads = features.unflatten(-1, (num_heads, -1))
    if heads.ndim == 3:
        return heads.transpose(0, 1)[None]
    return heads.transpose(1, 2) if batch_first else heads.permute(1, 2, 0, 3)


def batched(
    tokens: Shaped[Tensor, "*_axes _feature"], *, batch_first: bool
) -> Shaped[Tensor, "_batch _sequence _feature"]:
    """Set the batch axis first; a sequence without one becomes a batch of one."""
    if tokens.ndim == 2:
        return tokens[None]
    return tokens if batch_first else tokens.transpose(0, 1)


def merge_heads(
    heads: Shaped[Tensor, "_batch _head _sequence _dim"], *, is_batched: bool, batch_first: bool
) -> Shaped[Tensor, "*_axes _feature"]:
    """Set the heads' features side by side again, in the layer's layout and contiguous."""
    if not is_batched:
        return heads[0].transpose(0, 1).flatten(1)
    heads = heads.transpose(1, 2) if batch_first else heads.permute(2, 0, 1, 3)
    return heads.flatten(2)


def append_positions(
    key: Float[Tensor, "_batch _head _key _dim"],
    value: Float[Tensor, "_batch _head _key _dim"],
    bias_k: Float[Tensor, "..."] | None,
    bias_v: Float[Tensor, "..."] | None,
    *,
    add_zero_attn: bool,
) -> tuple[Float[Tensor, "_batch _head _more _dim"], Float[Tensor, "_batch _head _more _dim"]]:
    """Append what a layer appends to every sequence: a learned key and value, and then zeros."""
    if bias_k is not None and bias_v is not None:
        key, value = _append_position(key, bias_k), _append_position(value, bias_v)
    if add_zero_attn:
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    return key, value


def sequence_sizes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    widths: tuple[int, int, int],
    *,
    batch_first: bool,
) -> tuple[int | None, int, int]:
    """Check a layer's inputs against each other and their widths.

    Returns:
        Number of sequences, None without a batch axis, of queries in each, and of keys.

    Raises:
        ValueError: If they do not fit, or are nested.
    """
    parts = {"query": query, "key": key, "value": value}
    nested = [name for name, part in parts.items() if part.is_nested]
    if nested:
        raise ValueError(
            f"{nested[0]}: expected a padded tensor, got a nested one; where PyTorch's encoder "
            "makes those, set encoder.use_nested_tensor = False"
        )
    for (name, part), width in zip(parts.items(), widths, strict=True):
        if part.ndim not in (2, 3) or part.ndim != query.ndim or part.shape[-1] != width:
            raise ValueError(
                f"{name}: expected 2 or 3 axes as all, the last {width}, got {shapes_of(parts)}"
            )
    if query.ndim == 2:
        batches, lengths = [None] * 3, [part.shape[0] for part in parts.values()]
    else:
        batch_axis, sequence_axis = (0, 1) if batch_first else (1, 0)
        batches = [part.shape[batch_axis] for part in parts.values()]
        lengths = [part.shape[sequence_axis] for part in parts.values()]
    if len(set(batches)) > 1 or lengths[1] != lengths[2]:
        raise ValueError(
            f"key: expected query's batch, and a value for each key, got {shapes_of(parts)}"
        )
    return batches[0], lengths[0], lengths[1]


def _append_position(heads: Tensor, features: Tensor) -> Tensor:
    batch, num_heads, _, dim = heads.shape
    last = features.to(heads.dtype).reshape(num_heads, 1, dim).expand(batch, -1, -1, -1)
    return torch.cat([heads, last], -2)
