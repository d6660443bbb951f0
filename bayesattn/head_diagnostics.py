"""How alike the heads of every attention layer of a model are, and an alarm where they collapse."""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayesattn.head_similarity import (
    centered_kernel_alignment,
    cosine_similarity,
    effective_heads,
    jensen_shannon,
    over_norms,
)
from bayesattn.networks.attention_call import AttentionCall
from bayesattn.networks.circuits import circuit_products, head_circuits
from bayesattn.networks.layers import attention_layers, head_partitions
from bayesattn.networks.stacked_heads import HeadBatch
from bayesattn.networks.taps import last_calls

__all__ = [
    "HeadCollapseWarning",
    "HeadStatistics",
    "circuit_similarity",
    "head_statistics",
    "warn_of_collapse",
    "weight_similarity",
]

Number = float | int


class HeadCollapseWarning(UserWarning):
    """Heads of a layer have become nearly one."""


class HeadStatistics(NamedTuple):
    """How alike the heads of a layer are in one call.

    Attributes:
        cosine: Between their outputs at all queries.
        alignment: Linear CKA of their outputs, a sample for each query.
        divergence: Jensen-Shannon divergence of their attention, in nats, the mean over queries.
        num_value_heads: How many there are of the values, which groups of heads may share.
    """

    cosine: Float[Tensor, "head head"]
    alignment: Float[Tensor, "head head"]
    divergence: Float[Tensor, "head head"]
    num_value_heads: int

    @property
    def effective_heads(self) -> Float[Tensor, ""]:
        """How many heads there are in effect, by the cosines of their outputs."""
        return effective_heads(self.cosine)


def head_statistics(model: nn.Module) -> AbstractContextManager[dict[str, HeadStatistics]]:
    """Collect how alike the heads of every attention layer are.

    Within the context each call of a layer puts its statistics into the dictionary, under the
    layer's name; the last call counts. Queries that see no key are left out; other padding of
    queries is not known, and counts. Weights are formed::

        with head_statistics(model) as statistics:
            model(tokens)
        statistics["layers.0.self_attn"].effective_heads

    Raises:
        ValueError: If the model has no such layer.
    """
    return last_calls(model, _statistics, caller="head_statistics")


def weight_similarity(model: nn.Module) -> dict[str, Float[Tensor, "_head _head"]]:
    """Cosines between the weights of heads, for each layer and role."""
    return {part.name: cosine_similarity(part.particles()) for part in head_partitions(model)}


def circuit_similarity(model: nn.Module) -> dict[str, Float[Tensor, "_head _head"]]:
    """Cosines between the circuits of heads, which no gauge of their weights changes.

    By the layer's name and its two roles, such as ``"layers.0.query+key"``. Layers that have no
    such two projections are left out.
    """
    found = {}
    for layer in attention_layers(model).values():
        for roles in (("query", "key"), ("value", "output")):
            if not set(roles) <= set(layer.layout):
                continue
            heads = HeadBatch(layer.partitions(roles, joint=True))
            circuits = head_circuits(heads, heads.particles())
            found[heads.names[0]] = over_norms(circuit_products(circuits, circuits)[0])
    return found


def warn_of_collapse(
    statistics: Mapping[str, HeadStatistics], *, fewest: Number = 0.5
) -> dict[str, float]:
    """Warn of layers whose heads are, in effect, fewer than a part of their number.

    Heads that share a value count as one, since untrained they are nearly that.

    Args:
        statistics: By layer, of :func:`head_statistics`.
        fewest: The part.

    Returns:
        The effective number of heads of each such layer.

    Raises:
        ValueError: If ``fewest`` is not in (0, 1].
    """
    if not 0.0 < fewest <= 1.0:
        raise ValueError(f"fewest: expected a part in (0, 1], got {fewest}")
    collapsed = {}
    for name, entry in statistics.items():
        number, count = float(entry.effective_heads), entry.num_value_heads
        if count > 1 and number < fewest * count:
            collapsed[name] = number
    if collapsed:
        figures = ", ".join(
            f"{name or 'the layer'} ({number:.1f} of {statistics[name].num_value_heads})"
            for name, number in collapsed.items()
        )
        warnings.warn(
            f"heads are nearly alike: in effect there are, of each layer's, {figures}",
            HeadCollapseWarning,
            stacklevel=2,
        )
    return collapsed


@torch.no_grad()
def _statistics(call: AttentionCall) -> HeadStatistics:
    weights = call.weights()
    is_seeing = (weights != 0).any(-1).any(-2)
    outputs = call.head_outputs.movedim(-3, 0)[:, is_seeing]
    rows = weights.movedim(-3, 0)[:, is_seeing]
    if outputs.shape[1] == 0:
        raise ValueError("expected a query that sees a key, found none")
    return HeadStatistics(
        cosine_similarity(outputs.flatten(1)),
        centered_kernel_alignment(outputs),
        jensen_shannon(rows),
        call.value.shape[-3],
    )
