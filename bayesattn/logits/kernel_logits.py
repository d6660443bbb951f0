r"""Logits of attention with a kernel: its logarithm, and the magnitudes of query and key.

.. math:: s_{ij} = \log \kappa(q_i - k_j) + m(q_i) + m(k_j)

With :math:`\kappa(\delta) = e^{-\lVert \delta \rVert^2 / 2 \sqrt d}` this is the scaled dot
product. Kernels start there by default, so that the layers of a trained model can take them and go
on.

Source:
    Song et al. (2021), Implicit kernel attention, arXiv:2006.06147, for the decomposition.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayesattn.argument_checks import check_count
from bayesattn.autocasting import full_precision
from bayesattn.kernels.distances import widened
from bayesattn.logits.magnitudes import Magnitude, own_magnitude
from bayesattn.logits.protocol import EdgeLogits

__all__ = [
    "KernelLogits",
    "at_least_zero",
    "check_heads",
    "ends_of_edges",
    "logits_along_edges",
    "logits_of_pairs",
    "narrowed",
    "start_rate",
]

LogKernel = Callable[[Tensor, Tensor], Tensor]
LogKernelOfEdges = Callable[[Tensor, Tensor, Tensor], Tensor]


class KernelLogits(EdgeLogits):
    """Log kernel and magnitudes. A subclass defines the kernel, of all pairs and of edges.

    Args:
        num_heads: Each head has a kernel of its own.
        dim: Width of queries and keys.
        magnitude: The magnitudes, copied; Euclidean ones if True, none if False, so that only the
            difference of query and key counts.

    Attributes:
        magnitude: The magnitudes, or None.

    Raises:
        ValueError: If a size is not positive, or the magnitudes are for other heads.
    """

    def __init__(self, num_heads: int, dim: int, magnitude: Magnitude | bool = True):
        super().__init__()
        self.num_heads, self.dim = check_count("num_heads", num_heads), check_count("dim", dim)
        self.magnitude = own_magnitude(magnitude, num_heads)

    def log_kernel(
        self, query: Float[Tensor, "*_batch query dim"], key: Float[Tensor, "*_batch key dim"]
    ) -> Float[Tensor, "*_batch query key"]:
        """Logarithm of the kernel of all pairs, up to a constant.

        Args:
            query: In float32 or wider.
            key: Likewise.

        Raises:
            TypeError: If a subclass does not define it.
        """
        raise TypeError(f"{type(self).__name__} must define log_kernel")

    def log_kernel_of_edges(
        self,
        query: Float[Tensor, "head query dim"],
        key: Float[Tensor, "head key dim"],
        edges: Int[Tensor, "2 edge"],
    ) -> Float[Tensor, "head edge"]:
        """Logarithm of the kernel of the pairs that edges join, up to a constant.

        A subclass whose nodes have something to compute before edges gather it defines this in
        place of :meth:`log_kernel_of_ends`.

        Args:
            query: In float32 or wider.
            key: Likewise.
            edges: Numbers of keys, and of the queries that see them.
        """
        return self.log_kernel_of_ends(*ends_of_edges(query, key, edges))

    def log_kernel_of_ends(
        self, query: Float[Tensor, "head edge dim"], key: Float[Tensor, "head edge dim"]
    ) -> Float[Tensor, "head edge"]:
        """Logarithm of the kernel of each edge's query and key, up to a constant.

        Raises:
            TypeError: If a subclass does not define it.
        """
        raise TypeError(f"{type(self).__name__} must define log_kernel_of_ends")

    def forward(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> Float[Tensor, "*_batch query key"]:
        """The logits of all pairs."""
        self.check_parts(query, key)
        return logits_of_pairs(self.log_kernel, self.magnitude, query, key)

    def on_edges(
        self,
        query: Float[Tensor, "head query dim"],
        key: Float[Tensor, "head key dim"],
        edges: Int[Tensor, "2 edge"],
    ) -> Float[Tensor, "head edge"]:
        """The logits of each edge."""
        self.check_parts(query, key)
        return logits_along_edges(self.log_kernel_of_edges, self.magnitude, query, key, edges)

    def check_parts(self, *parts: Float[Tensor, "..."]) -> None:
        """Refuse queries or keys of other heads or of another width.

        Raises:
            ValueError: If they are such.
        """
        check_heads(type(self).__name__, self.num_heads, self.dim, *parts)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"num_heads={self.num_heads}, dim={self.dim}"


def logits_of_pairs(
    log_kernel: LogKernel,
    magnitude: Magnitude | None,
    query: Float[Tensor, "*_batch query _dim"],
    key: Float[Tensor, "*_batch key _dim"],
) -> Float[Tensor, "*_batch query key"]:
    """Log kernel and magnitudes of all pairs, in the type of the queries.

    Args:
        log_kernel: Of all pairs, from queries and keys in float32 or wider.
        magnitude: Of queries and keys; none if None.
        query: What asks.
        key: What is asked.
    """
    with full_precision(query):
        asking, asked = widened(query), widened(key)
        values = log_kernel(asking, asked)
        if magnitude is not None:
            values = values + magnitude(asking)[..., :, None] + magnitude(asked)[..., None, :]
    return narrowed(values, query.dtype)


def logits_along_edges(
    log_kernel_of_edges: LogKernelOfEdges,
    magnitude: Magnitude | None,
    query: Float[Tensor, "head query dim"],
    key: Float[Tensor, "head key dim"],
    edges: Int[Tensor, "2 edge"],
) -> Float[Tensor, "head edge"]:
    """Log kernel and magnitudes of the pairs that edges join, in float32 or wider.

    Args:
        log_kernel_of_edges: From queries and keys in float32 or wider, and edges.
        magnitude: Of queries and keys; none if None.
        query: What asks.
        key: What is asked.
        edges: Numbers of keys, and of the queries that see them.
    """
    with full_precision(query):
        asking, asked = widened(query), widened(key)
        values = log_kernel_of_edges(asking, asked, edges)
        if magnitude is not None:
            values = values + magnitude(asking).index_select(1, edges[1])
            values = values + magnitude(asked).index_select(1, edges[0])
    return values


def ends_of_edges(
    query: Float[Tensor, "head query dim"],
    key: Float[Tensor, "head key dim"],
    edges: Int[Tensor, "2 edge"],
) -> tuple[Float[Tensor, "head edge dim"], Float[Tensor, "head edge dim"]]:
    """The query and the key of each edge."""
    # Gathered along the first axis, rows are copied whole.
    at_target = query.transpose(0, 1).index_select(0, edges[1]).transpose(0, 1)
    at_source = key.transpose(0, 1).index_select(0, edges[0]).transpose(0, 1)
    return at_target, at_source


def narrowed(values: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Values in another type; what is below its range is its lowest number."""
    if torch.finfo(dtype).min <= torch.finfo(values.dtype).min:
        return values.to(dtype)
    return values.clamp_min(torch.finfo(dtype).min).to(dtype)


def check_heads(name: str, num_heads: int, dim: int, *parts: Float[Tensor, "..."]) -> None:
    """Refuse queries or keys of other heads or of another width.

    Raises:
        ValueError: If they are such.
    """
    for part in parts:
        heads = part.shape[-3] if part.ndim > 2 else None
        has_heads = heads is not None and (num_heads == 1 or heads in (1, num_heads))
        if part.shape[-1] != dim or not has_heads:
            raise ValueError(
                f"{name}: expected queries and keys '*batch head position dim' of {num_heads} "
                f"heads and width {dim}, got shape {tuple(part.shape)}"
            )


def start_rate(dim: int) -> float:
    r"""Rate r of the kernel :math:`e^{-r \lVert \delta \rVert^2 / 2}` that softmax has."""
    return dim**-0.5


def at_least_zero(raw: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Numbers from zero on, of a slope of one everywhere.

    What is at zero, or pushed below, can so come back; softmax stands at that edge of the families
    of kernels around it.
    """
    return torch.where(raw < 0, raw - raw.detach(), raw)
