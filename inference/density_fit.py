"""A named guide fitted to the recorded density, in raw or Laplace coordinates."""

from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from jaxtyping import Bool, Float
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from bayesattn.inference.coordinates import differentiable_value, identity, laplace
from bayesattn.inference.guide_fits import FIRST_SCALE, GUIDES, GuideFit
from bayesattn.inference.initialization import Init, initial_values
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.schedules import Number
from bayesattn.inference.step_loop import StepLoop

__all__ = ["DensityFit"]

_SITE = "unconstrained"


class DensityFit(GuideFit):
    """A named guide over the recorded density, whose unconstrained vector is one site."""

    def __init__(
        self,
        density: LogDensity,
        guide: str,
        loop: StepLoop,
        *,
        num_elbo_particles: int,
        init: Init,
        init_scale: Number | None,
        is_laplace: bool,
        **common: Any,
    ):
        super().__init__(density, loop, **common)
        self.dim = density.dim
        origin = torch.zeros(density.dim, device=density.device, dtype=density.dtype)
        points = None if init is None else initial_values(density, 1, init, loop.generator)
        if is_laplace:
            self.frame = laplace(density, generator=loop.generator, starts=points)
            points = self.frame.location[None] if points is None else points
        else:
            self.frame = identity(origin)
            points = initial_values(density, 1, None, loop.generator) if points is None else points
        start = init_to_value(values={_SITE: self.frame.invert(points)[0]})
        scale = init_scale or (1.0 if is_laplace else FIRST_SCALE)
        self.model = self._program
        self.guide = GUIDES[guide](self._program, init_loc_fn=start, init_scale=scale)
        self.elbo = Trace_ELBO(
            num_particles=num_elbo_particles, vectorize_particles=True, max_plate_nesting=0
        )
        self.begin()

    def watched(self) -> Float[Tensor, "evaluation dim"]:
        """Scores at the draws of the last loss."""
        return self._scores

    def names(self, entries: Bool[Tensor, " dim"]) -> list[str]:
        """Sites of some entries of the score."""
        return self.density.site_names(entries)

    def fields(self) -> dict[str, Any]:
        """Draws, made all at once."""
        with pyro.plate("draws", self.num_samples, dim=-1):
            trace = poutine.trace(self.guide).get_trace()
        trace.compute_log_prob()
        nodes: Any = trace.nodes
        log_q = sum(site["log_prob"] for site in nodes.values() if site["type"] == "sample")
        unconstrained = self.frame.apply(nodes[_SITE]["value"])
        return {
            "draws": {n: v[None] for n, v in self.density.constrain(unconstrained).items()},
            "draws_are": "iid_guide",
            "unconstrained": unconstrained[None],
            "sample_stats": {
                "lp": self.log_density(unconstrained)[None],
                "log_q": (log_q - self.frame.log_determinant())[None],
            },
        }

    def _program(self) -> None:
        like = self.frame.location
        flat = dist.Normal(torch.zeros_like(like), torch.ones_like(like)).to_event(1).mask(False)
        working = pyro.sample(_SITE, flat)
        subsample = self.density.draw_subsample(self.loop.generator)
        value, scores = differentiable_value(working, self.density, self.frame, subsample)
        self._scores = scores.reshape(-1, self.dim)
        pyro.factor("log_density", value)
