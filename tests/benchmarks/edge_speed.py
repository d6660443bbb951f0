r"""Attention along the edges of a graph, forward and backward, beside one that gathers all at once.

Run as ``python -m tests.benchmarks.edge_speed [--nodes 2708] [--edges 13264] [--busy]``; the sizes
are those of Cora with self-loops. Of E edges, H heads and width d, products and sums take 2 H E d
operations each, and their gradients as many twice; who gathers all at once writes and reads H E d
numbers several times, which no cache holds.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bayesattn.edge_contractions import edge_products, edge_sums
from bayesattn.edges import edge_weights
from bayesattn.logits import RBFMagnitude, SchoenbergMixture, SpectralLogits
from tests.benchmarks.timing import Clock, Times, alternating, repeated, table

__all__ = ["contestants", "measure"]


def products_at_once(query: Tensor, key: Tensor, edges: Tensor) -> Tensor:
    """Inner products of what all edges gather."""
    ends = query.index_select(1, edges[1]), key.index_select(1, edges[0])
    return (ends[0] * ends[1]).sum(-1)


def sums_at_once(weights: Tensor, value: Tensor, edges: Tensor, num_queries: int) -> Tensor:
    """Sums of what all edges gather."""
    terms = weights[..., None] * value.index_select(1, edges[0])
    return terms.new_zeros(len(terms), num_queries, value.shape[-1]).index_add(1, edges[1], terms)


def contestants(num_nodes: int, num_edges: int, heads: int, dim: int) -> dict[str, Callable]:
    """Each once forward and backward."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(heads, num_nodes, dim, generator=generator) for _ in range(2)]
    query, key = (part.requires_grad_() for part in drawn)
    weights = torch.randn(heads, num_edges, generator=generator).requires_grad_()
    edges = torch.randint(num_nodes, (2, num_edges), generator=generator)

    def run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], *rest: object) -> None:
        torch.autograd.grad(function(*inputs, *rest).sum(), inputs)

    def attend(logits: torch.nn.Module | None) -> None:
        run(partial(edge_weights, edges=edges, logits=logits), (query, key))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        spectral = SpectralLogits(heads, dim, 32)
        mixture = SchoenbergMixture(heads, dim, 8)
    return {
        "products": partial(run, edge_products, (query, key), edges),
        "products, at once": partial(run, products_at_once, (query, key), edges),
        "sums": partial(run, edge_sums, (weights, key), edges, num_nodes),
        "sums, at once": partial(run, sums_at_once, (weights, key), edges, num_nodes),
        "weights, dot product": partial(attend, None),
        "weights, RBFMagnitude": partial(attend, RBFMagnitude(num_heads=heads)),
        "weights, SchoenbergMixture of 8": partial(attend, mixture),
        "weights, SpectralLogits of 32": partial(attend, spectral),
    }


def measure(
    num_nodes: int,
    num_edges: int,
    heads: int,
    dim: int,
    *,
    rounds: int,
    seconds: float,
    clock: Clock,
) -> dict[str, Times]:
    """Times of each."""
    found = contestants(num_nodes, num_edges, heads, dim)
    turns = {name: repeated(call) for name, call in found.items()}
    return alternating(turns, rounds=rounds, seconds=seconds, clock=clock)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--nodes", type=int, default=2708)
    parser.add_argument("--edges", type=int, default=13264)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--busy", action="store_true", help="count processor time, not wall time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each turn, about")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.busy else time.perf_counter
    sizes = (given.nodes, given.edges, given.heads, given.dim)
    times = measure(*sizes, rounds=given.rounds, seconds=given.seconds, clock=clock)
    dot = times["weights, dot product"].median
    rows = []
    for name, found in times.items():
        at_once = times.get(f"{name}, at once")
        of_at_once = f"{found.median / at_once.median:.2f}" if at_once else ""
        of_dot = f"{found.median / dot:.2f}" if name.startswith("weights") else ""
        rows.append([name, str(found), of_at_once, of_dot])
    print(f"{given.nodes} nodes, {given.edges} edges, {given.heads} heads of {given.dim}\n")
    header = ["forward and backward", "ms", "of at once", "of the dot product's"]
    print(table(header, rows, markdown=given.markdown))


if __name__ == "__main__":
    main()
