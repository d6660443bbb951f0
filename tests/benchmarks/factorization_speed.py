"""Time and error of the factorization of heads' products, beside tensorly's on the dense tensor.

Twelve heads of 64 on 768 features at 256 shared components, on one thread; and the twelve layers of
a network of the size of BERT-base. Run it as ``python -m tests.benchmarks.factorization_speed``.
"""

import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import tensorly
import torch
import typer
from rich.console import Console
from rich.table import Table
from tensorly.decomposition import parafac
from torch import Tensor

from bayesattn.factorization import factorize
from tests.benchmarks.timing import name_of, wait_for

_HEADS, _DIM, _FEATURES, _WIDTH = 12, 64, 768, 256


def main(
    iterations: Annotated[int, typer.Option(min=1, help="Sweeps of both.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each.")] = 3,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the whole network.")] = 12,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the whole network.")] = 2,
    device: Annotated[
        str, typer.Option(help="Of the whole network.", show_default="a GPU if there is one")
    ] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Measure, and print tables."""
    console = Console()
    torch.set_num_threads(1)
    tensorly.set_backend("pytorch")
    for name, make in _LAYERS.items():
        query, key = make(torch.Generator().manual_seed(7))
        table = Table(
            title=f"{name}, {iterations} sweeps, CPU seconds ± spread, median of {rounds}"
        )
        for column in ("", "float32", "error", "float64", "error"):
            table.add_column(column)
        times: dict[str, dict[torch.dtype, float]] = {}
        rows: dict[str, list[str]] = {}
        for dtype in (torch.float32, torch.float64):
            given = (query.to(dtype), key.to(dtype))
            for label, run in _methods(iterations).items():
                seconds, error = _measured(run, given, rounds)
                times.setdefault(label, {})[dtype] = float(np.median(seconds))
                cell = f"{np.median(seconds):.2f} ± {np.ptp(seconds) / 2:.2f}"
                rows.setdefault(label, []).extend([cell, f"{error:.3e}"])
        for label, cells in rows.items():
            table.add_row(label, *cells)
        console.print(table)
        for theirs in ("tensorly, random start", "tensorly, SVD start"):
            ratios = [
                f"{times[theirs][dtype] / times['ours, heads apart'][dtype]:.1f}"
                for dtype in times[theirs]
            ]
            console.print(
                f"{theirs} takes {ratios[0]} (float32) and {ratios[1]} (float64) times ours."
            )
    _count(console, iterations)
    whole_network(console, layers, threads, device)


def whole_network(console: Console, layers: int, threads: int, device: str) -> None:
    """Time the factorization of all layers at once, after a short one that sets all up."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(7)
    query, key = (
        torch.randn(layers, _HEADS, _DIM, _FEATURES, generator=generator).to(device)
        for _ in range(2)
    )
    factorize(query[:1], key[:1], _WIDTH, num_iterations=1)
    wait_for(device)
    began = time.perf_counter()
    found = factorize(query, key, _WIDTH)
    wait_for(device)
    seconds = time.perf_counter() - began
    where = f"{threads} threads" if device == "cpu" else name_of(device)
    console.print(
        f"{layers} layers at once from the best of all starts, "
        f"{found.history.shape[1] - 1} sweeps: {seconds:.1f} s on {where}"
    )


def _count(console: Console, iterations: int) -> None:
    """What the sweeps must compute, and how fast this processor multiplies matrices."""
    rows = _HEADS * _DIM
    sweep = 5 * 2 * rows * _FEATURES * _WIDTH + 3 * 2 * _FEATURES * _WIDTH**2
    dense = 3 * 2 * _HEADS * _FEATURES**2 * _WIDTH
    square = torch.randn(768, 768)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 1:
        _ = square @ square
        count += 1
    rate = count * 2 * 768**3 / (time.perf_counter() - began)
    console.print(
        f"A sweep needs {sweep / 1e9:.2f} GFLOP; at the {rate / 1e9:.0f} GFLOP/s of a product of "
        f"matrices in float32, {iterations} of them {iterations * sweep / rate:.2f} s. "
        f"On the dense tensor a sweep needs {dense / 1e9:.1f} GFLOP."
    )


def _measured(
    run: Callable[[Tensor, Tensor], float], given: tuple[Tensor, Tensor], rounds: int
) -> tuple[list[float], float]:
    seconds, error = [], float("nan")
    for _ in range(rounds):
        began = time.process_time()
        error = run(*given)
        seconds.append(time.process_time() - began)
    return seconds, error


def _methods(iterations: int) -> dict[str, Callable[[Tensor, Tensor], float]]:
    def ours(start: str) -> Callable[[Tensor, Tensor], float]:
        def run(query: Tensor, key: Tensor) -> float:
            found = factorize(
                query, key, _WIDTH, start=start, num_iterations=iterations, tolerance=0
            )
            return float(found.relative_error)

        return run

    def theirs(init: str) -> Callable[[Tensor, Tensor], float]:
        def run(query: Tensor, key: Tensor) -> float:
            tensor = torch.einsum("hdq,hdk->hqk", query, key)
            found = parafac(tensor, _WIDTH, n_iter_max=iterations, init=init, tol=0, random_state=0)
            return float((tensorly.cp_to_tensor(found) - tensor).norm() / tensor.norm())

        return run

    return {
        "ours, heads apart": ours("heads"),
        "ours, algebraic start": ours("algebraic"),
        "ours, random start": ours("random"),
        "ours, best of the three": ours("best"),
        "tensorly, random start": theirs("random"),
        "tensorly, SVD start": theirs("svd"),
    }


def _random(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = (_HEADS, _DIM, _FEATURES)
    query, key = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return query, key


def _shareable(generator: torch.Generator, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Each head mixes 64 of 256 components; beside them noise, in parts of the weights' size."""
    pools = [
        torch.randn(_WIDTH, _FEATURES, generator=generator, dtype=torch.float64) for _ in range(2)
    ]
    sides: list[list[Tensor]] = [[], []]
    for _ in range(_HEADS):
        chosen = torch.randperm(_WIDTH, generator=generator)[:_DIM]
        sizes = torch.randn(_DIM, 1, generator=generator, dtype=torch.float64)
        sides[0].append(sizes * pools[0][chosen])
        sides[1].append(pools[1][chosen])
    query, key = (torch.stack(side) for side in sides)
    for side in (query, key):
        size = noise * side.std()
        side += size * torch.randn(side.shape, generator=generator, dtype=torch.float64)
    return query, key


_LAYERS: dict[str, Callable[[torch.Generator], tuple[Tensor, Tensor]]] = {
    "A random layer": _random,
    "A layer whose heads share 256 components": _shareable,
    "The same with 1 % noise": lambda generator: _shareable(generator, 0.01),
}

if __name__ == "__main__":
    typer.run(main)
