r"""Multi-head attention along the edges of a graph, as a layer.

.. math:: o_i = \big[ \textstyle\sum_{j \in N(i)} a^1_{ij} W^V_1 x_j \,\big|\, \dots \,\big|\,
    \sum_{j \in N(i)} a^H_{ij} W^V_H x_j \big] + b, \qquad
    a^h_{ij} = \mathrm{softmax}_{j \in N(i)}\, s_h(W^Q_h x_i + b^Q_h,\, W^K_h x_j)

Source:
    Veličković et al. (2018), Graph attention networks, arXiv:1710.10903, eq. 5 and 6. Differs from
    the paper: queries, keys and values have projections of their own, and the logits are the scaled
    dot product unless :class:`bayesattn.logits.AdditiveLogits` are chosen.
"""

from typing import Any, Literal, NamedTuple, overload

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from bayesattn.attention_choices import LogitsFunction, own_choice
from bayesattn.edge_contractions import edge_sums
from bayesattn.edges import edge_weights
from bayesattn.logits import ConditionalLogits, Logits
from bayesattn.pairwise_logits import check_pairwise

__all__ = ["EdgeAttention", "GraphAttention"]

# A whole number is a number too, which run-time type checks do not take for a float.
Number = float | int


class EdgeAttention(NamedTuple):
    """What came of the attention of one call.

    Attributes:
        heads: Outputs of the heads; zeros for nodes to which no edge leads.
        weights: Of the edges, in their order and after dropout.
    """

    heads: Float[Tensor, "head node dim"]
    weights: Float[Tensor, "head edge"]


