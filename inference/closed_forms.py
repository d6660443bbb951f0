"""What a model needs for closed forms: it is a Pyro program when called, and knows its steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

__all__ = ["ClosedForms", "MeanField", "check_closed_forms"]


@runtime_checkable
class ClosedForms(Protocol):
    """A Pyro program with closed forms, such as :class:`bayesattn.models.KeysFromQueries`.

    A state has the constrained value of every continuous latent site, as the program has it;
    further arguments are the program's own. An ``initial_state(*args, **kwargs)`` is welcome: it
    is where EM starts by default.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the Pyro program."""
        ...

    def log_density(self, state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Log joint density of state and data, hidden sites summed out, in nats.

        Of each independent problem, in any shape: their sum is that of the program. No Jacobian.
        """
        ...

    def e_step(self, state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Whatever the M-step needs to know of the hidden sites, such as responsibilities."""
        ...

    def m_step(
        self, state: Mapping[str, Tensor], expectations: Any, *args: Any, **kwargs: Any
    ) -> Mapping[str, Tensor]:
        """A state at which the expected log joint density is no lower."""
        ...


@runtime_checkable
class MeanField(Protocol):
    """A Pyro program whose best law of each latent site, given those of the others, is known.

    A state has the parameters of all these laws, under names of the program's choice. Further
    arguments are the program's own. An ``initial_state(*args, **kwargs)``, a value of every
    continuous latent site, is welcome: it is what the first law stands around by default.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the Pyro program."""
        ...

    def law_around(
        self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> Mapping[str, Tensor]:
        """State of narrow laws around constrained values of all sites."""
        ...

    def laws(
        self, state: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> Mapping[str, TorchDistributionMixin]:
        """Law of each site, independent of the others; as a whole it has the site's shape.

        ``Delta`` laws are allowed: their sites are then optimized.
        """
        ...

    def elbo(self, state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Evidence lower bound, exactly, in nats; of points, their entropy counts as none."""
        ...

    def coordinate_step(
        self, state: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> Mapping[str, Tensor]:
        """A state in which each law in turn is the best given the others: the bound never falls."""
        ...


def check_closed_forms(model: Callable, names: Sequence[str], routine: str) -> None:
    """Refuse a program without them.

    Raises:
        ValueError: With what it lacks.
    """
    missing = [name for name in names if not callable(getattr(model, name, None))]
    if missing:
        raise ValueError(
            f"{routine} needs a program with the methods {list(names)}, but {model!r} lacks "
            f"{missing}; SVGD, SVI and NUTS need none"
        )
