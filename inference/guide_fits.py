"""How one guide is fitted: to the recorded density, or to the program itself.

Named guides need the program's density only, which is replayed, in coordinates of choice. Guides of
the user's, point estimates and programs with parameters to learn need the program's own sites.
"""

import abc
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from jaxtyping import Bool, Float
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, autoguide
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from bayesattn.inference import enumeration
from bayesattn.inference.coordinates import differentiable_value, identity, laplace
from bayesattn.inference.initialization import Init, initial_values
from bayesattn.inference.learned_parameters import learned_values
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.optimizers import ScheduledOptimizer
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.quiet import data_defaults
from bayesattn.inference.schedules import Number
from bayesattn.inference.step_loop import StepLoop

__all__ = ["GUIDES", "DensityFit", "GuideFit", "ProgramFit", "SVIInfo"]

GUIDES: dict[str, Callable[..., Any]] = {
    "normal": autoguide.AutoNormal,
    "multivariate_normal": autoguide.AutoMultivariateNormal,
    "low_rank": autoguide.AutoLowRankMultivariateNormal,
    "delta": autoguide.AutoDelta,
}
_SITE = "unconstrained"
_FIRST_SCALE = 0.1


class SVIInfo(NamedTuple):
    """What the reader of a run needs of one step; never read back.

    Attributes:
        elbo: Estimate before the step, in nats.
        values: The same, watched for non-finite values.
        scores: Score at draws of the guide, or gradients by the guide's parameters.
    """

    elbo: Float[Tensor, " run"]
    values: Float[Tensor, " evaluation"]
    scores: Float[Tensor, "evaluation dim"]


class GuideFit(abc.ABC):
    """One guide and what it is fitted to, as a loop of steps needs it.

    Args:
        density: Of the program.
        loop: That will run it; its generator draws what is random here.
        make_optimizer: Of the parameters.
        make_posterior: Of draws and other fields.
        num_samples: Draws of the fitted guide.
    """

    dim: int
    device: torch.device
    elbo: Any
    model: Callable
    guide: Callable

    def __init__(
        self,
        density: LogDensity,
        loop: StepLoop,
        *,
        make_optimizer: Callable[[list[Tensor]], ScheduledOptimizer],
        make_posterior: Callable[..., Posterior],
        num_samples: int,
    ):
        self.density, self.loop, self.device = density, loop, density.device
        self.num_samples, self.make_posterior = num_samples, make_posterior
        self.make_optimizer = make_optimizer
        self.parameters: dict[str, Tensor] = {}

    @abc.abstractmethod
    def watched(self) -> Float[Tensor, "evaluation dim"]:
        """What is watched of the last loss beside its value."""

    @abc.abstractmethod
    def names(self, entries: Bool[Tensor, " dim"]) -> list[str]:
        """Names of some entries of what is watched."""

    @abc.abstractmethod
    def fields(self) -> dict[str, Any]:
        """Draws of the fitted guide, one run's, and what else a posterior of them has."""

    def begin(self, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Run model and guide once, which makes their parameters, and an optimizer of these."""
        self.args, self.kwargs = args, dict(kwargs or {})
        self.differentiate()
        self.optimizer = self.make_optimizer(list(self.parameters.values()))

    def differentiate(self) -> Float[Tensor, ""]:
        """Return the negative ELBO; parameters get its gradients."""
        with (
            # Validation would stop at a non-finite value that the watch is to report.
            pyro.validation_enabled(False),
            data_defaults(self.density.args, self.density.kwargs),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message="Encountered ")
            with poutine.trace(param_only=True) as met:
                loss = self.elbo.differentiable_loss(
                    self.model, self.guide, *self.args, **self.kwargs
                )
            nodes: Any = met.trace.nodes
            found = {name: site["value"].unconstrained() for name, site in nodes.items()}
            found = {name: value for name, value in found.items() if value.requires_grad}
            gradients = torch.autograd.grad(loss, list(found.values()), allow_unused=True)
        for value, gradient in zip(found.values(), gradients, strict=True):
            value.grad = gradient
        self.parameters |= found
        return loss.detach()

    def advance(self, step: int) -> SVIInfo:
        """Move the parameters once."""
        known = len(self.parameters)
        elbo = -self.differentiate()[None]
        self.optimizer.extend(list(self.parameters.values())[known:])
        info = SVIInfo(elbo, elbo, self.watched())
        self.optimizer.step(step / self.loop.num_steps)
        return info

    def evaluate(self) -> tuple[Tensor, Tensor]:
        """Sums of the parameters, which are finite where they all are."""
        sums = torch.stack([value.detach().sum() for value in self.parameters.values()])
        return sums, sums.new_zeros(1, self.dim)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all parameters."""
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    def figures(self, info: SVIInfo) -> dict[str, float]:
        """What the bar shows."""
        return {"elbo": float(info.elbo)}

    def finish(
        self, snapshot: dict[str, Tensor], curves: dict[str, Tensor], attrs: dict[str, Any]
    ) -> Posterior:
        """Posterior of draws of the guide with these parameters."""
        with torch.no_grad():
            for name, value in snapshot.items():
                self.parameters[name].copy_(value)
            with (
                pyro.validation_enabled(False),
                data_defaults(self.density.args, self.density.kwargs),
            ):
                fields = self.fields()
        return self.make_posterior(optimization=curves, attrs=attrs, **fields)

    def log_density(self, unconstrained: Float[Tensor, "draw all"]) -> Float[Tensor, " draw"]:
        """Log density of draws; of minibatches where plates are subsampled."""
        subsample = self.density.draw_subsample(self.loop.generator)
        return self.density.value_and_score(unconstrained, subsample)[0]


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
        scale = init_scale or (1.0 if is_laplace else _FIRST_SCALE)
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
            scale = {} if self.is_point else {"init_scale": init_scale or _FIRST_SCALE}
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
        unconstrained = self.density.unconstrain(draws)
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
        with data_defaults(self.density.args, self.density.kwargs), torch.no_grad():
            nodes = self._guide_trace().nodes
        for site in self.density.sites:
            if site.name not in nodes:
                raise ValueError(f"the guide lacks the model's latent site {site.name!r}")
            shape = nodes[site.name]["value"].shape
            if shape != site.shape:
                raise ValueError(
                    f"the guide's site {site.name!r} must have shape {tuple(site.shape)}, as in "
                    f"the model, got {tuple(shape)}"
                )

    def _guide_trace(self) -> Any:
        args, kwargs = self.density.args, self.density.kwargs
        return poutine.trace(self.guide).get_trace(*args, **kwargs)
