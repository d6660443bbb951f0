"""The steps of one run of EM, as a loop of steps needs them."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.running import ConvergenceWarning, Watched
from bayesattn.inference.schedules import Number

__all__ = ["EMInfo", "EMRun", "EMState", "rounding", "unconstrained_states"]


class EMState(NamedTuple):
    """What the next step needs.

    Attributes:
        runs: Of each run, site to constrained value.
    """

    runs: tuple[dict[str, Tensor], ...]


class EMInfo(NamedTuple):
    """What the reader of a run needs of one step; never read back.

    Attributes:
        log_density: Log joint density before the step, in nats.
        watched: The same, and the values of all sites.
    """

    log_density: Float[Tensor, " run"]
    watched: Watched


@runtime_checkable
class _Settings(Protocol):
    """What a run needs of :class:`bayesattn.inference.EM`."""

    def step(self, state: EMState, *args: Any, **kwargs: Any) -> EMState: ...

    def values(self, state: EMState, *args: Any, **kwargs: Any) -> Tensor: ...

    def posterior(self, density: LogDensity, draws: Any, **fields: Any) -> Posterior: ...


class EMRun:
    """The steps of one call of :meth:`bayesattn.inference.EM.run`.

    Args:
        em: The settings.
        density: Of the program.
        state: Moves with each step.
        tolerance: At or below which a rise is none; None to do all steps.
    """

    def __init__(
        self, em: _Settings, density: LogDensity, state: EMState, tolerance: Number | None
    ):
        self.em, self.density, self.state, self.tolerance = em, density, state, tolerance
        self.sizes = {site.name: site.shape.numel() for site in density.sites}
        self.dim, self.device = sum(self.sizes.values()), density.device
        self.latest: Tensor | None = None

    def advance(self, step: int) -> EMInfo:
        """Note the density, and move."""
        self.latest = self._values()
        info = EMInfo(self.latest, self._watched(self.latest))
        self.state = self.em.step(self.state, *self.density.args, **self.density.kwargs)
        return info

    def evaluate(self) -> Watched:
        """The density and values of the present state."""
        return self._watched(self._values())

    def snapshot(self) -> EMState:
        """The state, whose tensors no step writes to."""
        return self.state

    def is_settled(self) -> bool:
        """Whether the last step raised the density of no run by more than the tolerance."""
        if self.tolerance is None or self.latest is None:
            return False
        return bool((self._values() - self.latest <= self.tolerance).all())

    def state_dict(self) -> dict[str, Any]:
        """Values of all sites."""
        return {"runs": [dict(run) for run in self.state.runs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where a state was taken."""
        self.state = EMState(
            tuple({n: v.to(self.device) for n, v in run.items()} for run in state["runs"])
        )

    def figures(self, info: EMInfo) -> dict[str, float]:
        """What the bar shows."""
        return {"log density": float(info.log_density.mean())}

    def names(self, entries: Bool[Tensor, " dim"]) -> list[str]:
        """Sites of some entries of the values."""
        parts = entries.split(list(self.sizes.values()))
        return [name for name, bad in zip(self.sizes, parts, strict=True) if bool(bad.any())]

    def finish(
        self, snapshot: EMState, curves: dict[str, Tensor], attrs: dict[str, Any]
    ) -> Posterior:
        """Posterior of a state."""
        runs, density = snapshot.runs, self.density
        unconstrained = unconstrained_states(density, runs)
        values = density.value_and_score(unconstrained, is_in_loop=False)[0]
        problems = _falls(curves, rounding(density, values) ** 0.5)
        if problems:
            warnings.warn(f"EM: {'; '.join(problems)}", ConvergenceWarning, stacklevel=2)
        return self.em.posterior(
            density,
            {name: torch.stack([run[name] for run in runs])[:, None] for name in self.sizes},
            draws_are="point",
            unconstrained=unconstrained[:, None],
            sample_stats={"lp": values[:, None]},
            optimization=curves,
            attrs=attrs | {"problems": problems, "gradient_evaluations": 0},
        )

    def _values(self) -> Float[Tensor, " run"]:
        return self.em.values(self.state, *self.density.args, **self.density.kwargs)

    def _watched(self, values: Float[Tensor, " run"]) -> Watched:
        rows = [torch.cat([run[name].flatten() for name in self.sizes]) for run in self.state.runs]
        return Watched.of(values, torch.stack(rows))


def unconstrained_states(
    density: LogDensity, runs: Sequence[Mapping[str, Tensor]]
) -> Float[Tensor, "run dim"]:
    """States on the real line."""
    values = {site.name: torch.stack([run[site.name] for run in runs]) for site in density.sites}
    return density.unconstrain(values)


def rounding(density: LogDensity, values: Float[Tensor, " run"]) -> float:
    """Relative error of log densities, of the coarsest type among them and the program's data."""
    leaves = tree_leaves((values, density.args, dict(density.kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors)


def _falls(curves: Mapping[str, Tensor], tolerance: float) -> list[str]:
    """Steps at which the density fell by more than rounding, which no step of EM may do."""
    curve = curves.get("log_density")
    if curve is None or curve.shape[-1] < 2:
        return []
    allowed = tolerance * (1 + curve.abs().amax())
    fell = (curve.diff(dim=-1) < -allowed).nonzero()
    return [
        f"the log joint density of run {int(run)} fell at step {int(step)}, so that the M-step is "
        "none of this program"
        for run, step in fell[:1]
    ]
