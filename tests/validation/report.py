"""How near SVGD, SVI and NUTS come to eight reference posteriors, as a table.

Errors of means are in units of the reference's standard deviation, on the unconstrained scale, the
worst over coordinates and seeds; ratios of standard deviations are the range over both. Run it by
``python -m tests.validation.report``.
"""

import argparse
import time
import warnings

import torch
from torch import Tensor

from bayesattn.inference import NUTS, SVGD, SVI, ConvergenceWarning
from tests.validation.references import NAMES, ReferencePosterior, load, unconstrained
from tests.validation.scores import by_moments, effective_sample_size


def worst(reference: ReferencePosterior, runs: list[Tensor]) -> str:
    scores = [by_moments(draws, unconstrained(reference)) for draws in runs]
    shift = torch.stack([score.shift for score in scores]).abs().max()
    ratio = torch.stack([score.ratio for score in scores])
    return f"{shift:.2f} / {ratio.min():.2f}–{ratio.max():.2f}"


def row(name: str, num_seeds: int) -> list[str]:
    reference, seeds = load(name), range(num_seeds)
    quiet = {"progress": False}
    cells = [name.replace("_", " ")]
    svgd = SVGD(reference.model, coordinates="laplace")
    for num_steps in (600, 1800):
        runs = [svgd.run(*reference.data, num_steps=num_steps, seed=s, **quiet) for s in seeds]
        cells.append(worst(reference, [run.unconstrained[0] for run in runs]))
    svi = SVI(reference.model, coordinates="laplace", num_elbo_particles=10)
    runs = [svi.run(*reference.data, num_steps=1000, seed=s, **quiet) for s in seeds]
    cells.append(worst(reference, [run.unconstrained[0] for run in runs]))
    nuts = NUTS(reference.model, coordinates="laplace")
    run = nuts.run(*reference.data, warmup_steps=500, num_samples=1000, seed=0, **quiet)
    size = float(effective_sample_size(run.unconstrained).min())
    cells.append(f"{worst(reference, [run.unconstrained[0]])} (ESS {size:.0f})")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("always", ConvergenceWarning)
    start = time.perf_counter()
    svi = "SVI mean-field, 1000 steps of 10 draws"
    print(f"| posterior | SVGD, 600 steps | SVGD, 1800 steps | {svi} | NUTS |")
    print("|---|---|---|---|---|")
    for name in NAMES:
        print(f"| {' | '.join(row(name, options.seeds))} |", flush=True)
    print(f"\n{options.seeds} seeds, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
