r"""Logits of attention: how well a query and a key go together, before any normalization.

.. math:: s_{ij} = q'_i \cdot k'_j + a_i + b_j

Whatever has this form, with :math:`q'` a function of the query alone and so on, reduces to
attention by dot products with a bias for each query and each key, and so to the fused routines of
:mod:`bayesattn.fused`. A softmax over keys does not see :math:`a`; one over queries does.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayesattn.argument_checks import check_count, check_positive
from bayesattn.contraction import inner_products

__all__ = ["DotProduct", "GaussianLogits", "Logits", "RBFMagnitude", "ReducedLogits"]

Number = float | int


class ReducedLogits(NamedTuple):
    """Logits as inner products with biases; None where there is no bias.

    Attributes:
        query: What asks.
        key: What is asked.
        query_bias: Added to all logits of a query.
        key_bias: Added to all logits of a key.
        scale: Factor of the inner products.
    """

    query: Float[Tensor, "*_batch query _dim"]
    key: Float[Tensor, "*_batch key _dim"]
    query_bias: Float[Tensor, "*_batch query"] | None = None
    key_bias: Float[Tensor, "*_batch key"] | None = None
    scale: float = 1.0


class Logits(nn.Module):
    """A choice of logits. A subclass defines ``reduce``, or ``forward`` where only that exists.

    Modules have no parameters unless they say so; those with parameters have them for each head,
    on the third axis from the right.
    """

    def reduce(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> ReducedLogits | None:
        """The logits as inner products with biases, or None where they have no such form."""
        return None

    def forward(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> Float[Tensor, "*_batch query key"]:
        """The logits of all pairs.

        Raises:
            TypeError: If a subclass defines neither this nor ``reduce``.
        """
        reduced = self.reduce(query, key)
        if reduced is None:
            raise TypeError(f"{type(self).__name__} must define reduce or forward")
        scaled = reduced.query if reduced.scale == 1.0 else reduced.query * reduced.scale
        values = inner_products(scaled, reduced.key)
        if reduced.query_bias is not None:
            values = values + reduced.query_bias[..., :, None]
        return values if reduced.key_bias is None else values + reduced.key_bias[..., None, :]


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
        dim: Width of a head; :math:`\sigma^2` starts at its square root.

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


class RBFMagnitude(Logits):
    r"""An RBF similarity times magnitudes of query and key, of any power norm.

    .. math:: s_{ij} = \frac{-\lVert q_i - k_j \rVert_2^2
        + c_p \lVert q_i \rVert_p^2 + c_p \lVert k_j \rVert_p^2}{2 \sqrt d}, \qquad
        c_p = d^{1 - 2 / p}

    At p = 2 this is the scaled dot product. The factor c keeps the magnitude of a vector whose
    entries are all as large the same at any p, and so the temperature. A softmax over keys does not
    see the query's.

    Args:
        p: Of the norm, at least one.
        num_heads: Each head learns a p of its own above one, from the given one on; none is learned
            if None.

    Attributes:
        log_excess: :math:`\log(p - 1)` of each head, or None.

    Raises:
        ValueError: If p is no finite number, below one, or one where it is learned.

    Source:
        Song et al. (2021), arXiv:2006.06147; its code divides magnitudes by a power of the width
        that is not the distances', and lets the temperature change with p.
    """

    def __init__(self, p: Number = 2.0, num_heads: int | None = None):
        super().__init__()
        check_positive("p", p)
        if p < 1 or (p == 1 and num_heads is not None):
            least = "at least one" if num_heads is None else "above one where it is learned"
            raise ValueError(f"p must be {least}, got {p}")
        self.num_heads, self._start = num_heads, float(p)
        self.log_excess: nn.Parameter | None = None
        if num_heads is not None:
            self.log_excess = nn.Parameter(torch.empty(check_count("num_heads", num_heads)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at the given p."""
        if self.log_excess is not None:
            nn.init.constant_(self.log_excess, math.log(self._start - 1))

    @property
    def p(self) -> Float[Tensor, " head"] | float:
        """Of each head, or of all."""
        return self._start if self.log_excess is None else 1 + self.log_excess.exp()

    def reduce(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> ReducedLogits:
        """Queries and keys as they are, and as biases what magnitudes exceed those at two."""
        scale = query.shape[-1] ** -0.5
        if self.log_excess is None and self._start == 2:
            return ReducedLogits(query, key, scale=scale)
        return ReducedLogits(query, key, self._bias(query), self._bias(key), scale)

    def _bias(self, part: Float[Tensor, "*_batch position _dim"]) -> Tensor:
        # Narrow types lose what two large numbers differ by.
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        p = self.p.to(wide)[:, None] if isinstance(self.p, Tensor) else self.p
        excess = _squared_norm(wide, p) - wide.square().sum(-1)
        return (excess / (2 * part.shape[-1] ** 0.5)).to(part.dtype)

    def extra_repr(self) -> str:
        """The start, and the number of heads where they learn."""
        learned = "" if self.num_heads is None else f", num_heads={self.num_heads}"
        return f"p={self._start}{learned}"


def _squared_norm(
    part: Float[Tensor, "*_batch position _dim"], p: Float[Tensor, "head 1"] | float
) -> Float[Tensor, "*_batch position"]:
    """Squared power norms, as large as the Euclidean ones of vectors of equal entries."""
    largest = part.detach().abs().amax(-1, keepdim=True)
    is_zero = largest == 0
    # A multiple of the norm is that of the norm: entries are at most one, and powers stay in range.
    ratios = torch.where(is_zero, 1.0, part.abs() / torch.where(is_zero, 1.0, largest))
    # Zeros apart, whose powers have no slope in p.
    is_some = ratios > 0
    logs = torch.where(is_some, ratios, 1.0).log()
    exponent = p[..., None] if isinstance(p, Tensor) else p
    powers = torch.where(is_some, (logs * exponent).exp(), 0.0)
    size = (powers.mean(-1).log() * 2 / p).exp()
    size = part.shape[-1] * largest[..., 0].square() * size
    return torch.where(is_zero[..., 0], 0.0, size)
