r"""The no-U-turn sampler: Pyro's, on the recorded potential, in chains that run one by one or in processes.

.. math:: H(v, r) = -\log p(u(v)) + \tfrac12 r^\top \mathcal{M}^{-1} r

Source:
    Hoffman and Gelman (2014), The no-U-turn sampler, arXiv:1111.4246.
    Betancourt (2017), A conceptual introduction to Hamiltonian Monte Carlo, arXiv:1701.02434.
"""

import math
import multiprocessing
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, NamedTuple, Unpack

import numpy as np
import pyro.infer
import torch
from jaxtyping import Float
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from bayesattn.inference.coordinates import Affine, differentiable_value, identity, laplace
from bayesattn.inference.initialization import Init, initial_values
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.routine import DensityOptions, Routine, interruptible
from bayesattn.inference.running import (
    ConvergenceWarning,
    Progress,
    private_param_store,
    resolve_seed,
    seeded,
)

__all__ = ["NUTS", "ChainDraws"]

_STATS = ("lp", "acceptance_rate", "step_size", "tree_depth", "n_steps", "diverging", "energy")


class ChainDraws(NamedTuple):
    """What one chain kept.

    Attributes:
        working: Draws in working coordinates.
        stats: One column for each sample statistic, in the order of the schema's names here.
    """

    working: Float[np.ndarray, "draw dim"]
    stats: Float[np.ndarray, "draw stat"]


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
    """

    def __init__(
        self,
        model: Callable,
        *,
        step_size: float = 1.0,
        target_accept_prob: float = 0.8,
        max_tree_depth: int = 10,
        full_mass: bool = False,
        coordinates: Literal["raw", "laplace"] = "raw",
        chain_method: Literal["sequential", "processes"] = "sequential",
        **density: Unpack[DensityOptions],
    ):
        super().__init__(model, **density)
        if not 0 < target_accept_prob < 1:
            raise ValueError(f"target_accept_prob must be in (0, 1), got {target_accept_prob}")
        if step_size <= 0:
            raise ValueError(f"step_size must be positive, got {step_size}")
        if coordinates not in ("raw", "laplace"):
            raise ValueError(f"coordinates must be 'raw' or 'laplace', got {coordinates!r}")
        if chain_method not in ("sequential", "processes"):
            raise ValueError(
                f"chain_method must be 'sequential' or 'processes', got {chain_method!r}"
            )
        self.step_size = step_size
        self.target_accept_prob = target_accept_prob
        self.max_tree_depth = max_tree_depth
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
            **kwargs: The program's keyword arguments.

        Returns:
            Posterior with the sampler's statistics. Interrupted, it has the draws made so far.

        Raises:
            ValueError: If a plate is subsampled or no start has a finite log density.
            KeyboardInterrupt: If interrupted before the first draw.
        """
        for name, value in {"num_samples": num_samples, "num_chains": num_chains}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least one, got {value}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        seed, start = resolve_seed(seed), time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        density = self.log_density(*args, **kwargs)
        if density.program.subsamples:
            raise ValueError(
                "NUTS needs the full data, since a subsample's gradient is not that of any density, "
                f"but these plates are subsampled: {sorted(density.program.subsamples)}"
            )
        origin = torch.zeros(density.dim, device=density.device, dtype=density.dtype)
        laplacian = self.coordinates == "laplace"
        frame = laplace(density, generator=generator) if laplacian else identity(origin)
        starts = self._starts(density, frame, num_chains, init, generator)
        seeds = torch.randint(2**31, (num_chains,), generator=generator).tolist()

        def sample(chain: int, tick: Callable[[dict[str, float]], None], stop: Any) -> ChainDraws:
            with seeded(seeds[chain], density.device), private_param_store():
                return self._sample_chain(
                    density, frame, starts[chain], warmup_steps, num_samples, tick, stop
                )

        total = num_chains * (warmup_steps + num_samples)
        with Progress(total, "NUTS", progress) as bar, interruptible() as stop:
            if self.chain_method == "processes" and _can_fork(density):
                chains = _in_processes(sample, num_chains, bar)
            else:
                chains = []
                for chain in range(num_chains):
                    chains.append(sample(chain, lambda f: bar.advance(lambda: f), stop))
                    if stop.is_set():
                        break
        kept = _longest(chains)
        if kept is None:
            raise KeyboardInterrupt("NUTS was interrupted before its first draw")
        attrs = {"seed": seed, "seconds": time.perf_counter() - start, "warmup_steps": warmup_steps}
        if len(kept) < num_chains or len(kept[0].working) < num_samples:
            attrs["interrupted"] = 1
            warnings.warn(
                f"NUTS was interrupted; {len(kept)} of {num_chains} chains with {len(kept[0].working)} "
                f"of {num_samples} draws each are returned",
                RuntimeWarning,
                stacklevel=2,
            )
        return self._posterior(density, frame, kept, attrs)

    def _starts(
        self,
        density: LogDensity,
        frame: Affine,
        num_chains: int,
        init: Init,
        generator: torch.Generator,
    ) -> Tensor:
        """Starting points in working coordinates with a finite log density."""
        candidates = 20 * num_chains
        if init is None and self.coordinates == "laplace":
            noise = torch.randn(candidates, density.dim, generator=generator, dtype=torch.float64)
            points = frame.apply(noise.to(frame.location))
        else:
            count = candidates if init is None else num_chains
            points = initial_values(density, count, init, generator)
        values, scores = density.value_and_score(points)
        finite = (values.isfinite() & scores.isfinite().all(-1)).nonzero()[:, 0]
        if len(finite) < num_chains:
            raise ValueError(
                f"only {len(finite)} of {len(points)} starts have a finite log density, but "
                f"{num_chains} chains need one each; give starts by init="
            )
        return frame.invert(points[finite[:num_chains]])

    def _sample_chain(
        self,
        density: LogDensity,
        frame: Affine,
        start: Tensor,
        warmup_steps: int,
        num_samples: int,
        tick: Callable[[dict[str, float]], None],
        stop: Any,
    ) -> ChainDraws:
        sampler = _WatchedNUTS(
            potential_fn=lambda position: (
                -differentiable_value(position["working"], density, frame)[0]
            ),
            step_size=self.step_size,
            target_accept_prob=self.target_accept_prob,
            max_tree_depth=self.max_tree_depth,
            full_mass=self.full_mass,
        )
        position = {"working": start.clone()}
        sampler.initial_params = position
        sampler.setup(warmup_steps)
        working, stats = [], []
        for iteration in range(warmup_steps + num_samples):
            if stop.is_set():
                break
            sampler.watch()
            position = sampler.sample(position)
            if iteration >= warmup_steps:
                working.append(position["working"].detach().cpu().numpy().copy())
                stats.append(sampler.statistics())
            tick({"step size": float(sampler.step_size), "acceptance": sampler.acceptance_rate()})
        return ChainDraws(
            np.stack(working) if working else np.zeros((0, density.dim)),
            np.array(stats).reshape(len(stats), len(_STATS)),
        )

    def _posterior(
        self, density: LogDensity, frame: Affine, chains: list[ChainDraws], attrs: dict[str, Any]
    ) -> Posterior:
        working = torch.from_numpy(np.stack([chain.working for chain in chains]))
        working = working.to(density.device, density.dtype)
        unconstrained = frame.apply(working)
        values = density.constrain(unconstrained.flatten(0, 1))
        table = torch.from_numpy(np.stack([chain.stats for chain in chains]))
        stats = {name: table[..., column].clone() for column, name in enumerate(_STATS)}
        for name in ("tree_depth", "n_steps"):
            stats[name] = stats[name].long()
        stats["diverging"] = stats["diverging"].bool()
        problems = _problems(unconstrained, stats, self.max_tree_depth)
        for problem in problems:
            warnings.warn(f"NUTS: {problem}", ConvergenceWarning, stacklevel=3)
        return self.posterior(
            density,
            {name: value.unflatten(0, working.shape[:2]) for name, value in values.items()},
            draws_are="markov",
            unconstrained=unconstrained,
            sample_stats=stats,
            attrs=attrs | {"problems": problems},
        )


