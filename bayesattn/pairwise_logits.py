r"""Logits of single pairs of a query and a key, for attention along the edges of a graph.

.. math:: s_{ij} \quad \text{for } (j, i) \in E

An edge leads from its source, the key :math:`j`, to its target, the query :math:`i`. Memory is
linear in the number of edges; no logits of other pairs are formed.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayesattn.attention_choices import LogitsFunction, name_of_choice
from bayesattn.edge_contractions import edge_products
from bayesattn.logits import DotProduct, FactoredLogits, Logits, ReducedLogits

__all__ = ["check_pairwise", "logits_of_edges"]


def logits_of_edges(
    logits: LogitsFunction | None,
    query: Float[Tensor, "head query dim"],
    key: Float[Tensor, "head key dim"],
    edges: Int[Tensor, "2 edge"],
) -> Float[Tensor, "head edge"]:
    """Logits of each edge, in float32 or wider.

    Args:
        logits: :class:`EdgeLogits`, or any that reduce; the scaled dot product if None.
        query: What asks.
        key: What is asked.
        edges: Numbers of keys, and of the queries that see them.

    Raises:
        ValueError: If these logits exist for all pairs together only.
    """
    check_pairwise(logits)
    on_edges = getattr(logits, "on_edges", None)
    if on_edges is not None:
        return on_edges(query, key, edges).to(_wide(query))
    choice = logits if isinstance(logits, Logits) else DotProduct()
    reduced = choice.reduce(query, key)
    if reduced is None:
        raise _dense_only(logits)
    if isinstance(reduced, FactoredLogits):
        return _factored_on_edges(reduced, edges)
    return _reduced_on_edges(reduced, edges)


def check_pairwise(logits: LogitsFunction | None) -> None:
    """Refuse logits that exist for all pairs together only.

    Raises:
        ValueError: If they are such.
    """
    reduces = isinstance(logits, Logits) and type(logits).reduce is not Logits.reduce
    if not (logits is None or reduces or hasattr(logits, "on_edges")):
        raise _dense_only(logits)


def _reduced_on_edges(reduced: ReducedLogits, edges: Tensor) -> Tensor:
    sources, targets = edges
    copies = []
    for key, bias in _copies(reduced):
        values = edge_products(reduced.query, key, edges) * reduced.scale
        copies.append(values if bias is None else values + bias.index_select(1, sources))
    values = copies[0] if len(copies) == 1 else torch.stack(copies).logsumexp(0)
    if reduced.query_bias is not None:
        values = values + reduced.query_bias.index_select(1, targets)
    return values


def _factored_on_edges(reduced: FactoredLogits, edges: Tensor) -> Tensor:
    sources, targets = edges
    to_features = reduced.query.values().transpose(0, 1).index_select(0, targets)
    from_features = reduced.key.values().permute(2, 0, 1).index_select(0, sources)
    return (to_features + from_features).to(_wide(to_features)).logsumexp(-1).mT


def _copies(reduced: ReducedLogits) -> Iterator[tuple[Tensor, Tensor | None]]:
    keys = reduced.key.chunk(reduced.copies, 1)
    if reduced.key_bias is None:
        return ((key, None) for key in keys)
    return zip(keys, reduced.key_bias.chunk(reduced.copies, 1), strict=True)


def _wide(part: Tensor) -> torch.dtype:
    return torch.promote_types(part.dtype, torch.float32)


def _dense_only(logits: object) -> ValueError:
    name = name_of_choice(logits)
    return ValueError(
        "logits: expected a choice that is known for single pairs, by reduce (as DotProduct) or "
        f"on_edges (as AdditiveLogits), got {name}"
    )
