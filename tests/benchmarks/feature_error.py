r"""How far random features are from the softmax's kernel and from its attention, over their number.

Run as ``python -m tests.benchmarks.feature_error [--dim 64] [--out DIR]``. Of the kernel it is the
root mean square error of the features' estimate, over pairs of standard normal queries and keys,
divided by that of the kernel itself; of attention, the total variation from the softmax, the mean
over queries. Errors of independent features fall as one over the root of their number.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.functional import attention_weights
from bayesattn.logits import Logits, PositiveFeatures, SpectralLogits
from bayesattn.logits.frequencies import FREQUENCY_DRAWS
from bayesattn.plots import feature_error
from tests.benchmarks.timing import table

__all__ = ["attention_errors", "kernel_errors", "measured"]

TOKENS = 64
# From seeds, width and number of features; each seed is a head.
Make = Callable[[int, int, int], Logits]


def of_cosines(square: str, draw: str) -> Make:
    """Squared random Fourier features."""
    return lambda seeds, dim, count: SpectralLogits(seeds, dim, count, square=square, draw=draw)


def of_exponentials(draw: str) -> Make:
    """Positive features."""
    return lambda seeds, dim, count: PositiveFeatures(seeds, dim, count, draw=draw)


KERNELS = {
    **{f"cosines, {draw}": of_cosines("plain", draw) for draw in FREQUENCY_DRAWS},
    **{f"exponentials, {draw}": of_exponentials(draw) for draw in FREQUENCY_DRAWS},
}
ATTENTION = {
    "cosines, squared": of_cosines("plain", "orthogonal"),
    "independent cosines, unbiased square": of_cosines("unbiased", "independent"),
    "exponentials": of_exponentials("orthogonal"),
}


def kernel_errors(logits: Logits, query: Tensor, key: Tensor) -> Float[Tensor, " seed"]:
    """Root mean square error of the estimate, over the kernel's own root mean square."""
    root = query.shape[-1] ** 0.5
    if isinstance(logits, SpectralLogits):
        exact = (-torch.cdist(query, key).square() / (4 * root)).exp()
        found = logits.similarity(query, key)
    else:
        exact = (query @ key.mT / root).exp()
        found = logits(query, key).exp()
    return ((found - exact).square().mean((-2, -1)) / exact.square().mean((-2, -1))).sqrt()


def attention_errors(logits: Logits, query: Tensor, key: Tensor) -> Float[Tensor, " seed"]:
    """Total variation from softmax attention, the mean over queries."""
    found = attention_weights(query, key, logits=logits)
    return (found - attention_weights(query, key)).abs().sum(-1).mean(-1) / 2


@torch.no_grad()
def measured(
    makes: dict[str, Make],
    error: Callable[[Logits, Tensor, Tensor], Tensor],
    sizes: list[int],
    *,
    dim: int,
    seeds: int,
) -> dict[str, Float[Tensor, "seed size"]]:
    """Errors of each kind of features, for each seed and size."""
    generator = torch.Generator().manual_seed(0)
    settings = {"generator": generator, "dtype": torch.float64}
    query, key = (torch.randn(seeds, TOKENS, dim, **settings) for _ in range(2))
    errors = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, make in makes.items():
            logits = (make(seeds, dim, size).double() for size in sizes)
            errors[name] = torch.stack([error(one, query, key) for one in logits], -1)
    return errors


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--sizes", default="16,64,256,1024,4096")
    parser.add_argument("--out", type=Path, help="where the pictures go; none if not given")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    settings = {"dim": arguments.dim, "seeds": arguments.seeds}
    for what, makes, error in (
        ("kernel", KERNELS, kernel_errors),
        ("attention", ATTENTION, attention_errors),
    ):
        errors = measured(makes, error, sizes, **settings)
        rows = []
        for name, values in errors.items():
            means, deviations = values.mean(0), values.std(0) / math.sqrt(len(values))
            cells = (f"{m:.3g} ± {d:.1g}" for m, d in zip(means, deviations, strict=True))
            rows.append([name, *cells])
        print(f"error of the {what}, d={arguments.dim}, {arguments.seeds} seeds\n")
        print(table(["features", *map(str, sizes)], rows, markdown=arguments.markdown), "\n")
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            figure = feature_error(errors, sizes)
            figure.savefig(arguments.out / f"feature_error_{what}.png", dpi=150)


if __name__ == "__main__":
    main()
