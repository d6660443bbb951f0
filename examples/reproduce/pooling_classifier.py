"""A sentence classifier whose heads each pool the words under a query of their own."""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bayesattn.structured_pooling import StructuredSelfAttention

__all__ = ["PoolingClassifier"]


class PoolingClassifier(nn.Module):
    """Word embeddings, a bidirectional LSTM, structured self-attention and a linear readout.

    The readout sees the pooled vectors of all heads side by side, as in Lin et al. (2017),
    arXiv:1703.03130, so that it grows with the number of heads.

    Args:
        vocabulary_size: Number of words, with the padding as number zero.
        num_classes: Number of classes.
        num_heads: Number of heads.
        dim: Width of the embeddings, and of both directions of the LSTM together.
        hidden_dim: Width of the keys that heads attend by.
        dropout: Of the embeddings and before the readout.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_classes: int,
        num_heads: int,
        *,
        dim: int = 64,
        hidden_dim: int = 32,
        dropout: float = 0.2,
    ):
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, dim, padding_idx=0)
        self.reader = nn.LSTM(dim, dim // 2, batch_first=True, bidirectional=True)
        self.pooling = StructuredSelfAttention(dim, hidden_dim, num_heads)
        self.readout = nn.Linear(num_heads * dim, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, tokens: Int[Tensor, "sentence token"], mask: Bool[Tensor, "sentence token"]
    ) -> Float[Tensor, "sentence class"]:
        """Give logits of the classes; what stands at the padding does not matter."""
        embedded = self.dropout(self.words(tokens))
        lengths = mask.sum(-1).cpu()
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        read, _ = pad_packed_sequence(
            self.reader(packed)[0], batch_first=True, total_length=tokens.shape[1]
        )
        pooled, _ = self.pooling(read, mask)
        return self.readout(self.dropout(pooled.flatten(1)))
