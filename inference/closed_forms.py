"""What a model needs for EM: it is a Pyro program when called, and knows its E- and M-step."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["ClosedForms", "check_closed_forms"]

_NAMES = ("log_density", "e_step", "m_step")


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


def check_closed_forms(model: Callable) -> None:
    """Refuse a program without them.

    Raises:
        ValueError: With what it lacks.
    """
    missing = [name for name in _NAMES if not callable(getattr(model, name, None))]
    if missing:
        raise ValueError(
            f"EM needs a program with the methods {list(_NAMES)}, but {model!r} lacks {missing}; "
            "SVGD, SVI and NUTS need none"
        )
