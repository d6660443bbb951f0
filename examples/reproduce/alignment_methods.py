r"""Ways to match the queries and keys of a model while it is trained, all with as many tries.

Each weight of the alignment is a try, from the same start, on the same batches and with the same
dropout. Training without alignment has no weight to choose, and gets as many tries with other
orders of batches and other dropout instead, the first of them that of all rivals: whoever chooses
the best of three by the validation part has an advantage, which is the same for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bayesattn.divergences import (
    MMD,
    Adversarial,
    ConditionalTransport,
    Divergence,
    EntropicTransport,
)
from bayesattn.inference import Alignment
from examples.reproduce.sampled_points import SampledPoints

__all__ = [
    "METHODS",
    "Aligned",
    "AlignmentMethod",
    "AlignmentRun",
    "Restarts",
    "Setting",
    "Unaligned",
]

# A divergence, or what makes one with parameters of its own for a number of heads and a width.
AnyDivergence = Divergence | Callable[[int, int], nn.Module]


class AlignmentRun(Protocol):
    """What one training has besides the loss of its task."""

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int
    ) -> Callable[[], None]:
        """Begin with an untrained model, and give what is called before each step."""
        ...

    def loss(self, compute: Callable[[], Tensor]) -> Tensor:
        """Compute the loss of the task, within which the model is called, and add to it."""
        ...


class Setting(NamedTuple):
    """One try.

    Attributes:
        choice: What names it among those of its method: a weight, or the number of a restart.
        restart: Which order of batches and which dropout; zero is that of all rivals.
        begin: Gives what the training has besides its task; ``begin(seed)``.
    """

    choice: float
    restart: int
    begin: Callable[[int], AlignmentRun]


class AlignmentMethod(Protocol):
    """A way to train, with the settings that the validation part chooses from."""

    def settings(self) -> list[Setting]:
        """Give all tries."""
        ...


@dataclass(frozen=True)
class Restarts:
    """No alignment, and tries that differ by chance alone."""

    number: int = 3

    def settings(self) -> list[Setting]:
        """Give a try for each restart."""
        return [Setting(float(k), k, lambda seed: Unaligned()) for k in range(self.number)]


@dataclass(frozen=True)
class Aligned:
    """Alignment by a divergence.

    Attributes:
        divergence: Between queries and keys.
        is_learned: Whether that is what makes one for each layer instead.
        weights: λ, of the sum over layers and heads.
        adversary_rate: Learning rate of the divergence's own parameters.
        max_points: So many points of a cloud are taken at each step, others each time.
    """

    divergence: AnyDivergence
    is_learned: bool = False
    weights: tuple[float, ...] = (1.0, 0.1, 0.01)
    adversary_rate: float = 0.01
    max_points: int = 256

    def settings(self) -> list[Setting]:
        """Give a try for each weight."""

        def begin(weight: float) -> Callable[[int], AlignmentRun]:
            return lambda seed: _AlignedRun(self, weight, seed)

        return [Setting(weight, 0, begin(weight)) for weight in self.weights]


class Unaligned:
    """Nothing besides the task."""

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int
    ) -> Callable[[], None]:
        """Do nothing before a step."""
        del model, optimizer, num_steps
        return lambda: None

    def loss(self, compute: Callable[[], Tensor]) -> Tensor:
        """Give the loss of the task."""
        return compute()


class _AlignedRun:
    """A divergence's parameters have an optimizer of their own, and are no part of the model."""

    def __init__(self, method: Aligned, weight: float, seed: int):
        self.method, self.weight, self.seed = method, weight, seed
        self.alignment: Any = None

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int
    ) -> Callable[[], None]:
        """Make the alignment of a model, with adversaries whose start depends on the seed alone.

        What is called before a step lets them take one of theirs.
        """
        del optimizer, num_steps
        alignment = Alignment(model, self._divergence(), self.weight, seed=self.seed)
        groups = alignment.parameter_groups(lr=self.method.adversary_rate)
        adversaries = torch.optim.Adam(groups) if groups else None
        self.alignment = alignment

        def before_step() -> None:
            if adversaries is not None:
                adversaries.step()
                adversaries.zero_grad()
            alignment.step()

        return before_step

    def loss(self, compute: Callable[[], Tensor]) -> Tensor:
        """Compute the loss of the task while the model is observed, and add the alignment's."""
        with self.alignment.observe():
            value = compute()
        return value + self.alignment.loss()

    def _divergence(self) -> Any:
        """Make the method's divergence one of some points."""
        divergence, some = self.method.divergence, (self.method.max_points, self.seed)
        if self.method.is_learned:
            return lambda num_heads, dim: SampledPoints(divergence(num_heads, dim), *some)
        return SampledPoints(divergence, *some)


METHODS: dict[str, AlignmentMethod] = {
    "baseline": Restarts(),
    "gan": Aligned(Adversarial, is_learned=True),
    "ot": Aligned(EntropicTransport()),
    "ct": Aligned(ConditionalTransport.learned, is_learned=True),
    "mmd": Aligned(MMD()),
}
