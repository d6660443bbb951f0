"""A graph attention network of two layers that tells the classes of a graph's nodes."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bayesattn.graph_layers import GraphAttention
from bayesattn.logits import Logits
from examples.reproduce.graph_tasks import CitationGraph

__all__ = ["NodeClassifier", "graph_attention_network"]


class NodeClassifier(nn.Module):
    """Heads side by side, ELU, and a layer of one head that gives logits of the classes.

    Features, hidden nodes and attention weights are dropped with the same probability, as in
    Veličković et al. (2018), arXiv:1710.10903.

    Args:
        num_features: Width of the nodes.
        num_classes: Number of classes.
        num_heads: Number of heads of the first layer.
        head_dim: Width of each.
        dropout: Of features, hidden nodes and attention weights.
        logits: ``logits(num_heads, head_dim)`` gives those of a layer, such as
            :class:`bayesattn.logits.AdditiveLogits`; the scaled dot product if None.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        num_heads: int = 8,
        head_dim: int = 8,
        dropout: float = 0.6,
        logits: Callable[[int, int], Logits] | None = None,
    ):
        super().__init__()

        def layer(width: int, dim: int, heads: int) -> GraphAttention:
            choice = None if logits is None else logits(heads, dim)
            return GraphAttention(width, dim, heads, dropout=dropout, logits=choice)

        self.first = layer(num_features, head_dim, num_heads)
        self.second = layer(num_heads * head_dim, num_classes, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, features: Float[Tensor, "node feature"], edges: Int[Tensor, "2 edge"]
    ) -> Float[Tensor, "node class"]:
        """Give logits of the classes of all nodes; their features may be a sparse tensor."""
        hidden = F.elu(self.first(self._thinned(features), edges))
        return self.second(self.dropout(hidden), edges)

    def _thinned(self, features: Tensor) -> Tensor:
        if not features.is_sparse:
            return self.dropout(features)
        # Zeros stay zeros, so only the others are drawn for.
        features = features.coalesce()
        return torch.sparse_coo_tensor(
            features.indices(),
            self.dropout(features.values()),
            features.shape,
            check_invariants=False,
            is_coalesced=True,
        )


def graph_attention_network(
    graph: CitationGraph, *, logits: Callable[[int, int], Logits] | None = None
) -> NodeClassifier:
    """Build an untrained classifier of the published sizes: eight heads of eight features."""
    return NodeClassifier(graph.features.shape[1], graph.num_classes, logits=logits)
