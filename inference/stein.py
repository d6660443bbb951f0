r"""One step of all particles along a direction such as Stein's.

.. math:: \phi(x_i) = \frac1M \sum_j \left[ k(x_j, x_i)\, \frac{\nabla \log p(x_j)}{T}
          + \nabla_{x_j} k(x_j, x_i) \right]

Source:
    Liu and Wang (2016), Stein variational gradient descent, arXiv:1608.04471, eq. 8.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.inference.adam import AdamRule
from bayesattn.inference.coordinates import Affine
from bayesattn.inference.directions import Direction, stein_direction
from bayesattn.inference.fingerprints import Same
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.optimizers import ScheduledOptimizer
from bayesattn.inference.particle_views import ParticleView
from bayesattn.inference.running import Watched
from bayesattn.inference.scalars import Scalars
from bayesattn.inference.schedules import Number
from bayesattn.kernels import Kernel, Terms

__all__ = [
    "Movement",
    "SVGDInfo",
    "SVGDState",
    "Stepper",
    "direction",
    "init",
    "movement",
    "remeasured",
]


class SVGDState(NamedTuple):
    """What the next step needs; runs are batched.

    Attributes:
        working: Particles in working coordinates: those in which distances are measured.
        outside: Unconstrained values of what is optimized beside the particles; often empty.
        metric: From working to unconstrained coordinates, one for each run.
        optimizer: Over the two tensors above, which it moves in place.
    """

    working: Float[Tensor, "run particle dim"]
    outside: Float[Tensor, "run outside"]
    metric: Affine
    optimizer: ScheduledOptimizer

    @property
    def particles(self) -> Float[Tensor, "run particle dim"]:
        """Particles in unconstrained coordinates."""
        return self.metric.apply(self.working.detach())

    def networks(self, view: ParticleView) -> Float[Tensor, "evaluation all"]:
        """Unconstrained vectors to evaluate."""
        return view.assemble(self.particles, self.outside.detach())

    def copied(self) -> "SVGDState":
        """The same state, which later steps do not move."""
        working, outside = self.working.detach().clone(), self.outside.detach().clone()
        return self._replace(working=working, outside=outside)


class SVGDInfo(NamedTuple):
    """What the reader of a run needs; never read back.

    Attributes:
        log_density: Mean over evaluations, before the step, in nats.
        stein_norm: Root mean square over particles of the direction's norm.
        bandwidth: Of the kernel, in working coordinates; NaN where it has none.
        watched: Sums of values and scores, to be looked at for what is not finite.
    """

    log_density: Float[Tensor, " run"]
    stein_norm: Float[Tensor, " run"]
    bandwidth: Float[Tensor, " run"]
    watched: Watched


class Movement(NamedTuple):
    """All figures of one step.

    Attributes:
        log_density: As in :class:`SVGDInfo`, and so are the next two.
        stein_norm: ...
        bandwidth: ...
        total: Sum of the values of all evaluations.
        columns: Sum of their scores.
        direction: Of the particles, in working coordinates.
        outside: Score of what is outside of the particles.
        drive: Score of the particles, in working coordinates, over the temperature.
        values: Log density of each evaluation.
        terms: Of the kernel.
    """

    log_density: Float[Tensor, " run"]
    stein_norm: Float[Tensor, " run"]
    bandwidth: Float[Tensor, " run"]
    total: Float[Tensor, ""]
    columns: Float[Tensor, " all"]
    direction: Float[Tensor, "run particle dim"]
    outside: Float[Tensor, "run outside"]
    drive: Float[Tensor, "run particle dim"]
    values: Float[Tensor, " evaluation"]
    terms: Terms


def direction(
    particles: Float[Tensor, "*batch particle dim"],
    score: Float[Tensor, "*batch particle dim"],
    kernel: Kernel,
    temperature: Number | Tensor = 1.0,
) -> Float[Tensor, "*batch particle dim"]:
    """Steepest descent of KL from the particles to p^(1/T), in the kernel's function space.

    Args:
        particles: At least one.
        score: Gradient of the log density at each particle.
        kernel: Gives Gram matrix and repulsion.
        temperature: T; above one the particles spread more.
    """
    # Without a copy where there is nothing to divide by: scores are as large as the particles.
    is_one = not isinstance(temperature, Tensor) and temperature == 1
    parts = stein_direction(kernel(particles), score if is_one else score / temperature)
    return parts.drive + parts.repulsion


def init(
    particles: Float[Tensor, "run particle dim"],
    outside: Float[Tensor, "run outside"],
    metric: Affine,
    make_optimizer: Callable[[list[Tensor]], ScheduledOptimizer],
    *,
    move_outside: bool = True,
) -> SVGDState:
    """Start from given unconstrained particles.

    Raises:
        ValueError: Without particles.
    """
    if particles.shape[-2] == 0:
        raise ValueError("SVGD needs at least one particle, got none")
    working = metric.invert(particles).detach().clone().requires_grad_()
    outside = outside.detach().clone().requires_grad_(move_outside and outside.numel() > 0)
    moved = [tensor for tensor in (working, outside) if tensor.requires_grad]
    return SVGDState(working, outside, metric, make_optimizer(moved))


def movement(
    value_and_score: Callable[[Tensor], tuple[Tensor, Tensor]],
    working: Float[Tensor, "run particle dim"],
    outside: Float[Tensor, "run outside"],
    metric: Affine,
    temperature: Number | Tensor,
    *,
    view: ParticleView,
    kernel: Kernel,
    direction: Direction = stein_direction,
) -> Movement:
    """Figures of one step, as a pure function.

    Args:
        value_and_score: Log density and score of unconstrained vectors.
        working: Particles in working coordinates.
        outside: Unconstrained values beside them.
        metric: From working to unconstrained coordinates.
        temperature: T.
        view: What a particle is.
        kernel: Between particles in working coordinates.
        direction: From the kernel and the scores to where particles go.
    """
    values, scores = value_and_score(view.assemble(metric.apply(working), outside))
    inside, beside = view.split(scores)
    terms = kernel(working)
    drive = metric.pull_back(inside) / temperature
    parts = direction(terms, drive)
    phi = parts.drive + parts.repulsion
    squared = terms.squared_bandwidth
    missing = values.new_full((len(working),), torch.nan)
    return Movement(
        log_density=values.view(len(working), -1).mean(-1),
        stein_norm=phi.square().sum(-1).mean(-1).sqrt(),
        bandwidth=missing if squared is None else squared.sqrt().to(values.dtype),
        total=values.sum(),
        columns=scores.sum(0),
        direction=phi,
        outside=beside,
        drive=drive,
        values=values,
        terms=terms,
    )


class Stepper:
    """Steps on one log density with one kernel, each of them one recorded or compiled graph.

    Args:
        density: Evaluated once a step, at all particles.
        view: What a particle is.
        kernel: Between particles in working coordinates.
        direction: From the kernel and the scores to where particles go.
    """

    def __init__(
        self,
        density: LogDensity,
        view: ParticleView,
        kernel: Kernel,
        direction: Direction = stein_direction,
    ):
        self.density, self.view, self.kernel = density, view, kernel
        self.direction = direction
        self._graphs: dict[Hashable, Callable[..., tuple[Tensor, ...]]] = {}
        self._scalars = Scalars()

    def __call__(
        self,
        state: SVGDState,
        *,
        subsample: Mapping[str, Tensor] | None = None,
        temperature: Number = 1.0,
        progress: float = 0.0,
    ) -> SVGDInfo:
        """Move every particle once along the direction, by the optimizer's rule.

        Args:
            state: Its tensors are moved in place.
            subsample: Indices of subsampled plates.
            temperature: T.
            progress: In [0, 1], for the optimizer's schedule.
        """
        working, outside, metric, optimizer = state
        rule, is_moved = optimizer.rule, outside.requires_grad
        numbers, moments = [float(temperature)], []
        if rule is not None:
            moments = optimizer.moments()
            numbers += optimizer.coefficients(rule, progress)
        tensors = (working, outside, *metric, self._scalars(numbers, working), *moments)
        key = (rule, is_moved, metric.is_diagonal)
        if key not in self._graphs:
            self._graphs[key] = self._graph(rule, is_moved, tensors, subsample)
        figures = self._graphs[key](tensors, subsample)
        if rule is None:
            working.grad = -figures[5]
            if is_moved:
                outside.grad = -figures[6]
            optimizer.step(progress)
            # Not kept alive through the next step.
            working.grad = outside.grad = None
        else:
            optimizer.accept(figures[5:])
        log_density, stein_norm, bandwidth, total, columns = figures[:5]
        return SVGDInfo(log_density, stein_norm, bandwidth, Watched(total, columns))

    def _graph(
        self,
        rule: AdamRule | None,
        is_moved: bool,
        tensors: tuple[Tensor, ...],
        subsample: Mapping[str, Tensor] | None,
    ) -> Callable[..., tuple[Tensor, ...]]:
        """All figures of a step as one function; with a rule, what it makes of them instead."""
        view, kernel, direction = self.view, self.kernel, self.direction

        def function(
            value_and_score: Callable[[Tensor], tuple[Tensor, Tensor]],
            working: Tensor,
            outside: Tensor,
            location: Tensor,
            scale: Tensor,
            scalars: Tensor,
            *moments: Tensor,
        ) -> tuple[Tensor, ...]:
            metric = Affine(location, scale)
            figures = movement(
                value_and_score,
                working,
                outside,
                metric,
                scalars[0],
                view=view,
                kernel=kernel,
                direction=direction,
            )
            if rule is None:
                return figures[:7]
            mean, square, *beside = moments
            moved = rule(working, -figures.direction, mean, square, scalars[1:3])
            if is_moved:
                mean, square = beside
                moved += rule(outside, -figures.outside, mean, square, scalars[3:])
            return (*figures[:5], *moved)

        key = (direction, view.key, Same(kernel), rule, is_moved)
        return self.density.fused(function, key, tensors, subsample)


def remeasured(state: SVGDState, metric: Affine) -> SVGDState:
    """The same particles in other working coordinates; the optimizer starts anew with them."""
    with torch.no_grad():
        state.working.copy_(metric.invert(state.particles))
    # Momenta belong to the old coordinates.
    state.optimizer.forget(state.working)
    return state._replace(metric=metric)
