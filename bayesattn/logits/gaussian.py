r"""Log densities of a mixture of normal components around the keys, or around the queries.

.. math:: s_{ij} = \log \pi_j + \log N(q_i;\, k_j, \sigma^2 I) + \text{const}

Source:
    Ding et al. (2020), arXiv:2009.14308.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayesattn.logits.protocol import Logits, ReducedLogits

__all__ = ["GaussianLogits"]


class GaussianLogits(Logits):
    r"""Log densities of a normal mixture, with a learned variance and learned mixing weights.

    .. math:: s_{ij} = \frac{-\lVert q_i - k_j \rVert^2 + \beta_q \lVert q_i \rVert^2
        + \beta_k \lVert k_j \rVert^2}{2 \sigma^2}

    The :math:`\beta` are exponents of the mixing weights, :math:`\pi_j \propto
    e^{\beta_k \lVert k_j \rVert^2 / 2 \sigma^2}` where keys are the centers (softmax), and so for
    queries (doubly normalized). At one, where they start, the logits are the dot product over
    :math:`\sigma^2`; at zero the mixture is uniform.

    Args:
        num_heads: Each head has its own :math:`\sigma^2` and :math:`\beta`.
        dim: Width of queries and keys; :math:`\sigma^2` starts at its square root.

    Attributes:
        log_variance: :math:`\log \sigma^2`, for each head.
        query_exponent: :math:`\beta_q`, for each head.
        key_exponent: :math:`\beta_k`, for each head.

    Source:
        Ding et al. (2020), arXiv:2009.14308, for attention as a mixture.
    """

    def __init__(self, num_heads: int, dim: int):
        super().__init__()
        if num_heads < 1 or dim < 1:
            raise ValueError(
                f"num_heads and dim must be positive, got num_heads={num_heads}, dim={dim}"
            )
        self.num_heads, self.dim = num_heads, dim
        self.log_variance = nn.Parameter(torch.empty(num_heads))
        self.query_exponent = nn.Parameter(torch.empty(num_heads))
        self.key_exponent = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at the scaled dot product."""
        nn.init.constant_(self.log_variance, torch.tensor(float(self.dim)).log().item() / 2)
        nn.init.ones_(self.query_exponent)
        nn.init.ones_(self.key_exponent)

    def reduce(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> ReducedLogits:
        """Scale the queries, and give each query and key its bias."""
        precision = torch.exp(-self.log_variance.to(query.dtype))[:, None]
        return ReducedLogits(
            query * precision[..., None],
            key,
            _norm_bias(query, self.query_exponent, precision),
            _norm_bias(key, self.key_exponent, precision),
        )

    def extra_repr(self) -> str:
        """The sizes."""
        return f"num_heads={self.num_heads}, dim={self.dim}"


def _norm_bias(
    part: Float[Tensor, "*_batch position _dim"],
    exponent: Float[Tensor, " head"],
    precision: Float[Tensor, "head 1"],
) -> Float[Tensor, "*_batch position"]:
    factor = (exponent[:, None].to(part.dtype) - 1.0) * precision / 2.0
    return factor * part.square().sum(-1)
