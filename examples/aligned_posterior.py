"""What alignment does to a posterior: of the distance of queries and keys, and of attention.

A small self-attention program says yes or no to short sentences, as another one did that made the
data. Its posterior is found by NUTS, SVI and SVGD without alignment, and under a Gibbs factor
exp(-λ D) of each sentence and head, D being the energy distance of its queries and keys. That D
falls says little by itself: queries and keys can be brought together by a change of basis that
attention does not see, or by making all weights small. So D without such changes, the size of the
weights and attention itself stand beside it. At last the weight is sought at which the mean of D is
a third of what it was. It takes about a minute; a picture goes to `out/`.
"""

import argparse
import time
import warnings
from pathlib import Path

import matplotlib as mpl
import torch

from bayesattn import calibration
from bayesattn.divergences import Balanced, Energy
from bayesattn.inference import NUTS, SVGD, SVI, ConvergenceWarning, compare, weight_for_target
from bayesattn.models import AlignmentFactor, Bernoulli, MultiHeadSelfAttention
from bayesattn.models.self_attention import mean_over_tokens, projected, self_attend

mpl.use("Agg")
from matplotlib import pyplot as plt

DIM, NUM_HEADS, HEAD_DIM, NUM_TOKENS = 3, 2, 2, 5
WEIGHT = 0.5
QUIET = {"seed": 0, "progress": False}
COLORS = {0.0: "0.55", WEIGHT: "C0"}


def make_data(generator, num_sentences):
    """Sentences of three to five tokens, and what a network of two sharp heads says to them."""
    tokens = torch.randn(num_sentences, NUM_TOKENS, DIM, generator=generator)
    lengths = torch.randint(3, NUM_TOKENS + 1, (num_sentences, 1), generator=generator)
    mask = torch.arange(NUM_TOKENS) < lengths
    made = torch.Generator().manual_seed(1)
    weights = [2 * torch.randn(NUM_HEADS, DIM, HEAD_DIM, generator=made) for _ in range(3)]
    features = mean_over_tokens(self_attend(tokens, *weights, mask)[0], mask)
    probabilities = torch.sigmoid(2 * features.sum((1, 2)))
    return tokens, mask, torch.bernoulli(probabilities, generator=generator)


def program(weight):
    """Self-attention with alignment; at weight zero it is the same without."""
    factor = AlignmentFactor(Energy(), weight)
    return MultiHeadSelfAttention(NUM_HEADS, HEAD_DIM, Bernoulli(), alignment=factor)


