"""Two posteriors that every contestant can run: logistic regression and self-attention regression.

Each is written once per manner of writing: as a Pyro program of one latent vector and no plate
(Pyro's own SVGD mixes the particles of programs with several vectors), and as batched torch
arithmetic; :mod:`tests.benchmarks.jax_contestants` has them in NumPyro and JAX. All have the same
density up to a constant.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional as F

from bayesattn.functional import attention

__all__ = ["HEADS", "NOISE", "PROBLEMS", "WIDTH", "Problem"]

NUM_ROWS, NUM_FEATURES = 1000, 50
HEADS, WIDTH, LENGTH, SENTENCES = 2, 16, 16, 32
NOISE = 0.5


class Problem(NamedTuple):
    """A posterior.

    Attributes:
        name: "a" or "b".
        title: What it is.
        dim: Number of latent dimensions.
        program: In Pyro; leading axes of its latent are allowed.
        data: Arguments of the program.
        value: By hand: log density of each row of a matrix of particles, up to a constant.
        value_and_score: The same with its gradient.
        particle_counts: That are measured.
    """

    name: str
    title: str
    dim: int
    program: Callable[..., None]
    data: tuple[Tensor, ...]
    value: Callable[..., Tensor]
    value_and_score: Callable[..., tuple[Tensor, Tensor]]
    particle_counts: tuple[int, ...]

    @property
    def device(self) -> str:
        """Where the data are."""
        return str(self.data[0].device)

    def on(self, device: str) -> "Problem":
        """The same with its data elsewhere."""
        return self._replace(data=tuple(part.to(device) for part in self.data))

    def starts(self, num_particles: int) -> Tensor:
        """Particles that all contestants begin from."""
        generator = torch.Generator().manual_seed(num_particles)
        starts = 0.3 * torch.randn(num_particles, self.dim, generator=generator)
        return starts.to(self.data[0].device)


# ---------------------------------------------------------------- (a) logistic regression


def logistic_regression(features: Tensor, labels: Tensor) -> None:
    """The Pyro program of (a)."""
    prior = dist.Normal(features.new_zeros(features.shape[1]), 1.0).to_event(1)
    weight = pyro.sample("weight", prior)
    pyro.sample("label", dist.Bernoulli(logits=weight @ features.T).to_event(1), obs=labels)


def logistic_value(particles: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Log density of (a) by hand."""
    logits = particles @ features.T
    likelihood = logits @ labels - F.softplus(logits).sum(1)
    return likelihood - 0.5 * particles.square().sum(1)


def logistic_value_and_score(
    particles: Tensor, features: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, and its gradient."""
    logits = particles @ features.T
    value = logits @ labels - F.softplus(logits).sum(1) - 0.5 * particles.square().sum(1)
    return value, torch.addmm(particles, labels - logits.sigmoid(), features, beta=-1)


def _logistic_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(NUM_ROWS, NUM_FEATURES, generator=generator)
    truth = torch.randn(NUM_FEATURES, generator=generator) / math.sqrt(NUM_FEATURES)
    chance = torch.sigmoid(features @ truth)
    return features, (torch.rand(NUM_ROWS, generator=generator) < chance).float()


# ---------------------------------------------------------------- (b) self-attention regression


def attention_regression(tokens: Tensor, target: Tensor) -> None:
    """The Pyro program of (b): two heads, an output matrix, the mean over tokens, a readout."""
    size = 4 * WIDTH**2 + WIDTH
    weights = pyro.sample("weights", dist.Normal(tokens.new_zeros(size), 1.0).to_event(1))
    matrices = weights[..., : 4 * WIDTH**2] / math.sqrt(WIDTH)
    query, key, value, output = matrices.unflatten(-1, (4, WIDTH, WIDTH)).unbind(-3)
    parts = [
        torch.einsum("std,...dhc->...shtc", tokens, matrix.unflatten(-1, (HEADS, -1)))
        for matrix in (query, key, value)
    ]
    merged = attention(*parts).transpose(-3, -2).flatten(-2)
    features = (merged @ output.unsqueeze(-3)).mean(-2)
    mean = (features @ weights[..., 4 * WIDTH**2 :].unsqueeze(-1)).squeeze(-1)
    pyro.sample("target", dist.Normal(mean, NOISE).to_event(1), obs=target)


def attention_value(particles: Tensor, tokens: Tensor, target: Tensor) -> Tensor:
    """Log density of (b) by hand: every product is one batched matrix product."""
    count, (sentences, length, width) = len(particles), tokens.shape
    matrices = particles[:, : 4 * width**2].view(count, 4, width, width) / math.sqrt(width)
    projection = matrices[:, :3].transpose(1, 2).reshape(count, width, 3 * width)
    projected = tokens.view(1, -1, width).expand(count, -1, -1) @ projection
    parts = projected.view(count * sentences, length, 3, HEADS, width // HEADS)
    query, key, value = parts.permute(2, 0, 3, 1, 4)
    weights = torch.softmax(query @ key.mT / math.sqrt(width // HEADS), -1)
    merged = (weights @ value).transpose(1, 2).reshape(count, sentences * length, width)
    features = (merged @ matrices[:, 3]).view(count, sentences, length, width).mean(2)
    mean = (features @ particles[:, 4 * width**2 :, None]).squeeze(-1)
    likelihood = -0.5 * ((mean - target) / NOISE).square().sum(1)
    return likelihood - 0.5 * particles.square().sum(1)


def attention_value_and_score(
    particles: Tensor, tokens: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, and its gradient by automatic differentiation."""

    def total(rows: Tensor) -> tuple[Tensor, Tensor]:
        values = attention_value(rows, tokens, target)
        return values.sum(), values

    score, values = torch.func.grad(total, has_aux=True)(particles)
    return values, score


def _attention_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(SENTENCES, LENGTH, WIDTH, generator=generator)
    return tokens, tokens.amax(1)[:, 0] + 0.1 * torch.randn(SENTENCES, generator=generator)


def problem(name: str, **parts: Any) -> tuple[str, Problem]:
    """One entry of the table."""
    return name, Problem(name, **parts)


PROBLEMS: dict[str, Problem] = dict(
    [
        problem(
            "a",
            title=f"logistic regression, N={NUM_ROWS}, D={NUM_FEATURES}",
            dim=NUM_FEATURES,
            program=logistic_regression,
            data=_logistic_data(),
            value=logistic_value,
            value_and_score=logistic_value_and_score,
            particle_counts=(25, 100, 400),
        ),
        problem(
            "b",
            title=f"self-attention regression, {HEADS} heads, D={4 * WIDTH**2 + WIDTH}",
            dim=4 * WIDTH**2 + WIDTH,
            program=attention_regression,
            data=_attention_data(),
            value=attention_value,
            value_and_score=attention_value_and_score,
            particle_counts=(50,),
        ),
    ]
)
