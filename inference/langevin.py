r"""One step of particles that follow a Stein direction, Langevin drift, and noise.

.. math:: x_i \leftarrow x_i + \eta \left[ \phi(x_i) + \tau \nabla \log p(x_i) \right]
          + \sqrt{2 \eta}\, \xi_i

The noise is independent between coordinates. Between particles its covariance is
:math:`K / M + \tau I` ("exact"), under which the product of M posteriors is invariant as the step
size goes to zero, at any number of particles, as long as the kernel itself does not follow the
particles; or :math:`\tau I` ("paper"), under which it is too narrow where particles are few: with
one particle of a unit normal the variance is :math:`\tau / (1 + \tau)`.

Where particles are slices of one network, the same step with exact noise leaves the network's joint
posterior invariant: :math:`K / M + \tau I` is then a preconditioner between its slices, whose
divergence is the kernel's repulsion over M, and for kernels that are not radial, such as the linear
one, also the slope of :math:`k(x_i, y)` at :math:`y = x_i` over M, which exact noise adds.

Source:
    Zhang, Zhang, Carin and Chen (2020), Stochastic particle-optimization sampling,
    arXiv:1809.01293. Noise of covariance K: Gallego and Insua (2018), arXiv:1812.00071.
    Divergence of a preconditioner: Ma, Chen and Fox (2015), arXiv:1506.04696.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.inference.coordinates import Affine
from bayesattn.inference.fingerprints import Same
from bayesattn.inference.frozen_kernels import tensors_of, with_tensors
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.particle_views import ParticleView
from bayesattn.inference.running import Watched
from bayesattn.inference.schedules import Number
from bayesattn.inference.stein import SVGDInfo, movement
from bayesattn.kernels import Kernel, Terms

__all__ = ["LangevinStepper", "Noise", "SPOSState", "diffused", "diffusion"]

Noise = Literal["exact", "paper"]


class SPOSState(NamedTuple):
    """What the next step needs; runs are batched.

    Attributes:
        working: Particles in working coordinates.
        outside: Unconstrained values of what stands beside the particles; often empty.
        metric: From working to unconstrained coordinates, frozen.
        kernel: Between particles in working coordinates, frozen.
        outside_scale: Unit of each value outside of the particles, frozen.
    """

    working: Float[Tensor, "run particle dim"]
    outside: Float[Tensor, "run outside"]
    metric: Affine
    kernel: Kernel
    outside_scale: Float[Tensor, "run outside"]

    def networks(self, view: ParticleView) -> Float[Tensor, "evaluation all"]:
        """Unconstrained vectors to evaluate."""
        return view.assemble(self.metric.apply(self.working), self.outside)


def diffusion(
    terms: Terms,
    normal: Float[Tensor, "*batch particle dim"],
    *,
    noise: Noise,
    langevin: Number,
) -> tuple[Float[Tensor, "*batch particle dim"] | None, Float[Tensor, "*batch particle dim"]]:
    """What a noise adds to the drift, if anything, and the noise of unit step size over root two.

    Args:
        terms: Of the kernel at the particles.
        normal: Standard normal noise.
        noise: ``"exact"`` or ``"paper"``.
        langevin: τ.
    """
    if noise == "paper":
        return None, langevin**0.5 * normal
    own = terms.own_slope
    slope = None if own is None else own / normal.shape[-2]
    return slope, terms.fluctuate(normal, float(langevin))


def diffused(
    value_and_score: Callable[[Tensor], tuple[Tensor, Tensor]],
    state: SPOSState,
    normal: Float[Tensor, "run particle dim"],
    normal_outside: Float[Tensor, "run outside"],
    *,
    view: ParticleView,
    noise: Noise,
    langevin: Number,
    step_size: Number,
) -> tuple[Tensor, ...]:
    """Move particles once, as a pure function.

    Args:
        value_and_score: Log density and score of unconstrained vectors.
        state: Left as it is.
        normal: Standard normal noise of the particles.
        normal_outside: And of what is outside of them.
        view: What a particle is.
        noise: ``"exact"`` or ``"paper"``.
        langevin: τ.
        step_size: η.

    Returns:
        Particles and what is outside of them after the step; before it, the log density of each
        evaluation, and the figures of :func:`bayesattn.inference.stein.movement`.
    """
    figures = movement(
        value_and_score,
        state.working,
        state.outside,
        state.metric,
        1.0,
        view=view,
        kernel=state.kernel,
    )
    drift = figures.direction + langevin * figures.drive
    slope, fluctuation = diffusion(figures.terms, normal, noise=noise, langevin=langevin)
    if slope is not None:
        drift = drift + slope
    working = state.working + step_size * drift + (2 * step_size) ** 0.5 * fluctuation
    scale = state.outside_scale
    outside = state.outside + step_size * scale.square() * figures.outside
    outside = outside + (2 * step_size) ** 0.5 * scale * normal_outside
    shown = (figures.log_density, figures.stein_norm, figures.bandwidth)
    return working, outside, figures.values, *shown, figures.total, figures.columns


class LangevinStepper:
    """Steps on one log density, each of them one recorded or compiled graph.

    Args:
        density: Evaluated once a step, at all particles.
        view: What a particle is.
        kernel: The routine's, before it was frozen: stands for its graphs.
        noise: ``"exact"`` or ``"paper"``.
        langevin: τ.
        step_size: η.
        samples_outside: Whether what is outside of the particles moves too.
    """

    def __init__(
        self,
        density: LogDensity,
        view: ParticleView,
        kernel: Kernel,
        *,
        noise: Noise,
        langevin: Number,
        step_size: Number,
        samples_outside: bool,
    ):
        self.density, self.view, self._kernel = density, view, kernel
        self._settings = {"noise": noise, "langevin": langevin, "step_size": step_size}
        self._samples_outside = samples_outside
        self._graphs: dict[Hashable, Callable[..., tuple[Tensor, ...]]] = {}

    def __call__(
        self,
        state: SPOSState,
        generator: torch.Generator,
        subsample: Mapping[str, Tensor] | None = None,
    ) -> tuple[SPOSState, Float[Tensor, " evaluation"], SVGDInfo]:
        """Move once; also the log density of each evaluation before the step.

        Args:
            state: Left as it is.
            generator: Draws the noise.
            subsample: Indices of subsampled plates.
        """
        normals = [_normal(part, generator) for part in (state.working, state.outside)]
        constants = tensors_of(state.kernel)
        frozen = (*state.metric, state.outside_scale)
        tensors = (state.working, state.outside, *frozen, *normals, *constants)
        key = (state.metric.is_diagonal, len(constants))
        if key not in self._graphs:
            self._graphs[key] = self._graph(state.kernel, tensors, subsample)
        working, outside, values, *shown = self._graphs[key](tensors, subsample)
        log_density, stein_norm, bandwidth, total, columns = shown
        moved = state._replace(working=working)
        if self._samples_outside:
            moved = moved._replace(outside=outside)
        info = SVGDInfo(log_density, stein_norm, bandwidth, Watched(total, columns))
        return moved, values, info

    def _graph(
        self, frozen: Kernel, tensors: tuple[Tensor, ...], subsample: Mapping[str, Tensor] | None
    ) -> Callable[..., tuple[Tensor, ...]]:
        view, settings = self.view, self._settings

        def function(
            value_and_score: Callable[[Tensor], tuple[Tensor, Tensor]], *tensors: Tensor
        ) -> tuple[Tensor, ...]:
            working, outside, location, scale, unit, normal, beside, *constants = tensors
            kernel = with_tensors(frozen, constants)
            state = SPOSState(working, outside, Affine(location, scale), kernel, unit)
            return diffused(value_and_score, state, normal, beside, view=view, **settings)

        key = ("langevin", view.key, Same(self._kernel), *settings.values())
        return self.density.fused(function, key, tensors, subsample)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device)
    return noise.to(like.device, non_blocking=True)
