"""Attention as a mixture: its weights are a posterior, its output is a step of EM.

Two Pyro programs, in which keys generate queries or queries generate keys; softmax attention and
doubly-normalized attention come out of them exactly. Then EM goes on for many steps, and SVGD, SVI
and NUTS find the posterior over the centers, whose order means nothing. It takes less than
a minute; a picture goes to `out/`.
"""

import argparse
import time
from pathlib import Path

import matplotlib as mpl
import torch
from pyro.infer.autoguide.initialization import init_to_sample

import bayesattn as ba
from bayesattn.inference import EM, NUTS, SVGD, SVI, compare, match_heads
from bayesattn.models import KeysFromQueries, QueriesFromKeys, UniformMixing
from bayesattn.normalizations import DoublyNormalized

mpl.use("Agg")
from matplotlib import pyplot as plt

CENTERS = torch.tensor([[2.2, 0.0], [-1.4, 1.7], [-0.8, -2.1]], dtype=torch.float64)
MODEL = KeysFromQueries(variance=0.8, mixing=UniformMixing(), center_scale=3.0)


def show_identities(generator):
    """Print how far apart a program's posterior and attention are; return both weights."""
    query, key, value = (torch.randn(4, n, 16, generator=generator) for n in (40, 60, 60))
    # All queries share a direction, in which keys differ: softmax leaves some keys out.
    query[..., 0] += 6
    key *= 1.5
    doubly = {"normalization": DoublyNormalized()}
    queries_from_keys, keys_from_queries = QueriesFromKeys(), KeysFromQueries()
    softmax = queries_from_keys.weights({}, query, key)
    start = keys_from_queries.initial_state(query, key, value)
    weights = keys_from_queries.weights(start, query, key, value)
    moved = EM(keys_from_queries).run(query, key, value, num_steps=1, progress=False, seed=0)
    pairs = {
        "posterior over the key of a query, softmax attention": (
            softmax,
            ba.attention_weights(query, key),
        ),
        "posterior over the query of a key, doubly-normalized attention": (
            weights,
            ba.attention_weights(query, key, **doubly),
        ),
        "centers after a step of EM, doubly-normalized attention over keys": (
            moved.draws["center"][0, 0],
            ba.attention(query, key, key, **doubly),
        ),
    }
    print("Largest difference between")
    for name, (ours, theirs) in pairs.items():
        print(f"  {name}: {float((ours - theirs).abs().max()):.1e}")
    mass = {"softmax": softmax.sum(-2), "doubly normalized": weights.sum(-2)}
    print("Least attention that a key gets from all queries together")
    for name, values in mass.items():
        print(f"  {name}: {float(values.min()):.2g}")
    print(f"  never less than, if doubly normalized: {1 / key.shape[-2]:.2g}\n")
    return mass


def climb(query, key, quick):
    """EM from several starts."""
    em = EM(MODEL).run(
        *(query, key),
        num_steps=12 if quick else 25,
        num_runs=6,
        init=init_to_sample,
        progress=False,
        seed=1,
    )
    ends = ", ".join(f"{value:.2f}" for value in em.optimization["log_density"][:, -1])
    print(f"EM climbs from six draws of the prior to the log joint densities {ends}")
    same = EM(MODEL).run(query, key, num_steps=20, progress=False, seed=0)
    print(
        "and from the equal queries, which nothing tells apart, no higher than "
        f"{float(same.optimization['log_density'][0, -1]):.2f}\n"
    )
    return em


