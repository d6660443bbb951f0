r"""The scaled dot product taken apart, with another norm in its magnitudes.

.. math:: s_{ij} = -\frac{\lVert q_i - k_j \rVert_2^2}{2 \sqrt d} + m_p(q_i) + m_p(k_j)

Source:
    Song et al. (2021), Implicit kernel attention, arXiv:2006.06147.
"""

from jaxtyping import Float
from torch import Tensor

from bayesattn.logits.magnitudes import Magnitude
from bayesattn.logits.protocol import Logits, ReducedLogits

__all__ = ["RBFMagnitude"]

# A whole number is a number too, which run-time type checks do not take for a float.
Number = float | int


class RBFMagnitude(Logits):
    """An RBF similarity times magnitudes of query and key, of any power norm.

    At p = 2 this is the scaled dot product. Softmax attention takes the fused route, with the
    magnitudes as the keys' bias.

    Args:
        p: Of the norm, at least one; see :class:`Magnitude`.
        num_heads: Each head learns a p of its own above one, from the given one on; none is learned
            if None.

    Attributes:
        magnitude: The magnitudes.

    Raises:
        ValueError: If p is no finite number, below one, or one where it is learned.

    Source:
        Song et al. (2021), arXiv:2006.06147.
    """

    def __init__(self, p: Number = 2.0, *, num_heads: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.magnitude = Magnitude(p, num_heads=num_heads)

    def reset_parameters(self) -> None:
        """Start at the given p."""
        self.magnitude.reset_parameters()

    @property
    def p(self) -> Float[Tensor, " head"] | float:
        """Of each head, or of all."""
        return self.magnitude.p

    def reduce(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> ReducedLogits:
        """Queries and keys as they are, and as biases what magnitudes exceed those at two."""
        return self.reduce_over_keys(query, key)._replace(query_bias=self._bias(query))

    def reduce_over_keys(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> ReducedLogits:
        """Likewise, without the magnitudes of queries."""
        scale = query.shape[-1] ** -0.5
        return ReducedLogits(query, key, key_bias=self._bias(key), scale=scale)

    def extra_repr(self) -> str:
        """The start, and the number of heads where they learn."""
        return self.magnitude.extra_repr()

    def _bias(
        self, part: Float[Tensor, "*_batch position _dim"]
    ) -> Float[Tensor, "*_batch position"] | None:
        return None if self.magnitude.is_euclidean else self.magnitude.excess(part).to(part.dtype)
