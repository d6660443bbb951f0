"""Which function a Hugging Face layer hands its attention to, by the name of an implementation.

transformers is never imported: a model of theirs has done that.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["AttentionFunction", "attention_function", "attention_functions", "check_implementation"]

AttentionFunction = Callable[..., Any]


def attention_functions() -> Any:
    """Their registry."""
    return sys.modules["transformers.modeling_utils"].AttentionInterface


def attention_function(module: nn.Module, implementation: str) -> AttentionFunction:
    """Return what a layer calls under a name; "eager" is not registered, and each has its own.

    Raises:
        ValueError: If there is no such function.
    """
    found = attention_functions()().get(implementation)
    return _eager(module) if found is None else found


def check_implementation(implementation: str, function: AttentionFunction | None) -> None:
    """Refuse implementations of theirs that take other masks, or other widths, than these do.

    Raises:
        ValueError: If it is none of "eager", "sdpa" and the caller's own.
    """
    own = not getattr(function, "__module__", "transformers").startswith("transformers")
    if implementation not in ("eager", "sdpa") and (function is None or not own):
        raise ValueError(
            "model: expected the attention implementation eager, sdpa or one's own, got "
            f"{implementation}; model.set_attn_implementation('sdpa') changes it"
        )


def _eager(module: nn.Module) -> AttentionFunction:
    if getattr(module, "reorder_and_upcast_attn", False):
        # GPT-2's second way, which it takes under this one name only.
        return lambda module, query, key, value, mask, **_: module._upcast_and_reordered_attn(
            query, key, value, mask
        )
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(
        f"model: found no eager_attention_forward beside {type(module).__name__}; "
        "model.set_attn_implementation('sdpa') does without"
    )
