"""What attention's outputs say about observations: categorical, Bernoulli or normal."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from jaxtyping import Float
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from bayesattn.models.checks import check_settings

__all__ = ["Bernoulli", "Categorical", "Likelihood", "Normal"]


class Likelihood(ABC):
    """Turns a sentence's outputs into a distribution of its observation.

    A subclass for other observations overrides what differs from one real output.
    """

    @property
    def num_outputs(self) -> int:
        """How many outputs a sentence needs."""
        return 1

    @property
    def output_axis(self) -> str:
        """Name of the axis of the outputs."""
        return "output"

    @property
    def observes_floats(self) -> bool:
        """Whether observations are floating point numbers, not whole ones."""
        return True

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the axes of ``expected_target`` and of the likelihood's own sites."""
        return {"expected_target": ["sentence"]}

    @abstractmethod
    def __call__(
        self, outputs: Float[Tensor, "sentence output"]
    ) -> tuple[TorchDistributionMixin, Float[Tensor, "sentence *outcome"]]:
        """Give the distribution of each observation, and its expectation.

        Called outside of the plate of the sentences: it may sample what they have in common.
        """


@dataclass(frozen=True)
class Categorical(Likelihood):
    """One of several classes, counted from zero; the outputs are logits.

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
    def output_axis(self) -> str:
        """``class``."""
        return "class"

    @property
    def observes_floats(self) -> bool:
        """Classes are whole numbers."""
        return False

    @property
    def dims(self) -> dict[str, list[str]]:
        """``expected_target`` holds class probabilities."""
        return {"expected_target": ["sentence", "class"]}

    def __call__(
        self, outputs: Float[Tensor, "sentence output"]
    ) -> tuple[TorchDistributionMixin, Float[Tensor, "sentence output"]]:
        """Categorical distribution, and class probabilities."""
        return dist.Categorical(logits=outputs), outputs.softmax(-1)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Yes or no, 1.0 or 0.0; the output is a logit."""

    def __call__(
        self, outputs: Float[Tensor, "sentence 1"]
    ) -> tuple[TorchDistributionMixin, Float[Tensor, " sentence"]]:
        """Bernoulli distribution, and the probability of one."""
        logits = outputs.squeeze(-1)
        return dist.Bernoulli(logits=logits), logits.sigmoid()


@dataclass(frozen=True)
class Normal(Likelihood):
    """A real number: the output, and normal noise of unknown scale at the site ``noise_scale``.

    Attributes:
        noise_prior_scale: Of the half-normal prior of ``noise_scale``, in units of the observation.
    """

    noise_prior_scale: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def dims(self) -> dict[str, list[str]]:
        """``expected_target`` holds the mean."""
        return {"expected_target": ["sentence"], "noise_scale": []}

    def __call__(
        self, outputs: Float[Tensor, "sentence 1"]
    ) -> tuple[TorchDistributionMixin, Float[Tensor, " sentence"]]:
        """Normal distribution, and its mean."""
        prior = dist.HalfNormal(outputs.new_full((), self.noise_prior_scale))
        noise = pyro.sample("noise_scale", prior)
        mean = outputs.squeeze(-1)
        return dist.Normal(mean, noise), mean
