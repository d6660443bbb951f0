"""Where the time of a compiled SVGD step goes: its pieces, each compiled alone and timed.

Run as ``python -m tests.benchmarks.svgd_profile [--problem a|b] [--particles M] [--operators]``.
The pieces are the score (the recorded graph of the program), the kernel with its direction, the
median within it, and the optimizer. What a step takes beyond its graph is Python. Compiled
together, pieces may take less than alone. Processor time is counted. ``--operators`` adds the
operators of the recorded step as ``torch.profiler`` sees them.
"""

import argparse
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bayesattn.inference.adam import AdamRule
from bayesattn.inference.recording import record
from bayesattn.inference.stein import direction
from bayesattn.kernels import IMQ, median_squared_distance
from tests.benchmarks.problems import PROBLEMS, Problem
from tests.benchmarks.timing import Advance, alternating, table
from tests.benchmarks.torch_contestants import BETAS, EPS, ours_step, routine, step_of

WHOLE, GRAPH = "whole step", "its graph alone"


def pieces(problem: Problem, num_particles: int) -> dict[str, Advance]:
    """Pieces of a step, ready to be timed."""
    start = problem.starts(num_particles)
    score = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    rule, coefficients = AdamRule(BETAS, EPS), torch.tensor([0.01, 1.0])
    found = {
        "score": _graph_of_score(problem, start),
        "direction": _compiled(lambda x, s: direction(x, s, IMQ()), start, score),
        "of which distances and median": _compiled(median_squared_distance, start),
        "optimizer": _compiled(rule, start, score, score, score.square(), coefficients),
    }
    whole, graph = _whole(problem, num_particles)
    return {WHOLE: _repeated(whole), GRAPH: _repeated(graph)} | {
        name: _repeated(piece) for name, piece in found.items()
    }


def operators(problem: Problem, num_particles: int) -> str:
    """Table of the operators of the recorded step."""
    step = ours_step(problem, num_particles, "record")
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(20):
            step()
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problem", choices=PROBLEMS, default="a")
    parser.add_argument("--particles", type=int, help="100 for (a), 50 for (b) by default")
    parser.add_argument("--operators", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problem = PROBLEMS[arguments.problem]
    count = arguments.particles or {"a": 100, "b": 50}[problem.name]
    times = alternating(pieces(problem, count), rounds=5, seconds=0.2, clock=time.process_time)
    whole = times[WHOLE].median
    rows = [[name, str(found), f"{found.median / whole:.0%}"] for name, found in times.items()]
    beyond = whole - times[GRAPH].median
    rows.append(["Python: step less graph", f"{beyond:.3g}", f"{beyond / whole:.0%}"])
    print(f"({problem.name}) {problem.title}, M={count}\n")
    print(table(["", "ms: median (spread)", "of a step"], rows))
    if arguments.operators:
        print(operators(problem, count))


def _whole(
    problem: Problem, num_particles: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """One compiled step, and its graph called with the tensors that the step called it with."""
    svgd = routine(problem, num_particles, "inductor")
    density = svgd.log_density(*problem.data)
    step = step_of(svgd, density, problem.starts(num_particles))
    step()
    (graph,) = density.settings.graphs.graphs.values()
    with mock.patch.object(graph, "_forward", wraps=graph._forward) as forward:
        step()
    inputs = [tensor.clone() for tensor in forward.call_args.args]
    return step, lambda: graph(*inputs)


def _graph_of_score(problem: Problem, start: Tensor) -> Callable[[], object]:
    density = routine(problem, len(start), "inductor").log_density(*problem.data)
    return lambda: density.value_and_score(start)


def _compiled(function: Callable, *inputs: Tensor) -> Callable[[], object]:
    graph = record(function, inputs).compile(inputs)
    return lambda: graph(*inputs)


def _repeated(piece: Callable[[], object]) -> Advance:
    def advance(count: int) -> None:
        for _ in range(count):
            piece()

    return advance


if __name__ == "__main__":
    main()
