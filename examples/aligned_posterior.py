"""What alignment does to a posterior: of the distance of queries and keys, and of attention.

A small self-attention program says yes or no to short sentences, as another one did that made the
data. Its posterior is found by NUTS, SVI and SVGD without alignment, and under a Gibbs factor
exp(-λ D) for each sentence and head, D being the squared MMD of its queries and keys. A fall of D
alone says little, since D can fall while attention stays what it is; so the change in attention
stands beside it, and the energy distance with the gauge taken out that attention does not see. At
last the weight is sought at which the mean of D is half of what it was. It takes about two minutes;
a picture goes to `out/`.
"""

import argparse
import time
import warnings
from pathlib import Path

import matplotlib as mpl
import torch

from bayesattn import calibration
from bayesattn.divergences import MMD, Balanced, Energy
from bayesattn.inference import (
    NUTS,
    SVGD,
    SVI,
    ConvergenceWarning,
    compare,
    weight_for_target,
)
from bayesattn.kernels import RBF
from bayesattn.models import AlignmentFactor, Bernoulli, MultiHeadSelfAttention
from bayesattn.models.self_attention import mean_over_tokens, self_attend

mpl.use("Agg")
from matplotlib import pyplot as plt

DIM, NUM_HEADS, HEAD_DIM, NUM_TOKENS = 3, 2, 2, 5
WEIGHTS = (0.0, 1.0, 10.0)
QUIET = {"seed": 0, "progress": False}


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
    """Self-attention with alignment by a kernel of fixed width; a weight may be zero."""
    factor = AlignmentFactor(MMD(RBF(1.0)), weight)
    return MultiHeadSelfAttention(NUM_HEADS, HEAD_DIM, Bernoulli(), alignment=factor)


def infer(data, weight, few):
    """Posteriors at one weight, by three routines."""
    model = program(weight)
    svi = SVI(model, guide="normal").run(*data, num_steps=1000 // few, **QUIET)
    nuts = NUTS(model, max_tree_depth=5).run(
        *data, warmup_steps=100 // few, num_samples=100 // few, num_chains=2, **QUIET
    )
    svgd = SVGD(model, num_particles=25).run(*data, num_steps=500 // few, **QUIET)
    return {"NUTS": nuts, "SVI": svi, "SVGD": svgd}


def figures(posterior, data, held_out, reference):
    """Mean figures of a posterior; the change in attention is that of its mean to a reference's."""
    tokens, mask, _ = data
    seen = posterior.predict(tokens, mask, sites=["divergence", "attention"])
    attention = seen["attention"].flatten(0, 1)
    weights = attention.mean(0)
    live = mask[:, None, :].expand(weights.shape[:3])
    entropy = torch.special.entr(attention).sum(-1).mean(0)[live].mean()
    change = (weights - reference).abs().sum(-1)[live].mean() / 2 if reference is not None else 0.0
    yes = posterior.predict(*held_out[:2], sites=["expected_target"])["expected_target"]
    yes = yes.mean((0, 1))
    score = calibration.log_score(torch.stack([1 - yes, yes], -1), held_out[2].long())
    return {
        "D": float(seen["divergence"].mean()),
        "balanced": float(balanced_distance(posterior, tokens, mask)),
        "entropy": float(entropy),
        "change": float(change),
        "score": float(score),
        "draws of D": seen["divergence"].mean((-2, -1)).flatten(),
    }, weights


def balanced_distance(posterior, tokens, mask):
    """Energy distance of queries and keys where attention cannot tell their gauges apart."""
    projections = [posterior.draws[f"{part}_weight"][:, ::5] for part in ("query", "key")]
    query, key = (torch.einsum("std,crhdw->crshtw", tokens, weight) for weight in projections)
    masks = mask[:, None], mask[:, None]
    return Balanced(Energy())(query, key, *masks).mean()


def report(posteriors, data, held_out):
    """Print the figures of all posteriors, and give them."""
    found, references = {}, {}
    print("λ      routine  mean D   balanced  entropy  attention elsewhere  held-out log score")
    for weight, routines in posteriors.items():
        for name, posterior in routines.items():
            row, attention = figures(posterior, data, held_out, references.get(name))
            references.setdefault(name, attention)
            found[weight, name] = row
            print(
                f"{weight:<6g} {name:7s}  {row['D']:.4f}   {row['balanced']:.4f}    "
                f"{row['entropy']:.3f}    {row['change']:.3f}                {row['score']:.3f}"
            )
    return found


def draw(found):
    """Posteriors of D, and what each weight comes to."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    figure.set_layout_engine("constrained")
    for place, weight in enumerate(WEIGHTS):
        values = found[weight, "NUTS"]["draws of D"]
        left.hist(values.numpy(), bins=25, density=True, alpha=0.6, color=f"C{place}")
        left.plot([], [], color=f"C{place}", linewidth=6, alpha=0.6, label=f"λ = {weight:g}")
    left.set(xlabel="D, the mean over sentences and heads", ylabel="posterior density (NUTS)")
    left.legend(frameon=False)
    for place, name in enumerate(("NUTS", "SVI", "SVGD")):
        rows = [found[weight, name] for weight in WEIGHTS]
        x = [row["D"] / rows[0]["D"] for row in rows]
        right.plot(x, [row["change"] for row in rows], "o-", color=f"C{place + 3}", label=name)
    right.set(xlabel="mean D, as a part of that at λ = 0", ylabel="attention that goes elsewhere")
    right.set_xlim(left=0)
    right.legend(frameon=False)
    figure.suptitle("What a Gibbs factor does to queries and keys, and to attention")
    return figure


def search(data, target, few):
    """The weight at which the posterior mean of D is a target, by the mean-field guide."""

    def run(weight, init):
        svi = SVI(program(torch.tensor(weight)), guide="normal")
        return svi.run(*data, num_steps=1000 // few, init=init, **QUIET)

    return weight_for_target(run, target, tolerance=0.1)


def main():
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="a fifth of the steps")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    start, few = time.perf_counter(), 5 if options.quick else 1
    generator = torch.Generator().manual_seed(0)
    data, held_out = make_data(generator, 30), make_data(generator, 300)
    with warnings.catch_warnings():
        # Chains keep to one order of the heads, which is no matter here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        posteriors = {weight: infer(data, weight, few) for weight in WEIGHTS}
        found = report(posteriors, data, held_out)
        nuts, *others = posteriors[WEIGHTS[-1]].values()
        print(f"\nλ = {WEIGHTS[-1]:g}: SVI and SVGD beside NUTS")
        print(compare(nuts, svi=others[0], svgd=others[1], num_null=20))
        target = 0.5 * found[0.0, "SVI"]["D"]
        outcome = search(data, target, few)
    print(f"\nFor a mean of D of {target:.4f}, half of what it was, SVI needs λ:")
    for trial in outcome.trials:
        print(f"  λ = {trial.weight:8.3f}: {trial.mean:.4f} ± {trial.error:.4f}")
    path = options.out / "aligned_posterior.png"
    draw(found).savefig(path, dpi=150)
    print(f"\n{path} is written ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
