r"""Structured self-attention: each head pools a sentence's tokens under a query of its own.

.. math:: A = \mathrm{softmax}(W_{s2} \tanh(W_{s1} H^\top)), \qquad M = A H

Source:
    Lin et al. (2017), A structured self-attentive sentence embedding,
    arXiv:1703.03130, eq. 6 and 7.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bayesattn.contraction import weighted_sums
from bayesattn.functional import attention_weights

__all__ = ["StructuredSelfAttention"]


class StructuredSelfAttention(nn.Module):
    """Pool tokens into one vector for each head.

    Args:
        embed_dim: Width of the tokens.
        hidden_dim: Width of the keys, :math:`d_a`.
        num_heads: Number of heads, the rows of :math:`W_{s2}`.

    Raises:
        ValueError: If a size is not positive.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, num_heads: int) -> None:
        sizes = {"embed_dim": embed_dim, "hidden_dim": hidden_dim, "num_heads": num_heads}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        super().__init__()
        self.embed_dim, self.hidden_dim, self.num_heads = embed_dim, hidden_dim, num_heads
        self.key_weight = nn.Parameter(torch.empty(hidden_dim, embed_dim))
        self.query_weight = nn.Parameter(torch.empty(num_heads, hidden_dim))
        nn.init.xavier_uniform_(self.key_weight)
        nn.init.xavier_uniform_(self.query_weight)

    def forward(
        self,
        tokens: Float[Tensor, "batch token dim"],
        mask: Bool[Tensor, "batch token"] | None = None,
    ) -> tuple[Float[Tensor, "batch head dim"], Float[Tensor, "batch head token"]]:
        """Pool each sentence.

        Args:
            tokens: Of the sentences.
            mask: Which tokens take part; a sentence without any is pooled into zeros.

        Returns:
            Pooled vectors, and the weights of their tokens.

        Raises:
            ValueError: If the tokens' width is another, or the mask does not fit.
        """
        if tokens.shape[-1] != self.embed_dim:
            raise ValueError(f"tokens: expected width {self.embed_dim}, got {tokens.shape[-1]}")
        if mask is not None and mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"mask: expected 'batch token' {tuple(tokens.shape[:2])}, got {tuple(mask.shape)}"
            )
        pairs = None if mask is None else mask[:, None]
        weights = attention_weights(self.query_weight, self.keys(tokens), scale=1, attn_mask=pairs)
        return weighted_sums(weights.to(tokens.dtype), tokens), weights

    def keys(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token hidden"]:
        """Keys of the tokens, which all heads share."""
        return torch.tanh(nn.functional.linear(tokens, self.key_weight))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.embed_dim}, {self.hidden_dim}, num_heads={self.num_heads}"
