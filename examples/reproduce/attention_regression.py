r"""Regression by one layer of attention: a target looks at known points, and reads their targets.

.. math:: h_i = e(x_i), \qquad o_i = \mathrm{MultiHead}\bigl(h_i, h_j, v(h_j, y_j)\bigr), \qquad
    y_i \sim \mathcal N\bigl(r(o_i), \sigma^2\bigr)

where j runs over the known points of other groups than that of i. Of its own inputs a target tells
the readout r nothing: whatever it predicts comes by the weights of its attention.

Source:
    One layer of width 64 with eight heads is the setting of Song et al. (2021), arXiv:2006.06147.
    That queries and keys see inputs alone is from Kim et al. (2019), Attentive neural processes,
    arXiv:1901.05761.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayesattn.logits import Logits
from bayesattn.multihead import MultiheadAttention
from examples.reproduce.regression_tasks import Points

__all__ = ["AttentionRegression"]

_FIRST_NOISE = 0.2
# An optimizer's steps are as long for all parameters, and noise falls by a hundred.
_NOISE_SPEED = 10.0


class AttentionRegression(nn.Module):
    """An embedding of inputs, one layer of attention to known points, and a readout.

    Args:
        num_features: Width of the inputs.
        dim: Width of the embeddings.
        num_heads: Number of heads.
        logits: ``logits(num_heads, head_dim)`` gives those of the layer; the scaled dot product if
            None.
    """

    def __init__(
        self,
        num_features: int,
        *,
        dim: int = 64,
        num_heads: int = 8,
        logits: Callable[[int, int], Logits] | None = None,
    ):
        super().__init__()
        self.embedding = nn.Sequential(nn.Linear(num_features, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.known = nn.Linear(dim + 1, dim)
        choice = None if logits is None else logits(num_heads, dim // num_heads)
        self.attention = MultiheadAttention(dim, num_heads, batch_first=True, logits=choice)
        self.readout = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1)
        )
        self.log_noise = nn.Parameter(torch.tensor(math.log(_FIRST_NOISE) / _NOISE_SPEED))

    def forward(
        self, targets: Points, known: Points
    ) -> tuple[Float[Tensor, " point"], Float[Tensor, " point"]]:
        """Give means and deviations of targets, whose ``y`` is not seen, from known points."""
        attended, _ = self._attend(targets, known, need_weights=False)
        mean = self.readout(attended)[:, 0]
        return mean, (_NOISE_SPEED * self.log_noise).exp().expand_as(mean)

    def weights(self, targets: Points, known: Points) -> Float[Tensor, "head point known"]:
        """Where targets look."""
        _, weights = self._attend(targets, known, need_weights=True)
        assert weights is not None
        return weights

    def _attend(
        self, targets: Points, known: Points, *, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        query, key = self.embedding(targets.x), self.embedding(known.x)
        value = self.known(torch.cat([key, known.y[:, None]], -1))
        # Of a batch of one: what is drawn for a sequence, is drawn for this set of points.
        attended, weights = self.attention(
            query[None],
            key[None],
            value[None],
            attn_mask=targets.group[:, None] == known.group,
            need_weights=need_weights,
            average_attn_weights=False,
        )
        return attended[0], None if weights is None else weights[0]
