r"""Attention forward and backward beside PyTorch's own, over lengths: time, memory, crossover.

Run as ``python -m tests.benchmarks.attention_speed [--busy] [--lengths 256,512,...]``; on a GPU if
there is one.

In matrix products of S × S × d, softmax attention by blocks takes 2 forward and 5 backward. Two
stock passes of it, one for the column sums and one for the weights, take 14: twice as many. Doubly
normalized attention needs no more than 8, one for the sums, 2 for the outputs, and 5 for both
gradients in one sweep; that is 1.14 of softmax's. What is above that is in exponentials and in
products that run less well than those inside PyTorch's kernel.

Of kernels in the place of the dot product, RBF × magnitude is softmax attention with a bias of the
keys, a mixture of C Gaussian kernels is one of C copies of the keys at twice the width, and M
positive features are two of S × M × d each.
"""

import argparse
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesattn.functional import attention
from bayesattn.logits import (
    Logits,
    PositiveFeatures,
    RationalQuadratic,
    RBFMagnitude,
    SchoenbergMixture,
    SpectralLogits,
)
from bayesattn.normalizations import (
    DoublyNormalized,
    HybridNormalized,
    InterpolatedNormalized,
    Normalization,
    Sinkhorn,
)
from tests.benchmarks.peak_memory import peak_bytes
from tests.benchmarks.timing import Clock, alternating, name_of, repeated, table

__all__ = ["contestants", "measure", "products"]

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
    "magnitude, p = 3": 7,
    "magnitude, learned p": 7,
    "mixture of 4, fused": 44,
    "mixture of 4, dense": 36,
    "rational quadratic, dense": 6,
    "64 frequencies, dense": 10,
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def by(normalization: Normalization | None, route: str, logits: Logits | None = None) -> Attend:
    """Attention by one choice and route."""
    settings = {"normalization": normalization, "logits": logits, "route": route}
    return lambda q, k, v: attention(q, k, v, **settings)


def products(name: str, length: int) -> float:
    """Matrix products of S × S × d that a contestant cannot do without."""
    if name.endswith("features"):
        return 14 * int(name.split(maxsplit=1)[0]) / length
    return PRODUCTS[name]


def contestants(device: str) -> dict[str, Attend]:
    """All by name, with what they learn on a device."""
    interpolated = InterpolatedNormalized(HEADS).to(device)
    hybrid = HybridNormalized(HEADS).to(device)
    sizes = (HEADS, DIM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        frequencies = SpectralLogits(*sizes, 64, square="plain").to(device)
        features = {
            f"{count} features": by(None, "fused", PositiveFeatures(*sizes, count).to(device))
            for count in (64, 128, 256)
        }
    mixture = SchoenbergMixture(*sizes, 4, spread=1.0).to(device)
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
        "magnitude, p = 3": by(None, "fused", RBFMagnitude(3.0)),
        "magnitude, learned p": by(None, "fused", RBFMagnitude(3.0, num_heads=HEADS).to(device)),
        "mixture of 4, fused": by(None, "fused", mixture),
        "mixture of 4, dense": by(None, "dense", mixture),
        "rational quadratic, dense": by(None, "dense", RationalQuadratic(*sizes).to(device)),
        "64 frequencies, dense": by(None, "dense", frequencies),
        **features,
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
    drawn = [torch.randn(1, HEADS, length, DIM, generator=generator) for _ in range(4)]
    *inputs, gradient = (part.to(device, dtype) for part in drawn)
    inputs = [part.requires_grad_() for part in inputs]

    def once(attend: Attend) -> None:
        torch.autograd.grad(attend(*inputs), inputs, gradient)

    parts = match.split("|")
    chosen = {
        name: attend
        for name, attend in contestants(device).items()
        if name == "SDPA" or any(part in name for part in parts)
    }
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
    parser.add_argument(
        "--match", default="", help="only those with this, or this|that, in the name"
    )
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
                    f"{products(name, length) / PRODUCTS['SDPA']:.2f}",
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
