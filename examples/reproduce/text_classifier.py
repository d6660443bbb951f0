"""A small Transformer that reads a sentence and tells its class, trained from scratch."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bayesattn.attention_choices import NormalizationFunction
from bayesattn.encoder import TransformerEncoderLayer
from bayesattn.logits import Logits
from bayesattn.shared_projections import Collaborative
from examples.reproduce.text_tasks import TextSplits

__all__ = ["TextClassifier", "small_transformer"]


class TextClassifier(nn.Module):
    """Word and position embeddings, encoder layers, and a linear readout of the mean over words.

    Args:
        vocabulary_size: Number of words, with the padding as number zero.
        num_classes: Number of classes.
        layer: ``layer()`` gives an encoder layer, which takes words as "sentence token dim" and
            PyTorch's ``src_key_padding_mask``, True at the padding.
        num_layers: Number of layers.
        dim: Width.
        max_tokens: Length of the longest sentence.
        dropout: Of the embeddings and before the readout.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_classes: int,
        layer: Callable[[], nn.Module],
        *,
        num_layers: int = 2,
        dim: int = 64,
        max_tokens: int = 40,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, dim, padding_idx=0)
        self.positions = nn.Parameter(0.1 * torch.randn(max_tokens, dim))
        self.layers = nn.ModuleList([layer() for _ in range(num_layers)])
        self.norm = nn.LayerNorm(dim)
        self.readout = nn.Linear(dim, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, tokens: Int[Tensor, "sentence token"], mask: Bool[Tensor, "sentence token"]
    ) -> Float[Tensor, "sentence class"]:
        """Give logits of the classes; what stands at the padding does not matter."""
        hidden = self.dropout(self.words(tokens) + self.positions[: tokens.shape[1]])
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=~mask)
        hidden = torch.where(mask[..., None], self.norm(hidden), 0.0)
        mean = hidden.sum(-2) / mask.sum(-1, keepdim=True)
        return self.readout(self.dropout(mean))


def small_transformer(
    splits: TextSplits,
    num_heads: int,
    *,
    dim: int = 64,
    normalization: Callable[[], NormalizationFunction | None] = lambda: None,
    projections: Collaborative | None = None,
    logits: Callable[[int, int], Logits] | None = None,
) -> TextClassifier:
    """Build an untrained classifier of two layers.

    There is dropout of words and features, but none of attention weights: it would explain words
    away by chance, whatever the normalization.

    Args:
        splits: What it is for.
        num_heads: Number of heads of each layer.
        dim: Width.
        normalization: Gives that of a layer, None for the softmax.
        projections: Of each layer, None for heads that share none.
        logits: ``logits(num_heads, head_dim)`` gives those of a layer; the scaled dot product if
            None.
    """

    def layer() -> nn.Module:
        return TransformerEncoderLayer(
            dim,
            num_heads,
            2 * dim,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
            normalization=normalization(),
            projections=projections,
            logits=None if logits is None else logits(num_heads, dim // num_heads),
        )

    sizes = len(splits.vocabulary), len(splits.label_names)
    return TextClassifier(*sizes, layer, dim=dim, dropout=0.2)
