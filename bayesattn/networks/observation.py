"""Calls of a model's attention layers, kept from the forward pass for a term of the loss.

The term is computed after the forward pass, out of reach of activation checkpointing: a region that
is computed anew in the backward pass then does what it did at first.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from bayesattn.networks.attention_call import AttentionCall
from bayesattn.networks.taps import watch_attention

__all__ = ["ObservedCalls", "PlacedCall"]


class PlacedCall(NamedTuple):
    """A call, and where it stood.

    Attributes:
        place: How often the layer had been called before, in this forward pass of the model: zero
            but for a layer that stands in several places.
        call: What was handed to attention.
    """

    place: int
    call: AttentionCall


class ObservedCalls:
    """Collects the calls of the layers, of one forward pass or of several.

    Args:
        model: Any module with attention layers that :mod:`bayesattn.networks` knows.
        caller: Who asks, for messages.
    """

    def __init__(self, model: nn.Module, caller: str) -> None:
        self._model, self._caller = model, caller
        self._calls: dict[str, list[PlacedCall]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave calls behind: copies and files have no use for activations."""
        return vars(self) | {"_calls": {}}

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Collect the calls within the context; earlier ones are forgotten.

        A compiled model runs as it is written meanwhile, and nothing is left on the model.

        Raises:
            ValueError: If the model has no such layer.
            RuntimeError: If a layer is called without gradients in a context that has them.
        """
        self._calls, places = {}, Counter()
        has_gradients = torch.is_grad_enabled()

        def keep(name: str, call: AttentionCall) -> None:
            if has_gradients and not torch.is_grad_enabled():
                raise RuntimeError(
                    f"{self._caller}: layer '{name}' was called without gradients, as activation "
                    "checkpointing with use_reentrant=True does; take use_reentrant=False, or "
                    "enter torch.no_grad() before observe() where no gradient is wanted"
                )
            self._calls.setdefault(name, []).append(PlacedCall(places[name], call))
            places[name] += 1

        start = self._model.register_forward_pre_hook(lambda *_: places.clear())
        try:
            with watch_attention(self._model, keep) as layers:
                if not layers:
                    raise ValueError("model: expected attention layers, found none")
                yield
        finally:
            start.remove()

    def calls(self) -> dict[str, list[PlacedCall]]:
        """Give the calls of each layer that was called, in order.

        Raises:
            RuntimeError: If there was none.
        """
        if not self._calls:
            raise RuntimeError(
                f"{self._caller}.loss() needs a call of the model within observe(): of the very "
                "model that it was made with, and no copy"
            )
        return self._calls
