"""How many components do the queries and keys of a layer's heads share? Their posterior says.

Four heads, three components wide each, mix five components, and a little noise beside them. The
factorization finds shared projections of any width, but says of none that it is the right one. A
Pyro program of ten components, each with a scale, has a posterior in which those that are not
needed are next to nothing: found here by closed-form variational Bayes, by stochastic variational
inference under two priors, as particles that start from the variational laws, by a chain of NUTS
over the scales alone, and as a mode. It takes about a minute; a picture goes to `out/`.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch

from bayesattn.factorization import factorize
from bayesattn.inference import (
    NUTS,
    SVGD,
    SVI,
    ConvergenceWarning,
    CoordinateAscent,
    Posterior,
)
from bayesattn.models import AutomaticRelevance, ComponentScalesAlone, Horseshoe, SharedComponents

mpl.use("Agg")
from matplotlib import pyplot as plt

HEADS, DIM, QUERY, KEY, SHARED = 4, 3, 13, 11, 5
MOST = 10
QUIET = {"seed": 0, "progress": False}
SITES = ["width", "energy", "relative_error"]


def make_layer(generator):
    """Queries' and keys' weights of heads that each mix three of the shared components."""
    pools = [torch.randn(SHARED, size, generator=generator) for size in (QUERY, KEY)]
    # Dealt out in turn, so that no component is left out.
    order = torch.cat([torch.randperm(SHARED, generator=generator) for _ in range(HEADS * DIM)])
    chosen = order[: HEADS * DIM].view(HEADS, DIM)
    sizes = 0.7 + torch.rand(HEADS, DIM, 1, generator=generator)
    return [
        side + 0.05 * torch.randn(side.shape, generator=generator)
        for side in (sizes * pools[0][chosen], pools[1][chosen])
    ]


def tell_factorization(layer):
    """Print and return errors of each width: refitted, of the largest components, and the bound."""
    found = [factorize(*layer, width) for width in range(1, MOST + 1)]
    errors = torch.stack([one.relative_error for one in found])
    bounds = torch.stack([one.lower_bound for one in found])
    nested = found[-1].nested_errors
    print("Relative error of shared projections, by their width")
    print("  width                " + "".join(f"{width:7d}" for width in range(1, MOST + 1)))
    for name, row in (("refitted", errors), ("lower bound", bounds), (f"part of {MOST}", nested)):
        print(f"  {name:20s} " + "".join(f"{float(value):7.3f}" for value in row))
    print()
    return {"refitted": errors, f"largest of {MOST}": nested, "lower bound": bounds}


def routines(layer, few):
    """Name of each way, and what finds a posterior by it, given those before."""
    relevance, horseshoe = SharedComponents(MOST), SharedComponents(MOST, Horseshoe())
    scales = ComponentScalesAlone(AutomaticRelevance())
    near = {"guide": "normal", "init_scale": 0.01}

    def by_laws(_):
        ascent = CoordinateAscent(relevance)
        return ascent.run(*layer, num_steps=500, tolerance=1e-3, num_samples=400, **QUIET)

    def by_svi(_):
        start = relevance.initial_state(*layer)
        settings = {"num_steps": 1200 // few, "num_samples": 400, "init": start}
        return SVI(relevance, **near).run(*layer, **settings, **QUIET)

    def by_horseshoe(_):
        settings = {"num_steps": 1200 // few, "num_samples": 400}
        return SVI(horseshoe, **near).run(*layer, **settings, **QUIET)

    def by_particles(found):
        svgd = SVGD(relevance, num_particles=30)
        return svgd.run(*layer, num_steps=200 // few, init=found["laws, ARD"], **QUIET)

    def by_chain(found):
        laws = found["laws, ARD"]
        directions = [laws[f"{side}_component"].mean((0, 1)) for side in ("query", "key")]
        nuts = NUTS(scales, target_accept_prob=0.9)
        lengths = {"warmup_steps": 80 // few, "num_samples": 80 // few}
        return nuts.run(*layer, *directions, **lengths, **QUIET)

    def by_mode(_):
        return SVI(horseshoe, guide="delta").run(*layer, num_steps=1200 // few, **QUIET)

    ways: dict[str, Callable[[dict[str, Posterior]], Posterior]] = {
        "laws, ARD": by_laws,
        "SVI, ARD": by_svi,
        "SVI, horseshoe": by_horseshoe,
        "SVGD from laws": by_particles,
        "NUTS over scales": by_chain,
        "mode, horseshoe": by_mode,
    }
    return ways


def tell(name, posterior, seconds):
    """Print what one posterior says, and return its energies."""
    seen = {site: value.flatten(0, 1) for site, value in posterior.predict(sites=SITES).items()}
    widths, counts = seen["width"].unique(return_counts=True)
    shares = ", ".join(
        f"{int(width)} ({count / len(seen['width']):.0%})"
        for width, count in zip(widths, counts.tolist(), strict=True)
    )
    energy = seen["energy"].mean(0)
    print(
        f"  {name:18s} {float(energy[SHARED - 1]):8.2f} {float(energy[SHARED]):10.2g}"
        f" {float(seen['relative_error'].mean()):10.3f} {seconds:9.1f}   {shares}"
    )
    return seen["energy"]


def draw(errors, energies, target):
    """Errors by width, and energies of the components by each posterior."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2))
    figure.set_layout_engine("constrained")
    widths = range(1, MOST + 1)
    for (name, row), style in zip(errors.items(), ("o-", "s--", "k:"), strict=True):
        left.plot(widths, row, style, label=name)
    left.axvline(SHARED, color="0.8", zorder=0)
    left.set(xlabel="width", ylabel="relative error", title="The factorization", ylim=(0, None))
    left.set_xticks(widths)
    left.legend()
    for place, (name, values) in enumerate(energies.items()):
        shift = 0.12 * (place - (len(energies) - 1) / 2)
        low, middle, high = values.quantile(torch.tensor([0.05, 0.5, 0.95]).to(values), 0)
        bars = torch.stack([middle - low, high - middle])
        at = [width + shift for width in widths]
        right.errorbar(at, middle, bars, fmt="o", markersize=4, label=name)
    right.axvspan(0.5, SHARED + 0.5, color="0.95", zorder=0)
    right.set(
        xlabel=f"component, by energy (shaded: the {SHARED} that heads share)",
        ylabel="energy: median, 5 % and 95 %",
        title="Posteriors",
        yscale="log",
        ylim=(1e-4, None),
    )
    right.set_xticks(widths)
    right.legend(fontsize="small", loc="lower left")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run all, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    layer = make_layer(torch.Generator().manual_seed(0))
    errors = tell_factorization(layer)
    print(f"Posteriors of {MOST} components; heads were made of {SHARED}")
    print(f"  {'':18s} energy {SHARED}   energy {SHARED + 1} rel. error   seconds   widths")
    found, energies = {}, {}
    for name, find in routines(layer, 10 if arguments.quick else 1).items():
        began = time.perf_counter()
        with warnings.catch_warnings():
            if arguments.quick:
                warnings.simplefilter("ignore", ConvergenceWarning)
            found[name] = find(found)
        energies[name] = tell(name, found[name], time.perf_counter() - began)
    print(f"\nEnergies of the first {SHARED}, means and standard deviations")
    for name, values in energies.items():
        cells = zip(values.mean(0)[:SHARED], values.std(0, correction=0)[:SHARED], strict=True)
        print(f"  {name:18s} " + "  ".join(f"{mean:6.2f} ± {sd:.3f}" for mean, sd in cells))
    print(
        "The chain is given the directions that the laws found, and mixing is integrated out: its "
        "spread\nis that of scales alone."
    )
    target = arguments.out / "inferred_width.png"
    draw(errors, energies, target)
    print(f"\nA picture is in {target}.")


if __name__ == "__main__":
    main()
