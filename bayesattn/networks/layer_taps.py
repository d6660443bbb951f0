"""Taps of single layers: what their calls hand to attention, recorded while a context lasts.

Queries, keys and values of PyTorch's layer, of ours and of pooling are projected a second time;
they are the same, and gradients pass through them.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bayesattn.head_layout import append_positions, project, split_heads
from bayesattn.layer_masks import LayerShape, attention_masks
from bayesattn.multihead import MultiheadAttention
from bayesattn.networks.attention_call import AttentionCall, Record
from bayesattn.structured_pooling import StructuredSelfAttention

__all__ = ["Observe", "Watch", "hooked", "pooling_call", "watch_multihead", "watch_own_multihead"]

# From a layer, its arguments by place and by name, and its output to what it handed to attention.
Observe = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], AttentionCall]
Watch = Callable[[Any, Record], AbstractContextManager[None]]


def hooked(observe: Observe) -> Watch:
    """Turn a function of a call's arguments and output into a tap."""

    @contextmanager
    def watch(module: nn.Module, record: Record) -> Iterator[None]:
        hook = module.register_forward_hook(
            lambda *call: record(observe(*call)), with_kwargs=True, prepend=True
        )
        try:
            yield
        finally:
            hook.remove()

    return watch


def pooling_call(
    module: StructuredSelfAttention, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> AttentionCall:
    """One query of each head, and keys and values that all heads share."""
    given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    tokens = given["tokens"]
    query = module.query_weight[None, :, None].expand(len(tokens), -1, -1, -1)
    settings = {"key_mask": given.get("mask"), "scale": 1}
    key, value = module.keys(tokens)[:, None], tokens[:, None]
    return AttentionCall(query, key, value, output[0][:, :, None], settings)


@contextmanager
def watch_own_multihead(module: MultiheadAttention, record: Record) -> Iterator[None]:
    """Record the calls of our layer, whose output projection is a module that can be hooked."""
    merged: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        merged[:] = args[:1]

    def observe(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> AttentionCall:
        query, key, value, settings = layer.attention_inputs(*args, **kwargs)
        heads = split_heads(merged.pop(), layer.num_heads, batch_first=layer.batch_first)
        return AttentionCall(query, key, value, heads, settings)

    hook = module.out_proj.register_forward_pre_hook(keep)
    try:
        with hooked(observe)(module, record):
            yield
    finally:
        hook.remove()


@contextmanager
def watch_multihead(module: nn.MultiheadAttention, record: Record) -> Iterator[None]:
    """Record what PyTorch's layer, or a layer derived from it, hands to its functional form."""
    before = vars(module).get("forward")
    forward = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with _FunctionalCalls(record):
            return forward(*args, **kwargs)

    # Not hooks, of which an interrupt may skip the second and leave the mode in force.
    module.forward = watched
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class _FunctionalCalls(TorchFunctionMode):
    """Sees the calls of ``F.multi_head_attention_forward``."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.multi_head_attention_forward:
            return func(*args, **(kwargs or {}))
        given = inspect.signature(func).bind(*args, **(kwargs or {}))
        given.apply_defaults()
        call = given.arguments
        weight, bias = call["out_proj_weight"], call["out_proj_bias"]
        # Under the identity the function returns the heads' outputs themselves.
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        given.arguments |= {"out_proj_weight": identity, "out_proj_bias": None}
        merged, weights = func(*given.args, **given.kwargs)
        heads = split_heads(merged, call["num_heads"], batch_first=False)
        self.record(AttentionCall(*_projected(call), heads, _settings(call)))
        output = F.linear(merged.flatten(0, -2), weight, bias)
        return output.view(*merged.shape[:-1], -1), weights


def _projected(call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    separate = call["use_separate_proj_weight"]
    weights = [call[name] for name in names] if separate else call["in_proj_weight"]
    parts = project(call["query"], call["key"], call["value"], weights, call["in_proj_bias"])
    query, key, value = (split_heads(p, call["num_heads"], batch_first=False) for p in parts)
    appended = (call["bias_k"], call["bias_v"])
    key, value = append_positions(key, value, *appended, add_zero_attn=call["add_zero_attn"])
    return query, key, value


def _settings(call: dict[str, Any]) -> dict[str, Any]:
    query, padding = call["query"], call["key_padding_mask"]
    # In this case the function goes by the hint, and asks neither the mask nor what is appended.
    is_causal = call["is_causal"] and padding is None and not call["need_weights"]
    appended = int(call["bias_k"] is not None) + int(call["add_zero_attn"])
    batch = query.shape[1] if query.ndim == 3 else None
    shape = LayerShape(batch, call["num_heads"], len(query), len(call["key"]), appended)
    masks = attention_masks(
        shape, attn_mask=None if is_causal else call["attn_mask"], key_padding_mask=padding
    )
    return masks._replace(is_causal=is_causal)._asdict()
