"""Taps of single layers: what their calls hand to attention, recorded while a context lasts.

The layers compute what they would compute, and nothing twice; a tap only looks on.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bayesattn.head_layout import append_positions, split_heads
from bayesattn.layer_masks import LayerShape, attention_masks
from bayesattn.multihead import MultiheadAttention
from bayesattn.networks.attention_call import AttentionCall, Record, are_one_tensor
from bayesattn.structured_pooling import StructuredSelfAttention

__all__ = ["Observe", "Watch", "hooked", "watch_multihead", "watch_own_multihead", "watch_pooling"]

# From a layer, its arguments by place and by name, and its output to what it handed to attention.
Observe = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], AttentionCall]
Watch = Callable[[Any, Record], AbstractContextManager[None]]
# Within PyTorch's functional form.
_PROJECTIONS = ("_in_projection", "_in_projection_packed")


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


@contextmanager
def watch_pooling(module: StructuredSelfAttention, record: Record) -> Iterator[None]:
    """Record one query of each head, and keys and values that all heads share."""
    with _results_of(module, "keys") as keys:

        def observe(
            layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> AttentionCall:
            given = inspect.signature(type(layer).forward).bind(layer, *args, **kwargs).arguments
            tokens = given["tokens"]
            query = layer.query_weight[None, :, None].expand(len(tokens), -1, -1, -1)
            settings = {"key_mask": given.get("mask"), "scale": 1}
            key, value = keys.pop()[:, None], tokens[:, None]
            return AttentionCall(query, key, value, output[0][:, :, None], settings)

        with hooked(observe)(module, record):
            yield


@contextmanager
def watch_own_multihead(module: MultiheadAttention, record: Record) -> Iterator[None]:
    """Record the calls of our layer, whose output projection is a module that can be hooked."""
    merged: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        merged[:] = args[:1]

    def observe(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> AttentionCall:
        given = inspect.signature(layer.attention_inputs).bind(*args, **kwargs).arguments
        query, key, value, settings = inputs.pop()
        heads = split_heads(merged.pop(), layer.num_heads, batch_first=layer.batch_first)
        is_self = are_one_tensor(given["query"], given["key"])
        return AttentionCall(query, key, value, heads, settings, is_self)

    hook = module.out_proj.register_forward_pre_hook(keep)
    try:
        with _results_of(module, "attention_inputs") as inputs, hooked(observe)(module, record):
            yield
    finally:
        hook.remove()


@contextmanager
def _results_of(module: nn.Module, name: str) -> Iterator[list[Any]]:
    """Keep the last result of a module's method."""
    last, before = [], vars(module).get(name)
    setattr(module, name, _keeping(last, getattr(module, name)))
    try:
        yield last
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)


@contextmanager
def watch_multihead(module: nn.MultiheadAttention, record: Record) -> Iterator[None]:
    """Record what PyTorch's layer, or a layer derived from it, hands to its functional form."""
    before = vars(module).get("forward")
    records = getattr(before, "records", None)
    if records is not None:
        # Watched already: a mode within a mode would see nothing.
        records.append(record)
        try:
            yield
        finally:
            records.remove(record)
        return
    forward, records = module.forward, [record]

    def watched(*args: Any, **kwargs: Any) -> Any:
        # Here, for what goes on turns each of the three its own way if the values are others.
        given = inspect.signature(forward).bind(*args, **kwargs).arguments
        tokens = [given[name] for name in ("query", "key") if name in given]
        is_self = are_one_tensor(*tokens) if len(tokens) == 2 else None
        with _FunctionalCalls(records, is_self):
            return forward(*args, **kwargs)

    watched.records = records  # pyright: ignore[reportFunctionMemberAccess]
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

    def __init__(self, records: list[Record], is_self: bool | None) -> None:
        super().__init__()
        self.records, self.is_self = records, is_self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.multi_head_attention_forward:
            return func(*args, **(kwargs or {}))
        given = inspect.signature(func).bind(*args, **(kwargs or {}))
        given.apply_defaults()
        call = given.arguments
        projected, merged = [], []

        def linear(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if weight is call["out_proj_weight"]:
                merged.append(features)
            return F.linear(features, weight, bias)

        # The same code, to which these names mean what looks on.
        names = {name: _keeping(projected, vars(F)[name]) for name in _PROJECTIONS}
        names |= {"linear": linear, "has_torch_function": lambda _: False}
        result = FunctionType(func.__code__, vars(F) | names)(*given.args, **given.kwargs)
        heads = merged.pop().unflatten(0, projected[-1][0].shape[:2])
        query, key, value, heads = (
            split_heads(part, call["num_heads"], batch_first=False)
            for part in (*projected.pop(), heads)
        )
        appended = (call["bias_k"], call["bias_v"])
        key, value = append_positions(key, value, *appended, add_zero_attn=call["add_zero_attn"])
        is_self = call["query"] is call["key"] if self.is_self is None else self.is_self
        seen = AttentionCall(query, key, value, heads, _settings(call), is_self)
        for record in tuple(self.records):
            record(seen)
        return result


def _keeping(results: list[Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def observed(*args: Any, **kwargs: Any) -> Any:
        results[:] = [function(*args, **kwargs)]
        return results[0]

    return observed


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
