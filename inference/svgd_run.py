"""The steps of one call of :meth:`bayesattn.inference.SVGD.run`, as a loop of steps takes them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bayesattn.inference import stein
from bayesattn.inference.coordinates import Affine
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.metrics import Metric, curvature_metric, metric_of
from bayesattn.inference.particle_views import ParticleView
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.running import Watched
from bayesattn.inference.schedules import Number
from bayesattn.inference.stein import SVGDInfo, SVGDState
from bayesattn.inference.stein_statistics import stein_discrepancy
from bayesattn.inference.step_loop import StepLoop
from bayesattn.kernels import IMQ

if TYPE_CHECKING:
    # By its whole name, which a type checker at run time can resolve.
    import bayesattn.inference.svgd

__all__ = ["SVGDRun"]


class SVGDRun:
    """The steps of one call of :meth:`SVGD.run`.

    Attributes:
        state: Moves with each step.
        num_steps: By which progress is measured.
    """

    def __init__(
        self,
        svgd: "bayesattn.inference.svgd.SVGD",
        density: LogDensity,
        view: ParticleView,
        state: SVGDState,
        metric: Metric,
        loop: StepLoop,
    ):
        self.svgd, self.density, self.view, self.loop = svgd, density, view, loop
        self.state, self.frame = state, state.metric
        self.metric: Metric = metric
        self.dim, self.device = density.dim, density.device
        self.num_steps = loop.num_steps
        self.stop_below_ksd: Number | None = None
        self.stepper = svgd.stepper(density, view)

    def advance(self, step: int) -> SVGDInfo:
        """Measure the particles anew where it is time, and move them."""
        svgd, progress = self.svgd, step / self.num_steps
        if step and step % svgd.metric_every == 0 and progress <= svgd.metric_until:
            self.state = stein.remeasured(self.state, self._measured(self.state.particles))
        self.state, info = svgd.step(self.state, self.stepper, self.loop.generator, progress)
        return info

    def evaluate(self) -> Watched:
        """Values and scores of the present state."""
        subsample = self.density.draw_subsample(self.loop.generator)
        networks = self.state.networks(self.view)
        return Watched.of(*self.density.value_and_score(networks, subsample, is_in_loop=False))

    def snapshot(self) -> SVGDState:
        """A copy of the state."""
        return self.state.copied()

    def is_settled(self) -> bool:
        """Whether the discrepancy of every run is below the bound."""
        if self.stop_below_ksd is None:
            return False
        particles = self.state.particles
        _, scores = self.density.value_and_score(particles.flatten(0, 1), is_in_loop=False)
        scale = particles.std(-2, keepdim=True)
        kernel = IMQ((2 * self.dim) ** 0.5)
        scores = scores.reshape(particles.shape) * scale
        discrepancy = stein_discrepancy(particles / scale, scores, kernel)
        return bool((discrepancy < self.stop_below_ksd).all())

    def state_dict(self) -> dict[str, Any]:
        """Particles, coordinates and the optimizer's state."""
        state = self.state
        return {
            "working": state.working.detach(),
            "outside": state.outside.detach(),
            "metric": [*state.metric],
            "frame": [*self.frame],
            "optimizer": state.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where a state was taken."""
        metric, frame = (
            Affine(*(part.to(self.device) for part in state[name])) for name in ("metric", "frame")
        )
        with torch.no_grad():
            self.state.working.copy_(state["working"])
            self.state.outside.copy_(state["outside"])
        self.state.optimizer.load_state_dict(state["optimizer"])
        self.state, self.frame = self.state._replace(metric=metric), frame

    def figures(self, info: SVGDInfo) -> dict[str, float]:
        """What the bar shows."""
        return {
            "log density": float(info.log_density.mean()),
            "stein norm": float(info.stein_norm.mean()),
        }

    def names(self, entries: Bool[Tensor, " dim"]) -> list[str]:
        """Sites of some entries of the score."""
        return self.density.site_names(entries)

    def finish(
        self, snapshot: SVGDState, curves: dict[str, Tensor], attrs: dict[str, Any]
    ) -> Posterior:
        """Posterior of a state."""
        state, density, view = snapshot, self.density, self.view
        networks = state.networks(view)
        values, scores = density.value_and_score(
            networks, density.draw_subsample(self.loop.generator), is_in_loop=False
        )
        temperature = self.svgd.temperature_at(attrs["num_steps"] / self.num_steps)
        drive = state.metric.pull_back(view.split(scores)[0]) / temperature
        parts = self.stepper.direction(self.stepper.kernel(state.working), drive)
        fields = view.lay_out(density, networks, values)
        fields["sample_stats"]["stein_norm"] = (parts.drive + parts.repulsion).norm(dim=-1)
        count = {"gradient_evaluations": attrs["num_steps"] * len(networks)}
        fields["attrs"] = fields.get("attrs", {}) | attrs | count
        return self.svgd.posterior(
            density,
            fields.pop("draws"),
            unconstrained=state.particles,
            optimization=curves,
            **fields,
        )

    def _measured(self, particles: Float[Tensor, "run particle dim"]) -> Affine:
        if self.metric == "curvature":
            return curvature_metric(self.density, particles, self.frame)
        return metric_of(particles, self.metric, self.frame)
