r"""Kernels whose frequencies an implicit density gives, for each sequence by itself.

.. math:: w_m = s \odot \big(z_m + V \tanh(U z_m)\big), \quad m = 1 \dots M

where the latents z of a sequence have the law that a network makes of its queries and keys
(:mod:`bayesattn.logits.latent_laws`). The generator is odd, so that w has the density of the
symmetric spectrum if z has means of either sign; the kernel does not see the sign, and none is
drawn.

Source:
    Song et al. (2021), Implicit kernel attention, arXiv:2006.06147.
"""

import copy
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bayesattn.argument_checks import check_choice, check_count, check_positive
from bayesattn.autocasting import full_precision
from bayesattn.kernels.distances import widened
from bayesattn.logits.frequencies import normal_frequencies
from bayesattn.logits.kernel_logits import check_heads, logits_along_edges, logits_of_pairs
from bayesattn.logits.latent_laws import LatentLaw, LawNetwork
from bayesattn.logits.magnitudes import Magnitude, own_magnitude
from bayesattn.logits.protocol import ConditionalLogits
from bayesattn.logits.spectral_kernel import (
    SQUARES,
    Frequencies,
    SpectralKernel,
    softmax_frequency_scale,
)

__all__ = ["GivenKernel", "ImplicitSpectralLogits"]

# A whole number is a number too, which run-time type checks do not take for a float.
Number = float | int


class GivenKernel(NamedTuple):
    """Logits of the kernels that one draw gave the sequences.

    Attributes:
        kernel: Of each sequence and head.
        magnitude: Of queries and keys, or None.
    """

    kernel: SpectralKernel
    magnitude: Magnitude | None

    def __deepcopy__(self, memo: dict) -> "GivenKernel":
        # What was computed cannot be copied with its graph of gradients.
        return GivenKernel(self.kernel.detached(), copy.deepcopy(self.magnitude, memo))

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
        log_kernel = self.kernel.log_kernel_of_edges
        return logits_along_edges(log_kernel, self.magnitude, query, key, edges)


class ImplicitSpectralLogits(ConditionalLogits):
    r"""Squared random Fourier features of frequencies that a generator draws for each sequence.

    In training each call draws anew. In evaluation noise is fixed, M orthogonal vectors, unless
    :func:`bayesattn.implicit_densities.density_draws` asks for draws. The loss needs the divergence
    of the latents from their prior: :func:`bayesattn.implicit_densities.density_terms` collects it
    from all layers. At the start z has the prior's law, but for a slight correlation of heads, and
    anchored logits are the softmax's.

    Args:
        num_heads: Number of heads.
        dim: Width of queries and keys.
        num_frequencies: M.
        couples_heads: Whether latents may correlate between heads.
        hidden_dim: Width of the hidden layers of the network and of the generator.
        pool: What the law depends on: "mean" of the queries and of the keys that are no padding;
            the "first" of both, which also goes under causal masks; or "none", one law and one draw
            for all sequences. Pooled tokens tell each other of themselves whatever masks are
            between them: in a decoder's attention to an encoder, of packed documents, and of
            several graphs in one only "none" keeps them apart.
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
        check_choice("square", square, SQUARES)
        check_positive("floor", floor)
        self.pools_tokens, self.sees_all_tokens = pool != "none", pool == "mean"
        self.is_stationary, self.square, self.floor = is_stationary, square, float(floor)
        self.magnitude = own_magnitude(magnitude, num_heads)
        sets = 1 if is_stationary else 2
        self.law = LawNetwork(
            num_heads, dim, sets * dim, hidden_dim, pool, couples_heads=couples_heads
        )
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
        self.law.reset_parameters()
        nn.init.normal_(self.generator_input, std=self.generator_input.shape[1] ** -0.5)
        nn.init.zeros_(self.generator_output)
        nn.init.zeros_(self.log_width)
        noise = normal_frequencies(self.num_heads, self.num_frequencies, self.noise.shape[-1])
        with torch.no_grad():
            self.noise.copy_(noise)

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
        check_heads(type(self).__name__, self.num_heads, self.dim, query, key)
        with full_precision(query):
            law = self.law(widened(query), widened(key), query_mask, key_mask)
            # Always, so that recomputed activations are those of the first time.
            divergence = law.divergence()
            for listener in self.listeners:
                listener.hear(self, divergence)
            noise = law.correlated(self._noise(law))
            frequencies = self._generated(law.latents(noise))
        # Standard normal in each head, however heads correlate: draws of the prior's kernel.
        anchor = None
        if self.square == "anchored":
            anchor = self._split(noise * softmax_frequency_scale(self.dim))
        kernel = SpectralKernel(self._split(frequencies), anchor, self.square, self.floor)
        return GivenKernel(kernel, self.magnitude)

    def __getstate__(self) -> dict[str, Any]:
        # Whoever listens to this one does not listen to its copies.
        return self.__dict__ | {"listeners": []}

    def extra_repr(self) -> str:
        """The sizes and choices."""
        return (
            f"num_heads={self.num_heads}, dim={self.dim}, num_frequencies={self.num_frequencies}, "
            f"couples_heads={self.law.couples_heads}, pool={self.law.pool!r}, "
            f"square={self.square!r}, is_stationary={self.is_stationary}"
        )

    def _noise(self, law: LatentLaw) -> Float[Tensor, "*_batch head frequency latent"]:
        """Independent standard normals."""
        if not (self.training or self.draws_in_evaluation):
            return self.noise.to(law.mean.dtype)
        batch = law.mean.shape[:-2]
        return torch.randn(*batch, *self.noise.shape, dtype=law.mean.dtype, device=law.mean.device)

    def _generated(self, latents: Tensor) -> Float[Tensor, "*_batch head frequency latent"]:
        inner, outer = (
            part.to(latents.dtype) for part in (self.generator_input, self.generator_output)
        )
        bent = torch.einsum("...hml,hlo->...hmo", latents, inner).tanh()
        bent = torch.einsum("...hml,hlo->...hmo", bent, outer)
        width = softmax_frequency_scale(self.dim) * self.log_width.to(latents.dtype).exp()
        return width[:, None] * (latents + bent)

    def _split(self, frequencies: Tensor) -> Frequencies:
        if self.is_stationary:
            return Frequencies(frequencies)
        first, second = frequencies.chunk(2, -1)
        return Frequencies(first, second)