class _WatchedNUTS(pyro.infer.NUTS):
    """Pyro's NUTS, counting what each draw took."""

    def watch(self) -> None:
        """Forget the last draw's counts."""
        self._leapfrogs, self._acceptance, self._diverging = 0, 0.0, False

    def acceptance_rate(self) -> float:
        """Mean acceptance probability over the last draw's trajectory."""
        return float(self._acceptance) / max(self._leapfrogs, 1)

    def statistics(self) -> tuple[float, ...]:
        """Statistics of the last draw, in the order of the schema's names here."""
        return (
            -float(self._potential_energy_last),
            self.acceptance_rate(),
            float(self.step_size),
            math.ceil(math.log2(self._leapfrogs + 1)),
            self._leapfrogs,
            float(self._diverging),
            self._energy,
        )

    def _sample_r(self, name: str) -> Any:
        momentum = super()._sample_r(name)
        # Total energy after the momentum is drawn: what E-BFMI compares from draw to draw.
        self._energy = float(self._kinetic_energy(momentum[1]) + self._potential_energy_last)
        return momentum

    def _build_basetree(self, *args: Any) -> Any:
        tree = super()._build_basetree(*args)
        self._leapfrogs += 1
        self._acceptance += float(tree.sum_accept_probs)
        self._diverging |= bool(tree.diverging)
        return tree


