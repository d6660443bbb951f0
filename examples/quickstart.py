"""Attention as a Bayesian model, on real text: four ways to its posterior, side by side.

Four attention heads pool fixed word vectors to tell apart seven intents of short orders to a voice
assistant (SNIPS). Heads and readout are latent; SVGD finds their posterior in two readings, SVI in
a third way, and NUTS is the reference. `make demo` runs it; pictures and netCDF files go to `out/`.
"""

import argparse
import math
import time
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch

import bayesattn as ba
from bayesattn import calibration, datasets, plots
from bayesattn.inference import NUTS, SVGD, SVI


def model(tokens, mask, intent=None, *, num_heads=4, num_intents=7):
    """Each head averages the words it attends to; a readout decides the intent."""
    dim = tokens.shape[-1]
    with pyro.plate("head", num_heads):
        query = pyro.sample("query_weight", dist.Normal(0.0, 3.0).expand([dim]).to_event(1))
    readout = pyro.sample(
        "readout", dist.Normal(0.0, 1.0).expand([num_heads * dim, num_intents]).to_event(2)
    )
    key = tokens[:, None]
    weights = ba.attention_weights(query[:, None], key, key_mask=mask)
    pyro.deterministic("attention", weights.squeeze(-2), event_dim=3)
    pooled = ba.attention(query[:, None], key, key, key_mask=mask)
    logits = pooled.flatten(1) @ readout
    pyro.deterministic("intent_probability", logits.softmax(-1), event_dim=2)
    with pyro.plate("sentence", len(tokens)):
        pyro.sample("intent", dist.Categorical(logits=logits), obs=intent)


model.dims = {
    "query_weight": ["head", "feature"],
    "readout": ["pooled_feature", "intent_class"],
    "attention": ["sentence", "head", "token"],
    "intent_probability": ["sentence", "intent_class"],
}


def infer(train, quick):
    """Find the posterior in four ways; the label says which."""
    data = (train.tokens, train.mask, train.intent)
    few = 10 if quick else 1
    heads = SVGD(model, particle_plate="head").run(*data, num_steps=1000 // few, num_runs=4, seed=0)
    svgd = SVGD(model, num_particles=50).run(*data, num_steps=500 // few, seed=0)
    svi = SVI(model, guide="normal", num_elbo_particles=1).run(
        *data, num_steps=2000 // few, num_samples=300, seed=0
    )
    nuts = NUTS(model, chain_method="processes").run(
        *data, warmup_steps=150 // few, num_samples=150 // few, num_chains=2, init=svi, seed=0
    )
    return {"NUTS": nuts, "SVGD particles": svgd, "SVGD heads": heads, "SVI normal": svi}


def score(posterior, test):
    """Held-out figures of the posterior predictive, each with its standard error over sentences."""
    predicted = posterior.predict(*test.inputs, sites=["intent_probability"])["intent_probability"]
    probability = predicted.flatten(0, 1).mean(0)
    correct = (probability.argmax(-1) == test.intent).double()
    log_probability = probability.gather(-1, test.intent[:, None]).log().double()
    error = math.sqrt(len(test))
    return probability, {
        "accuracy": (float(correct.mean()), float(correct.std()) / error),
        "log score": (float(log_probability.mean()), float(log_probability.std()) / error),
        "calibration error": (
            float(calibration.expected_calibration_error(probability, test.intent)),
            math.nan,
        ),
    }


def show(posteriors, test, out):
    """Print scores and a summary; write pictures and netCDF files."""
    probabilities, table = {}, {}
    for name, posterior in posteriors.items():
        probabilities[name], table[name] = score(posterior, test)
        posterior.save(out / f"{name.lower().replace(' ', '_')}.nc", deterministic=False)
    rows = {
        name: {metric: f"{value:.4f} ± {error:.4f}" for metric, (value, error) in row.items()}
        | {
            "mean log density": f"{float(posteriors[name].sample_stats['lp'].mean()):.0f}",
            "seconds": f"{posteriors[name].attrs['seconds']:.0f}",
        }
        for name, row in table.items()
    }
    print(f"\nHeld-out scores on {len(test)} sentences, beside NUTS")
    print(pd.DataFrame(rows).T.to_string().replace("± nan", ""))

    svgd = posteriors["SVGD particles"].match("head", by=["query_weight"], blocks={"readout": 0})
    print("\nArviZ summary of the heads' queries (SVGD particles, heads matched)")
    print(svgd.summary(sites=["query_weight"]).head(8).to_string())

    chosen = test[interesting(test, probabilities["SVGD particles"])]
    attended = svgd.predict(*chosen.inputs, sites=["attention"])
    captions = [test.intent_names[intent] for intent in chosen.intent]
    title = "Attention of each head on each word: posterior mean"
    for kind, spread in (("bars", "and 90 % interval"), ("heatmap", "± standard deviation")):
        figure = plots.attention(
            attended, chosen.words, captions=captions, title=f"{title} {spread} (SVGD)", kind=kind
        )
        figure.savefig(out / f"attention_{kind}.png", dpi=150)
    plots.scores(table, title="Held-out scores").savefig(out / "scores.png", dpi=150)
    plots.reliability(probabilities, test.intent).savefig(out / "reliability.png", dpi=150)
    curves = {
        "SVGD: mean log density": posteriors["SVGD particles"].optimization["log_density"],
        "SVI: ELBO": posteriors["SVI normal"].optimization["elbo"],
    }
    plots.optimization(curves, smooth=25).savefig(out / "optimization.png", dpi=150)


def interesting(test, probability, count=5):
    """Choose the five least certain of the short sentences: their attention is worth a look."""
    length = test.mask.sum(-1)
    certainty = probability.max(-1).values.masked_fill((length > 11) | (length < 5), math.inf)
    return certainty.topk(count, largest=False).indices


def main():
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="where files go")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # The matrices are small, and NUTS runs its chains in processes of their own.
    torch.set_num_threads(1)
    start = time.perf_counter()
    train, test = datasets.snips()
    print(f"Training on {train}\n  testing on {test}")
    show(infer(train, options.quick), test, options.out)
    written = ", ".join(sorted(path.name for path in options.out.iterdir()))
    print(f"\n{options.out}/ now has {written} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
