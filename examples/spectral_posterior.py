"""What is known of attention's kernel: a posterior over its frequencies, and over kernels.

A signal of two tones is seen at sixty points, with noise. A Pyro program predicts each point by
attention to the others, whose kernel is made of sixteen random frequencies. Many sets of
frequencies explain the points: their order and signs mean nothing, and kernels differ where the
points say little; attention sees no more than a kernel's square. So the kernel is found in several
ways, as the best of ten modes of its posterior, by normal guides, as particles and by Markov
chains, and it is kernels that are compared. Predictions of single kernels stand beside the mean
over all, and beside the best fixed bandwidth of a Gaussian kernel. One seed takes some two minutes;
pictures go to `out/`.
"""

import argparse
import math
import time
import warnings
from pathlib import Path

import matplotlib as mpl
import torch

from bayesattn import plots
from bayesattn.inference import NUTS, SVGD, SVI, ConvergenceWarning, compare
from bayesattn.kernels import RBF, Equivariant, FrequencySets, PerSite
from bayesattn.models import AttentionRegression, FrequencyMixture, RandomFrequencies

mpl.use("Agg")
from matplotlib import pyplot as plt

TONES = ((1.0, 0.0), (3.0, 1.0))
LAGS = tuple(round(0.025 * step, 3) for step in range(41))
GAUSSIAN = "Gaussian kernel"


def signal(inputs):
    """Two tones: their frequency in cycles for a unit, and their phase."""
    return sum(torch.cos(2 * math.pi * rate * inputs[:, 0] + phase) for rate, phase in TONES)


def make_data(seed):
    """Sixty points with noise, and held-out points without between them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = 2 * torch.rand(60, 1, generator=generator) - 1
    target = signal(inputs) + 0.2 * torch.randn(60, generator=generator)
    new = 1.8 * torch.rand(60, 1, generator=generator) - 0.9
    return (inputs, target), (new, signal(new))


def routines(few):
    """Name of each way, the routine, and the length of its run; graphs are recorded once."""
    model = AttentionRegression(RandomFrequencies(16, scale=2.0), lags=LAGS)
    mixture = AttentionRegression(FrequencyMixture(4, mean_scale=2.0), lags=LAGS)
    # Lags at which one set of frequencies is told from another.
    probes = torch.linspace(0.1, 1.6, 16)[:, None]
    sets = {"normal_frequency": Equivariant(FrequencySets(1, 1, probes))}
    steps = {"num_steps": 1000 // few}
    fewer, draws = {"num_steps": 600 // few}, {**steps, "num_samples": 300}
    chains = {"warmup_steps": 80 // few, "num_samples": 80 // few, "num_chains": 2}
    return {
        "MAP": (SVGD(model, num_particles=1), {**steps, "num_runs": 10}),
        "SVI normal": (SVI(model, num_elbo_particles=2), draws),
        "SVI low rank": (SVI(model, guide="low_rank", num_elbo_particles=2), draws),
        "SVGD": (SVGD(model, num_particles=30), steps),
        "SVGD by site": (SVGD(model, num_particles=30, kernel=PerSite(RBF())), steps),
        "SVGD of sets": (
            SVGD(model, num_particles=30, kernel=PerSite(RBF(), sets)),
            steps,
        ),
        "SVGD, mixture": (SVGD(mixture, num_particles=20, kernel=PerSite(RBF())), fewer),
        "NUTS": (NUTS(model, max_tree_depth=6), chains),
    }


def root_mean_square(errors):
    """Over all entries."""
    return float(errors.square().mean().sqrt())


def gaussian(query, keys, target, bandwidth, *, leave_out=False):
    """Averages of targets under a Gaussian kernel, of each point's own target or not."""
    logits = -(query - keys.mT).square() / (2 * bandwidth**2)
    if leave_out:
        logits = logits.masked_fill(torch.eye(len(keys), dtype=torch.bool), -torch.inf)
    return logits.softmax(-1) @ target


def best_gaussian(data, new):
    """Predictions by the bandwidth that is best where each point is left out in turn."""
    inputs, target = data

    def error(bandwidth):
        return root_mean_square(gaussian(inputs, *data, bandwidth, leave_out=True) - target)

    best = min(torch.logspace(-2.5, 0, 60), key=error)
    return gaussian(new, inputs, target, best)


def errors_of(posterior, data, held_out):
    """Root mean square errors on held-out points: of the mean over draws, and of single draws.

    Of modes, in the place of the mean, the one of the ten starts with the highest density.
    """
    inputs, target = data
    new, truth = held_out
    context = {"context_inputs": inputs, "context_target": target}
    found = posterior.predict(new, **context, sites=["expected_target"])["expected_target"]
    single = root_mean_square(found - truth)
    if posterior.num_draws == 1:
        best = posterior.sample_stats["lp"][:, 0].argmax()
        return root_mean_square(found[best, 0] - truth), single
    return root_mean_square(found.mean((0, 1)) - truth), single


