r"""Stochastic particle-optimization sampling of a Pyro program: SVGD with noise, as a sampler.

A run begins as SVGD, which finds the posterior and its scale. Then metric and bandwidth are frozen,
the particles move by :func:`bayesattn.inference.langevin.diffused`, and their states are kept.

Source:
    Zhang, Zhang, Carin and Chen (2020), Stochastic particle-optimization sampling,
    arXiv:1809.01293. Heads as particles: An et al. (2020), Repulsive attention, arXiv:2009.09364.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bayesattn.argument_checks import check_choice, check_count, check_positive
from bayesattn.inference.checkpoints import Checkpoint, resumed_seed
from bayesattn.inference.coordinates import Affine
from bayesattn.inference.frozen_kernels import tensors_of, with_tensors
from bayesattn.inference.initialization import Init
from bayesattn.inference.langevin import LangevinStepper, Noise, SPOSState
from bayesattn.inference.learned_parameters import warn_of_held_parameters
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.metrics import MetricChoice
from bayesattn.inference.particle_views import ParticleView
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.routine import DensityOptions, Routine
from bayesattn.inference.running import Watched
from bayesattn.inference.schedules import Number
from bayesattn.inference.stein import SVGDInfo
from bayesattn.inference.step_loop import StepLoop
from bayesattn.inference.svgd import SVGD
from bayesattn.inference.svgd_run import SVGDRun
from bayesattn.kernels import Kernel, Separate, SiteKernel

__all__ = ["SPOS", "SPOSState"]


class SPOS(Routine):
    """Stochastic particle-optimization sampling of a Pyro program.

    Args:
        model: A Pyro program.
        num_particles: Copies of all latents, each of which becomes a chain; 20 by default. Under
            exact noise each chain's own law is the posterior, at any number of them.
        particle_plate: Instead: name of the plate whose slices are the particles of one network.
            Under exact noise the network samples its joint posterior, and is the chain.
        noise: ``"exact"``, or ``"paper"``: as published, too narrow where particles are few.
        langevin: Weight τ of each particle's own Langevin dynamics beside the Stein direction.
        step_size: η, in working coordinates, where the posterior is near unit scale: its variance
            comes out larger by about η (τ + 1) / 2 of itself. Values outside of the particles move
            in units of their own curvature at the end of the transient.
        outside: With ``particle_plate``, what sites outside of it do after the transient:
            ``"sample"`` (by Langevin dynamics) or ``"fixed"``.
        kernel: In working coordinates; IMQ with the median rule by default.
        metric: As in :class:`bayesattn.inference.SVGD`; measured in the transient.
        coordinates: ``"raw"``, or ``"laplace"`` for badly scaled posteriors of some ten dimensions.
        **density: ``compile``, ``chunk_size``, ``stochastic``, ``max_plate_nesting``: see
            :class:`bayesattn.inference.DensitySettings`.

    Raises:
        ValueError: On settings that do not go together.
    """

    def __init__(
        self,
        model: Callable,
        *,
        num_particles: int | None = None,
        particle_plate: str | None = None,
        noise: Noise = "exact",
        langevin: Number = 1.0,
        step_size: Number = 0.05,
        outside: Literal["sample", "fixed"] = "sample",
        kernel: Kernel | SiteKernel | None = None,
        metric: MetricChoice = "auto",
        coordinates: Literal["raw", "laplace"] = "raw",
        **density: Unpack[DensityOptions],
    ):
        super().__init__(model, **density)
        check_choice("noise", noise, ("exact", "paper"))
        check_choice("outside", outside, ("sample", "fixed"))
        check_positive("step_size", step_size)
        if langevin != 0:
            check_positive("langevin", langevin)
        if particle_plate is None and outside != "sample":
            raise ValueError(f"outside={outside!r} goes with particle_plate; none was given")
        if particle_plate is None and num_particles is None:
            num_particles = 20
        self.noise: Noise = noise
        self.langevin, self.step_size, self.outside = langevin, step_size, outside
        self.transient = SVGD(
            model,
            num_particles=num_particles,
            particle_plate=particle_plate,
            kernel=kernel,
            metric=metric,
            coordinates=coordinates,
        )
        # One set of graphs for both phases.
        self.transient.density_settings = self.density_settings

    def run(
        self,
        *args: Any,
        warmup_steps: int,
        num_samples: int,
        thinning: int = 10,
        num_runs: int = 1,
        seed: int | None = None,
        progress: bool = True,
        init: Init = None,
        checkpoint: Checkpoint | str | Path | None = None,
        check_every: int = 50,
        **kwargs: Any,
    ) -> Posterior:
        """Sample the posterior given the program's arguments.

        Args:
            *args: The program's arguments.
            warmup_steps: Steps thrown away: half of them SVGD, half burn-in.
            num_samples: States kept of each chain.
            thinning: Steps from one kept state to the next.
            num_runs: Independent clouds of particles, or networks.
            seed: Of starts, subsamples and noise; fresh if None, and noted in the posterior.
            progress: Whether to show a progress bar.
            init: Where to start; see :func:`bayesattn.inference.initial_values`.
            checkpoint: File to save the run to, and to go on from where it is there already; see
                :class:`bayesattn.inference.Checkpoint`.
            check_every: Steps between looks at the device: progress, non-finite values, a snapshot.
            **kwargs: The program's keyword arguments.

        Returns:
            Posterior in which each particle of each run, or each run's network, is a chain. Chains
            of one run interact, as ``attrs["chains_interact"]`` says.

        Raises:
            ValueError: If the program, its arguments or ``init`` do not fit.
            NonFiniteError: If values or scores stop being finite; what there was is attached.
        """
        warmup_steps = check_count("warmup_steps", warmup_steps, least=0)
        thinning = check_count("thinning", thinning)
        num_steps = warmup_steps + thinning * check_count("num_samples", num_samples)
        num_runs = check_count("num_runs", num_runs)
        saved = Checkpoint.of(checkpoint)
        seed = resumed_seed(seed, saved)
        name = type(self).__name__
        loop = StepLoop(name, num_steps, seed, progress, check_every)
        density = self.log_density_for(num_steps, args, kwargs)
        warn_of_held_parameters(density, name)
        view = self.transient.view(density, num_runs)
        loop.save_to(
            saved,
            density,
            num_runs=num_runs,
            warmup_steps=warmup_steps,
            thinning=thinning,
            noise=self.noise,
            langevin=self.langevin,
            step_size=self.step_size,
            **self.transient.identity() | {"outside": self.outside},
        )
        with loop.random_state(density.device):
            start = self.transient.begin(density, view, init, loop, num_runs)
            start.num_steps = max(1, warmup_steps // 2)
            return loop.run(SPOSRun(self, density, view, start, warmup_steps, thinning, loop))

    @property
    def chains_interact(self) -> bool:
        """Whether chains of one run depend on each other: where they are particles of one cloud."""
        is_alone = isinstance(self.transient.kernel, Separate)
        return self.transient.particle_plate is None and not is_alone

    def stepper(self, density: LogDensity, view: ParticleView) -> LangevinStepper:
        """Steps with these settings on a log density."""
        return LangevinStepper(
            density,
            view,
            self.transient.kernel_of(density, view),
            noise=self.noise,
            langevin=self.langevin,
            step_size=self.step_size,
            samples_outside=self.outside == "sample",
        )

    def freeze(self, start: SVGDRun) -> SPOSState:
        """State of the sampler where SVGD stands, with its metric and bandwidth as they are."""
        state = start.state.copied()
        kernel = start.stepper.kernel.frozen(state.working)
        return SPOSState(
            state.working, state.outside, state.metric, kernel, self._outside_scale(start)
        )

    def _outside_scale(self, start: SVGDRun) -> Float[Tensor, "run outside"]:
        """One over the root of the curvature along each value outside of the particles."""
        state, view = start.state, start.view
        outside = state.outside.detach()
        if self.outside == "fixed" or outside.numel() == 0:
            return torch.ones_like(outside)
        subsample = start.density.draw_subsample(torch.Generator().manual_seed(0))
        reach = torch.finfo(outside.dtype).eps ** 0.25
        columns = []
        for index in range(outside.shape[1]):
            ends = []
            for sign in (1.0, -1.0):
                moved = outside.clone()
                moved[:, index] += sign * reach
                rows = view.assemble(state.particles, moved)
                _, scores = start.density.value_and_score(rows, subsample, is_in_loop=False)
                ends.append(view.split(scores)[1][:, index])
            columns.append((ends[1] - ends[0]) / (2 * reach))
        curvature = torch.stack(columns, -1).abs()
        largest = curvature.amax(-1, keepdim=True)
        # Flat directions get no step that the others could not take.
        floor = torch.where(largest > 0, 1e-3 * largest, torch.ones_like(largest))
        return torch.maximum(curvature, floor).rsqrt()


class SPOSRun:
    """The steps of one call of :meth:`SPOS.run`."""

    def __init__(
        self,
        spos: SPOS,
        density: LogDensity,
        view: ParticleView,
        start: SVGDRun,
        warmup_steps: int,
        thinning: int,
        loop: StepLoop,
    ):
        self.spos, self.density, self.view, self.loop = spos, density, view, loop
        self.start, self.warmup_steps, self.thinning = start, warmup_steps, thinning
        self.dim, self.device = density.dim, density.device
        self.stepper = spos.stepper(density, view)
        self.generator = _noise_generator(loop, density.device)
        self.state: SPOSState | None = None
        self.kept: list[tuple[Tensor, Tensor]] = []

    def advance(self, step: int) -> SVGDInfo:
        """Move the particles, and keep where they were if it is time."""
        if step < self.warmup_steps // 2:
            return self.start.advance(step)
        if self.state is None:
            self.state = self.spos.freeze(self.start)
        before = self.state
        subsample = self.density.draw_subsample(self.loop.generator)
        self.state, values, info = self.stepper(before, self.generator, subsample)
        since = step - self.warmup_steps
        if since >= 0 and since % self.thinning == self.thinning - 1:
            self.kept.append((before.networks(self.view), values))
        return info

    def evaluate(self) -> Watched:
        """Values and scores of the present state."""
        subsample = self.density.draw_subsample(self.loop.generator)
        return Watched.of(
            *self.density.value_and_score(self._networks(), subsample, is_in_loop=False)
        )

    def snapshot(self) -> tuple[Tensor, int]:
        """Where the networks are, and how many states were kept before."""
        return self._networks().clone(), len(self.kept)

    def is_settled(self) -> bool:
        """A sampler does all its steps."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """State of both phases, what was kept, and the noise's generator."""
        state = self.state
        return {
            "start": self.start.state_dict(),
            "particles": None
            if state is None
            else [*state[:2], state.outside_scale, *state.metric],
            "kernel": None if state is None else tensors_of(state.kernel),
            "kept": [torch.stack(parts) for parts in zip(*self.kept, strict=True)],
            "noise": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where a state was taken."""
        self.start.load_state_dict(state["start"])
        if state["particles"] is not None:
            working, outside, unit, *metric = (p.to(self.device) for p in state["particles"])
            constants = [part.to(self.device) for part in state["kernel"]]
            like = self.start.stepper.kernel.frozen(self.start.state.working.detach())
            kernel = with_tensors(like, constants)
            self.state = SPOSState(working, outside, Affine(*metric), kernel, unit)
        kept = [part.to(self.device).unbind() for part in state["kept"]]
        self.kept = list(zip(*kept, strict=True))
        self.generator.set_state(state["noise"])

    def figures(self, info: SVGDInfo) -> dict[str, float]:
        """What the bar shows."""
        return self.start.figures(info)

    def names(self, entries: Bool[Tensor, " dim"]) -> list[str]:
        """Sites of some entries of the score."""
        return self.density.site_names(entries)

    def finish(
        self, snapshot: tuple[Tensor, int], curves: dict[str, Tensor], attrs: dict[str, Any]
    ) -> Posterior:
        """Posterior of the states kept until a snapshot, or of itself where there are none."""
        networks, count = snapshot
        kept = self.kept[:count]
        if not kept:
            subsample = self.density.draw_subsample(self.loop.generator)
            values, _ = self.density.value_and_score(networks, subsample, is_in_loop=False)
            kept = [(networks, values)]
        unconstrained = torch.stack([rows for rows, _ in kept], 1)
        draws = self.density.constrain(unconstrained.flatten(0, 1))
        curves = {n: c.repeat_interleave(len(networks) // len(c), 0) for n, c in curves.items()}
        spos = self.spos
        return spos.posterior(
            self.density,
            {name: value.unflatten(0, unconstrained.shape[:2]) for name, value in draws.items()},
            draws_are="markov",
            unconstrained=unconstrained,
            sample_stats={"lp": torch.stack([values for _, values in kept], 1)},
            optimization=curves,
            attrs=attrs
            | {
                "gradient_evaluations": attrs["num_steps"] * len(networks),
                "warmup_steps": self.warmup_steps,
                "thinning": self.thinning,
                "noise": spos.noise,
                "langevin": float(spos.langevin),
                "step_size": float(spos.step_size),
                "chains_interact": int(spos.chains_interact),
            },
        )

    def _networks(self) -> Tensor:
        if self.state is None:
            return self.start.state.networks(self.view)
        return self.state.networks(self.view)


def _noise_generator(loop: StepLoop, device: torch.device) -> torch.Generator:
    """The loop's generator, or one like it on the device, so that noise need not travel."""
    if device.type == "cpu":
        return loop.generator
    seed = int(torch.randint(2**62, (), generator=loop.generator))
    return torch.Generator(device).manual_seed(seed)
