r"""Self-attention whose kernels each sentence has for itself: a network makes their frequencies.

.. math:: z_{nmh} \sim N(0, I), \qquad w_{nhm} = s \tanh(z_{nmh} G_h) F_h, \qquad
    a_{nhij} = \mathrm{softmax}_j \log\bigl(k_{nh}(q_i, k_j)^2 + \epsilon\bigr)

The density of frequencies is implicit: it can be drawn from, no more. The network is odd, so that
the density is symmetric, and a change of sign of a z does not change its sentence's kernel.

Source:
    Song et al. (2021), Implicit kernel attention, arXiv:2006.06147. Differs from its code: networks
    are latent too, the latents have a prior, and the divergence is one; see
    :mod:`bayesattn.models.density_guides`.
"""

from dataclasses import dataclass

import pyro
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from bayesattn.logits.spectral_features import fourier_features, log_of_square
from bayesattn.logits.spectral_kernel import softmax_frequency_scale
from bayesattn.masking import masked_softmax
from bayesattn.models.checks import check_settings
from bayesattn.models.density_guides import DensityGuide
from bayesattn.models.likelihoods import Likelihood
from bayesattn.models.self_attention import mean_over_tokens, projected
from bayesattn.models.sentences import Batch, minibatch, normal_prior, observe, shared_dims

__all__ = ["ImplicitKernelAttention", "implicit_frequencies"]


@dataclass(frozen=True)
class ImplicitKernelAttention:
    """A Pyro program: self-attention by kernels of frequencies that each sentence draws.

    Sites: ``query_weight``, ``key_weight``, ``value_weight``, ``generator_weight`` and
    ``frequency_weight`` in plate ``head``; ``density_latent`` in plate ``sentence``; those of
    :func:`~bayesattn.models.sentences.observe`. Deterministic: ``scaled_frequency``, (sentence,
    head, frequency, component); ``attention``, (sentence, head, query, key); ``expected_target``.

    Queries, keys and all tokens of a sentence have the same frequencies. As each sentence has
    latents of its own, there are no minibatches. Those of another sentence follow their prior as
    long as its target is not known, so predictions for it draw them anew::

        draws = {name: draw for name, draw in posterior.draws.items() if name != "density_latent"}
        posterior.replace(draws=draws).predict(tokens, mask)

    Attributes:
        num_heads: Number of heads.
        head_dim: Width of each head.
        likelihood: Such as :class:`bayesattn.models.Categorical`.
        num_frequencies: Of each sentence and head.
        latent_dim: Width of z.
        hidden_dim: Width of the network that takes it to a frequency.
        frequency_scale: Of the network's outputs, in units of the scale at which squared kernels
            come close to the similarity in softmax attention.
        projection_scale: Prior standard deviation of each entry of a unit-scale token's projection.
        readout_scale: Prior standard deviation of the readout's entries and bias.
        floor: Added to squared kernels.
    """

    num_heads: int
    head_dim: int
    likelihood: Likelihood
    num_frequencies: int = 8
    latent_dim: int = 2
    hidden_dim: int = 8
    frequency_scale: int | float = 1.0
    projection_scale: int | float = 1.0
    readout_scale: int | float = 0.3
    floor: int | float = 1e-5

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the axes of each site and argument, for ArviZ."""
        return {
            "query_weight": ["head", "feature", "component"],
            "key_weight": ["head", "feature", "component"],
            "value_weight": ["head", "feature", "component"],
            "generator_weight": ["head", "latent", "hidden"],
            "frequency_weight": ["head", "hidden", "component"],
            "density_latent": ["sentence", "frequency", "head", "latent"],
            "scaled_frequency": ["sentence", "head", "frequency", "component"],
            "attention": ["sentence", "head", "query", "key"],
            **shared_dims(self.likelihood, "component"),
        }

    def __call__(
        self,
        tokens: Float[Tensor, "sentence token dim"],
        mask: Bool[Tensor, "sentence token"] | None = None,
        target: Shaped[Tensor, " sentence"] | None = None,
    ) -> None:
        """Run the program; arguments: :func:`~bayesattn.models.sentences.minibatch`."""
        batch = minibatch(tokens, mask, target, None)
        dim, width = tokens.shape[-1], self.head_dim
        prior = normal_prior(tokens, dim, width, scale=self.projection_scale * dim**-0.5)
        heads = pyro.plate("head", self.num_heads)
        with heads:
            query, key, value = (
                projected(tokens, pyro.sample(f"{name}_weight", prior))
                for name in ("query", "key", "value")
            )
        weights = self._attention(query, key, self._frequencies(heads, batch), mask)
        with batch.plate:
            pyro.deterministic("attention", weights, event_dim=3)
        features = mean_over_tokens(weights @ value, mask)
        observe(batch, features, self.likelihood, self.readout_scale)

    def guide(self, dim: int, *, hidden_dim: int = 16) -> DensityGuide:
        """Make a guide for :class:`bayesattn.inference.SVI` that reads latents off the tokens.

        Args:
            dim: Width of the tokens.
            hidden_dim: Width of the network that reads.
        """
        shape = (self.num_frequencies, self.num_heads, self.latent_dim)
        return DensityGuide(self, "density_latent", dim, shape, hidden_dim=hidden_dim)

    def _frequencies(
        self, heads: pyro.plate, batch: Batch
    ) -> Float[Tensor, "sentence head frequency component"]:
        like, latent, hidden = batch.tokens, self.latent_dim, self.hidden_dim
        first = normal_prior(like, latent, hidden, scale=latent**-0.5)
        second = normal_prior(like, hidden, self.head_dim, scale=hidden**-0.5)
        with heads:
            generator = pyro.sample("generator_weight", first)
            outward = pyro.sample("frequency_weight", second)
        shape = (self.num_frequencies, self.num_heads, latent)
        scale = self.frequency_scale * softmax_frequency_scale(self.head_dim)
        with batch.plate:
            z = pyro.sample("density_latent", normal_prior(like, *shape, scale=1.0))
            frequencies = scale * implicit_frequencies(z, generator, outward)
            return pyro.deterministic("scaled_frequency", frequencies, event_dim=3)

    def _attention(
        self,
        query: Float[Tensor, "sentence head token component"],
        key: Float[Tensor, "sentence head token component"],
        frequencies: Float[Tensor, "sentence head frequency component"],
        mask: Bool[Tensor, "sentence token"] | None,
    ) -> Float[Tensor, "sentence head token token"]:
        left, right = (fourier_features(part, frequencies) for part in (query, key))
        logits = log_of_square((left @ right.mT).square(), self.floor)
        pairs = None if mask is None else mask[:, None, :, None] & mask[:, None, None, :]
        return masked_softmax(logits, pairs)


def implicit_frequencies(
    latent: Float[Tensor, "*batch frequency head latent"],
    generator: Float[Tensor, "head latent hidden"],
    outward: Float[Tensor, "head hidden component"],
) -> Float[Tensor, "*batch head frequency component"]:
    """Frequencies by an odd network of one hidden layer, one network a head.

    Args:
        latent: z of each frequency.
        generator: Weights into the hidden layer.
        outward: Weights out of it.
    """
    hidden = torch.einsum("...mhl,hlk->...hmk", latent, generator).tanh()
    return hidden @ outward
