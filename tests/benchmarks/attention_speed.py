r"""Attention forward and backward beside PyTorch's own, over lengths: time, memory, crossover.

Run as ``python -m tests.benchmarks.attention_speed [--busy] [--lengths 256,512,...]``; on a GPU if
there is one.

In matrix products of S × S × d, softmax attention by blocks takes 2 forward and 5 backward. Two
stock passes of it, one for the column sums and one for the weights, take 14: twice as many. Doubly
normalized attention needs no more than 8, one for the sums, 2 for the outputs, and 5 for both
gradients in one sweep; that is 1.14 of softmax's. What is above that is in exponentials and in
products that run less well than those inside PyTorch's kernel.
"""

import argparse
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesattn.functional import attention
from bayesattn.normalizations import (
    DoublyNormalized,
    HybridNormalized,
    InterpolatedNormalized,
    Normalization,
    Sinkhorn,
)
from tests.benchmarks.peak_memory import peak_bytes
from tests.benchmarks.timing import Clock, alternating, name_of, repeated, table

__all__ = ["PRODUCTS", "contestants", "measure"]

HEADS, DIM = 8, 64
# Beyond this, weights of all heads are gigabytes.
LONGEST_DENSE = 4096
# Matrix products of S x S x d that each cannot do without.
PRODUCTS = {
    "SDPA": 7,
    "softmax, dense": 6,
    "doubly, dense": 6,
    "doubly, fused": 8,
    "interpolated, dense": 6,
    "interpolated, fused": 11,
    "hybrid, dense": 9,
    "hybrid, fused": 15,
    "sinkhorn 3, dense": 6,
    "sinkhorn 3, fused": 27,
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def by(normalization: Normalization | None, route: str) -> Attend:
    """Attention by one normalization and route."""
    return lambda q, k, v: attention(q, k, v, normalization=normalization, route=route)


def contestants(device: str) -> dict[str, Attend]:
    """All by name, with what they learn on a device."""
    interpolated = InterpolatedNormalized(HEADS).to(device)
    hybrid = HybridNormalized(HEADS).to(device)
    return {
        "SDPA": F.scaled_dot_product_attention,
        "softmax, dense": by(None, "dense"),
        "doubly, dense": by(DoublyNormalized(), "dense"),
        "doubly, fused": by(DoublyNormalized(), "fused"),
        "interpolated, dense": by(interpolated, "dense"),
        "interpolated, fused": by(interpolated, "fused"),
        "hybrid, dense": by(hybrid, "dense"),
        "hybrid, fused": by(hybrid, "fused"),
        "sinkhorn 3, dense": by(Sinkhorn(3), "dense"),
        "sinkhorn 3, fused": by(Sinkhorn(3), "fused"),
    }


def measure(
    length: int,
    *,
    rounds: int,
    seconds: float,
    clock: Clock,
    match: str = "",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    longest_dense: int = LONGEST_DENSE,
) -> tuple[dict[str, tuple[float, str]], dict[str, float]]:
    """Median milliseconds and spread of each contestant, and megabytes it needs at its peak."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, HEADS, length, DIM, generator=generator) for _ in range(4)]
    *inputs, gradient = (part.to(device, dtype) for part in parts)
    inputs = [part.requires_grad_() for part in inputs]

    def once(attend: Attend) -> None:
        torch.autograd.grad(attend(*inputs), inputs, gradient)

    chosen = {n: a for n, a in contestants(device).items() if match in n or n == "SDPA"}
    if length > longest_dense:
        chosen = {name: attend for name, attend in chosen.items() if "dense" not in name}
    calls = {name: functools.partial(once, attend) for name, attend in chosen.items()}
    turns = {name: repeated(call, device) for name, call in calls.items()}
    times = alternating(turns, rounds=rounds, seconds=seconds, clock=clock)
    memory = {n: peak_bytes(call, device) / 2**20 for n, call in calls.items()}
    return {name: (found.median, found.spread) for name, found in times.items()}, memory


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lengths", default="256,512,768,1024,2048,4096,8192")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--longest-dense", type=int, default=LONGEST_DENSE)
    parser.add_argument("--busy", action="store_true", help="count processor time, not wall time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each turn, about")
    parser.add_argument("--match", default="", help="only contestants whose names have this")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.busy else time.perf_counter
    rows = []
    for length in map(int, arguments.lengths.split(",")):
        times, memory = measure(
            length,
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            clock=clock,
            match=arguments.match,
            device=arguments.device,
            dtype=getattr(torch, arguments.dtype),
            longest_dense=arguments.longest_dense,
        )
        for name, (median, spread) in times.items():
            rows.append(
                [
                    str(length),
                    name,
                    f"{median:.3g} ({spread})",
                    f"{median / times['SDPA'][0]:.2f}",
                    f"{PRODUCTS[name] / PRODUCTS['SDPA']:.2f}",
                    f"{memory[name]:.0f}",
                    f"{memory[name] / memory['SDPA']:.2f}",
                ]
            )
    header = ["S", "", "ms", "of SDPA", "of its products", "MB", "of SDPA"]
    device = name_of(arguments.device)
    print(f"forward and backward, batch 1, {HEADS} heads, d={DIM}, {arguments.dtype}, {device}\n")
    print(table(header, rows, markdown=arguments.markdown))


if __name__ == "__main__":
    main()
