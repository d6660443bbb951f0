r"""The scaled dot product, the logits of the Transformer.

.. math:: s_{ij} = q_i \cdot k_j / \sqrt d

Source:
    Vaswani et al. (2017), Attention is all you need, arXiv:1706.03762, eq. 1.
"""

from jaxtyping import Float
from torch import Tensor

from bayesattn.logits.protocol import Logits, ReducedLogits

__all__ = ["DotProduct"]

# A whole number is a number too, which run-time type checks do not take for a float.
Number = float | int


class DotProduct(Logits):
    r"""Scaled dot product, :math:`s_{ij} = \alpha\, q_i \cdot k_j`.

    Args:
        scale: :math:`\alpha`; one over the square root of the width if None.
    """

    def __init__(self, scale: Number | None = None):
        super().__init__()
        self.scale = scale

    def reduce(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> ReducedLogits:
        """Queries and keys as they are, with the scale."""
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return ReducedLogits(query, key, scale=float(scale))

    def extra_repr(self) -> str:
        """The scale, where it was given."""
        return "" if self.scale is None else f"scale={self.scale}"
