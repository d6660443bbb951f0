r"""Inner products along the edges of a graph, and sums over the edges of each target.

.. math:: p_e = q_{t_e} \cdot k_{s_e}, \qquad o_i = \sum_{e:\, t_e = i} a_e v_{s_e}

Each is the other's gradient. On the CPU products go through the edges by blocks that its cache
holds, and sums are PyTorch's bags of embeddings, rather than that what all edges gather is formed
and kept for the gradient; see ``tests/benchmarks/edge_speed.py``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import Function
from torch.nn import functional as F

from bayesattn.contraction import has_tangent, inside_transform, is_mapped

__all__ = ["edge_products", "edge_sums"]

# Numbers that are gathered at once.
_BLOCK_ENTRIES = 2**18


def edge_products(
    query: Float[Tensor, "#head query dim"],
    key: Float[Tensor, "#head key dim"],
    edges: Int[Tensor, "2 edge"],
) -> Float[Tensor, "head edge"]:
    """Inner products of the target and the source of each edge.

    Args:
        query: At the targets.
        key: At the sources; one head may go with many.
        edges: Numbers of keys, and of the queries that see them.

    Returns:
        In the order of the edges, in float32 or wider.
    """
    heads = max(len(query), len(key))
    query, key = (part.expand(heads, -1, -1).transpose(0, 1) for part in (query, key))
    return _products(query, key, edges).mT


def edge_sums(
    weights: Float[Tensor, "#head edge"],
    value: Float[Tensor, "#head key dim"],
    edges: Int[Tensor, "2 edge"],
    num_queries: int,
) -> Float[Tensor, "head {num_queries} dim"]:
    """Sum of the values at the sources under the weights; zeros where no edge leads.

    Args:
        weights: In the order of the edges.
        value: At the sources; one head may go with many.
        edges: Numbers of keys, and of the queries that see them.
        num_queries: How many targets there are.

    Returns:
        As precise as the weights, however many edges a target has, and in the values' type.
    """
    heads = max(len(weights), len(value))
    weights, value = weights.expand(heads, -1), value.expand(heads, -1, -1)
    sums = _sums(weights.mT, value.transpose(0, 1), edges, num_queries)
    return sums.to(value.dtype).transpose(0, 1)


# --- Here nodes and edges come first: gathered along the first axis, rows are copied whole ------


def _products(query: Tensor, key: Tensor, edges: Tensor) -> Tensor:
    if _is_apart(query, key):
        products: Any = _EdgeProducts.apply(query, key, edges)
        return products
    return _inner(query.index_select(0, edges[1]), key.index_select(0, edges[0]))


def _sums(weights: Tensor, value: Tensor, edges: Tensor, num_targets: int) -> Tensor:
    if _is_apart(weights, value):
        sums: Any = _EdgeSums.apply(weights, value, edges, num_targets)
        return sums
    terms = weights[..., None] * value.index_select(0, edges[0])
    return terms.new_zeros(num_targets, *terms.shape[1:]).index_add(0, edges[1], terms)


class _EdgeProducts(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, edges: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, edges)
        query, key = query.contiguous(), key.contiguous()
        blocks = [
            _inner(query.index_select(0, targets), key.index_select(0, sources))
            for sources, targets in _blocks(edges, query)
        ]
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        query, key, edges = ctx.saved_tensors
        to_query = to_key = None
        if ctx.needs_input_grad[0]:
            to_query = _sums(gradient, key, edges, len(query)).to(query.dtype)
        if ctx.needs_input_grad[1]:
            to_key = _sums(gradient, query, edges.flip(0), len(key)).to(key.dtype)
        return to_query, to_key, None


class _EdgeSums(Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, value: Tensor, edges: Tensor, num_targets: int
    ) -> Tensor:
        ctx.save_for_backward(weights, value, edges)
        dtype = torch.promote_types(weights.dtype, value.dtype)
        order = edges[1].argsort()
        counts = edges[1].bincount(minlength=num_targets)
        heads = torch.arange(value.shape[1], device=value.device)[:, None]
        # For each head its targets, each a bag of rows of the table of all nodes' heads.
        bags = F.embedding_bag(
            (edges[0, order] * len(heads) + heads).flatten(),
            value.to(dtype).flatten(0, 1),
            (counts.cumsum(0) - counts + len(order) * heads).flatten(),
            mode="sum",
            per_sample_weights=weights.to(dtype)[order].mT.flatten(),
        )
        return bags.unflatten(0, (len(heads), -1)).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weights, value, edges = ctx.saved_tensors
        to_weights = to_value = None
        if ctx.needs_input_grad[0]:
            to_weights = _products(gradient, value, edges).to(weights.dtype)
        if ctx.needs_input_grad[1]:
            to_value = _sums(weights, gradient, edges.flip(0), len(value)).to(value.dtype)
        return to_weights, to_value, None, None


def _is_apart(*parts: Tensor) -> bool:
    """Whether on the CPU, not empty, and nothing looks on; else single operations are better."""
    if torch.compiler.is_compiling() or inside_transform() or has_tangent(*parts):
        return False
    return all(
        part.device.type == "cpu" and part.numel() and not (is_fake(part) or is_mapped(part))
        for part in parts
    )


def _blocks(edges: Tensor, nodes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Sources and targets of some edges at a time, one block at least."""
    size = max(1, _BLOCK_ENTRIES // max(1, nodes.shape[1] * nodes.shape[2]))
    sources, targets = edges
    yield from zip(sources.split(size), targets.split(size), strict=True)


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """Inner products of rows, in float32 or wider."""
    products = one * other
    return products.sum(-1, dtype=torch.promote_types(products.dtype, torch.float32))
