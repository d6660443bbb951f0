"""What attention's outputs say about observations: categorical, Bernoulli or normal.

Each likelihood is called outside of the data plate, where it may sample what it needs itself, and
returns the distribution of the observations given the outputs.
"""

from dataclasses import dataclass
from typing import Protocol

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Bernoulli", "Categorical", "Likelihood", "Normal"]


class Likelihood(Protocol):
    """Turns outputs into a distribution of observations.

    Attributes:
        num_outputs: How many outputs a sequence needs.
        dims: Names of the axes of the likelihood's own sites and of ``expected_target``.
    """

    @property
    def num_outputs(self) -> int:
        """How many outputs a sequence needs."""
        ...

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of all axes of the sites that the likelihood adds."""
        ...

    def __call__(
        self, outputs: Float[Tensor, "sentence output"]
    ) -> tuple[dist.TorchDistribution, Float[Tensor, "sentence *outcome"]]:
        """Distribution of each observation, and its expectation."""
        ...


@dataclass(frozen=True)
class Categorical:
    """One of several classes; the outputs are logits.

    Attributes:
        num_classes: At least two.
    """

    num_classes: int

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least two, got {self.num_classes}")

    @property
    def num_outputs(self) -> int:
        """One logit a class."""
        return self.num_classes

    @property
    def dims(self) -> dict[str, list[str]]:
        """``expected_target`` holds class probabilities."""
        return {"expected_target": ["sentence", "class"]}

    def __call__(
        self, outputs: Float[Tensor, "sentence output"]
    ) -> tuple[dist.TorchDistribution, Float[Tensor, "sentence output"]]:
        """Categorical distribution, and class probabilities."""
        return dist.Categorical(logits=outputs), outputs.softmax(-1)


@dataclass(frozen=True)
class Bernoulli:
    """Yes or no; the output is a logit, the observation a float of zero or one."""

    @property
    def num_outputs(self) -> int:
        """One logit."""
        return 1

    @property
    def dims(self) -> dict[str, list[str]]:
        """``expected_target`` holds the probability of one."""
        return {"expected_target": ["sentence"]}

    def __call__(
        self, outputs: Float[Tensor, "sentence 1"]
    ) -> tuple[dist.TorchDistribution, Float[Tensor, " sentence"]]:
        """Bernoulli distribution, and the probability of one."""
        logits = outputs[..., 0]
        return dist.Bernoulli(logits=logits), logits.sigmoid()


@dataclass(frozen=True)
class Normal:
    """A real number with normal noise of unknown scale.

    Attributes:
        noise_prior_scale: Of the half-normal prior of ``noise_scale``, in units of the observation.
    """

    noise_prior_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.noise_prior_scale <= 0:
            raise ValueError(f"noise_prior_scale must be positive, got {self.noise_prior_scale}")

    @property
    def num_outputs(self) -> int:
        """One mean."""
        return 1

    @property
    def dims(self) -> dict[str, list[str]]:
        """``expected_target`` holds the mean."""
        return {"expected_target": ["sentence"], "noise_scale": []}

    def __call__(
        self, outputs: Float[Tensor, "sentence 1"]
    ) -> tuple[dist.TorchDistribution, Float[Tensor, " sentence"]]:
        """Normal distribution, and its mean."""
        prior = dist.HalfNormal(outputs.new_tensor(self.noise_prior_scale))
        noise = pyro.sample("noise_scale", prior)
        mean = outputs[..., 0]
        return dist.Normal(mean, torch.as_tensor(noise)), mean
