"""Contestants in torch: ours in its three modes, Pyro's SVGD, and arithmetic written by hand.

Every maker takes a problem and a number of particles, and returns a function that does so many
steps. All use Adam at one learning rate. Ours and the arithmetic take the same steps: IMQ kernel,
median rule, Gram form.
"""

import functools
from collections.abc import Callable

import pyro
import pyro.infer
import pyro.optim
import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesattn.inference.coordinates import identity
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.particle_views import WholeParticles
from bayesattn.inference.schedules import constant
from bayesattn.inference.svgd import SVGD
from bayesattn.order_statistics import smallest_but
from tests.benchmarks.problems import Problem
from tests.benchmarks.timing import Advance, repeated, wait_for

__all__ = [
    "BETAS",
    "EPS",
    "RATE",
    "ByHand",
    "by_hand",
    "by_hand_compiled",
    "ours",
    "ours_step",
    "pyro_svgd",
    "routine",
    "step_of",
    "whole_run",
]

RATE = 0.01
BETAS, EPS = (0.9, 0.999), 1e-8


def routine(problem: Problem, num_particles: int, mode: str) -> SVGD:
    """Our SVGD with the settings that are measured."""
    optimizer = functools.partial(torch.optim.Adam, lr=RATE)
    return SVGD(
        problem.program,
        num_particles=num_particles,
        optimizer=optimizer,
        schedule=constant,
        compile=mode,  # type: ignore[arg-type]
    )


def ours_step(problem: Problem, num_particles: int, mode: str) -> Callable[[], Tensor]:
    """One step at each call, which returns the particles of its one run."""
    svgd = routine(problem, num_particles, mode)
    return step_of(svgd, svgd.log_density(*problem.data), problem.starts(num_particles))


def step_of(svgd: SVGD, density: LogDensity, start: Tensor) -> Callable[[], Tensor]:
    """The same of given settings on a given log density."""
    no_shared = start.new_zeros(1, 0)
    state = svgd.init(start[None], no_shared, identity(start.new_zeros(1, density.dim)))
    stepper = svgd.stepper(density, WholeParticles(1))
    generator = torch.Generator().manual_seed(0)

    def step() -> Tensor:
        svgd.step(state, stepper, generator)
        return state.working

    return step


def ours(problem: Problem, num_particles: int, mode: str) -> Advance:
    """Bare steps of ours."""
    return repeated(ours_step(problem, num_particles, mode), problem.device)


def whole_run(problem: Problem, num_particles: int, mode: str) -> Advance:
    """Whole runs of ours, with all that goes around the steps; graphs are kept between runs."""
    svgd = routine(problem, num_particles, mode)
    # Of a run, past the first measuring of the metric, which is another graph.
    svgd.run(*problem.data, num_steps=120, seed=0, progress=False)

    def advance(num_steps: int) -> None:
        svgd.run(*problem.data, num_steps=num_steps, seed=0, progress=False)
        wait_for(problem.device)

    return advance


def pyro_svgd(problem: Problem, num_particles: int, mode: str) -> Advance:
    """Pyro's SVGD as its users run it, in a parameter store of its own."""
    svgd = pyro.infer.SVGD(
        problem.program,
        pyro.infer.RBFSteinKernel(),
        pyro.optim.Adam({"lr": RATE}),
        num_particles,
        max_plate_nesting=0,
        mode=mode,
    )
    store = pyro.get_param_store()
    with store.scope() as kept:
        svgd.step(*problem.data)

    def advance(num_steps: int) -> None:
        nonlocal kept
        with store.scope(kept) as kept:
            for _ in range(num_steps):
                svgd.step(*problem.data)
        wait_for(problem.device)

    return advance


class ByHand:
    """Eager arithmetic of one step, in place where that is faster."""

    def __init__(self, problem: Problem, num_particles: int):
        self.problem = problem
        self.particles = problem.starts(num_particles)
        self.mean = torch.zeros_like(self.particles)
        self.square = torch.zeros_like(self.particles)
        self.count = 0

    def __call__(self) -> Tensor:
        self.count += 1
        first, second = BETAS
        _, score = self.problem.value_and_score(self.particles, *self.problem.data)
        gradient = stein_direction(self.particles, score).neg_()
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (1 - second**self.count) ** 0.5
        denominator = self.square.sqrt().div_(scale).add_(EPS)
        rate = RATE / (1 - first**self.count)
        return self.particles.addcdiv_(self.mean, denominator, value=-rate)


def by_hand(problem: Problem, num_particles: int) -> Advance:
    """Eager arithmetic."""
    return repeated(torch.no_grad()(ByHand(problem, num_particles)), problem.device)


def by_hand_compiled(problem: Problem, num_particles: int) -> Advance:
    """The same as a function of tensors, under torch.compile."""

    def step(
        particles: Tensor, mean: Tensor, square: Tensor, corrections: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        first, second = BETAS
        _, score = problem.value_and_score(particles, *problem.data)
        gradient = -stein_direction(particles, score)
        mean = mean + (1 - first) * (gradient - mean)
        square = second * square + (1 - second) * gradient * gradient
        denominator = square.sqrt() / corrections[1] + EPS
        return particles - corrections[0] * mean / denominator, mean, square

    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    start = problem.starts(num_particles)
    state = (start, torch.zeros_like(start), torch.zeros_like(start))
    count = 0

    @torch.no_grad()
    def one() -> None:
        nonlocal state, count
        count += 1
        first, second = BETAS
        corrections = [RATE / (1 - first**count), (1 - second**count) ** 0.5]
        state = compiled(*state, start.new_tensor(corrections))

    validates = Distribution._validate_args
    one()
    # Compiling turns validation off for the process, from which Pyro would gain.
    Distribution.set_default_validate_args(validates)
    return repeated(one, problem.device)


def stein_direction(particles: Tensor, score: Tensor) -> Tensor:
    """Direction of all particles, IMQ kernel, exponent one half, median rule."""
    centered = particles - particles.mean(0)
    products = centered @ centered.T
    norms = products.diagonal()
    distances = (norms[:, None] + norms - 2 * products).clamp_min(0)
    # Past the zeros of the diagonal, and each pair twice.
    count = len(particles)
    middle = (count * (count - 1) // 2 - 1) // 2
    squared = smallest_but(distances.flatten(), count + 2 * middle)
    base = 1 + distances / squared
    gram = base.rsqrt()
    slope = gram / (base * squared)
    drive = gram @ score + slope.sum(1, keepdim=True) * centered - slope @ centered
    return drive / len(particles)
