r"""A guide for latents of each sentence that correlate over heads, read off the sentence.

.. math:: (\mu, \sigma, c) = \mathrm{network}(\bar x_n), \qquad
    q(z_{nm}) = \tfrac12 N(\mu, \Sigma) + \tfrac12 N(-\mu, \Sigma), \qquad
    \Sigma = \operatorname{diag}(\sigma) R(c) \operatorname{diag}(\sigma)

for each frequency m, with one sign for all heads and R of
:mod:`bayesattn.logits.head_coupling`. The mixture's own density enters the evidence lower bound;
the divergence in closed form, :func:`~bayesattn.logits.head_coupling.coupled_divergence`, is an
upper bound of what it has there.

Source:
    Song et al. (2021), Implicit kernel attention, arXiv:2006.06147.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from jaxtyping import Bool, Float, Shaped
from pyro.infer.autoguide import AutoNormal, init_to_sample
from torch import Size, Tensor, nn
from torch.distributions import constraints

from bayesattn.logits.head_coupling import correlation_tril

__all__ = ["DensityEncoder", "DensityGuide", "SignedNormal"]


class SignedNormal(dist.TorchDistribution):
    """Coupled normal laws over heads around means of a random sign, one for all heads.

    Events are "head latent".

    Args:
        loc: The means before the sign, "*batch head latent".
        scale: Standard deviations around them, of the same shape, positive.
        coupling: "*batch head"; see :func:`bayesattn.logits.head_coupling.correlation_tril`.
    """

    arg_constraints: ClassVar[dict] = {
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
        "coupling": constraints.real_vector,
    }
    support = constraints.independent(constraints.real, 2)  # type: ignore[assignment]
    has_rsample = True

    def __init__(
        self,
        loc: Float[Tensor, "*batch head latent"],
        scale: Float[Tensor, "*batch head latent"],
        coupling: Float[Tensor, "*batch head"],
        validate_args: bool | None = None,
    ):
        self.loc, self.scale, self.coupling = loc, scale, coupling
        self._factor = correlation_tril(coupling)
        super().__init__(loc.shape[:-2], loc.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SignedNormal":
        """The same law for each entry of a larger batch."""
        loc, scale = (
            part.expand(*batch_shape, *self.event_shape) for part in (self.loc, self.scale)
        )
        coupling = self.coupling.expand(*batch_shape, self.event_shape[0])
        return SignedNormal(loc, scale, coupling, validate_args=False)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008 (as in torch)
        """Draw; a draw moves with means, scales and coupling, given its sign."""
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.scale.dtype, device=self.scale.device)
        half = torch.full((*shape[:-2], 1, 1), 0.5, dtype=noise.dtype, device=noise.device)
        sign = 2 * torch.bernoulli(half) - 1
        return sign * self.loc + self.scale * (self._factor @ noise)

    def log_prob(self, value: Float[Tensor, "*_draw head latent"]) -> Float[Tensor, "*_batch"]:
        """Log density of the mixture of both signs."""
        either = [self._log_normal(value - sign * self.loc) for sign in (1, -1)]
        return torch.logaddexp(*either) - math.log(2)

    def _log_normal(self, deviation: Tensor) -> Tensor:
        standard = deviation / self.scale
        factor = self._factor.expand(*standard.shape[:-2], *self._factor.shape[-2:])
        white = torch.linalg.solve_triangular(factor, standard, upper=False)
        diagonal = self._factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        volume = self.scale.log().sum((-2, -1)) + self.scale.shape[-1] * diagonal
        return -(white.square() + math.log(2 * math.pi)).sum((-2, -1)) / 2 - volume


class DensityEncoder(nn.Module):
    """Reads means, scales and couplings of latents off the mean of a sentence's tokens.

    Args:
        dim: Width of the tokens.
        num_heads: Number of heads.
        latent_dim: Width of the latents of a head.
        hidden_dim: Width of the hidden layer.
    """

    def __init__(self, dim: int, num_heads: int, latent_dim: int, hidden_dim: int):
        super().__init__()
        self.num_heads, self.latent_dim = num_heads, latent_dim
        width = num_heads * (2 * latent_dim + 1)
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden_dim), nn.Tanh(), nn.Linear(hidden_dim, width)
        )

    def forward(
        self,
        tokens: Float[Tensor, "sentence token dim"],
        mask: Bool[Tensor, "sentence token"] | None = None,
    ) -> tuple[
        Float[Tensor, "sentence head latent"],
        Float[Tensor, "sentence head latent"],
        Float[Tensor, "sentence head"],
    ]:
        """Means, scales and couplings; of no token's mean, those at zero."""
        seen = torch.ones_like(tokens[..., 0]) if mask is None else mask.to(tokens)
        count = seen.sum(-1, keepdim=True).clamp(min=1)
        mean = torch.einsum("st,std->sd", seen, tokens) / count
        figures = self.layers(mean)
        figures = figures.unflatten(-1, (self.num_heads, 2 * self.latent_dim + 1))
        means, logs, coupling = figures.split([self.latent_dim, self.latent_dim, 1], -1)
        return means, logs.exp(), coupling.squeeze(-1)


class DensityGuide(nn.Module):
    """A guide for SVI: sentences' latents from their tokens, all else normal on its own.

    Args:
        model: The program.
        site: Its site of the latents, in plate ``sentence``.
        dim: Width of the tokens.
        shape: Of one sentence's latents: frequency, head, latent.
        hidden_dim: Width of the encoder's hidden layer.

    Attributes:
        encoder: Of the latents.
        others: Guide of all other sites.
    """

    def __init__(
        self, model: Callable, site: str, dim: int, shape: tuple[int, int, int], *, hidden_dim: int
    ):
        super().__init__()
        self.site = site
        self.num_frequencies, num_heads, latent_dim = shape
        self.encoder = DensityEncoder(dim, num_heads, latent_dim, hidden_dim)
        hidden = poutine.block(model, hide=[site])
        # At zero, where other starts are, nothing of a network would tell which way to go.
        self.others = AutoNormal(hidden, init_loc_fn=init_to_sample)

    def forward(
        self,
        tokens: Float[Tensor, "sentence token dim"],
        mask: Bool[Tensor, "sentence token"] | None = None,
        target: Shaped[Tensor, " sentence"] | None = None,
    ) -> None:
        """Run the guide on the program's arguments."""
        self.others(tokens, mask, target)
        encoder = pyro.module("density_encoder", self.encoder)
        mean, scale, coupling = (part.unsqueeze(1) for part in encoder(tokens, mask))
        law = SignedNormal(mean, scale, coupling).expand((len(tokens), self.num_frequencies))
        with pyro.plate("sentence", len(tokens)):
            pyro.sample(self.site, law.to_event(1))