def fit_guide(weight, data, few, init=None):
    """A normal law of all weights together; one of each by itself could not join two weights."""
    routine = SVI(program(weight), guide="multivariate_normal")
    return routine.run(*data, num_steps=500 // few, init=init, **QUIET)


def infer(weight, data, few):
    """Posteriors at one weight, by three routines."""
    svi, model = fit_guide(weight, data, few), program(weight)
    nuts = NUTS(model, max_tree_depth=6).run(
        *data, warmup_steps=80 // few, num_samples=150 // few, init=svi, **QUIET
    )
    svgd = SVGD(model, num_particles=100).run(*data, num_steps=200 // few, **QUIET)
    return {"NUTS": nuts, "SVI": svi.thin(200), "SVGD": svgd}


def figures(posterior, data, held_out):
    """Of each draw: D, D less its gauge, size of weights and attention; and how all predict."""
    tokens, mask, _ = data
    seen = posterior.predict(sites=["divergence", "attention"])
    attention, live = seen["attention"][0], mask[:, None].expand(-1, NUM_HEADS, -1)
    weights = [posterior.draws[f"{part}_weight"][0] for part in ("query", "key")]
    query, key = (torch.stack([projected(tokens, one) for one in weight]) for weight in weights)
    masks = mask[:, None], mask[:, None]
    yes = posterior.predict(*held_out[:2], sites=["expected_target"])["expected_target"].mean(
        (0, 1)
    )
    return {
        "D": seen["divergence"][0].mean((-2, -1)),
        "balanced": Balanced(Energy())(query, key, *masks).mean((-2, -1)),
        "size": torch.cat(weights, 1).square().mean((1, 2, 3)).sqrt(),
        "entropy": torch.special.entr(attention).sum(-1)[:, live].mean(-1),
        # Over the heads too, whose order means nothing.
        "attention": attention.mean(2),
        "score": calibration.log_score(torch.stack([1 - yes, yes], -1), held_out[2].long()),
    }


def moved(attention, other, mask):
    """Part of the mean attention that goes to other tokens."""
    difference = (attention.mean(0) - other.mean(0)).abs().sum(-1) / 2
    return float(difference[mask].mean())


def report(found, mask):
    """Print the figures of all posteriors, means over draws."""
    print("   λ  routine     D   balanced D  size of weights  entropy  moved  held-out log score")
    for (weight, name), row in found.items():
        means = [float(row[figure].mean()) for figure in ("D", "balanced", "size", "entropy")]
        change = moved(row["attention"], found[0.0, name]["attention"], mask)
        print(
            f"{weight:4g}  {name:7s} {means[0]:.3f}     {means[1]:.3f}          {means[2]:.3f}"
            f"       {means[3]:.3f}   {change:.3f}        {float(row['score']):.3f}"
        )
    first, second = found[0.0, "NUTS"]["attention"].chunk(2)
    print(
        "moved: part of the mean attention that goes elsewhere than at λ = 0; the halves of the "
        f"chain\nof NUTS at λ = 0 are {moved(first, second, mask):.3f} apart."
    )
    parts = [
        float(found[WEIGHT, "NUTS"][figure].mean() / found[0.0, "NUTS"][figure].mean())
        for figure in ("D", "balanced", "size")
    ]
    gain = float(found[WEIGHT, "NUTS"]["score"] - found[0.0, "NUTS"]["score"])
    print(
        f"By NUTS, D falls to {parts[0]:.0%} of what it was. A part of that is basis and size: "
        f"less what\nattention does not see, it falls to {parts[1]:.0%}, and weights shrink to "
        f"{parts[2]:.0%}.\nThe held-out log score changes by {gain:+.3f} nats."
    )


def tell_sites(reference, others, sites):
    """Print how far posteriors of deterministic sites are from a reference's."""
    table = compare(reference, sites=sites, num_null=20, **others).sites
    print(table[["mean_error", "mean_error_95", "sd_ratio_low", "sd_ratio_high"]].round(2))


def draw(found, outcome, target):
    """Posteriors of D, its mean by weight, and D beside the entropy of attention."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4))
    figure.set_layout_engine("constrained")
    for weight, color in COLORS.items():
        for name, style in (("NUTS", None), ("SVI", "-"), ("SVGD", ":")):
            values = found[weight, name]["D"].numpy()
            shape = {"histtype": "step", "linestyle": style} if style else {"alpha": 0.4}
            label = f"{name}, λ = {weight:g}"
            left.hist(
                values, bins=24, range=(0, 1.8), density=True, color=color, label=label, **shape
            )
    left.set(xlabel="D, mean over sentences and heads", ylabel="posterior density", xlim=(0, 1.8))
    left.legend(frameon=False)
    left.set_title("Alignment moves the posterior of D")

    trials = sorted(outcome.trials)
    bars = [[getattr(t, part) for t in trials] for part in ("weight", "mean", "error")]
    middle.errorbar(*bars, fmt="o-", color="C1", label="SVI: the search's runs")
    for name, marker in (("NUTS", "s"), ("SVGD", "^")):
        means = [float(found[weight, name]["D"].mean()) for weight in COLORS]
        middle.plot(list(COLORS), means, marker, color="C0", label=name, markersize=8)
    middle.axhline(target, color="k", linestyle=":", linewidth=1, label="target")
    middle.set(xlabel="weight λ", ylabel="posterior mean of D", ylim=(0, None))
    middle.legend(frameon=False)
    middle.set_title("The mean falls with the weight")

    for weight, color in COLORS.items():
        row = found[weight, "NUTS"]
        right.scatter(
            row["D"], row["entropy"], s=14, alpha=0.7, color=color, label=f"NUTS, λ = {weight:g}"
        )
    right.set(xlabel="D", ylabel="entropy of attention, in nats")
    right.legend(frameon=False)
    right.set_title("Attention of the same draws")
    return figure


def main():
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="a fifth of the steps")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    start, few = time.perf_counter(), 5 if options.quick else 1
    generator = torch.Generator().manual_seed(0)
    data, held_out = make_data(generator, 30), make_data(generator, 300)
    with warnings.catch_warnings():
        # One chain and few particles are to show what changes, which is much.
        warnings.simplefilter("ignore", ConvergenceWarning)
        posteriors = {weight: infer(weight, data, few) for weight in COLORS}
        found = {
            (weight, name): figures(posterior, data, held_out)
            for name in ("NUTS", "SVI", "SVGD")
            for weight, posterior in ((w, p[name]) for w, p in posteriors.items())
        }
        report(found, data[1])
        plain, aligned = (posteriors[weight]["NUTS"] for weight in COLORS)
        sites = ["divergence", "attention"]
        print(f"\nNUTS at λ = {WEIGHT}, beside NUTS at λ = 0, in its standard deviations")
        tell_sites(plain, {"aligned": aligned}, sites)
        print(f"\nAt λ = {WEIGHT}: SVI and SVGD beside NUTS")
        tell_sites(aligned, {n.lower(): posteriors[WEIGHT][n] for n in ("SVI", "SVGD")}, sites)
        target = float(found[0.0, "SVI"]["D"].mean()) / 3
        outcome = weight_for_target(
            lambda weight, init: fit_guide(weight, data, few, init), target, tolerance=0.05
        )
    print(f"\nFor a mean of D of {target:.3f}, a third of what it was, SVI needs λ")
    for trial in outcome.trials:
        print(f"  {trial.weight:.3f}, which gives {trial.mean:.3f} ± {trial.error:.3f}")
    path = options.out / "aligned_posterior.png"
    draw(found, outcome, target).savefig(path, dpi=150)
    print(f"\n{path} is written ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
