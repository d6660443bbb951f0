"""Taps of a model's attention layers, whatever they are, open while a context lasts."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from bayesattn.networks.attention_call import AttentionCall
from bayesattn.networks.interface_tap import watch_interface
from bayesattn.networks.layers import AttentionLayer, attention_layers

__all__ = ["attention_calls", "last_calls", "watch_attention"]


@contextmanager
def attention_calls(model: nn.Module) -> Iterator[dict[str, list[AttentionCall]]]:
    """Collect what the attention layers of a model hand to attention, call by call.

    Nothing is left on the model afterwards::

        with attention_calls(model) as calls:
            model(tokens)
        calls["encoder.layer.0.attention"][-1].weights()  # (sentence, head, query, key)

    Calls keep their graphs of gradients, so a loss may be made of them. Compiled models run as they
    are written within the context, and PyTorch's encoder without its shortcut past attention. Under
    gradient checkpointing, a backward pass within the context calls layers again.

    Args:
        model: Any module.

    Yields:
        For each layer that :func:`attention_layers` finds, the calls so far.

    Raises:
        ValueError: If Hugging Face's attention goes by an implementation whose masks are not
            understood, such as flash attention.
    """
    calls: dict[str, list[AttentionCall]] = {}
    with watch_attention(model, lambda name, call: calls[name].append(call)) as layers:
        calls |= {name: [] for name in layers}
        yield calls


@contextmanager
def watch_attention(
    model: nn.Module, record: Callable[[str, AttentionCall], None]
) -> Iterator[dict[str, AttentionLayer]]:
    """Hand each call of an attention layer to a function, with the layer's name, and keep none.

    All else is as for :func:`attention_calls`.

    Args:
        model: Any module.
        record: What takes the name and the call.

    Yields:
        The layers.
    """
    layers = attention_layers(model)
    inside = {}
    with ExitStack() as stack:
        stack.enter_context(_as_written())
        for name, layer in layers.items():
            take = partial(record, name)
            if layer.kind.watch is None:
                inside |= dict.fromkeys(layer.module.modules(), take)
            else:
                stack.enter_context(layer.kind.watch(layer.module, take))
        stack.enter_context(watch_interface(inside))
        yield layers


@contextmanager
def last_calls(
    model: nn.Module, summarize: Callable[[AttentionCall], Any], *, caller: str
) -> Iterator[dict[str, Any]]:
    """Collect what a function makes of the last call of each attention layer.

    Args:
        model: Any module.
        summarize: What is kept of a call.
        caller: Who warns if there is none.

    Yields:
        By the layers' names, what is kept so far.

    Raises:
        ValueError: If the model has no such layer.
    """
    found: dict[str, Any] = {}

    def keep(name: str, call: AttentionCall) -> None:
        found[name] = summarize(call)

    with watch_attention(model, keep) as layers:
        if not layers:
            raise ValueError(
                "model: expected attention layers, such as layers of "
                "bayesattn.MultiheadAttention, found none"
            )
        yield found
    if not found:
        warnings.warn(
            f"{caller}: no attention layer of the model was called within the context",
            stacklevel=3,
        )


@contextmanager
def _as_written() -> Iterator[None]:
    """Without compiled code, and without PyTorch's shortcut past its attention layers."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # Where nothing was compiled the compiler need not be loaded.
        if "torch._dynamo" in sys.modules:
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
