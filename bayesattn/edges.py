r"""Attention along the edges of a graph: each target averages the values of its sources.

.. math:: o_i = \sum_{e:\, t_e = i} a_e v_{s_e}, \qquad
    a_e = \frac{\exp \ell_e}{\sum_{f:\, t_f = t_e} \exp \ell_f}

Edges are "2 edge": first the number of each edge's source, which is the key and value, then that
of its target, which is the query; the convention of PyTorch Geometric's ``edge_index``. Two edges
between the same nodes are two terms of the sums. Memory is linear in the number of edges.

Source:
    Veličković et al. (2018), Graph attention networks, arXiv:1710.10903, eq. 2 to 4.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from bayesattn.attention_choices import LogitsFunction
from bayesattn.contraction import inside_transform
from bayesattn.pairwise_logits import logits_of_edges

__all__ = ["check_edges", "edge_softmax", "edge_weights", "with_self_loops"]


def edge_weights(
    query: Float[Tensor, "head query dim"],
    key: Float[Tensor, "head key dim"],
    edges: Int[Tensor, "2 edge"],
    *,
    logits: LogitsFunction | None = None,
) -> Float[Tensor, "head edge"]:
    """Attention weights of the edges; over those into one target they sum to one.

    Args:
        query: What asks.
        key: What is asked.
        edges: Numbers of keys, and of the queries that see them.
        logits: :class:`bayesattn.logits.EdgeLogits`, or any that reduce; the scaled dot
            product if None.

    Returns:
        Weights in float32 or wider, in the order of the edges.

    Raises:
        ValueError: If the edges lead nowhere, or the logits exist for all pairs together only.
    """
    num_queries = query.shape[1]
    check_edges(edges, key.shape[1], num_queries)
    return edge_softmax(logits_of_edges(logits, query, key, edges), edges[1], num_queries)


def edge_softmax(
    logits: Float[Tensor, "head edge"], targets: Int[Tensor, " edge"], num_targets: int
) -> Float[Tensor, "head edge"]:
    """Softmax over the edges of each target."""
    shape = (logits.shape[0], num_targets)
    # The largest logit only moves what cancels, so no gradient need pass through it.
    largest = logits.new_full(shape, -torch.inf).scatter_reduce(
        1, targets.expand_as(logits), logits.detach(), "amax"
    )
    exponentials = torch.exp(logits - largest.index_select(1, targets))
    totals = logits.new_zeros(shape).index_add(1, targets, exponentials)
    return exponentials / totals.index_select(1, targets)


def with_self_loops(edges: Int[Tensor, "2 edge"], num_nodes: int) -> Int[Tensor, "2 _edge"]:
    """Give every node one edge to itself, so that it attends to itself too.

    Those that there are already are left out, and the new ones come last, as in PyTorch Geometric's
    ``GATConv``, which does this at each call; here it is done once, with the graph.

    Raises:
        ValueError: If the edges lead nowhere.
    """
    check_edges(edges, num_nodes, num_nodes)
    others = edges[:, edges[0] != edges[1]]
    loops = torch.arange(num_nodes, device=edges.device).expand(2, -1)
    return torch.cat([others, loops], 1)


def check_edges(edges: Shaped[Tensor, "..."], num_sources: int, num_targets: int) -> None:
    """Refuse edges of another shape or type, or that lead to nodes which are not there.

    Where code is compiled, recorded or transformed, there are no values to look at.

    Raises:
        ValueError: If they are such.
    """
    if edges.ndim != 2 or edges.shape[0] != 2:
        raise ValueError(
            "edges: expected '2 edge', all sources and then all targets, "
            f"got shape {tuple(edges.shape)}"
        )
    if edges.dtype != torch.int64:
        raise ValueError(f"edges: expected numbers of nodes as int64, got {edges.dtype}")
    if torch.compiler.is_compiling() or inside_transform() or is_fake(edges):
        return
    if edges.shape[1] == 0:
        return
    lowest, highest = (ends.tolist() for ends in torch.aminmax(edges, dim=1))
    if min(lowest) < 0 or highest[0] >= num_sources or highest[1] >= num_targets:
        raise ValueError(
            f"edges: expected sources from 0 to {num_sources - 1} and targets from 0 to "
            f"{num_targets - 1}, got {lowest[0]} to {highest[0]} and {lowest[1]} to {highest[1]}"
        )
