r"""Logits of single pairs of a query and a key, for attention along the edges of a graph.

.. math:: s_{ij} \quad \text{for } (j, i) \in E

An edge leads from its source, the key :math:`j`, to its target, the query :math:`i`. Memory is
linear in the number of edges; no logits of other pairs are formed.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bayesattn.attention_choices import LogitsFunction
from bayesattn.logits import DotProduct, Logits, ReducedLogits

__all__ = ["AdditiveLogits", "EdgeLogits", "check_pairwise", "logits_of_edges"]

# A whole number is a number too, which run-time type checks do not take for a float.
Number = float | int


class EdgeLogits(Logits):
    """Logits that do not reduce, but are known pair by pair. A subclass defines ``on_edges``.

    It defines ``forward`` too, where it is to serve attention of all pairs.
    """

    def on_edges(
        self,
        query: Float[Tensor, "head query dim"],
        key: Float[Tensor, "head key dim"],
        edges: Int[Tensor, "2 edge"],
    ) -> Float[Tensor, "head edge"]:
        """The logits of each edge: of the query ``edges[1]`` and the key ``edges[0]``.

        Raises:
            TypeError: If a subclass does not define it.
        """
        raise TypeError(f"{type(self).__name__} must define on_edges")


class AdditiveLogits(EdgeLogits):
    r"""Logits of graph attention networks, a bent sum of what query and key bring by themselves.

    .. math:: s_{ij} = \mathrm{LeakyReLU}(a^q \cdot q_i + a^k \cdot k_j)

    Args:
        num_heads: Each head has its own :math:`a`.
        dim: Width of a head.
        negative_slope: Of the LeakyReLU, below zero.

    Attributes:
        query_vector: :math:`a^q`, for each head.
        key_vector: :math:`a^k`, for each head.

    Source:
        Veličković et al. (2018), Graph attention networks, arXiv:1710.10903, eq. 3. There queries
        and keys are one projection, and so are the values.
    """

    def __init__(self, num_heads: int, dim: int, *, negative_slope: Number = 0.2):
        super().__init__()
        if num_heads < 1 or dim < 1:
            raise ValueError(
                f"num_heads and dim must be positive, got num_heads={num_heads}, dim={dim}"
            )
        self.num_heads, self.dim, self.negative_slope = num_heads, dim, float(negative_slope)
        self.query_vector = nn.Parameter(torch.empty(num_heads, dim))
        self.key_vector = nn.Parameter(torch.empty(num_heads, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vectors as Glorot does."""
        nn.init.xavier_uniform_(self.query_vector)
        nn.init.xavier_uniform_(self.key_vector)

    def forward(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> Float[Tensor, "*_batch query key"]:
        """The logits of all pairs."""
        from_query, from_key = self._parts(query, key)
        return self._bent(from_query[..., :, None] + from_key[..., None, :])

    def on_edges(
        self,
        query: Float[Tensor, "head query dim"],
        key: Float[Tensor, "head key dim"],
        edges: Int[Tensor, "2 edge"],
    ) -> Float[Tensor, "head edge"]:
        """The logits of each edge, for which nothing as wide as a head is gathered."""
        from_query, from_key = self._parts(query, key)
        return self._bent(from_query.index_select(1, edges[1]) + from_key.index_select(1, edges[0]))

    def extra_repr(self) -> str:
        """The sizes."""
        return f"num_heads={self.num_heads}, dim={self.dim}, negative_slope={self.negative_slope}"

    def _parts(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        vectors = (self.query_vector, self.key_vector)
        from_query, from_key = (
            (part * vector[:, None].to(part.dtype)).sum(-1, dtype=_wide(part))
            for part, vector in zip((query, key), vectors, strict=True)
        )
        return from_query, from_key

    def _bent(self, values: Tensor) -> Tensor:
        return F.leaky_relu(values, self.negative_slope)


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
    if isinstance(logits, EdgeLogits):
        return logits.on_edges(query, key, edges).to(_wide(query))
    choice = logits if isinstance(logits, Logits) else DotProduct()
    reduced = choice.reduce(query, key)
    if reduced is None:
        raise _dense_only(logits)
    return _reduced_on_edges(reduced, edges)


def check_pairwise(logits: LogitsFunction | None) -> None:
    """Refuse logits that exist for all pairs together only.

    Raises:
        ValueError: If they are such.
    """
    reduces = isinstance(logits, Logits) and type(logits).reduce is not Logits.reduce
    if not (logits is None or reduces or isinstance(logits, EdgeLogits)):
        raise _dense_only(logits)


def _reduced_on_edges(reduced: ReducedLogits, edges: Tensor) -> Tensor:
    sources, targets = edges
    # Gathered along the first axis, rows are copied whole.
    query = reduced.query.transpose(0, 1).index_select(0, targets)
    key = reduced.key.transpose(0, 1).index_select(0, sources)
    values = (query * key).sum(-1, dtype=_wide(query)).mT * reduced.scale
    if reduced.query_bias is not None:
        values = values + reduced.query_bias.index_select(1, targets)
    if reduced.key_bias is not None:
        values = values + reduced.key_bias.index_select(1, sources)
    return values


def _wide(part: Tensor) -> torch.dtype:
    return torch.promote_types(part.dtype, torch.float32)


def _dense_only(logits: object) -> ValueError:
    name = getattr(logits, "__name__", type(logits).__name__)
    return ValueError(
        "logits: expected a choice that is known for single pairs, by reduce (as DotProduct) or "
        f"on_edges (as AdditiveLogits), got {name}"
    )
