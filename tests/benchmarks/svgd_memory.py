r"""Peak memory of the Stein direction and the optimizer, against :math:`8 M D + 4 M^2` numbers.

Run as ``python -m tests.benchmarks.svgd_memory [--particles M] [--dim D]``.

What is there all the time (particles, momenta, the score where it is given) is counted as well; two
steps are looked at, since the second one begins with what the first one leaves.

The bound is for the direction and the optimizer, the score apart. A step of a routine is one graph
with the score in it, so it is measured on a standard normal, whose score adds some :math:`M D` of
its own: what stays below the bound so does without it. Beside it stands the direction as a function
that is called by itself, with Adam after it.
"""

import argparse
import functools

import pyro
import pyro.distributions as dist
import torch

from bayesattn.inference.coordinates import identity
from bayesattn.inference.optimizers import ScheduledOptimizer
from bayesattn.inference.particle_views import WholeParticles
from bayesattn.inference.schedules import constant
from bayesattn.inference.svgd import SVGD, direction
from bayesattn.kernels import IMQ
from tests.benchmarks.peak_memory import peak_bytes
from tests.benchmarks.timing import table

__all__ = ["bound", "direction_and_optimizer", "whole_step"]

ADAM = functools.partial(torch.optim.Adam, lr=0.01)


def bound(num_particles: int, dim: int) -> int:
    """Numbers that direction and optimizer may hold at once."""
    return 8 * num_particles * dim + 4 * num_particles**2


def direction_and_optimizer(num_particles: int, dim: int) -> float:
    """Peak in numbers with the score given, operation by operation."""
    generator = torch.Generator().manual_seed(0)
    moved = torch.randn(num_particles, dim, generator=generator).requires_grad_()
    score = -moved.detach()
    optimizer = ScheduledOptimizer(ADAM, constant, [moved])

    def step() -> None:
        with torch.no_grad():
            moved.grad = -direction(moved.detach(), score, IMQ())
        optimizer.step(0.0)

    def two_steps() -> None:
        step()
        step()

    step()
    moved.grad = None
    # Particles, their score and two momenta are there all the time.
    return peak_bytes(two_steps) / moved.element_size() + 4 * moved.numel()


def whole_step(num_particles: int, dim: int, mode: str) -> float:
    """Peak in numbers of a step on a standard normal."""
    svgd = SVGD(
        lambda: pyro.sample("x", dist.Normal(0.0, 1.0).expand([dim]).to_event(1)),
        num_particles=num_particles,
        optimizer=ADAM,
        schedule=constant,
        compile=mode,  # type: ignore[arg-type]
    )
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, num_particles, dim, generator=generator)
    state = svgd.init(start, torch.zeros(1, 0), identity(torch.zeros(1, dim)))
    stepper = svgd.stepper(svgd.log_density(), WholeParticles(1))

    def two_steps() -> None:
        svgd.step(state, stepper, generator)
        svgd.step(state, stepper, generator)

    two_steps()
    state.working.grad = None
    # Particles and two momenta are there all the time.
    return peak_bytes(two_steps) / start.element_size() + 3 * start.numel()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=5000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count, dim = arguments.particles, arguments.dim
    rows = [["direction by itself, Adam", direction_and_optimizer(count, dim)]]
    modes = ("record", "inductor")
    rows += [[f"step, {mode}", whole_step(count, dim, mode)] for mode in modes]
    limit = bound(count, dim)
    shown = [
        [name, f"{found / 1e6:.2f}", f"{found / limit:.2f}", "met" if found <= limit else "NOT met"]
        for name, found in rows
    ]
    print(f"M={count}, D={dim}; bound 8 M D + 4 M² = {limit / 1e6:.2f} million numbers\n")
    print(table(["", "peak, million numbers", "of the bound", ""], shown))


if __name__ == "__main__":
    main()
