"""Draws of a program's latent sites with all that a run tells of them, as plain data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Draws"]

# Not typing.Self, which the shape checks of the test run refuse.
# ruff: noqa: PYI019
_Self = TypeVar("_Self", bound="Draws")

KINDS = ("particles", "heads", "iid_guide", "markov", "point")


class Draws:
    """Draws of a program's latent sites, however they were found.

    A chain is one independent run. A draw is a particle, a head of the run's one network, an
    independent draw of a guide, or an iteration of a Markov chain, as ``draws_are`` says.

    Args:
        draws: Site to its values, ``(chain, draw, *shape)``, on the site's own support. Where draws
            are heads, without the axis of the plate of the heads, which became the draw axis.
        method: The routine's name.
        draws_are: ``"particles"``, ``"heads"``, ``"iid_guide"``, ``"markov"`` or ``"point"``.
        model: The Pyro program; without it there are no predictions.
        args: Its training arguments.
        kwargs: Its training keyword arguments.
        unconstrained: The draws on the real line, ``(chain, draw, dim)``.
        sample_stats: Name to figures of each draw, ``(chain, draw, *extra)``, ``lp`` among them.
        optimization: Name to figures of each step, ``(chain, step)``.
        point_estimates: Sites and parameters that were optimized: name to ``(chain, *shape)``.
        site_dims: Site to names of its axes after chain and draw, None where an axis has none; a
            shorter list names the last axes.
        attrs: What else there is to know: texts, numbers, lists. Where draws are heads,
            ``particle_plate`` names their plate and ``particle_plate_axes`` says, for each site,
            which axis it is in the site's own shape.

    Raises:
        ValueError: If there are no draws, or shapes do not fit each other.
    """

    def __init__(
        self,
        draws: Mapping[str, Tensor],
        *,
        method: str,
        draws_are: str,
        model: Callable | None = None,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        unconstrained: Tensor | None = None,
        sample_stats: Mapping[str, Tensor] | None = None,
        optimization: Mapping[str, Tensor] | None = None,
        point_estimates: Mapping[str, Tensor] | None = None,
        site_dims: Mapping[str, Sequence[str | None]] | None = None,
        attrs: Mapping[str, Any] | None = None,
    ):
        if draws_are not in KINDS:
            raise ValueError(f"draws_are must be one of {KINDS}, got {draws_are!r}")
        self.method, self.draws_are = method, draws_are
        self.model, self.args, self.kwargs = model, tuple(args), dict(kwargs or {})
        self.draws = _detached(draws)
        self.unconstrained = None if unconstrained is None else unconstrained.detach()
        self.sample_stats = _detached(sample_stats or {})
        self.optimization = _detached(optimization or {})
        self.point_estimates = _detached(point_estimates or {})
        self.site_dims = {name: tuple(names) for name, names in (site_dims or {}).items()}
        self.attrs = dict(attrs or {})
        self._check()

    @property
    def num_chains(self) -> int:
        """Number of independent runs."""
        return next(iter(self.draws.values())).shape[0]

    @property
    def num_draws(self) -> int:
        """Number of draws of each run."""
        return next(iter(self.draws.values())).shape[1]

    @property
    def particle_plate(self) -> str | None:
        """The plate whose slices are the draws, where draws are heads."""
        return self.attrs["particle_plate"] if self.draws_are == "heads" else None

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.draws:
            raise KeyError(f"no draws of site {site!r}; sites: {list(self.draws)}")
        return self.draws[site]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}{tuple(v.shape[2:])}" for name, v in self.draws.items())
        kind, size = self.draws_are.replace("_", " "), f"{self.num_chains} x {self.num_draws}"
        return f"{type(self).__name__}({self.method}, {size} (chain x draw) {kind}: {shapes})"

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Draws by site, chains one after another in the first axis unless grouped by chain."""
        if group_by_chain:
            return dict(self.draws)
        return {name: value.flatten(0, 1) for name, value in self.draws.items()}

    def network_samples(self) -> dict[str, Tensor]:
        """Values of all sites that make one run of the program: site to ``(row, *shape)``.

        A row is a draw, beside its chain's point estimates; where draws are heads, a row is a
        chain, whose heads are put together again.
        """
        if self.draws_are == "heads":
            axes = self.attrs["particle_plate_axes"]
            whole = {name: v.movedim(1, axes[name] + 1) for name, v in self.draws.items()}
            return {**whole, **self.point_estimates}
        estimates = {
            name: value.repeat_interleave(self.num_draws, 0)
            for name, value in self.point_estimates.items()
        }
        return {**self.get_samples(), **estimates}

    def by_chain(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo the flattening of :meth:`network_samples`: name to ``(chain, draw, *shape)``."""
        shape = (self.num_chains, 1 if self.draws_are == "heads" else self.num_draws)
        return {name: value.unflatten(0, shape) for name, value in rows.items()}

    def mean(self) -> dict[str, Tensor]:
        """Mean of each site over all draws."""
        return {name: value.mean((0, 1)) for name, value in self.draws.items()}

    def std(self) -> dict[str, Tensor]:
        """Standard deviation of each site over all draws."""
        return {name: value.flatten(0, 1).std(0) for name, value in self.draws.items()}

    def thin(self: _Self, num_draws: int) -> _Self:
        """Keep the given number of draws of each chain, evenly spaced.

        Raises:
            ValueError: If there are fewer, or if draws are heads, which make a network together.
        """
        if self.draws_are == "heads":
            raise ValueError("draws are the heads of one network, which cannot be thinned")
        if not 1 <= num_draws <= self.num_draws:
            raise ValueError(
                f"num_draws must be between 1 and {self.num_draws}, the draws of a chain, got "
                f"{num_draws}"
            )
        kept = torch.linspace(0, self.num_draws - 1, num_draws, dtype=torch.float64).round().long()
        return self._mapped(lambda value: value[:, kept.to(value.device)])

    def to(self: _Self, device: torch.device | str) -> _Self:
        """Move the draws and all that goes with them, the training arguments excepted."""
        return self._mapped(lambda value: value.to(device), lambda value: value.to(device))

    def replace(self: _Self, **changes: Any) -> _Self:
        """Return a copy in which some of the constructor's arguments are others."""
        return type(self)(**{**{name: getattr(self, name) for name in _FIELDS}, **changes})

    def _mapped(self: _Self, per_draw: Callable[[Tensor], Tensor], per_chain: Any = None) -> _Self:
        """Copy with a function applied to all tensors that have draws, and one to all others."""
        keep = per_chain or (lambda value: value)
        changes: dict[str, Any] = {
            "draws": {name: per_draw(value) for name, value in self.draws.items()},
            "sample_stats": {name: per_draw(value) for name, value in self.sample_stats.items()},
            "optimization": {name: keep(value) for name, value in self.optimization.items()},
            "point_estimates": {name: keep(value) for name, value in self.point_estimates.items()},
        }
        if self.unconstrained is not None:
            changes["unconstrained"] = per_draw(self.unconstrained)
        return self.replace(**changes)

    def _check(self) -> None:
        if not self.draws:
            raise ValueError("a posterior needs draws of at least one site, got none")
        first, shape = next((name, value.shape[:2]) for name, value in self.draws.items())
        for name, value in self.draws.items():
            if value.ndim < 2 or value.shape[:2] != shape:
                raise ValueError(
                    f"draws must be (chain, draw, *shape), alike for all sites; {first!r} starts "
                    f"with {tuple(shape)}, but {name!r} has shape {tuple(value.shape)}"
                )
        if 0 in shape:
            raise ValueError(
                f"a posterior needs at least one draw, got (chain, draw) = {tuple(shape)}"
            )
        per_draw = {"unconstrained": self.unconstrained, **self.sample_stats}
        for name, value in per_draw.items():
            if value is not None and value.shape[:2] != shape:
                raise ValueError(
                    f"{name!r} must start with (chain, draw) = {tuple(shape)}, got shape "
                    f"{tuple(value.shape)}"
                )
        for name, value in {**self.optimization, **self.point_estimates}.items():
            if value.shape[:1] != shape[:1]:
                raise ValueError(
                    f"{name!r} must start with an axis of {shape[0]} chains, got shape "
                    f"{tuple(value.shape)}"
                )
        axes = self.attrs.get("particle_plate_axes", {})
        if self.draws_are == "heads" and set(axes) != set(self.draws):
            raise ValueError(
                "where draws are heads, attrs['particle_plate_axes'] must say each site's axis; it "
                f"has {sorted(axes)} for the sites {sorted(self.draws)}"
            )


_FIELDS = (
    "draws",
    "method",
    "draws_are",
    "model",
    "args",
    "kwargs",
    "unconstrained",
    "sample_stats",
    "optimization",
    "point_estimates",
    "site_dims",
    "attrs",
)


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(tensor).detach() for name, tensor in tensors.items()}