def infer(query, key, quick):
    """The posterior over the centers in three ways."""
    few = 10 if quick else 1
    print(
        "Any order of the three centers is as probable. A chain of NUTS keeps to one, so it warns\n"
        "that chains disagree. Below, the centers are compared as they are, then in one order."
    )
    quiet = {"progress": False, "seed": 0}
    nuts = NUTS(MODEL).run(
        query, key, warmup_steps=100 // few, num_samples=200 // few, num_chains=3, **quiet
    )
    svgd = SVGD(MODEL, num_particles=100).run(query, key, num_steps=500 // few, **quiet)
    svi = SVI(MODEL, guide="multivariate_normal").run(
        query, key, num_steps=1000 // few, num_samples=300, **quiet
    )
    return {"NUTS": nuts, "SVGD": svgd, "SVI": svi}


def in_one_order(posteriors):
    """Give the centers one order in all draws of each posterior, and then the same in all."""
    matched = {name: posterior.match("query") for name, posterior in posteriors.items()}
    means = torch.stack([p.draws["center"].mean((0, 1)) for p in matched.values()])
    orders = match_heads(means[None])[0]
    return {
        name: posterior.replace(draws={"center": posterior.draws["center"][:, :, order]})
        for (name, posterior), order in zip(matched.items(), orders, strict=True)
    }


def together(posterior, query, key):
    """Chance of each two keys to come from one center, which no order of centers changes."""
    draws = posterior.draws["center"].flatten(0, 1)
    shares = torch.stack([MODEL.responsibilities({"center": c}, query, key) for c in draws])
    return torch.einsum("sij,sil->jl", shares, shares) / len(shares)


def report(posteriors, matched, query, key):
    """Print what label switching does, and what is left when it is undone."""
    for name, group in (("as they are", posteriors), ("in one order", matched)):
        spread = group["NUTS"].summary(sites=["center"])["r_hat"]
        found = compare(group["NUTS"], svgd=group["SVGD"], svi=group["SVI"], num_null=50)
        print(f"\nCenters {name}, beside NUTS; its worst R-hat is {float(spread.max()):.2f}")
        by_site = found.sites.droplevel("site")
        of_site = ["mean_error", "mean_error_95", "sd_ratio_low", "sd_ratio_high"]
        print(by_site[of_site].join(found.joint[["energy", "energy_95"]]).round(3).to_string())
    chances = {name: together(posterior, query, key) for name, posterior in posteriors.items()}
    print(
        "\nChance of two keys to have one center, which knows no order: largest difference to NUTS"
    )
    for name in ("SVGD", "SVI"):
        print(f"  {name}: {float((chances[name] - chances['NUTS']).abs().max()):.3f}")
    return chances


def draw(mass, em, matched, chances, key):
    """Column masses, steps of EM, posteriors of the centers, and keys that belong together."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 8.6), layout="constrained")
    for (name, values), color in zip(mass.items(), ("C1", "C0"), strict=True):
        logs = values.flatten().log10().tolist()
        axes[0, 0].hist(logs, bins=45, range=(-3.5, 1.0), alpha=0.6, label=name, color=color)
    axes[0, 0].axvline(-torch.tensor(mass["softmax"].shape[-1]).log10(), color="k", ls=":")
    axes[0, 0].set(xlabel="log10 of the attention that a key gets", ylabel="keys")
    axes[0, 0].set_title("Doubly normalized explains no key away (dotted: bound)")
    axes[0, 0].legend(frameon=False, loc="upper left")

    axes[0, 1].plot(em.optimization["log_density"].T.cpu())
    axes[0, 1].set(xlabel="step of EM", ylabel="log joint density, in nats")
    axes[0, 1].set_title("Each step climbs, from six draws of the prior")

    axes[1, 0].scatter(*key.T, s=14, color="0.75", label="keys")
    for (name, posterior), color in zip(matched.items(), ("C0", "C3", "C2"), strict=True):
        centers = posterior.draws["center"].flatten(0, 1)[:200].flatten(0, 1)
        axes[1, 0].scatter(*centers.T, s=4, alpha=0.4, color=color, label=name)
    axes[1, 0].scatter(*CENTERS.T, marker="+", s=120, color="k", label="truth")
    axes[1, 0].set(xlabel="feature 1", ylabel="feature 2", aspect="equal")
    axes[1, 0].set_title("Posterior of the centers")
    axes[1, 0].legend(frameon=False, markerscale=1.5)

    image = axes[1, 1].imshow(chances["NUTS"], vmin=0, vmax=1, cmap="viridis")
    axes[1, 1].set(xlabel="key", ylabel="key")
    axes[1, 1].set_title("Chance of two keys to have one center (NUTS)")
    figure.colorbar(image, ax=axes[1, 1], shrink=0.8)
    return figure


def main():
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    start, generator = time.perf_counter(), torch.Generator().manual_seed(0)
    mass = show_identities(generator)
    noise = torch.randn(45, 2, generator=generator)
    key = CENTERS.repeat_interleave(15, 0) + MODEL.variance**0.5 * noise
    # Equal queries make the centers exchangeable: the posterior has six modes that are one.
    query = torch.zeros_like(CENTERS)
    em = climb(query, key, options.quick)
    posteriors = infer(query, key, options.quick)
    matched = in_one_order(posteriors)
    chances = report(posteriors, matched, query, key)
    path = options.out / "attention_as_mixture.png"
    draw(mass, em, matched, chances, key).savefig(path, dpi=150)
    print(f"\n{path} is written ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
