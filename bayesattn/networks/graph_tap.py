"""Graph attention as the other layers: where its heads stand, and its calls, without all pairs.

What costs memory for every pair of nodes, the mask and the weights, is formed only when asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bayesattn.attention_choices import LogitsFunction
from bayesattn.edges import edge_weights
from bayesattn.graph_layers import EdgeAttention, GraphAttention
from bayesattn.networks.attention_call import AttentionCall, Record
from bayesattn.networks.head_slices import HeadLayout, HeadSlice, ProjectionSlices

__all__ = ["GraphCall", "graph_layout", "watch_graph"]


class GraphCall(AttentionCall):
    """One call of a graph attention layer: nodes are a batch of one, all are queries and keys.

    Instead of masks the fifth entry holds the ``edges``; by its name ``settings`` they are formed.
    """

    __slots__ = ()

    @property
    def edges(self) -> Int[Tensor, "2 edge"]:
        """Keys, and the queries that see them."""
        return self[4]["edges"]

    @property
    def settings(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As of any call, with logarithms of how many edges each pair of nodes has as the mask."""
        num_nodes = self.query.shape[2]
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        counts = self.query.new_zeros(num_nodes, num_nodes, dtype=dtype)
        ones = counts.new_ones(self.edges.shape[1])
        sources, targets = self.edges
        counts = counts.index_put((targets, sources), ones, accumulate=True)
        return {"attn_mask": counts.log(), "logits": self[4]["logits"]}

    def weights(self) -> Float[Tensor, "batch head query key"]:
        """Form the weights of all pairs, before dropout; zeros for those without an edge."""
        found = edge_weights(self.query[0], self.key[0], self.edges, logits=self[4]["logits"])
        num_heads, num_nodes = self.query.shape[1:3]
        sources, targets = self.edges
        # Edges between the same nodes add up.
        pairs = found.new_zeros(num_heads, num_nodes**2)
        pairs = pairs.index_add(1, targets * num_nodes + sources, found)
        return pairs.view(1, num_heads, num_nodes, num_nodes)

    def cloud_masks(
        self,
    ) -> tuple[Bool[Tensor, "batch head query"], Bool[Tensor, "batch head key"]]:
        """Which queries see a node, and which keys are seen; under self-loops all."""
        shape = self.query.shape[:3]
        sources, targets = (
            torch.zeros(shape[2], dtype=torch.bool, device=ends.device)
            .index_fill(0, ends, True)
            .expand(shape)
            for ends in self.edges
        )
        return targets, sources


@contextmanager
def watch_graph(module: GraphAttention, record: Record) -> Iterator[None]:
    """Record the calls of a graph attention layer."""
    before, attend = vars(module).get("attend"), module.attend

    def watched(
        query: Tensor, key: Tensor, value: Tensor, edges: Tensor, logits: LogitsFunction | None
    ) -> EdgeAttention:
        found = attend(query, key, value, edges, logits)
        settings = {"edges": edges, "logits": logits}
        record(GraphCall(query[None], key[None], value[None], found.heads[None], settings))
        return found

    module.attend = watched
    try:
        yield
    finally:
        del module.attend
        if before is not None:
            module.attend = before


def graph_layout(module: GraphAttention) -> HeadLayout:
    """Heads of a graph attention layer, which has no output projection."""
    layout = HeadLayout()
    for role in ("query", "key", "value"):
        place = (0, 0, module.head_dim, module.num_heads)
        has_bias = role == "query" and module.query_bias is not None
        bias = HeadSlice("query_bias", *place) if has_bias else None
        layout[role] = ProjectionSlices(HeadSlice(f"{role}_weight", *place), bias)
    return layout
