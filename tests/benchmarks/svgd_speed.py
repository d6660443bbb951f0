"""Milliseconds an SVGD step, ours beside other packages and beside arithmetic written by hand.

Run as ``python -m tests.benchmarks.svgd_speed [--quick] [--problem a|b] [--markdown] [--busy]``,
best on a machine with nothing else to do; elsewhere ``--busy`` counts processor time. One thread;
the contestants of a problem and a particle count take turns, five times; set-up and compilation are
apart. What counts are ratios of medians of one run: milliseconds of different machines, or of
different hours of one, say little.

JAX, NumPyro and BlackJAX take part where they are installed: ``pip install -e '.[bench]'``. The
other packages have an RBF kernel, ours and the arithmetic by hand an IMQ kernel; all have the
median rule.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

# Read when JAX and OpenMP start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = "cpu"

import torch

from tests.benchmarks import torch_contestants
from tests.benchmarks.problems import PROBLEMS, Problem
from tests.benchmarks.timing import Advance, Clock, Times, alternating, name_of, seconds_of, table

__all__ = ["REQUIREMENTS", "Requirement", "measured"]

COMPILED, RECORDED = "bayesattn, inductor", "bayesattn, record"
PYRO, NUMPYRO, BY_HAND = "Pyro (univariate)", "NumPyro", "torch by hand"

Cell = tuple[str, int]
Figures = dict[Cell, dict[str, Times]]


class Requirement(NamedTuple):
    """One contestant is to be faster than another by a factor (if below one: may be slower).

    Attributes:
        fast: Who is.
        slow: Than whom.
        factor: Time of the slow one over that of the fast one.
        cells: Problems and numbers of particles.
    """

    fast: str
    slow: str
    factor: float
    cells: tuple[Cell, ...]


_LOGISTIC = (("a", 25), ("a", 100), ("a", 400))

REQUIREMENTS = (
    Requirement(COMPILED, PYRO, 15, (("a", 100),)),
    Requirement(COMPILED, PYRO, 40, (("a", 400),)),
    Requirement(COMPILED, PYRO, 4, (("b", 50),)),
    Requirement(COMPILED, NUMPYRO, 1.3, (("a", 25),)),
    Requirement(COMPILED, NUMPYRO, 3, (("a", 100), ("a", 400))),
    Requirement(COMPILED, NUMPYRO, 0.9, (("b", 50),)),
    Requirement(COMPILED, BY_HAND, 1 / 2, _LOGISTIC),
    Requirement(RECORDED, BY_HAND, 1 / 5, _LOGISTIC),
)


def contestants(
    problem: Problem, num_particles: int, *, quick: bool
) -> Iterator[tuple[str, Callable[[], Advance]]]:
    """Name of each contestant, and what makes it ready."""
    make = functools.partial(functools.partial, problem=problem, num_particles=num_particles)
    modes = ["inductor", "record"] if quick else ["inductor", "record", "none"]
    for mode in modes:
        yield f"bayesattn, {mode}", make(torch_contestants.ours, mode=mode)
    for mode in ("univariate", "multivariate"):
        yield f"Pyro ({mode})", make(torch_contestants.pyro_svgd, mode=mode)
    if quick:
        return
    jax = _jax_contestants() if problem.device == "cpu" else None
    if jax is not None:
        yield NUMPYRO, make(jax.numpyro_svgd)
        yield "BlackJAX", make(jax.blackjax_svgd)
    yield BY_HAND, make(torch_contestants.by_hand)
    yield "torch.compile by hand", make(torch_contestants.by_hand_compiled)
    if jax is not None:
        yield "JAX by hand", make(jax.by_hand)


def measured(
    problem: Problem,
    num_particles: int,
    *,
    quick: bool = False,
    clock: Clock = time.perf_counter,
) -> tuple[dict[str, Times], dict[str, float]]:
    """Milliseconds a step of each contestant, and seconds until each was ready."""
    ready, setup = {}, {}
    for name, make in contestants(problem, num_particles, quick=quick):
        start = time.perf_counter()
        ready[name] = make()
        ready[name](1)
        setup[name] = time.perf_counter() - start
    length = {"rounds": 3, "seconds": 0.05} if quick else {"rounds": 5, "seconds": 0.4}
    return alternating(ready, **length, clock=clock), setup


def whole_runs(
    problem: Problem, num_particles: int, *, steps: int, rounds: int, clock: Clock
) -> Times:
    """Milliseconds a step of whole compiled runs, with all that goes around their steps."""
    run = torch_contestants.whole_run(problem, num_particles, "inductor")
    found = (seconds_of(run, steps, clock=clock) for _ in range(rounds))
    return Times(tuple(1e3 * seconds / steps for seconds in found))


def verdicts(figures: Figures) -> list[list[str]]:
    """Each requirement that was measured: what it asks, what was found, and whether it is met."""
    rows = []
    for need in REQUIREMENTS:
        for cell in need.cells:
            times = figures.get(cell, {})
            if need.fast in times and need.slow in times:
                ratio = times[need.slow].median / times[need.fast].median
                is_met = "met" if ratio >= need.factor else "NOT met"
                place = f"({cell[0]}) M={cell[1]}"
                rows.append([place, *_in_words(need, ratio), is_met])
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="ours and Pyro, few particles, short")
    parser.add_argument("--problem", choices=PROBLEMS, action="append")
    parser.add_argument("--particles", type=int, action="append", help="instead of all counts")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda, where nothing is asked")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument(
        "--busy", action="store_true", help="count processor time: others use this machine too"
    )
    arguments = parser.parse_args()
    clock = time.process_time if arguments.busy else time.perf_counter
    torch.set_num_threads(1)
    show = functools.partial(table, markdown=arguments.markdown)
    figures: Figures = {}
    for name in arguments.problem or (["a"] if arguments.quick else PROBLEMS):
        problem = PROBLEMS[name].on(arguments.device)
        for count in arguments.particles or problem.particle_counts[: 1 if arguments.quick else 9]:
            times, setup = measured(problem, count, quick=arguments.quick, clock=clock)
            rows = [[who, str(times[who]), f"{setup[who]:.1f}"] for who in times]
            if not arguments.quick:
                rounds = 3 if name == "a" else 1
                runs = whole_runs(problem, count, steps=2000, rounds=rounds, clock=clock)
                rows.insert(1, ["bayesattn, inductor, run of 2000", str(runs), ""])
            figures[name, count] = times
            where = name_of(arguments.device)
            print(f"\n({name}) {problem.title}, M={count}, {where}\n", flush=True)
            print(show(["", "ms a step: median (spread)", "set-up, s"], rows), flush=True)
    rows = verdicts(figures) if arguments.device == "cpu" else []
    if rows:
        print("\n" + show(["where", "asked", "found", ""], rows))


def _in_words(need: Requirement, ratio: float) -> tuple[str, str]:
    if need.factor < 1 and need.slow == BY_HAND:
        asked = f"{need.fast}: at most {1 / need.factor:g} × the time of {need.slow}"
        return asked, f"{1 / ratio:.2f} ×"
    return f"{need.fast}: at least {need.factor:g} × as fast as {need.slow}", f"{ratio:.2f} ×"


def _jax_contestants() -> ModuleType | None:
    try:
        from tests.benchmarks import jax_contestants
    except ImportError as error:
        print(f"without JAX packages: {error}; pip install -e '.[bench]' adds them")
        return None
    return jax_contestants


if __name__ == "__main__":
    main()
