r"""Positive random features of the softmax's kernel, with attention in linear time.

.. math:: e^{q \cdot k / \sqrt d} = \operatorname{E}\, \varphi_w(q)\, \varphi_w(k), \qquad
    \varphi_w(x) = \exp\Big(\frac{w \cdot x}{d^{1/4}} - \frac{\lVert x \rVert^2}{2 \sqrt d}\Big),
    \qquad w \sim N(0, I)

Source:
    Choromanski et al. (2021), Rethinking attention with performers, arXiv:2009.14794, lemma 1.
    Attention of queries to features and of features to keys, in place of sums of products that
    over- and underflow, is ours.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayesattn.argument_checks import check_choice, check_count
from bayesattn.kernels.distances import widened
from bayesattn.logits.frequencies import FREQUENCY_DRAWS, normal_frequencies
from bayesattn.logits.kernel_logits import check_heads
from bayesattn.logits.protocol import FactoredLogits, Logits, ReducedLogits

__all__ = ["PositiveFeatures"]


class PositiveFeatures(Logits):
    r"""The log of a mean of positive features, each an exponential of query and key.

    .. math:: s_{ij} = \log \frac1M \sum_m \varphi_{w_m}(q_i)\, \varphi_{w_m}(k_j)

    Attention is then M softmaxes over keys, one for each feature, of which each query takes an
    average: of time and memory linear in the sequence, exact for these logits, padding included.
    Causal masks take the dense route.

    The scaled dot product is the limit of many features; few are far from it where queries and keys
    are long. Frequencies may be learned, and then no more stand for that kernel.

    Args:
        num_heads: Each head has features of its own.
        dim: Width of queries and keys.
        num_features: M; twice the width if None.
        draw: As for :func:`bayesattn.logits.frequencies.normal_frequencies`.
        learns: Whether frequencies are parameters; else they stay as drawn.

    Attributes:
        frequencies: w, for each head.

    Raises:
        ValueError: If a size is not positive, or the draw is none of these.
    """

    is_factored = True

    def __init__(
        self,
        num_heads: int,
        dim: int,
        num_features: int | None = None,
        *,
        draw: str = "orthogonal",
        learns: bool = True,
    ):
        super().__init__()
        self.num_heads, self.dim = check_count("num_heads", num_heads), check_count("dim", dim)
        num_features = 2 * dim if num_features is None else num_features
        self.num_features = check_count("num_features", num_features)
        check_choice("draw", draw, FREQUENCY_DRAWS)
        self.draw = draw
        self.frequencies = nn.Parameter(
            torch.empty(num_heads, num_features, dim), requires_grad=learns
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the frequencies anew."""
        drawn = normal_frequencies(self.num_heads, self.num_features, self.dim, draw=self.draw)
        with torch.no_grad():
            self.frequencies.copy_(drawn)

    def reduce(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> FactoredLogits:
        """From queries to features, and from features to keys."""
        check_heads(type(self).__name__, self.num_heads, self.dim, query, key)
        features = self.frequencies.to(query.dtype)
        scale = self.dim**-0.25
        shared = -math.log(self.num_features)
        to_features = ReducedLogits(query, features, _penalty(query), None, scale)
        return FactoredLogits(
            to_features, ReducedLogits(features, key, None, _penalty(key) + shared, scale)
        )

    def extra_repr(self) -> str:
        """The sizes and the draw."""
        return (
            f"num_heads={self.num_heads}, dim={self.dim}, num_features={self.num_features}, "
            f"draw={self.draw!r}"
        )


def _penalty(part: Float[Tensor, "*_batch position dim"]) -> Float[Tensor, "*_batch position"]:
    return -widened(part).square().sum(-1) / (2 * part.shape[-1] ** 0.5)
