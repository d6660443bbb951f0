r"""Kernels whose frequencies an implicit density gives, for each sequence by itself.

.. math:: z_m \sim N(\mu, \operatorname{diag}(\sigma) R \operatorname{diag}(\sigma)), \quad
    w_m = s \odot \big(z_m + V \tanh(U z_m)\big), \quad m = 1 \dots M

where a network of the sequence's mean query and key gives each head's :math:`\mu` and
:math:`\sigma`, and the correlations R between heads (:mod:`bayesattn.logits.head_coupling`). The
prior of z is standard normal and independent over heads.

The generator is odd, so that w has the density of the symmetric spectrum that :math:`\pm \mu`
make; the kernel does not see the sign, and none is drawn.

Source:
    Song et al. (2021), Implicit kernel attention, arXiv:2006.06147. Differs from its code: the
    copula is a multivariate normal over heads; scales are standard deviations; every sequence of a
    batch has frequencies of its own; padding takes no part.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bayesattn.argument_checks import check_choice, check_count, check_positive
from bayesattn.autocasting import full_precision
from bayesattn.kernels.distances import widened
from bayesattn.logits.frequencies import normal_frequencies
from bayesattn.logits.head_coupling import correlation_tril, coupled_divergence
from bayesattn.logits.kernel_logits import logits_along_edges, logits_of_pairs
from bayesattn.logits.magnitudes import Magnitude, own_magnitude
from bayesattn.logits.protocol import ConditionalLogits
from bayesattn.logits.spectral_kernel import (
    SQUARES,
    Frequencies,
    SpectralKernel,
    softmax_frequency_scale,
)

__all__ = ["GivenKernel", "ImplicitSpectralLogits", "LatentLaw"]

# A whole number is a number too, which run-time type checks do not take for a float.
Number = float | int
POOLS = ("mean", "first", "none")
# Between heads at the start. At zero its slope is zero too, and heads would stay apart.
_COUPLING = 0.3


class LatentLaw(NamedTuple):
    """The normal distribution of the latents of a sequence; of all M frequencies the same.

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


