r"""The no-U-turn sampler: Pyro's, on the recorded potential, in chains of our own.

.. math:: H(v, r) = -\log p(u(v)) + \tfrac12 r^\top \mathcal{M}^{-1} r

Source:
    Hoffman and Gelman (2014), The no-U-turn sampler, arXiv:1111.4246.
    Betancourt (2017), A conceptual introduction to Hamiltonian Monte Carlo, arXiv:1701.02434.
"""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.argument_checks import check_choice, check_count, check_positive
from bayesattn.inference.chain_processes import can_fork, in_processes
from bayesattn.inference.checkpoints import (
    Checkpoint,
    CheckpointFile,
    resumed_seed,
    run_identity,
)
from bayesattn.inference.convergence import chain_problems
from bayesattn.inference.coordinates import Affine, differentiable_value, identity, laplace
from bayesattn.inference.initialization import Init, initial_values
from bayesattn.inference.learned_parameters import warn_of_held_parameters
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.markov_chain import (
    STATISTICS,
    ChainDraws,
    Tick,
    WatchedNUTS,
    equally_long,
    sample_chain,
)
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.routine import DensityOptions, Routine
from bayesattn.inference.running import (
    ConvergenceWarning,
    Progress,
    private_param_store,
    resolve_seed,
    seeded,
)
from bayesattn.inference.schedules import Number
from bayesattn.inference.step_loop import interruptible

__all__ = ["NUTS"]

# Random starts tried for each chain until one has a finite log density.
_TRIALS = 20


