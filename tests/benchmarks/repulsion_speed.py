r"""Time of a step of Repulsion over that of a training step of a Transformer.

Run as ``python -m tests.benchmarks.repulsion_speed [--batch B] [--tokens S] [--threads N]``.

The network has 6 layers of width 512 with 8 heads. Its heads hold

.. math:: 6 \cdot 3 \cdot 512^2 = 4.7 \cdot 10^6

numbers. A step has to read them and their gradients once and to write gradients once; each tensor
in between that is not fused with the next one is written and read again. Beside the time stands the
bandwidth that those three passes come to, and that of a copy of as many numbers here.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from bayesattn.inference import (
    CircuitForce,
    Repulsion,
    SteinDiffusion,
    SteinForce,
    WassersteinForce,
)
from bayesattn.networks import head_partitions
from tests.benchmarks.timing import Clock, alternating, name_of, table, wait_for

__all__ = ["LAYERS", "contestants", "measure"]

LAYERS, WIDTH, HEADS = 6, 512, 8
METHODS = {
    "SVGD": SteinForce(),
    "WGD": WassersteinForce(),
    "circuits": CircuitForce(),
    "SPOS": SteinDiffusion(0, preconditioner="none"),
}


def network(width: int, layers: int) -> nn.Module:
    """An encoder with PyTorch's own layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, HEADS, 4 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def contestants(
    batch: int, tokens: int, device: str = "cpu", width: int = WIDTH, layers: int = LAYERS
) -> dict[str, Callable[[int], None]]:
    """Training steps alone, a step of each method alone, and a copy of the heads' numbers."""
    model = network(width, layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rows = torch.randn(batch, tokens, width, device=device)

    def train(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(rows).square().mean().backward()
            optimizer.step()
        wait_for(device)

    train(1)
    model(rows).square().mean().backward()
    found = {"training step": train}
    for name, method in METHODS.items():
        roles = ("query", "key") if name == "circuits" else ("query", "key", "value")
        heads = head_partitions(model, roles, joint=name == "circuits")
        # With an optimizer of its own, so that what others note for later is not done here.
        own = torch.optim.SGD(model.parameters(), lr=0.0)
        prior = torch.distributions.Normal(0.0, 1.0)
        settings = {"method": method, "heads": heads, "num_data": 10_000, "prior": prior}
        repulsion = Repulsion(model, own, **settings)
        found[name] = _steps(repulsion, own, device)
    numbers = torch.randn(3 * layers * width * width, device=device)
    target = torch.empty_like(numbers)

    def copy(count: int) -> None:
        for _ in range(count):
            target.copy_(numbers)
        wait_for(device)

    return found | {"copy": copy}


def _steps(
    repulsion: Repulsion, optimizer: torch.optim.Optimizer, device: str
) -> Callable[[int], None]:
    def advance(count: int) -> None:
        for _ in range(count):
            repulsion.step()
            # What is done after an optimizer's step, without the step; gradients are used again.
            repulsion._after_step(optimizer)
            repulsion._used = []
        wait_for(device)

    return advance


def measure(
    batch: int,
    tokens: int,
    *,
    device: str = "cpu",
    width: int = WIDTH,
    layers: int = LAYERS,
    rounds: int = 5,
    seconds: float = 1.0,
    clock: Clock = time.perf_counter,
) -> dict[str, tuple[float, str]]:
    """Median milliseconds of each contestant, and their spread."""
    turns = contestants(batch, tokens, device, width, layers)
    times = alternating(turns, rounds=rounds, seconds=seconds, clock=clock)
    return {name: (found.median, found.spread) for name, found in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=32, help="sentences")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a sentence")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn, about")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    width, layers = arguments.width, arguments.layers
    times = measure(
        arguments.batch,
        arguments.tokens,
        device=arguments.device,
        width=width,
        layers=layers,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
    )
    numbers, step = 3 * layers * width**2, times["training step"][0]
    rows = []
    for name, (median, spread) in times.items():
        passes = {"training step": 0, "copy": 2}.get(name, 3)
        rate = f"{passes * 4 * numbers / median / 1e6:.1f}" if passes else ""
        rows.append([name, f"{median:.3g} ({spread})", f"{100 * median / step:.1f} %", rate])
    print(
        f"{layers} layers, width {width}, {HEADS} heads, {name_of(arguments.device)}; "
        f"{arguments.batch} sentences of {arguments.tokens} tokens; "
        f"heads of {numbers / 1e6:.1f} million numbers\n"
    )
    print(table(["", "ms: median (spread)", "of a step", "GB/s of least traffic"], rows))


if __name__ == "__main__":
    main()
