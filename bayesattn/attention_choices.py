"""What a layer is given to choose its attention by: logits and normalization."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bayesattn.logits import ConditionalLogits, Logits
from bayesattn.masking import Masks
from bayesattn.normalizations.protocol import Normalization

__all__ = [
    "LogitsFunction",
    "NormalizationFunction",
    "check_no_class",
    "logits_given",
    "mixes_queries",
    "name_of_choice",
    "own_choice",
    "pools_tokens",
    "sees_all_tokens",
]

LogitsFunction = Callable[[Tensor, Tensor], Tensor]
NormalizationFunction = Callable[[Tensor, Tensor | None], Tensor]


def mixes_queries(normalization: NormalizationFunction | None) -> bool:
    """Whether a query's weights may depend on the other queries; true of one that does not say."""
    return normalization is not None and getattr(normalization, "mixes_queries", True)


def sees_all_tokens(logits: LogitsFunction | None) -> bool:
    """Whether the logits of a pair depend on the other queries and keys."""
    return isinstance(logits, ConditionalLogits) and logits.sees_all_tokens


def pools_tokens(logits: LogitsFunction | None) -> bool:
    """Whether the logits of a pair depend on some other queries and keys, which may be padding."""
    return isinstance(logits, ConditionalLogits) and logits.pools_tokens


def logits_given(
    logits: LogitsFunction | None, query: Tensor, key: Tensor, masks: Masks
) -> LogitsFunction | None:
    """The logits as they are for one call of attention, if they depend on it."""
    if not isinstance(logits, ConditionalLogits):
        return logits
    pairs = masks.pairs()
    if pairs is not None:
        pairs = pairs.expand(*pairs.shape[:-2], query.shape[-2], key.shape[-2])
    # Pairs of a query and a key tell of a token whether it takes part in any.
    query_mask = None if pairs is None else pairs.any(-1)
    key_mask = None if pairs is None else pairs.any(-2)
    return logits.given(query, key, query_mask, key_mask)


def check_no_class(name: str, choice: object) -> None:
    """Refuse a class in the place of one of its objects.

    Raises:
        ValueError: If it is one.
    """
    if isinstance(choice, type):
        raise ValueError(f"{name}: expected an object, such as {choice.__name__}(), got the class")


def name_of_choice(choice: object) -> str:
    """The name of a function, or of a module's type."""
    return getattr(choice, "__name__", type(choice).__name__)


def own_choice(
    name: str,
    choice: object,
    device: torch.device | str | int | None,
    dtype: torch.dtype | None,
    num_heads: int,
    width: int,
) -> Any:
    """Copy a module for one layer's use, where and of what type that is; a function stays itself.

    Raises:
        ValueError: If it cannot be called, or says that it is for other heads.
    """
    if choice is not None and not callable(choice):
        raise ValueError(f"{name}: expected something to call, or None, got {choice!r}")
    check_no_class(name, choice)
    sizes = {"num_heads": num_heads, "dim": width}
    # Elsewhere such names may mean other things, as the axis of a softmax does.
    for size, expected in sizes.items() if isinstance(choice, Logits | Normalization) else ():
        got = getattr(choice, size, None)
        if got not in (None, expected):
            raise ValueError(
                f"{name}: expected {size}={expected} for a layer of {num_heads} heads with queries "
                f"of width {width}, got {size}={got}"
            )
    if isinstance(choice, nn.Module):
        return copy.deepcopy(choice).to(device=device, dtype=dtype)
    return choice