def run_all(seed, ways):
    """Posteriors of one seed, and errors of each way: both as a dict by name."""
    data, held_out = make_data(seed)
    error = root_mean_square(best_gaussian(data, held_out[0]) - held_out[1])
    found, errors = {}, {GAUSSIAN: (error, error)}
    print(f"seed {seed}")
    print(f"  {GAUSSIAN:16s} {error:.3f}")
    for name, (routine, length) in ways.items():
        began = time.perf_counter()
        found[name] = routine.run(*data, **length, seed=seed, progress=False)
        errors[name] = errors_of(found[name], data, held_out)
        seconds = time.perf_counter() - began
        mean, one = errors[name]
        print(f"  {name:16s} {mean:.3f}  one draw {one:.3f}  {seconds:5.1f} s")
    return data, found, errors


def report(errors):
    """Print means over seeds with standard errors, and paired differences from NUTS."""
    table = {name: torch.tensor([row[name] for row in errors]) for name in errors[0]}
    print(f"\nRoot mean square errors on held-out points, over {len(errors)} seeds")
    print(f"  {'':16s} mean over draws   one draw          less that of NUTS")
    for name, values in table.items():
        columns = values[:, 0], values[:, 1], values[:, 0] - table["NUTS"][:, 0]
        cells = [f"{float(v.mean()):6.3f} ± {float(v.std()) / len(v) ** 0.5:.3f}" for v in columns]
        print(f"  {name:16s} " + "    ".join(cells))


def tell_kernels(found):
    """Print how far the kernels of all others are from those of NUTS, and how chains agree."""
    nuts = found["NUTS"]
    others = {
        name: posterior
        for name, posterior in found.items()
        if name not in ("NUTS", "MAP", "SVGD, mixture")
    }
    table = compare(nuts, sites=["kernel", "squared_kernel"], num_null=20, **others).sites
    print("\nKernels beside those of NUTS, in its standard deviations")
    columns = ["mean_error", "mean_error_95", "sd_ratio_low", "sd_ratio_high"]
    print(table[columns].round(2).to_string())
    tree = nuts.to_arviz(log_likelihood=False)
    axes = {site: tree["posterior"][site].dims for site in ("squared_kernel", "scaled_frequency")}
    for site, dims in axes.items():
        summary = nuts.summary(sites=[site], round_to="none")
        worst = float(summary["r_hat"].max())
        print(f"  {site} ({', '.join(dims)}): worst R-hat of two chains {worst:.2f}")
    effective = found["SVGD, mixture"].predict(sites=["effective_components"])
    middle = float(effective["effective_components"].median())
    print(f"Of four components of the mixture, {middle:.1f} are in effect (median)")


def draw(data, found):
    """Predictions of four ways, with bands of nine tenths of the draws."""
    inputs, values = data
    grid = torch.linspace(-1, 1, 200)[:, None]
    context = {"context_inputs": inputs, "context_target": values}
    shown = ("NUTS", "SVGD by site", "SVI normal", "MAP")
    figure, axes = plt.subplots(1, len(shown), figsize=(15, 3.6), sharey=True)
    figure.set_layout_engine("constrained")
    for name, panel in zip(shown, axes, strict=True):
        seen = found[name].predict(grid, **context, sites=["expected_target"])
        rows = seen["expected_target"].flatten(0, 1)
        low, high = rows.quantile(torch.tensor([0.05, 0.95]), 0)
        panel.fill_between(grid[:, 0], low, high, alpha=0.3)
        panel.plot(grid[:, 0], rows.mean(0), label="mean over draws")
        panel.plot(grid[:, 0], signal(grid), "k:", linewidth=1, label="signal")
        panel.plot(inputs[:, 0], values, "k.", markersize=3)
        panel.set(title=name, xlabel="input")
    axes[0].set_ylabel("target")
    axes[0].legend(fontsize="small")
    return figure


def main() -> None:
    """Run all, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1, help="data sets, each drawn by its seed")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the pictures")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {arguments.seeds}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    ways, errors = routines(10 if arguments.quick else 1), []
    with warnings.catch_warnings():
        # Short chains and few particles; how they agree is printed.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for seed in range(arguments.seeds):
            data, found, row = run_all(seed, ways)
            errors.append(row)
            if seed == 0:
                tell_kernels(found)
                draw(data, found).savefig(arguments.out / "spectral_posterior.png", dpi=120)
                seen = {name: found[name] for name in ("NUTS", "SVGD by site", "SVI normal")}
                title = "Attention's kernel, as found"
                bands = plots.kernel_bands(seen, site="squared_kernel", title=title)
                bands.savefig(arguments.out / "spectral_kernels.png", dpi=120)
    if arguments.seeds > 1:
        report(errors)
    print(f"\nPictures are in {arguments.out}.")


if __name__ == "__main__":
    main()
