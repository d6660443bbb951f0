"""The steps of one run of a routine of closed forms, as a loop of steps needs them."""

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.running import ConvergenceWarning, Watched
from bayesattn.inference.schedules import Number

__all__ = ["AscentRun", "AscentState", "rounding"]


class AscentState(NamedTuple):
    """What the next step needs.

    Attributes:
        runs: Of each run, name to value.
    """

    runs: tuple[dict[str, Tensor], ...]


@runtime_checkable
class _Settings(Protocol):
    """What a run needs of :class:`bayesattn.inference.ascent.Ascent`."""

    objective: ClassVar[str]

    def step(self, state: AscentState, *args: Any, **kwargs: Any) -> AscentState: ...

    def values(self, state: AscentState, *args: Any, **kwargs: Any) -> Tensor: ...

    def info(self, values: Tensor, watched: Watched) -> Any: ...

    def finished(self, density: LogDensity, state: AscentState, **fields: Any) -> Posterior: ...


class AscentRun:
    """The steps of one call of a routine's ``run``, none of which may lower its objective.

    Args:
        routine: The settings.
        density: Of the program.
        state: Moves with each step.
        tolerance: At or below which a rise is none; None to do all steps.
        settings: What the routine needs besides to make a posterior.
    """

    def __init__(
        self,
        routine: _Settings,
        density: LogDensity,
        state: AscentState,
        tolerance: Number | None,
        settings: Mapping[str, Any],
    ):
        self.routine, self.density, self.state = routine, density, _laid_out(state)
        self.tolerance, self.settings = tolerance, settings
        self.sizes = {name: value.numel() for name, value in state.runs[0].items()}
        self.dim, self.device = sum(self.sizes.values()), density.device
        self.latest: Tensor | None = None

    def advance(self, step: int) -> Any:
        """Note the objective, and move."""
        self.latest = self._values()
        info = self.routine.info(self.latest, self._watched(self.latest))
        moved = self.routine.step(self.state, *self.density.args, **self.density.kwargs)
        self.state = _laid_out(moved)
        return info

    def evaluate(self) -> Watched:
        """The objective and values of the present state."""
        return self._watched(self._values())

    def snapshot(self) -> AscentState:
        """The state, whose tensors no step writes to."""
        return self.state

    def is_settled(self) -> bool:
        """Whether the last step raised the objective of no run by more than the tolerance."""
        if self.tolerance is None or self.latest is None:
            return False
        return bool((self._values() - self.latest <= self.tolerance).all())

    def state_dict(self) -> dict[str, Any]:
        """Values of all runs."""
        return {"runs": [dict(run) for run in self.state.runs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where a state was taken."""
        self.state = AscentState(
            # Copied, since tensors of a file may lie in memory so that products round otherwise.
            tuple({n: v.to(self.device).clone() for n, v in run.items()} for run in state["runs"])
        )

    def figures(self, info: Any) -> dict[str, float]:
        """What the bar shows."""
        name = info._fields[0]
        return {name.replace("_", " "): float(getattr(info, name).mean())}

    def names(self, entries: Bool[Tensor, " dim"]) -> list[str]:
        """Names of some entries of the values."""
        parts = entries.split(list(self.sizes.values()))
        return [name for name, bad in zip(self.sizes, parts, strict=True) if bool(bad.any())]

    def finish(
        self, snapshot: AscentState, curves: dict[str, Tensor], attrs: dict[str, Any]
    ) -> Posterior:
        """Posterior of a state, with a warning of what is wrong with it."""
        problems = [
            f"{self.routine.objective} of run {run} fell at step {step}, so that the closed forms "
            "are none of this program"
            for curve in curves.values()
            for run, step in _first_fall(curve, rounding(self.density, curve) ** 0.5)
        ]
        about = attrs | {"problems": problems, "gradient_evaluations": 0}
        posterior = self.routine.finished(
            self.density, snapshot, optimization=curves, attrs=about, **self.settings
        )
        if posterior.attrs["problems"]:
            found = "; ".join(posterior.attrs["problems"])
            label = type(self.routine).__name__
            warnings.warn(f"{label}: {found}", ConvergenceWarning, stacklevel=2)
        return posterior

    def _values(self) -> Float[Tensor, " run"]:
        return self.routine.values(self.state, *self.density.args, **self.density.kwargs)

    def _watched(self, values: Float[Tensor, " run"]) -> Watched:
        rows = [torch.cat([run[name].flatten() for name in self.sizes]) for run in self.state.runs]
        return Watched.of(values, torch.stack(rows))


def _laid_out(state: AscentState) -> AscentState:
    """The same in one layout of memory, as a file keeps it, so that all rounding is equal."""
    return AscentState(
        tuple({name: value.contiguous() for name, value in run.items()} for run in state.runs)
    )


def rounding(density: LogDensity, values: Float[Tensor, "..."]) -> float:
    """Relative error of log densities, of the coarsest type among them and the program's data."""
    leaves = tree_leaves((values, density.args, dict(density.kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors)


def _first_fall(curve: Float[Tensor, "run step"], tolerance: float) -> list[tuple[int, int]]:
    """Run and step at which a curve first fell by more than rounding; none if it did not."""
    if curve.shape[-1] < 2:
        return []
    allowed = tolerance * (1 + curve.abs().amax())
    fell = (curve.diff(dim=-1) < -allowed).nonzero()
    return [(int(run), int(step)) for run, step in fell[:1]]
