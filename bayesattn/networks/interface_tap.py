"""The tap of Hugging Face's models, which all hand their attention to one registry of functions.

While it is open, the models' configurations name a function that calls the one in force and records
what it was handed; the mask function goes by the new name too, for without one padding would be
ignored. transformers is never imported: a model of theirs has done that.
"""

import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from bayesattn.masking import with_infinities
from bayesattn.networks.attention_call import AttentionCall, Record
from bayesattn.networks.interface_functions import (
    AttentionFunction,
    attention_function,
    attention_functions,
    check_implementation,
)
from bayesattn.networks.shared_config import underlying_config

__all__ = ["watch_interface"]

_block = itertools.count()
# What some models add to the logits or the softmax, and the settings of a call cannot say.
_NOT_UNDERSTOOD = ("position_bias", "softcap", "s_aux")


@contextmanager
def watch_interface(records: Mapping[nn.Module, Record]) -> Iterator[None]:
    """Record the calls of attention by any of some modules.

    Args:
        records: Modules that may call attention, and what takes their calls.

    Raises:
        ValueError: If an implementation takes masks of another kind than "eager" and "sdpa" do.
    """
    configs = {id(config): config for config in map(_config, records) if config is not None}
    if not configs:
        yield
        return
    block = next(_block)
    with ExitStack() as stack:
        for config in configs.values():
            stack.enter_context(_renamed(config, f"observed {block}", records))
        yield


@contextmanager
def _renamed(config: Any, prefix: str, records: Mapping[nn.Module, Record]) -> Iterator[None]:
    """Put a function that records in the place of the one that a configuration names."""
    functions = attention_functions()
    masks = sys.modules["transformers.masking_utils"].AttentionMaskInterface
    before = config._attn_implementation
    implementation = before or "eager"
    function = functions().get(implementation)
    kind = getattr(function, "implementation", implementation)
    check_implementation(kind, function)
    name = f"{prefix} {implementation}"
    functions.register(name, _observed(implementation, kind, records))
    if implementation in masks():
        masks.register(name, masks()[implementation])
    # By the empty key, so that the configurations within this one stay.
    config._attn_implementation = {"": name}
    try:
        yield
    finally:
        if config._attn_implementation == name:
            config._attn_implementation = {"": before}
        for interface in (functions, masks):
            # Also what layers that share projections made of the name.
            for made in [known for known in interface._global_mapping if known.endswith(name)]:
                del interface._global_mapping[made]


def _config(module: nn.Module) -> Any:
    config = underlying_config(getattr(module, "config", None))
    return config if hasattr(config, "_attn_implementation") else None


def _observed(
    name: str, implementation: str, records: Mapping[nn.Module, Record]
) -> AttentionFunction:
    def observed(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        attend = attention_function(module, name)
        result = attend(module, query, key, value, attention_mask, **kwargs)
        if module in records:
            settings = _settings(module, (query, key), attention_mask, kwargs, implementation)
            heads = result[0].transpose(1, 2)
            is_self = _is_self_attention(module, query, key)
            records[module](AttentionCall(query, key, value, heads, settings, is_self))
        return result

    # For blocks within blocks, which see the name of this function and not of the one beneath.
    observed.implementation = implementation  # pyright: ignore[reportFunctionMemberAccess]
    return observed


def _is_self_attention(module: nn.Module, query: Tensor, key: Tensor) -> bool:
    # With cached keys, the first of them are earlier tokens.
    crosses = getattr(module, "is_cross_attention", "Cross" in type(module).__name__)
    return not crosses and query.shape[-2] == key.shape[-2]


def _settings(
    module: nn.Module,
    queries_and_keys: tuple[Tensor, Tensor],
    mask: Any,
    kwargs: dict[str, Any],
    implementation: str,
) -> dict[str, Any]:
    for name in _NOT_UNDERSTOOD:
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__}: attention with {name} cannot be recorded")
    query, key = queries_and_keys
    is_causal = False
    if mask is None and implementation != "eager" and query.shape[-2] > 1:
        hint = kwargs.get("is_causal")
        is_causal = bool(getattr(module, "is_causal", True) if hint is None else hint)
    return {
        "attn_mask": _forbidding(mask),
        "is_causal": is_causal,
        "scale": kwargs.get("scaling"),
        "enable_gqa": key.shape[1] != query.shape[1],
    }


def _forbidding(mask: Any) -> Tensor | None:
    """Mask with minus infinity for what is forbidden, where theirs has the lowest number."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise ValueError(f"attention mask: expected 'batch head query key', got {type(mask)}")
    return with_infinities(mask)
