r"""Laws of the latents of implicit densities: normal over heads, amortized over sequences.

.. math:: z \sim N(\mu, \operatorname{diag}(\sigma) R \operatorname{diag}(\sigma)), \qquad
    (\mu, \log \sigma, c)_h = B_h \tanh(A_h [\bar q_h, \bar k_h] + a_h) + b_h

with the correlations R between heads of :mod:`bayesattn.logits.head_coupling`. The prior is
standard normal, and independent over heads.

Source:
    Song et al. (2021), Implicit kernel attention, arXiv:2006.06147. Differs from its code: the
    copula is a multivariate normal over heads; scales are standard deviations, not variances; every
    sequence of a batch has a law of its own; padding takes no part.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bayesattn.argument_checks import check_choice
from bayesattn.logits.head_coupling import correlation_tril, coupled_divergence

__all__ = ["LatentLaw", "LawNetwork"]

_POOLS = ("mean", "first", "none")
# Between heads at the start. At zero its slope is zero too, and heads would stay apart.
_COUPLING = 0.3


class LatentLaw(NamedTuple):
    """A normal distribution of latents over heads, the same for each of several frequencies.

    Attributes:
        mean: Of the marginals.
        scale: Their standard deviations.
        coupling: What sets the correlations between heads.
    """

    mean: Float[Tensor, "*_batch head latent"]
    scale: Float[Tensor, "*_batch head latent"]
    coupling: Float[Tensor, "*_batch head"]

    def divergence(self) -> Float[Tensor, "*_batch"]:
        """From the prior, of one frequency, in nats."""
        return coupled_divergence(*self)

    def correlated(
        self, noise: Float[Tensor, "*_batch head frequency latent"]
    ) -> Float[Tensor, "*_batch head frequency latent"]:
        """Standard normals of each head, correlated between heads, of independent ones."""
        return torch.einsum("...hg,...gml->...hml", correlation_tril(self.coupling), noise)

    def latents(
        self, correlated: Float[Tensor, "*_batch head frequency latent"]
    ) -> Float[Tensor, "*_batch head frequency latent"]:
        """Draws of this law, from correlated standard normals."""
        return self.mean[..., None, :] + self.scale[..., None, :] * correlated


class LawNetwork(nn.Module):
    """From a sequence's queries and keys to the law of its latents, at first the prior.

    Args:
        num_heads: Number of heads.
        dim: Width of a head.
        num_latents: Width of the latents of a head.
        hidden_dim: Width of the hidden layer.
        pool: What the law depends on: "mean" of the queries and of the keys that are no padding;
            the "first" of both; or "none".
        couples_heads: Whether latents may correlate between heads.

    Raises:
        ValueError: If the pool is none of these.
    """

    def __init__(
        self,
        num_heads: int,
        dim: int,
        num_latents: int,
        hidden_dim: int,
        pool: str,
        *,
        couples_heads: bool,
    ):
        super().__init__()
        check_choice("pool", pool, _POOLS)
        self.pool, self.couples_heads = pool, couples_heads
        self.input_weight = self.input_bias = self.output_weight = None
        # The mean and the logarithm of the scale of each latent, and what couples the head.
        num_outputs = 2 * num_latents + 1
        if pool != "none":
            self.input_weight = nn.Parameter(torch.empty(num_heads, 2 * dim, hidden_dim))
            self.input_bias = nn.Parameter(torch.empty(num_heads, hidden_dim))
            self.output_weight = nn.Parameter(torch.empty(num_heads, hidden_dim, num_outputs))
        self.output_bias = nn.Parameter(torch.empty(num_heads, num_outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at the prior, but for a slight correlation of heads."""
        nn.init.zeros_(self.output_bias)
        with torch.no_grad():
            self.output_bias[:, -1] = _COUPLING
        if self.pool != "none":
            first, bias, last = self._network()
            nn.init.normal_(first, std=first.shape[1] ** -0.5)
            nn.init.zeros_(bias)
            nn.init.zeros_(last)

    def forward(
        self,
        query: Float[Tensor, "*_batch query dim"],
        key: Float[Tensor, "*_batch key dim"],
        query_mask: Bool[Tensor, "*_batch _query"] | None = None,
        key_mask: Bool[Tensor, "*_batch _key"] | None = None,
    ) -> LatentLaw:
        """The law of each sequence; one for all of them if nothing is pooled."""
        outputs = self.output_bias.to(query.dtype)
        if self.pool != "none":
            outputs = outputs + self._of_pooled(query, key, query_mask, key_mask)
        mean, log_scale = outputs[..., :-1].chunk(2, -1)
        coupling = outputs[..., -1]
        coupling = coupling if self.couples_heads else torch.zeros_like(coupling)
        return LatentLaw(mean, log_scale.exp(), coupling)

    def _of_pooled(
        self, query: Tensor, key: Tensor, query_mask: Tensor | None, key_mask: Tensor | None
    ) -> Float[Tensor, "*_batch head output"]:
        first, bias, last = (part.to(query.dtype) for part in self._network())
        pool = _mean if self.pool == "mean" else _first
        pooled = torch.broadcast_tensors(pool(query, query_mask), pool(key, key_mask))
        hidden = torch.einsum("...hi,hio->...ho", torch.cat(pooled, -1), first)
        return torch.einsum("...hi,hio->...ho", torch.tanh(hidden + bias), last)

    def _network(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.input_weight is not None
        assert self.input_bias is not None
        assert self.output_weight is not None
        return self.input_weight, self.input_bias, self.output_weight


def _mean(part: Tensor, mask: Tensor | None) -> Float[Tensor, "*_batch head dim"]:
    if mask is None:
        return part.sum(-2) / max(1, part.shape[-2])
    counted = torch.where(mask[..., None], part, 0.0).sum(-2)
    return counted / mask.sum(-1).clamp(min=1)[..., None]


def _first(part: Tensor, mask: Tensor | None) -> Float[Tensor, "*_batch head dim"]:
    """The first that is no padding."""
    if mask is None or not part.shape[-2]:
        return part[..., :1, :].sum(-2)
    place = mask.to(torch.uint8).argmax(-1)[..., None, None]
    batch = torch.broadcast_shapes(part.shape[:-2], place.shape[:-2])
    part, place = part.expand(*batch, -1, -1), place.expand(*batch, -1, -1)
    return part.take_along_dim(place, -2)[..., 0, :]