class NUTS(Routine):
    """The no-U-turn sampler on a Pyro program.

    Args:
        model: A Pyro program without subsampled plates.
        step_size: First step size.
        target_accept_prob: What warm-up tunes the step size to.
        max_tree_depth: At most ``2 ** max_tree_depth - 1`` steps a draw.
        full_mass: Whether to adapt a full mass matrix, not only its diagonal.
        coordinates: ``"raw"``, or ``"laplace"`` for badly scaled posteriors of some ten dimensions.
        chain_method: ``"sequential"``, or ``"processes"``: forked processes, one thread each, where
            the platform and the device (CPU) allow.
        **density: See :class:`bayesattn.inference.DensitySettings`.

    Raises:
        ValueError: On settings out of range.
    """

    def __init__(
        self,
        model: Callable,
        *,
        step_size: Number = 1.0,
        target_accept_prob: float = 0.8,
        max_tree_depth: int = 10,
        full_mass: bool = False,
        coordinates: Literal["raw", "laplace"] = "raw",
        chain_method: Literal["sequential", "processes"] = "sequential",
        **density: Unpack[DensityOptions],
    ):
        super().__init__(model, **density)
        check_positive("step_size", step_size)
        check_positive("target_accept_prob", target_accept_prob)
        if target_accept_prob >= 1:
            raise ValueError(f"target_accept_prob must be below one, got {target_accept_prob}")
        check_choice("coordinates", coordinates, ("raw", "laplace"))
        check_choice("chain_method", chain_method, ("sequential", "processes"))
        self.step_size = step_size
        self.target_accept_prob = target_accept_prob
        self.max_tree_depth = check_count("max_tree_depth", max_tree_depth)
        self.full_mass = full_mass
        self.coordinates = coordinates
        self.chain_method = chain_method

    def run(
        self,
        *args: Any,
        warmup_steps: int,
        num_samples: int,
        num_chains: int = 1,
        seed: int | None = None,
        progress: bool = True,
        init: Init = None,
        checkpoint: Checkpoint | str | Path | None = None,
        **kwargs: Any,
    ) -> Posterior:
        """Sample the posterior given the program's arguments.

        Args:
            *args: The program's arguments.
            warmup_steps: Draws thrown away while step size and mass matrix adapt.
            num_samples: Draws kept in each chain.
            num_chains: Chains from different starts.
            seed: Of starts and chains; fresh if None, and noted in the posterior.
            progress: Whether to show a progress bar.
            init: Where to start; see :func:`bayesattn.inference.initial_values`.
            checkpoint: File to save the run to, and to go on from where it is there already; see
                :class:`bayesattn.inference.Checkpoint`. Several chains have one each.
            **kwargs: The program's keyword arguments.

        Returns:
            Posterior with the sampler's statistics. Interrupted, it has the draws made so far.
            Parameters that the program declares are held fixed, with a warning.

        Raises:
            ValueError: If a plate is subsampled or no start has a finite log density.
            KeyboardInterrupt: If interrupted before the first draw.
        """
        warmup_steps = check_count("warmup_steps", warmup_steps, least=0)
        num_samples = check_count("num_samples", num_samples)
        num_chains = check_count("num_chains", num_chains)
        saved = Checkpoint.each(checkpoint, num_chains)
        seed, began = resolve_seed(resumed_seed(seed, saved[0])), time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        density = self.log_density(*args, **kwargs)
        if density.program.subsamples:
            raise ValueError(
                "NUTS needs the full data, since a subsample's gradient is not that of any "
                f"density, but plates are subsampled: {sorted(density.program.subsamples)}"
            )
        warn_of_held_parameters(density, "NUTS")
        frame, starts = self._starts(density, num_chains, init, generator)
        seeds = torch.randint(2**31, (num_chains,), generator=generator).tolist()

        files = [self._file(place, density, seed, warmup_steps, num_samples) for place in saved]

        def sample(chain: int, tick: Tick, stop: Callable[[], bool]) -> ChainDraws:
            with seeded(seeds[chain], density.device), private_param_store():
                sampler = self._sampler(density, frame)
                length = (warmup_steps, num_samples)
                return sample_chain(sampler, starts[chain], *length, tick, stop, files[chain])

        obstacle = can_fork(density.device) if self.chain_method == "processes" else ""
        if obstacle:
            warnings.warn(f"the chains run one by one: {obstacle}", RuntimeWarning, stacklevel=2)
        total = num_chains * (warmup_steps + num_samples)
        with Progress(total, "NUTS", progress) as bar, interruptible() as stop:
            if self.chain_method == "processes" and not obstacle:
                chains = in_processes(sample, num_chains, bar, stop.is_set)
            else:
                chains = []
                for chain in range(num_chains):
                    if not stop.is_set():
                        chains.append(sample(chain, bar.show, stop.is_set))
        kept = equally_long(chains)
        if not kept:
            raise KeyboardInterrupt("NUTS was interrupted before its first draw")
        attrs = {"seed": seed, "seconds": time.perf_counter() - began, "warmup_steps": warmup_steps}
        attrs["gradient_evaluations"] = sum(chain.num_steps for chain in chains)
        num_kept = len(kept[0].working)
        if len(kept) < num_chains or num_kept < num_samples:
            attrs["interrupted"] = 1
            warnings.warn(
                f"NUTS was interrupted; {len(kept)} of {num_chains} chains with {num_kept} of "
                f"{num_samples} draws each are returned",
                RuntimeWarning,
                stacklevel=2,
            )
        posterior = self._posterior(density, frame, kept, attrs)
        if posterior.attrs["problems"]:
            problems = "; ".join(posterior.attrs["problems"])
            warnings.warn(f"NUTS: {problems}", ConvergenceWarning, stacklevel=2)
        return posterior

    def _file(
        self,
        place: Checkpoint | None,
        density: LogDensity,
        seed: int,
        warmup_steps: int,
        num_samples: int,
    ) -> CheckpointFile | None:
        """One chain's checkpoint."""
        if place is None:
            return None
        if density.settings.stochastic:
            raise ValueError("the checkpoint of a chain does not hold the noise of stochastic=True")
        names = ("step_size", "target_accept_prob", "max_tree_depth", "full_mass", "coordinates")
        settings = {name: getattr(self, name) for name in names}
        length = {"warmup_steps": warmup_steps, "num_samples": num_samples}
        return CheckpointFile(place, run_identity(density, "NUTS", seed, **length, **settings))

    def _starts(
        self, density: LogDensity, num_chains: int, init: Init, generator: torch.Generator
    ) -> tuple[Affine, Float[Tensor, "chain dim"]]:
        """Working coordinates, and starts in them that have a finite log density."""
        points = None if init is None else initial_values(density, num_chains, init, generator)
        frame = identity(torch.zeros(density.dim, device=density.device, dtype=density.dtype))
        if self.coordinates == "laplace":
            frame = laplace(density, generator=generator, starts=points)
        if points is None and self.coordinates == "raw":
            points = initial_values(density, _TRIALS * num_chains, None, generator)
        elif points is None:
            noise = torch.randn(
                _TRIALS * num_chains, density.dim, generator=generator, dtype=torch.float64
            )
            points = frame.apply(noise.to(frame.location))
        good: list[Tensor] = []
        # One row at a time, which records the very graph that the chains replay.
        for point in points.split(1):
            value, score = density.value_and_score(point)
            if bool(value.isfinite().all() & score.isfinite().all()):
                good.append(point)
            if len(good) == num_chains:
                return frame, frame.invert(torch.cat(good))
        raise ValueError(
            f"only {len(good)} of {len(points)} starts have a finite log density and score, but "
            f"{num_chains} chains need one each; give starts by init="
        )

    def _sampler(self, density: LogDensity, frame: Affine) -> WatchedNUTS:
        def potential(position: dict[str, Tensor]) -> Tensor:
            return -differentiable_value(position["working"], density, frame)[0]

        return WatchedNUTS(
            potential_fn=potential,
            step_size=self.step_size,  # type: ignore[arg-type] (Pyro's default is a whole number)
            target_accept_prob=self.target_accept_prob,
            max_tree_depth=self.max_tree_depth,
            full_mass=self.full_mass,
        )

    def _posterior(
        self, density: LogDensity, frame: Affine, chains: list[ChainDraws], attrs: dict[str, Any]
    ) -> Posterior:
        working = torch.from_numpy(np.stack([chain.working for chain in chains]))
        unconstrained = frame.apply(working.to(density.device, density.dtype))
        draws = density.constrain(unconstrained.flatten(0, 1))
        table = torch.from_numpy(np.stack([chain.statistics for chain in chains]))
        stats = {name: table[..., column].clone() for column, name in enumerate(STATISTICS)}
        for name in ("tree_depth", "n_steps"):
            stats[name] = stats[name].long()
        stats["diverging"] = stats["diverging"].bool()
        problems = chain_problems(unconstrained, stats, self.max_tree_depth)
        return self.posterior(
            density,
            {name: value.unflatten(0, working.shape[:2]) for name, value in draws.items()},
            draws_are="markov",
            unconstrained=unconstrained,
            sample_stats=stats,
            attrs=attrs | {"problems": problems},
        )
