r"""Variational inference: a guide's parameters climb the evidence lower bound.

.. math:: \mathrm{ELBO}(\lambda) = \mathbb{E}_{q_\lambda(u)} [\log p(u) - \log q_\lambda(u)]

With one of the named guides the guide stands over the recorded log density, in raw or Laplace
coordinates. With a guide of the user's, or where the program has parameters to learn, Pyro's ELBO runs
on the program itself.

Source:
    Kucukelbir et al. (2017), Automatic differentiation variational inference, arXiv:1603.00788.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Unpack

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from jaxtyping import Float
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, autoguide
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from bayesattn.inference import enumeration
from bayesattn.inference.coordinates import differentiable_value, identity, laplace
from bayesattn.inference.initialization import Init, initial_values
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.program import data_defaults, module_tensors, modules_of
from bayesattn.inference.routine import DensityOptions, Optimizer, Routine, StepLoop
from bayesattn.inference.running import private_param_store, resolve_seed
from bayesattn.inference.schedules import Schedule, cosine_after_half

__all__ = ["SVI", "SVIInfo"]

_GUIDES: dict[str, Callable[..., Any]] = {
    "normal": autoguide.AutoNormal,
    "multivariate_normal": autoguide.AutoMultivariateNormal,
    "low_rank": autoguide.AutoLowRankMultivariateNormal,
    "delta": autoguide.AutoDelta,
}
_SITE = "unconstrained"


class SVIInfo(NamedTuple):
    """What the reader of a run needs of one step; never read back.

    Attributes:
        elbo: Estimate before the step, in nats.
        values: The same, watched for non-finite values.
        scores: Score at a draw of the guide, where the guide stands over the recorded density.
    """

    elbo: Float[Tensor, ""]
    values: Float[Tensor, " evaluation"]
    scores: Float[Tensor, "evaluation dim"]


class SVI(Routine):
    """Stochastic variational inference on a Pyro program.

    Args:
        model: A Pyro program.
        guide: ``"normal"`` (mean-field), ``"multivariate_normal"``, ``"low_rank"``, ``"delta"`` (MAP of
            the constrained values, without Jacobian, as Pyro's), or a guide of your own: a Pyro
            program over the same sites, or an instance of one of Pyro's autoguides.
        optimizer: Makes a torch optimizer of a list of tensors; Adam at 0.02 by default.
        schedule: Factor on the learning rate by progress in [0, 1].
        num_elbo_particles: Draws of the guide in each estimate of the ELBO.
        init_scale: First standard deviation of a named guide; by default 0.1 in raw coordinates and
            one in Laplace coordinates.
        coordinates: ``"raw"``, or ``"laplace"`` for badly scaled posteriors of some ten dimensions.
        **density: See :class:`bayesattn.inference.DensitySettings`.
    """

    def __init__(
        self,
        model: Callable,
        *,
        guide: Literal["normal", "multivariate_normal", "low_rank", "delta"] | Callable = "normal",
        optimizer: Optimizer | None = None,
        schedule: Schedule = cosine_after_half,
        num_elbo_particles: int = 1,
        init_scale: float | None = None,
        coordinates: Literal["raw", "laplace"] = "raw",
        **density: Unpack[DensityOptions],
    ):
        super().__init__(model, **density)
        if isinstance(guide, str) and guide not in _GUIDES:
            raise ValueError(
                f"guide must be one of {sorted(_GUIDES)} or a Pyro program, got {guide!r}"
            )
        if not isinstance(guide, str) and not callable(guide):
            raise ValueError(f"guide must be a name or a Pyro program, got {guide!r}")
        if num_elbo_particles < 1:
            raise ValueError(f"num_elbo_particles must be at least one, got {num_elbo_particles}")
        if init_scale is not None and init_scale <= 0:
            raise ValueError(f"init_scale must be positive, got {init_scale}")
        if coordinates not in ("raw", "laplace"):
            raise ValueError(f"coordinates must be 'raw' or 'laplace', got {coordinates!r}")
        if coordinates == "laplace" and (not isinstance(guide, str) or guide == "delta"):
            raise ValueError(
                "coordinates='laplace' changes what the guide stands over, so it goes with the guides "
                f"'normal', 'multivariate_normal' and 'low_rank' only, not with {guide!r}"
            )
        self.guide = guide
        self.optimizer = optimizer or functools.partial(torch.optim.Adam, lr=0.02)
        self.schedule = schedule
        self.num_elbo_particles = num_elbo_particles
        self.init_scale = init_scale
        self.coordinates = coordinates

    def run(
        self,
        *args: Any,
        num_steps: int,
        num_samples: int = 1000,
        num_runs: int = 1,
        seed: int | None = None,
        progress: bool = True,
        init: Init = None,
        check_every: int = 50,
        **kwargs: Any,
    ) -> Posterior:
        """Fit the guide given the program's arguments, and draw from it.

        Args:
            *args: The program's arguments.
            num_steps: Steps of the optimizer.
            num_samples: Independent draws of each fitted guide (one for ``"delta"``).
            num_runs: Independent restarts, which become chains.
            seed: Of starts, estimates and draws; fresh if None, and noted in the posterior.
            progress: Whether to show a progress bar.
            init: Where the guide's mean starts; see :func:`bayesattn.inference.initial_values`. Not
                for guides of your own.
            check_every: Steps between looks at the device: progress, non-finite values, a snapshot.
            **kwargs: The program's keyword arguments.

        Returns:
            Posterior of independent draws of the guide, with ``lp`` and ``log_q`` of each.

        Raises:
            NonFiniteError: If the ELBO or its gradient stops being finite; what there was is attached.
        """
        for name, value in {"num_samples": num_samples, "num_runs": num_runs}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least one, got {value}")
        seed, start = resolve_seed(seed), time.perf_counter()
        density = self.log_density(*args, **kwargs)
        seeds = torch.randint(
            2**31, (num_runs,), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        runs = []
        for index, run_seed in enumerate(seeds):
            label = "SVI" if num_runs == 1 else f"SVI {index + 1}/{num_runs}"
            loop = StepLoop(label, num_steps, run_seed, progress, check_every)
            with loop.random_state(), private_param_store():
                if self._is_flat(density):
                    fit: _Fit = _FlatFit(self, density, init, loop.generator)
                else:
                    fit = _ProgramFit(self, density, init, loop.generator)
                runs.append(self._fit(density, fit, loop, num_samples))
            if "interrupted" in runs[-1].attrs:
                break
        return self._joined(density, runs, {"seed": seed, "seconds": time.perf_counter() - start})

    def _is_flat(self, density: LogDensity) -> bool:
        """Whether a named guide can stand over the recorded density: nothing else is to be learned."""
        if not isinstance(self.guide, str) or self.guide == "delta":
            return False
        tensors = module_tensors(modules_of(self.model, density.args, density.kwargs)).values()
        learned = bool(density.program.parameters) or any(t.requires_grad for t in tensors)
        if learned and self.coordinates == "laplace":
            raise ValueError(
                "coordinates='laplace' needs a density without parameters to learn; the program has "
                f"pyro.param sites {list(density.program.parameters)} or modules with parameters"
            )
        return not learned

    def _fit(self, density: LogDensity, fit: "_Fit", loop: StepLoop, num_samples: int) -> Posterior:
        optimizer: torch.optim.Optimizer | None = None
        rates: list[float] = []
        known: set[int] = set()

        def advance(step: int) -> SVIInfo:
            nonlocal optimizer
            loss, parameters, scores = fit.loss()
            fresh = [p for p in parameters if id(p) not in known]
            known.update(id(p) for p in fresh)
            if optimizer is None:
                optimizer = self.optimizer(fresh)
            elif fresh:
                optimizer.add_param_group({"params": fresh})
            rates.extend(group["lr"] for group in optimizer.param_groups[len(rates) :])
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.schedule(step / loop.num_steps)
            optimizer.step()
            optimizer.zero_grad()
            return SVIInfo(-loss, -loss[None], scores)

        def finish(good: Any, curves: dict[str, Tensor], attrs: dict[str, Any]) -> Posterior:
            fit.restore(good)
            curves = {name: values[None] for name, values in curves.items()}
            return fit.posterior(num_samples, curves, attrs)

        return loop.run(
            density, advance, fit.snapshot, lambda info: {"elbo": float(info.elbo)}, finish
        )

    def _joined(
        self, density: LogDensity, runs: list[Posterior], attrs: dict[str, Any]
    ) -> Posterior:
        """Runs as chains of one posterior."""

        def chains(parts: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

        steps = min((c.shape[1] for run in runs for c in run.optimization.values()), default=0)
        shortest = [{n: c[:, :steps] for n, c in run.optimization.items()} for run in runs]
        unconstrained = [run.unconstrained for run in runs if run.unconstrained is not None]
        return self.posterior(
            density,
            chains([run.draws for run in runs]),
            draws_are=runs[0].draws_are,
            unconstrained=torch.cat(unconstrained),
            sample_stats=chains([run.sample_stats for run in runs]),
            optimization=chains(shortest),
            point_estimates=chains([run.point_estimates for run in runs]),
            attrs=runs[-1].attrs | attrs,
        )


class _Fit:
    """One guide over one program, as the loop of steps needs it."""

    def __init__(self, routine: SVI, density: LogDensity):
        self.routine, self.density = routine, density
        self.parameters: dict[str, Tensor] = {}

    def differentiated(self, elbo: Any, model: Callable, guide: Callable, *args: Any, **kw: Any):
        """Differentiate the negative ELBO, and note the parameters that it met."""
        with poutine.trace(param_only=True) as met:
            loss = elbo.differentiable_loss(model, guide, *args, **kw)
            loss.backward()
        self.parameters = {
            name: site["value"].unconstrained() for name, site in met.trace.nodes.items()
        }
        return loss.detach()

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all parameters."""
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    def restore(self, good: dict[str, Tensor]) -> None:
        """Put copies of parameters back."""
        with torch.no_grad():
            for name, value in good.items():
                self.parameters[name].copy_(value)

    def loss(self) -> tuple[Tensor, list[Tensor], Tensor]:
        """Negative ELBO, the parameters that it has gradients for, and scores to watch."""
        raise AssertionError("each kind of fit has its own loss")

    def posterior(self, count: int, curves: dict[str, Tensor], attrs: dict[str, Any]) -> Posterior:
        """Draws of the fitted guide."""
        raise AssertionError("each kind of fit has its own draws")


class _FlatFit(_Fit):
    """A named guide over the recorded density, in one site."""

    def __init__(
        self, routine: SVI, density: LogDensity, init: Init, generator: torch.Generator
    ) -> None:
        super().__init__(routine, density)
        origin = torch.zeros(density.dim, device=density.device, dtype=density.dtype)
        laplacian = routine.coordinates == "laplace"
        self.frame = laplace(density, generator=generator) if laplacian else identity(origin)
        self.generator = generator
        if laplacian and init is None:
            start = origin
        else:
            start = self.frame.invert(initial_values(density, 1, init, generator))[0]
        make = _GUIDES[routine.guide]  # type: ignore[index]
        scale = routine.init_scale or (1.0 if laplacian else 0.1)
        self.guide = make(
            self._program, init_loc_fn=init_to_value(values={_SITE: start}), init_scale=scale
        )
        self.elbo = Trace_ELBO(
            num_particles=routine.num_elbo_particles, vectorize_particles=True, max_plate_nesting=0
        )
        self.scores = origin[None]
        with data_defaults(density.args, density.kwargs):
            self.guide()

    def _program(self) -> None:
        like = self.frame.location
        flat = dist.Normal(torch.zeros_like(like), torch.ones_like(like)).to_event(1).mask(False)
        working = pyro.sample(_SITE, flat)
        subsample = self.density.draw_subsample(self.generator)
        value, scores = differentiable_value(working, self.density, self.frame, subsample)
        self.scores = scores.reshape(-1, self.density.dim)
        pyro.factor("log_density", value)

    def loss(self) -> tuple[Tensor, list[Tensor], Tensor]:
        loss = self.differentiated(self.elbo, self._program, self.guide)
        return loss, list(self.parameters.values()), self.scores

    def posterior(self, count: int, curves: dict[str, Tensor], attrs: dict[str, Any]) -> Posterior:
        with torch.no_grad(), pyro.plate("draws", count, dim=-1):
            trace = poutine.trace(self.guide).get_trace()
        trace.compute_log_prob()
        log_q = sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample")
        unconstrained = self.frame.apply(trace.nodes[_SITE]["value"])
        subsample = self.density.draw_subsample(self.generator)
        values, _ = self.density.value_and_score(unconstrained, subsample)
        scale = self.frame.scale if self.frame.is_diagonal else self.frame.scale.diagonal()
        log_q = log_q - scale.log().sum()
        draws = self.density.constrain(unconstrained)
        return self.routine.posterior(
            self.density,
            {name: value[None] for name, value in draws.items()},
            draws_are="iid_guide",
            unconstrained=unconstrained[None],
            sample_stats={"lp": values[None], "log_q": log_q.detach()[None]},
            optimization=curves,
            attrs=attrs,
        )


class _ProgramFit(_Fit):
    """A guide over the program's own sites, by Pyro's ELBO; parameters of the program learn too."""

    def __init__(
        self, routine: SVI, density: LogDensity, init: Init, generator: torch.Generator
    ) -> None:
        super().__init__(routine, density)
        discrete = list(density.program.discrete)
        self.model = enumeration.marked(routine.model) if discrete else routine.model
        self.is_point = routine.guide == "delta"
        if isinstance(routine.guide, str):
            row = density.constrain(initial_values(density, 1, init, generator))
            start = {name: value[0] for name, value in row.items()}
            hidden = poutine.block(self.model, hide=discrete)
            self.guide = _GUIDES[routine.guide](hidden, init_loc_fn=init_to_value(values=start))
        elif init is not None:
            raise ValueError("init goes with named guides; a guide of your own has its own start")
        else:
            self.guide = routine.guide
        make = TraceEnum_ELBO if discrete else Trace_ELBO
        nesting = density.program.plate_nesting
        self.elbo = make(num_particles=routine.num_elbo_particles, max_plate_nesting=nesting)
        self.nothing = torch.zeros(1, density.dim, device=density.device, dtype=density.dtype)

    def loss(self) -> tuple[Tensor, list[Tensor], Tensor]:
        args, kwargs = self.density.args, self.density.kwargs
        with data_defaults(args, kwargs):
            loss = self.differentiated(self.elbo, self.model, self.guide, *args, **kwargs)
        return loss, list(self.parameters.values()), self.nothing

    def posterior(self, count: int, curves: dict[str, Tensor], attrs: dict[str, Any]) -> Posterior:
        density, names = self.density, [site.name for site in self.density.sites]
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        log_q = []
        with torch.no_grad(), data_defaults(density.args, density.kwargs):
            for _ in range(1 if self.is_point else count):
                trace = poutine.trace(self.guide).get_trace(*density.args, **density.kwargs)
                missing = [name for name in names if name not in trace.nodes]
                if missing:
                    raise ValueError(f"the guide lacks the model's latent sites {missing}")
                log_q.append(trace.log_prob_sum())
                for name in names:
                    rows[name].append(trace.nodes[name]["value"].detach())
        draws = {name: torch.stack(values) for name, values in rows.items()}
        unconstrained = density.unconstrain(draws)
        subsample = density.draw_subsample()
        values, _ = density.value_and_score(unconstrained, subsample)
        stats = {"lp": values[None]}
        if not self.is_point:
            logarithm = density.log_determinant(unconstrained)
            stats["log_q"] = (torch.stack(log_q) + logarithm)[None]
        learned = {name: pyro.param(name).detach().clone() for name in density.program.parameters}
        return self.routine.posterior(
            density,
            {name: value[None] for name, value in draws.items()},
            draws_are="point" if self.is_point else "iid_guide",
            unconstrained=unconstrained[None],
            sample_stats=stats,
            optimization=curves,
            point_estimates={name: value[None] for name, value in learned.items()},
            attrs=attrs,
        )
