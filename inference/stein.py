r"""The Stein direction, and one step of all particles along it.

.. math:: \phi(x_i) = \frac1M \sum_j \left[ k(x_j, x_i)\, \frac{\nabla \log p(x_j)}{T}
          + \nabla_{x_j} k(x_j, x_i) \right]

Source:
    Liu and Wang (2016), Stein variational gradient descent, arXiv:1608.04471, eq. 8.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.inference.coordinates import Affine
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.optimizers import ScheduledOptimizer
from bayesattn.inference.particle_views import ParticleView
from bayesattn.inference.schedules import Number
from bayesattn.kernels import Kernel

__all__ = ["SVGDInfo", "SVGDState", "direction", "init", "remeasured", "step"]


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
        bandwidth: Of the kernel, in working coordinates, when it was last measured.
        values: Log density of each evaluation.
        scores: By unconstrained coordinates, of each evaluation.
    """

    log_density: Float[Tensor, " run"]
    stein_norm: Float[Tensor, " run"]
    bandwidth: Float[Tensor, " run"]
    values: Float[Tensor, " evaluation"]
    scores: Float[Tensor, "evaluation all"]


def direction(
    particles: Float[Tensor, "*batch particle dim"],
    score: Float[Tensor, "*batch particle dim"],
    kernel: Kernel,
    temperature: Number = 1.0,
) -> Float[Tensor, "*batch particle dim"]:
    """Steepest descent of KL from the particles to p^(1/T), in the kernel's function space.

    Args:
        particles: At least one.
        score: Gradient of the log density at each particle.
        kernel: Gives Gram matrix and repulsion.
        temperature: T; above one the particles spread more.
    """
    gram, repulsion, _ = kernel(particles)
    return (gram @ score / temperature + repulsion) / particles.shape[-2]


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


def step(
    state: SVGDState,
    density: LogDensity,
    view: ParticleView,
    kernel: Kernel,
    *,
    subsample: Mapping[str, Tensor] | None = None,
    temperature: Number = 1.0,
    progress: float = 0.0,
    bandwidth: Float[Tensor, " run"] | None = None,
) -> tuple[SVGDState, SVGDInfo]:
    """Move every particle once along :func:`direction`, by the optimizer's rule.

    Args:
        state: Its tensors are moved in place.
        density: Evaluated once, at all particles.
        view: What a particle is.
        kernel: Between particles in working coordinates.
        subsample: Indices of subsampled plates.
        temperature: T.
        progress: In [0, 1], for the optimizer's schedule.
        bandwidth: What to report of the kernel's; measured here by default, which takes about as
            long as the kernel itself.
    """
    values, scores = density.value_and_score(state.networks(view), subsample)
    inside, outside = view.split(scores)
    working = state.working.detach()
    phi = direction(working, state.metric.pull_back(inside), kernel, temperature)
    if bandwidth is None:
        bandwidth = kernel.squared_bandwidth(working).sqrt()
    state.working.grad = -phi
    if state.outside.requires_grad:
        state.outside.grad = -outside
    state.optimizer.step(progress)
    info = SVGDInfo(
        log_density=values.view(len(working), -1).mean(-1),
        stein_norm=phi.square().sum(-1).mean(-1).sqrt(),
        bandwidth=bandwidth,
        values=values,
        scores=scores,
    )
    return state, info


def remeasured(state: SVGDState, metric: Affine) -> SVGDState:
    """The same particles in other working coordinates; the optimizer starts anew with them."""
    with torch.no_grad():
        state.working.copy_(metric.invert(state.particles))
    # Momenta belong to the old coordinates.
    state.optimizer.forget(state.working)
    return state._replace(metric=metric)