def _can_fork(density: LogDensity) -> bool:
    if sys.platform == "linux" and density.device.type == "cpu":
        return True
    warnings.warn(
        "chain_method='processes' needs forked processes on the CPU (Linux); the chains run one by one",
        RuntimeWarning,
        stacklevel=3,
    )
    return False


def _in_processes(sample: Callable, num_chains: int, bar: Progress) -> list[ChainDraws]:
    """Run every chain in a process forked from this one, which has the recorded graph already."""
    context = multiprocessing.get_context("fork")
    links: dict[Any, int] = {}
    processes = []
    threads = torch.get_num_threads()
    # A forked process must not enter a thread pool that it does not have.
    torch.set_num_threads(1)
    try:
        for chain in range(num_chains):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(theirs, sample, chain), daemon=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork")
                process.start()
            theirs.close()
            links[ours] = chain
            processes.append(process)
    finally:
        torch.set_num_threads(threads)
    chains: dict[int, ChainDraws] = {}
    try:
        while links:
            for link in wait(list(links)):
                assert isinstance(link, Connection)
                kind, content = _receive(link, links[link])
                if kind == "tick":
                    for figures in content:
                        bar.advance(lambda figures=figures: figures)
                    continue
                chains[links.pop(link)] = content
                link.close()
    finally:
        for process in processes:
            if links:
                process.terminate()
            process.join()
    return [chains[chain] for chain in range(num_chains)]


def _receive(link: Connection, chain: int) -> tuple[str, Any]:
    try:
        kind, content = link.recv()
    except EOFError:
        raise RuntimeError(f"the process of chain {chain} ended without a result") from None
    if kind == "error":
        raise RuntimeError(f"chain {chain} failed in its process:\n{content}")
    return kind, content


def _serve(link: Connection, sample: Callable, chain: int) -> None:
    pending: list[dict[str, float]] = []

    def tick(figures: dict[str, float]) -> None:
        pending.append(figures)
        if len(pending) >= 10:
            link.send(("tick", pending[:]))
            pending.clear()

    try:
        with interruptible() as stop:
            draws = sample(chain, tick, stop)
        link.send(("tick", pending))
        link.send(("done", draws))
    except BaseException:
        link.send(("error", traceback.format_exc()))
    finally:
        link.close()


def _longest(chains: list[ChainDraws]) -> list[ChainDraws] | None:
    """Of chains of unequal length, those and that length that keep the most draws; None if none."""
    lengths = sorted((len(chain.working) for chain in chains), reverse=True)
    length = max(lengths, key=lambda n: n * sum(other >= n for other in lengths))
    if length == 0:
        return None
    whole = [chain for chain in chains if len(chain.working) >= length]
    return [ChainDraws(chain.working[:length], chain.stats[:length]) for chain in whole]


def _problems(unconstrained: Tensor, stats: dict[str, Tensor], max_depth: int) -> list[str]:
    """Say in words what a reader must know before trusting the draws."""
    problems = []
    num_chains, num_draws = unconstrained.shape[:2]
    diverging = int(stats["diverging"].sum())
    if diverging:
        problems.append(f"{diverging} of {num_chains * num_draws} draws diverged")
    deep = int((stats["tree_depth"] >= max_depth).sum())
    if deep > 0.1 * num_chains * num_draws:
        problems.append(f"{deep} draws reached the largest tree depth, {max_depth}")
    if num_draws >= 20:
        size = float(effective_sample_size(unconstrained.double()).nan_to_num().min())
        if size < 0.05 * num_chains * num_draws:
            problems.append(
                f"the smallest effective sample size is {size:.0f} of {num_chains * num_draws} draws; "
                "run longer, or reparametrize (coordinates='laplace')"
            )
    if num_chains > 1 and num_draws >= 20:
        worst = float(split_gelman_rubin(unconstrained.double()).nan_to_num().max())
        if worst > 1.2:
            problems.append(f"the chains disagree: the largest split R-hat is {worst:.2f}")
    return problems
