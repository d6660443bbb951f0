r"""Ways to keep the heads of a classifier apart while it is trained.

Each has a list of strengths, from which the validation part chooses; all else that training does
is the same. A strength is the weight of the penalty, or the α of repulsion; None is the α = 1 / N
of the posterior.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from bayesattn.head_penalties import HeadPenalty, orthogonality_penalty
from bayesattn.inference import Repulsion, SteinDiffusion, SteinForce, WassersteinForce
from bayesattn.kernels import Separate
from bayesattn.networks import head_partitions
from examples.reproduce.protocol import Build
from examples.reproduce.text_tasks import Sentences
from examples.reproduce.training import Budget, Trained, cross_entropy, train

__all__ = ["METHODS", "Diffusion", "Force", "Method", "Orthogonality", "Plain", "Start", "fit"]

Strength = float | None


class Start(NamedTuple):
    """What all methods begin with; see :func:`examples.reproduce.training.train`."""

    build: Build
    training: Sentences
    validation: Sentences
    budget: Budget
    seed: int


class Method(Protocol):
    """A way to train a classifier's heads."""

    @property
    def strengths(self) -> tuple[Strength, ...]:
        """What the validation part chooses from."""
        ...

    def train(self, start: Start, strength: Strength) -> Trained:
        """Train with one strength."""
        ...


def fit(method: Method, start: Start) -> Trained:
    """Train with each strength, and choose by the log score on the validation sentences."""
    tried = []
    for strength in method.strengths:
        trained = method.train(start, strength)
        tried.append(trained._replace(choices=trained.choices | {"strength": strength}))
    return max(tried, key=lambda trained: trained.choices["validation_log_score"])


@dataclass(frozen=True)
class Plain:
    """Nothing between heads."""

    strengths: tuple[Strength, ...] = (None,)

    def train(self, start: Start, strength: Strength) -> Trained:
        """Train as ever."""
        assert strength is None
        return train(*start)


@dataclass(frozen=True)
class Orthogonality:
    """The penalty of Lin et al. (2017) on attention maps."""

    strengths: tuple[Strength, ...]

    def train(self, start: Start, strength: Strength) -> Trained:
        """Train with the penalty, times the strength, as a part of the loss."""
        assert strength is not None
        return train(*start, loss=partial(_penalized, strength))


@dataclass(frozen=True)
class Force:
    """Repulsion at every step.

    Attributes:
        force: Between heads.
        strengths: As for all methods.
        decoupled: Whether the repulsion passes the optimizer by.
        has_prior: Whether heads have the prior that those of SPOS have.
    """

    force: SteinForce | WassersteinForce
    strengths: tuple[Strength, ...] = (None,)
    decoupled: bool = False
    has_prior: bool = False

    def train(self, start: Start, strength: Strength) -> Trained:
        """Train with gradients that the force has turned."""

        def attach(
            model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int
        ) -> Callable[[], None]:
            del num_steps
            return Repulsion(
                model,
                optimizer,
                method=self.force,
                decoupled=self.decoupled,
                alpha=strength,
                num_data=len(start.training.label),
                prior=_prior(model) if self.has_prior else None,
            ).step

        return train(*start, attach=attach)


@dataclass(frozen=True)
class Diffusion:
    """SPOS: Stein's force and burn-in in the first half of the steps, then heads sample.

    Only epochs of the second half are chosen from, so that the heads of the model are a sample.
    Their prior is normal, as wide as the weights that they begin with, and their step size a tenth
    of the learning rate, at which some of them would diverge.
    """

    strengths: tuple[Strength, ...] = (None,)

    def train(self, start: Start, strength: Strength) -> Trained:
        """Warm up in half of the steps, and sample in the other half."""

        def attach(
            model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int
        ) -> Callable[[], None]:
            return Repulsion(
                model,
                optimizer,
                method=SteinDiffusion(num_steps // 2, step_size=0.1),
                alpha=strength,
                num_data=len(start.training.label),
                prior=_prior(model),
                seed=start.seed,
            ).step

        return train(*start, attach=attach, first_epoch=start.budget.num_epochs // 2 + 1)


def _prior(model: nn.Module) -> Normal:
    """As wide as the heads' weights are at the beginning."""
    weights = torch.cat([part.particles().flatten() for part in head_partitions(model)])
    return Normal(0.0, float(weights.std()))


def _penalized(weight: float, model: nn.Module, batch: Sentences) -> Tensor:
    diversity = HeadPenalty(model, orthogonality_penalty)
    with diversity.observe():
        loss = cross_entropy(model, batch)
    return loss + weight * diversity.loss()


# α = .01 is the one published for most tasks. Decoupled, α is in units of the optimizer's steps,
# in which a coordinate moves by about one learning rate.
METHODS: dict[str, Method] = {
    "baseline": Plain(),
    "prior": Force(SteinForce(Separate()), has_prior=True),
    "lin_penalty": Orthogonality((0.01, 0.1)),
    "svgd": Force(SteinForce()),
    "svgd_hot": Force(SteinForce(), (0.01,)),
    "svgd_decoupled": Force(SteinForce(), (10.0, 100.0), decoupled=True),
    "wgd": Force(WassersteinForce()),
    "spos": Diffusion(),
}