class GivenKernel(NamedTuple):
    """Logits of the kernels that one draw gave the sequences.

    Attributes:
        kernel: Of each sequence and head.
        magnitude: Of queries and keys, or None.
    """

    kernel: SpectralKernel
    magnitude: Magnitude | None

    def __call__(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> Float[Tensor, "*_batch query key"]:
        """The logits of all pairs."""
        return logits_of_pairs(self.kernel.log_kernel, self.magnitude, query, key)

    def on_edges(
        self,
        query: Float[Tensor, "head query dim"],
        key: Float[Tensor, "head key dim"],
        edges: Int[Tensor, "2 edge"],
    ) -> Float[Tensor, "head edge"]:
        """The logits of each edge."""
        along = self.kernel.log_kernel_of_pairs
        return logits_along_edges(along, self.magnitude, query, key, edges)


class ImplicitSpectralLogits(ConditionalLogits):
    r"""Squared random Fourier features of frequencies that a generator draws for each sequence.

    In training each call draws anew. In evaluation noise is fixed, M orthogonal vectors, unless
    :func:`bayesattn.implicit_densities.density_draws` asks for draws. The loss needs the divergence
    of the latents from their prior: :func:`bayesattn.implicit_densities.density_terms` collects it
    from all layers. At the start z has the prior's law, but for a slight correlation of heads, and
    anchored logits are the softmax's.

    Args:
        num_heads: Number of heads.
        dim: Width of a head.
        num_frequencies: M.
        couples_heads: Whether latents may correlate between heads.
        hidden_dim: Width of the hidden layers of the network and of the generator.
        pool: What the law depends on: "mean" of the queries and of the keys that are no padding;
            the "first" of both, which also goes under causal masks; or "none", one law and one draw
            for all sequences.
        is_stationary: As for :class:`bayesattn.logits.SpectralLogits`.
        square: Likewise.
        floor: Likewise.
        magnitude: As for :class:`bayesattn.logits.KernelLogits`.

    Raises:
        ValueError: If a size or the floor is not positive, or a choice none of these.

    Source:
        Song et al. (2021), arXiv:2006.06147.
    """

    noise: Tensor

    def __init__(
        self,
        num_heads: int,
        dim: int,
        num_frequencies: int = 64,
        *,
        couples_heads: bool = True,
        hidden_dim: int = 32,
        pool: str = "mean",
        is_stationary: bool = True,
        square: str = "anchored",
        floor: Number = 1e-5,
        magnitude: Magnitude | bool = True,
    ):
        super().__init__()
        self.num_heads, self.dim = check_count("num_heads", num_heads), check_count("dim", dim)
        least = 2 if square == "unbiased" else 1
        self.num_frequencies = check_count("num_frequencies", num_frequencies, least)
        hidden_dim = check_count("hidden_dim", hidden_dim)
        check_choice("pool", pool, POOLS)
        check_choice("square", square, SQUARES)
        check_positive("floor", floor)
        self.couples_heads, self.pool = couples_heads, pool
        self.sees_all_tokens = pool == "mean"
        self.is_stationary, self.square, self.floor = is_stationary, square, float(floor)
        self.magnitude = own_magnitude(magnitude, num_heads)
        sets = 1 if is_stationary else 2
        # The mean, the logarithm of the scale, and what couples the head.
        num_outputs = 2 * sets * dim + 1
        self.input_weight = nn.Parameter(torch.empty(num_heads, 2 * dim, hidden_dim))
        self.input_bias = nn.Parameter(torch.empty(num_heads, hidden_dim))
        self.law_weight = nn.Parameter(torch.empty(num_heads, hidden_dim, num_outputs))
        self.law_bias = nn.Parameter(torch.empty(num_heads, num_outputs))
        self.generator_input = nn.Parameter(torch.empty(num_heads, sets * dim, hidden_dim))
        self.generator_output = nn.Parameter(torch.empty(num_heads, hidden_dim, sets * dim))
        self.log_width = nn.Parameter(torch.empty(num_heads, sets * dim))
        self.register_buffer("noise", torch.empty(num_heads, num_frequencies, sets * dim))
        # What listens to the laws of calls, and whether evaluation draws; see implicit_densities.
        self.listeners: list = []
        self.draws_in_evaluation = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at the prior, and a generator of the frequencies whose kernel is the softmax's."""
        nn.init.normal_(self.input_weight, std=self.input_weight.shape[1] ** -0.5)
        nn.init.normal_(self.generator_input, std=self.generator_input.shape[1] ** -0.5)
        for part in (self.input_bias, self.law_weight, self.law_bias, self.generator_output):
            nn.init.zeros_(part)
        nn.init.constant_(self.log_width, math.log(softmax_frequency_scale(self.dim)))
        noise = normal_frequencies(self.num_heads, self.num_frequencies, self.noise.shape[-1])
        with torch.no_grad():
            self.law_bias[:, -1] = _COUPLING
            self.noise.copy_(noise)

    def law(
        self,
        query: Float[Tensor, "*_batch query dim"],
        key: Float[Tensor, "*_batch key dim"],
        query_mask: Bool[Tensor, "*_batch _query"] | None = None,
        key_mask: Bool[Tensor, "*_batch _key"] | None = None,
    ) -> LatentLaw:
        """The distribution of the latents of each sequence; of all of them if none is pooled."""
        outputs = self.law_bias
        if self.pool != "none":
            pool = _mean if self.pool == "mean" else _first
            pooled = torch.broadcast_tensors(pool(query, query_mask), pool(key, key_mask))
            hidden = torch.einsum("...hi,hio->...ho", torch.cat(pooled, -1), self.input_weight)
            hidden = torch.tanh(hidden + self.input_bias)
            outputs = outputs + torch.einsum("...hi,hio->...ho", hidden, self.law_weight)
        mean, log_scale = outputs[..., :-1].chunk(2, -1)
        coupling = outputs[..., -1]
        coupling = coupling if self.couples_heads else torch.zeros_like(coupling)
        return LatentLaw(mean, log_scale.exp(), coupling)

    def given(
        self,
        query: Float[Tensor, "*_batch query dim"],
        key: Float[Tensor, "*_batch key dim"],
        query_mask: Bool[Tensor, "*_batch _query"] | None = None,
        key_mask: Bool[Tensor, "*_batch _key"] | None = None,
    ) -> GivenKernel:
        """Draw the frequencies of each sequence.

        Args:
            query: What asks.
            key: What is asked.
            query_mask: With the head axis, to broadcast; True where there is no padding.
            key_mask: Likewise.
        """
        with full_precision(query):
            law = self.law(widened(query), widened(key), query_mask, key_mask)
            for listener in self.listeners:
                listener.hear(self, law)
            noise = self._noise(law)
            frequencies = self._generated(law, noise)
        # Standard normal in each head, however heads correlate: draws of the prior's kernel.
        anchor = None
        if self.square == "anchored":
            anchor = self._split(noise * softmax_frequency_scale(self.dim))
        kernel = SpectralKernel(self._split(frequencies), anchor, self.square, self.floor)
        return GivenKernel(kernel, self.magnitude)

    def extra_repr(self) -> str:
        """The sizes and choices."""
        return (
            f"num_heads={self.num_heads}, dim={self.dim}, num_frequencies={self.num_frequencies}, "
            f"couples_heads={self.couples_heads}, pool={self.pool!r}, square={self.square!r}, "
            f"is_stationary={self.is_stationary}"
        )

    def _noise(self, law: LatentLaw) -> Float[Tensor, "*_batch head frequency latent"]:
        """Standard normals of each head, correlated between heads."""
        if self.training or self.draws_in_evaluation:
            batch = law.mean.shape[:-2]
            noise = torch.randn(
                *batch, *self.noise.shape, dtype=law.mean.dtype, device=law.mean.device
            )
        else:
            noise = self.noise.to(law.mean.dtype)
        factor = correlation_tril(law.coupling)
        return torch.einsum("...hg,...gml->...hml", factor, noise)

    def _generated(self, law: LatentLaw, noise: Tensor) -> Tensor:
        latent = law.mean[..., None, :] + law.scale[..., None, :] * noise
        bent = torch.einsum("...hml,hlo->...hmo", latent, self.generator_input).tanh()
        bent = torch.einsum("...hml,hlo->...hmo", bent, self.generator_output)
        return self.log_width.exp()[:, None] * (latent + bent)

    def _split(self, frequencies: Tensor) -> Frequencies:
        if self.is_stationary:
            return Frequencies(frequencies)
        first, second = frequencies.chunk(2, -1)
        return Frequencies(first, second)


def _mean(part: Tensor, mask: Tensor | None) -> Float[Tensor, "*_batch head dim"]:
    if mask is None:
        return part.mean(-2)
    counted = torch.where(mask[..., None], part, 0.0).sum(-2)
    return counted / mask.sum(-1).clamp(min=1)[..., None]


def _first(part: Tensor, mask: Tensor | None) -> Float[Tensor, "*_batch head dim"]:
    """The first that is no padding."""
    if mask is None:
        return part[..., 0, :]
    place = mask.to(torch.uint8).argmax(-1).expand(part.shape[:-2])
    return part.take_along_dim(place[..., None, None], -2)[..., 0, :]
