"""The attention weights of a classifier's layers on some sentences, a batch at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayesattn.networks import attention_calls
from examples.reproduce.text_tasks import Sentences

__all__ = ["AttentionMaps", "attention_maps"]


class AttentionMaps(NamedTuple):
    """What attention is on a batch.

    Attributes:
        batch: The sentences.
        weights: By the layer's name, in the order of the model.
    """

    batch: Sentences
    weights: dict[str, Float[Tensor, "sentence head query token"]]


@torch.no_grad()
def attention_maps(
    model: nn.Module, sentences: Sentences, batch_size: int = 256
) -> Iterator[AttentionMaps]:
    """Read sentences of similar length together, in evaluation mode, and give the weights."""
    model.eval()
    for rows in sentences.mask.sum(-1).argsort().split(batch_size):
        batch = sentences.choose(rows)
        with attention_calls(model) as calls:
            model(batch.tokens, batch.mask)
        yield AttentionMaps(batch, {name: call.weights() for name, (call,) in calls.items()})