class GraphAttention(nn.Module):
    """Each node attends to the nodes from which edges lead to it.

    Edges are "2 edge", sources and then targets, as PyTorch Geometric's ``edge_index``; an
    undirected graph has both directions of each edge. They are taken as they are: one that is there
    twice counts twice, a node to which none leads gets the bias alone, and it attends to itself
    only where an edge says so. Where each should, as in graph attention networks, the graph is
    prepared once by :func:`bayesattn.edges.with_self_loops`. Several graphs are one without edges
    between them. Memory is linear in the number of edges.

    Keys have no bias, for one of the queries moves both apart; values have none, for weights that
    sum to one would add it to the output, which has one.

    Args:
        in_features: Width of the nodes.
        head_dim: Width of a head.
        num_heads: Number of heads.
        concatenate: Heads' outputs stand side by side; else their mean is taken.
        dropout: Probability of dropping a weight in training.
        bias: Whether queries and outputs have biases.
        logits: :class:`bayesattn.logits.EdgeLogits`, or any of :mod:`bayesattn.logits`
            that reduce; the scaled dot product if None. A module is copied, so that layers made
            from one share no parameter.
        device: Where the parameters are.
        dtype: Type of the parameters.

    Attributes:
        query_weight: :math:`W^Q`, of all heads.
        key_weight: :math:`W^K`, likewise.
        value_weight: :math:`W^V`, likewise.
        query_bias: :math:`b^Q`, likewise, or None.
        bias: :math:`b`, or None.

    Raises:
        ValueError: If a size is not positive, the dropout is no probability, or the logits exist
            for all pairs together only.
    """

    def __init__(
        self,
        in_features: int,
        head_dim: int,
        num_heads: int,
        *,
        concatenate: bool = True,
        dropout: Number = 0.0,
        bias: bool = True,
        logits: Logits | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"in_features": in_features, "head_dim": head_dim, "num_heads": num_heads}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a probability, got {dropout}")
        super().__init__()
        self.in_features, self.head_dim, self.num_heads = in_features, head_dim, num_heads
        self.concatenate, self.dropout = concatenate, float(dropout)
        self.logits = own_choice("logits", logits, device, dtype, num_heads, head_dim)
        check_pairwise(self.logits)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        width = num_heads * head_dim
        self.query_weight = nn.Parameter(torch.empty(width, in_features, **place))
        self.key_weight = nn.Parameter(torch.empty(width, in_features, **place))
        self.value_weight = nn.Parameter(torch.empty(width, in_features, **place))
        self.query_bias = self.bias = None
        if bias:
            self.query_bias = nn.Parameter(torch.empty(width, **place))
            self.bias = nn.Parameter(torch.empty(self.out_features, **place))
        self.reset_parameters()

    @property
    def out_features(self) -> int:
        """Width of the outputs."""
        return self.num_heads * self.head_dim if self.concatenate else self.head_dim

    def reset_parameters(self) -> None:
        """Draw the projections as Glorot does; biases start at zero."""
        for weight in self._weights():
            nn.init.xavier_uniform_(weight)
        for bias in (self.query_bias, self.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @overload
    def forward(
        self, nodes: Tensor, edges: Tensor, *, need_weights: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, nodes: Tensor, edges: Tensor, *, need_weights: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self,
        nodes: Float[Tensor, "node feature"],
        edges: Int[Tensor, "2 edge"],
        *,
        need_weights: bool = False,
    ) -> Float[Tensor, "node out"] | tuple[Float[Tensor, "node out"], Float[Tensor, "head edge"]]:
        """Attend along the edges.

        Args:
            nodes: Features, which may be a sparse tensor.
            edges: Sources, whose keys and values are attended to, and targets, whose queries ask.
            need_weights: Return the weights too.

        Returns:
            Outputs of the nodes; with ``need_weights`` also the weights of the edges, after
            dropout.

        Raises:
            ValueError: If the nodes' width is another, or edges are not "2 edge" of int64 between
                nodes that there are.
        """
        query, key, value = self.projections(nodes)
        logits = self.logits
        if isinstance(logits, ConditionalLogits):
            # Once, so that whoever looks on sees what is drawn here.
            logits = logits.given(query, key)
        heads, weights = self.attend(query, key, value, edges, logits)
        output = heads.transpose(0, 1).flatten(1) if self.concatenate else heads.mean(0)
        output = output if self.bias is None else output + self.bias.to(output.dtype)
        return (output, weights) if need_weights else output

    def projections(
        self, nodes: Float[Tensor, "node feature"]
    ) -> tuple[
        Float[Tensor, "head node dim"],
        Float[Tensor, "head node dim"],
        Float[Tensor, "head node dim"],
    ]:
        """Queries, keys and values of the nodes.

        Raises:
            ValueError: If the nodes' width is another.
        """
        _check_nodes(nodes, self.in_features)
        projected = F.linear(nodes, torch.cat(self._weights()))
        parts = projected.unflatten(1, (3, self.num_heads, self.head_dim))
        query, key, value = parts.permute(1, 2, 0, 3)
        if self.query_bias is not None:
            query = query + self.query_bias.to(query.dtype).view(self.num_heads, 1, -1)
        return query, key, value

    def attend(
        self,
        query: Float[Tensor, "head node dim"],
        key: Float[Tensor, "head node dim"],
        value: Float[Tensor, "head node dim"],
        edges: Int[Tensor, "2 edge"],
        logits: LogitsFunction | None,
    ) -> EdgeAttention:
        """What a call does between the projections and the output."""
        weights = edge_weights(query, key, edges, logits=logits)
        weights = F.dropout(weights, self.dropout, self.training)
        return EdgeAttention(edge_sums(weights, value, edges, query.shape[1]), weights)

    def extra_repr(self) -> str:
        """Sizes, and what is not the default."""
        parts = [f"{self.in_features}, {self.head_dim}, num_heads={self.num_heads}"]
        parts += [] if self.concatenate else ["concatenate=False"]
        parts += [f"dropout={self.dropout}"] if self.dropout else []
        parts += ["bias=False"] if self.bias is None else []
        return ", ".join(parts)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query_weight, self.key_weight, self.value_weight


def _check_nodes(nodes: Shaped[Tensor, "..."], width: int) -> None:
    if nodes.ndim != 2 or nodes.shape[1] != width:
        raise ValueError(
            f"nodes: expected 'node feature' of width {width}, got shape {tuple(nodes.shape)}"
        )
