r"""What alignment costs: conditional transport beside attention, and a training step with it.

Run as ``python -m tests.benchmarks.alignment_speed [--busy] [--lengths 512,...] [--threads N]``; on
a GPU if there is one.

A transport both ways is two passes of attention. In matrix products of S × S × d one pass takes 2
forward and 5 backward, so two of them are at least 2.0 times attention. In the second table one
step of training, six layers of width 512 with 8 heads, is held against the same step with the term
of each divergence; what is learned takes an optimizer's step too.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesattn.divergences import (
    MMD,
    Adversarial,
    ConditionalTransport,
    Energy,
    SlicedWasserstein,
)
from bayesattn.inference import Alignment
from tests.benchmarks.peak_memory import peak_bytes
from tests.benchmarks.repulsion_speed import HEADS, LAYERS, WIDTH, network
from tests.benchmarks.timing import Advance, Clock, alternating, name_of, repeated, table

__all__ = ["measure_lengths", "measure_steps"]

DIM = 64
# Beyond this, costs of all heads are gigabytes.
LONGEST_DENSE = 4096
DIVERGENCES: dict[str, Any] = {
    "MMD": MMD(),
    "energy": Energy(),
    "sliced Wasserstein": SlicedWasserstein(),
    "transport": ConditionalTransport(),
    "transport, learned": ConditionalTransport.learned,
    "adversary": Adversarial,
}
Times = dict[str, tuple[float, str]]


def clouds_of(length: int, heads: int = HEADS, device: str = "cpu") -> list[Tensor]:
    """Queries and keys of one sentence."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, length, DIM)
    clouds = [torch.randn(shape, generator=generator).to(device) for _ in range(2)]
    return [cloud.requires_grad_() for cloud in clouds]


def comparisons(length: int, device: str = "cpu") -> dict[str, Callable[[], object]]:
    """Attention and transports of one sentence, each forward and backward."""
    query, key = clouds_of(length, device=device)
    # As wide as the keys, and of gradients of their own.
    value, gradient = (part.detach() for part in clouds_of(length, device=device))
    value.requires_grad_()

    def attend() -> object:
        output = F.scaled_dot_product_attention(query, key, value)
        return torch.autograd.grad(output, (query, key, value), gradient)

    def transport(divergence: nn.Module) -> Callable[[], object]:
        learned = list(divergence.to(device).parameters())
        return lambda: torch.autograd.grad(divergence(query, key).sum(), [query, key, *learned])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = {
            "SDPA": attend,
            "transport, fused": transport(ConditionalTransport(route="fused")),
            "learned, fused": transport(ConditionalTransport.learned(HEADS, DIM, route="fused")),
            "debiased, fused": transport(ConditionalTransport(debiased=True, route="fused")),
        }
        if length <= LONGEST_DENSE:
            found["transport, dense"] = transport(ConditionalTransport(route="dense"))
    return found


def measure_lengths(
    length: int, *, rounds: int, seconds: float, clock: Clock, device: str = "cpu"
) -> tuple[Times, dict[str, float]]:
    """Median milliseconds and spread of each, and the megabytes that each needs at its peak."""
    found = comparisons(length, device)
    turns = {name: repeated(once, device) for name, once in found.items()}
    times = alternating(turns, rounds=rounds, seconds=seconds, clock=clock)
    memory = {name: peak_bytes(once, device) / 2**20 for name, once in found.items()}
    return {name: (spent.median, spent.spread) for name, spent in times.items()}, memory


def training_steps(
    batch: int, tokens: int, width: int = WIDTH, layers: int = LAYERS, device: str = "cpu"
) -> dict[str, Advance]:
    """A training step alone, and with the term of each divergence."""
    rows = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(0)).to(device)
    padding = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
    padding[::2, tokens // 2 :] = True
    turns: dict[str, Advance] = {}
    for name, divergence in {"training step": None, **DIVERGENCES}.items():
        model = network(width, layers).to(device)
        alignment = None if divergence is None else Alignment(model, divergence)
        learned = [] if alignment is None else alignment.parameter_groups(lr=1e-3)
        optimizer = torch.optim.AdamW([{"params": model.parameters()}, *learned], lr=1e-4)
        turns[name] = repeated(_step(model, alignment, optimizer, rows, padding), device)
    return turns


def measure_steps(
    batch: int,
    tokens: int,
    *,
    width: int = WIDTH,
    layers: int = LAYERS,
    rounds: int,
    seconds: float,
    clock: Clock,
    device: str = "cpu",
) -> Times:
    """Median milliseconds and spread of a step with each divergence, and without any."""
    turns = training_steps(batch, tokens, width, layers, device)
    times = alternating(turns, rounds=rounds, seconds=seconds, clock=clock)
    return {name: (spent.median, spent.spread) for name, spent in times.items()}


def _step(
    model: nn.Module,
    alignment: Alignment | None,
    optimizer: torch.optim.Optimizer,
    rows: Tensor,
    padding: Tensor,
) -> Callable[[], object]:
    def once() -> None:
        optimizer.zero_grad()
        if alignment is None:
            loss = model(rows, src_key_padding_mask=padding).square().mean()
        else:
            with alignment.observe():
                loss = model(rows, src_key_padding_mask=padding).square().mean()
            loss = loss + alignment.loss()
        loss.backward()
        optimizer.step()

    return once


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lengths", default="256,512,1024,2048,4096,8192")
    parser.add_argument("--batch", type=int, default=32, help="sentences of a training step")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of such a sentence")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--busy", action="store_true", help="count processor time, not wall time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn, about")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = {
        "device": arguments.device,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "clock": time.process_time if arguments.busy else time.perf_counter,
    }
    rows = []
    for length in map(int, filter(None, arguments.lengths.split(","))):
        times, memory = measure_lengths(length, **settings)
        for name, (median, spread) in times.items():
            ratio = f"{median / times['SDPA'][0]:.2f}"
            extra = f"{memory[name] - memory['SDPA']:.0f}"
            rows.append([str(length), name, f"{median:.3g} ({spread})", ratio, extra])
    header = ["S", f"{HEADS} heads of {DIM}", "ms: median (spread)", "of SDPA", "MiB beyond SDPA"]
    print(table(header, rows, markdown=arguments.markdown) + "\n")
    sizes = {"width": arguments.width, "layers": arguments.layers}
    times = measure_steps(arguments.batch, arguments.tokens, **sizes, **settings)
    rows = [
        [name, f"{median:.3g} ({spread})", f"{median / times['training step'][0]:.2f}"]
        for name, (median, spread) in times.items()
    ]
    print(
        f"{name_of(arguments.device)}; {arguments.layers} layers, width {arguments.width}, "
        f"{HEADS} heads; {arguments.batch} sentences of {arguments.tokens} tokens, "
        "every other half padding\n"
    )
    header = ["", "ms: median (spread)", "of a step"]
    print(table(header, rows, markdown=arguments.markdown))


if __name__ == "__main__":
    main()
