"""A guide fitted to the program itself: over its own sites, with its parameters learned along.

What needs this: guides of the user's, point estimates, and programs with parameters to learn.
"""

from collections.abc import Sequence
from typing import Any

import pyro.poutine as poutine
import torch
from jaxtyping import Bool, Float
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide.initialization import init_to_value
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from bayesattn.inference import enumeration
from bayesattn.inference.arguments import describe_arguments
from bayesattn.inference.guide_fits import FIRST_SCALE, GUIDES, GuideFit
from bayesattn.inference.handlers import first_line
from bayesattn.inference.initialization import Init, initial_values
from bayesattn.inference.learned_parameters import learned_values
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.quiet import data_defaults
from bayesattn.inference.schedules import Number
from bayesattn.inference.step_loop import StepLoop

__all__ = ["ProgramFit"]


class ProgramFit(GuideFit):
    """A guide over the program's own sites; parameters of the program learn too."""

    def __init__(
        self,
        density: LogDensity,
        guide: Any,
        loop: StepLoop,
        *,
        num_elbo_particles: int,
        init: Init,
        init_scale: Number | None,
        learned: Sequence[str],
        **common: Any,
    ):
        super().__init__(density, loop, **common)
        discrete = list(density.program.discrete)
        self.model = enumeration.marked(density.model) if discrete else density.model
        self.is_point, self.learned = guide == "delta", learned
        if isinstance(guide, str):
            row = density.constrain(initial_values(density, 1, init, loop.generator))
            start = init_to_value(values={name: value[0] for name, value in row.items()})
            scale = {} if self.is_point else {"init_scale": init_scale or FIRST_SCALE}
            hidden = poutine.block(self.model, hide=discrete)
            self.guide = GUIDES[guide](hidden, init_loc_fn=start, **scale)
        else:
            self.guide = guide
        make = TraceEnum_ELBO if discrete else Trace_ELBO
        nesting = density.program.plate_nesting
        self.elbo = make(num_particles=num_elbo_particles, max_plate_nesting=nesting)
        self._check_sites()
        self.begin(density.args, density.kwargs)
        self.dim = len(self.parameters)

    def watched(self) -> Float[Tensor, "evaluation dim"]:
        """Sums of the gradients by each parameter."""
        zero = next(iter(self.parameters.values())).new_zeros(())
        sums = [zero if p.grad is None else p.grad.sum() for p in self.parameters.values()]
        return torch.stack(sums[: self.dim])[None]

    def names(self, entries: Bool[Tensor, " dim"]) -> list[str]:
        """Names of some parameters."""
        return [name for name, bad in zip(self.parameters, entries, strict=False) if bool(bad)]

    def fields(self) -> dict[str, Any]:
        """Draws, made one by one."""
        count = 1 if self.is_point else self.num_samples
        traces = [self._guide_trace() for _ in range(count)]
        draws = {
            site.name: torch.stack([trace.nodes[site.name]["value"] for trace in traces])
            for site in self.density.sites
        }
        unconstrained = self._unconstrained(draws)
        stats = {"lp": self.log_density(unconstrained)[None]}
        if not self.is_point:
            log_q = torch.stack([trace.log_prob_sum() for trace in traces])
            stats["log_q"] = (log_q + self.density.log_determinant(unconstrained))[None]
        values = learned_values(self.density)
        return {
            "draws": {name: value[None] for name, value in draws.items()},
            "draws_are": "point" if self.is_point else "iid_guide",
            "unconstrained": unconstrained[None],
            "sample_stats": stats,
            "point_estimates": {name: values[name][None] for name in self.learned},
        }

    def _check_sites(self) -> None:
        args, kwargs = self.density.args, self.density.kwargs
        try:
            with data_defaults(args, kwargs), torch.no_grad():
                nodes = self._guide_trace().nodes
        except Exception as error:
            raise ValueError(
                f"the guide failed when run on {describe_arguments(args, kwargs)}, which are the "
                f"model's: {type(error).__name__}: {first_line(error)}"
            ) from error
        for site in self.density.sites:
            if site.name not in nodes:
                raise ValueError(f"the guide lacks the model's latent site {site.name!r}")
            shape = nodes[site.name]["value"].shape
            if shape != site.shape:
                raise ValueError(
                    f"the guide's site {site.name!r} must have shape {tuple(site.shape)}, as in "
                    f"the model, got {tuple(shape)}"
                )
        known = {site.name for site in self.density.sites}.union(self.density.program.discrete)
        extra = [name for name, node in nodes.items() if _is_latent(node) and name not in known]
        if extra:
            raise ValueError(
                f"the guide has sites {extra} that are no latent sites of the model; mark those "
                "that only help it by infer={'is_auxiliary': True}"
            )
        self._unconstrained(
            {site.name: nodes[site.name]["value"][None] for site in self.density.sites}
        )

    def _unconstrained(self, draws: dict[str, Tensor]) -> Float[Tensor, "draw all"]:
        try:
            return self.density.unconstrain(draws)
        except ValueError as error:
            raise ValueError(
                f"the guide draws values that the model cannot have: {error}"
            ) from error

    def _guide_trace(self) -> Any:
        args, kwargs = self.density.args, self.density.kwargs
        return poutine.trace(self.guide).get_trace(*args, **kwargs)


def _is_latent(node: Any) -> bool:
    """Whether a node of a trace is a site that is drawn and has a meaning of its own."""
    return (
        node["type"] == "sample"
        and not node["is_observed"]
        and not isinstance(node["fn"], _Subsample)
        and not node["infer"].get("is_auxiliary")
    )
