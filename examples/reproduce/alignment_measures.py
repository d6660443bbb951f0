"""How far queries and keys of a model are apart, and how its attention differs from another's.

Both are told of the attention that a function calls the models with, all of it in one call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bayesattn import alignment_statistics, attention_change
from bayesattn.networks import AttentionCall, attention_calls

__all__ = ["HEAD_FIGURES", "Look", "attention_difference", "head_figures"]

HEAD_FIGURES = ("squared_mmd", "chance", "p_value", "entropy")

# Calls a model on what its attention is looked at on.
Look = Callable[[nn.Module], Any]


@torch.no_grad()
def head_figures(model: nn.Module, look: Look) -> dict[str, list[list[float]]]:
    """Give figures of :func:`bayesattn.alignment_statistics`, each as "layer head"."""
    model.eval()
    with alignment_statistics(model) as statistics:
        look(model)
    return {
        name: [getattr(layer, name).tolist() for layer in statistics.values()]
        for name in HEAD_FIGURES
    }


def attention_difference(model: nn.Module, other: nn.Module, look: Look) -> list[list[float]]:
    """Give the part of the attention that goes to other tokens than another model's, "layer head".

    It is the total variation between the two, the mean over queries.
    """
    changes = attention_change(_calls(other, look), _calls(model, look))
    return [change.total_variation.tolist() for change in changes.values()]


@torch.no_grad()
def _calls(model: nn.Module, look: Look) -> dict[str, list[AttentionCall]]:
    model.eval()
    with attention_calls(model) as calls:
        look(model)
    return calls
