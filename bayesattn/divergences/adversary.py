r"""An adversary for each head, who learns to tell queries from keys.

.. math:: D(p, q) = \max_{\delta} \; \mathbb E_{x \sim p} \log \delta(x)
    + \mathbb E_{y \sim q} \log (1 - \delta(y)) + 2 \log 2

With the best of all :math:`\delta` it is twice the Jensen-Shannon divergence. A given one says
less: zero if it tells nothing apart, below zero if it is wrong.

Source:
    Goodfellow et al. (2014), Generative adversarial networks, arXiv:1406.2661, theorem 1; for
    attention Zhang et al. (2021), Alignment attention, arXiv:2110.12567, eq. 3. There one
    discriminator serves all heads, and can only tell apart the mixtures over heads.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from bayesattn.autocasting import full_precision
from bayesattn.divergences.headwise_networks import HeadwiseMLP, Highway, call_reversed
from bayesattn.divergences.point_clouds import Weights, weighted_clouds

__all__ = ["Adversarial"]

# So that a discriminator that tells nothing apart gives zero.
_LEAST = 2 * math.log(2)


class Adversarial(nn.Module):
    """What a learned discriminator finds between two clouds; see the module's formula.

    Its parameters ascend where all others descend, by one backward pass.

    Args:
        num_heads: Number of heads, the last batch axis of the clouds.
        dim: Width of their points.
        hidden_dim: Width of the discriminator's hidden layer, behind a highway layer.

    Raises:
        ValueError: If a size is not positive.
    """

    def __init__(self, num_heads: int, dim: int, *, hidden_dim: int = 16) -> None:
        super().__init__()
        sizes = {"num_heads": num_heads, "dim": dim, "hidden_dim": hidden_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least one, got {size}")
        self.discriminator = nn.Sequential(
            Highway(num_heads, dim), HeadwiseMLP(num_heads, dim, hidden_dim, 1)
        )

    def forward(
        self,
        query: Float[Tensor, "*#batch query dim"],
        key: Float[Tensor, "*#batch key dim"],
        query_mask: Bool[Tensor, "*#batch query"] | None = None,
        key_mask: Bool[Tensor, "*#batch key"] | None = None,
        weights: Weights | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Score of two clouds; see :class:`~bayesattn.divergences.Divergence`."""
        clouds = weighted_clouds(query, key, query_mask, key_mask, weights)
        with full_precision(clouds.query):
            points = torch.cat([clouds.query, clouds.key], -2)
            told = call_reversed(self.discriminator, points).squeeze(-1)
        as_query, as_key = told.split([clouds.query.shape[-2], clouds.key.shape[-2]], -1)
        right = (clouds.query_weights * F.logsigmoid(as_query)).sum(-1)
        return right + (clouds.key_weights * F.logsigmoid(-as_key)).sum(-1) + _LEAST
