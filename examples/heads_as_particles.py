"""Heads as particles: of a network in training, of a Pyro program, and of its posterior.

First the same heads are moved twice, by `Repulsion` beside an optimizer of a network and by `SVGD`
on the network's Pyro program: they take one path. Then a small program of three heads shows what
they are particles of. All heads stand in one loss, so that each sees what the others explain: the
heads of one network are no draws of the posterior of a network with one head. Its joint posterior
has heads that differ, by NUTS and by SPOS with exact noise; SVGD's heads lie near its mode. It
takes about a minute; a picture goes to `out/`.
"""

import argparse
import functools
import math
import time
import warnings
from pathlib import Path

import matplotlib as mpl
import pyro
import pyro.distributions as dist
import torch

import bayesattn as ba
from bayesattn.inference import (
    NUTS,
    SPOS,
    SVGD,
    ConvergenceWarning,
    Posterior,
    Repulsion,
    SteinForce,
    compare,
)
from bayesattn.inference.schedules import constant
from bayesattn.kernels import RBF
from bayesattn.models import AttentionPooling, Categorical
from bayesattn.networks import head_partitions

mpl.use("Agg")
from matplotlib import pyplot as plt

NUM_HEADS, NOISE = 3, 0.15
# What each head looks for, in the tokens' first two features; the third one is what it reads.
QUERIES = 4.0 * torch.tensor([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]], dtype=torch.float64)


class Network(torch.nn.Module):
    """Pooling by heads and a readout, as a module that anybody might train."""

    def __init__(self, embed_dim, hidden_dim, num_heads, num_classes):
        super().__init__()
        self.pooling = ba.StructuredSelfAttention(embed_dim, hidden_dim, num_heads)
        self.readout = torch.nn.Linear(num_heads * embed_dim, num_classes)

    def forward(self, tokens):
        """Logits of the classes."""
        return self.readout(self.pooling(tokens)[0].flatten(1))


def show_one_path(generator):
    """Move the same heads by a network's training and by its program's inference."""
    tokens = torch.randn(40, 6, 5, generator=generator)
    labels = torch.randint(3, (40,), generator=generator)
    num_data, rate, num_steps = len(tokens), 0.002, 50
    network = Network(5, 8, NUM_HEADS, 3)
    for parameter in (*network.readout.parameters(), network.pooling.key_weight):
        parameter.requires_grad_(False)
    start = network.pooling.query_weight.detach().clone()
    program = AttentionPooling(NUM_HEADS, Categorical(3), hidden_dim=8)
    svgd = SVGD(
        program,
        particle_plate="head",
        outside="fixed",
        kernel=RBF("paper"),
        optimizer=functools.partial(torch.optim.SGD, lr=rate),
        schedule=constant,
        metric="none",
    )
    weight = network.readout.weight.detach().view(3, NUM_HEADS, 5).movedim(0, -1)
    values = {
        "query_weight": start,
        "hidden_weight": network.pooling.key_weight.detach(),
        "readout_weight": weight,
        "readout_bias": network.readout.bias.detach(),
    }
    init = {name: value[None] for name, value in values.items()}
    with warnings.catch_warnings():
        # Fifty steps are to be equal, not to arrive.
        warnings.simplefilter("ignore", ConvergenceWarning)
        posterior = svgd.run(
            tokens, None, labels, num_steps=num_steps, init=init, seed=0, progress=False
        )
    optimizer = torch.optim.SGD([network.pooling.query_weight], lr=rate * num_data)
    prior = torch.distributions.Normal(0.0, 1.0)
    heads = head_partitions(network)
    repulsion = Repulsion(
        network, optimizer, method=SteinForce(), heads=heads, num_data=num_data, prior=prior
    )
    for _ in range(num_steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(tokens), labels).backward()
        repulsion.step()
        optimizer.step()
    trained = network.pooling.query_weight.detach()
    apart = (posterior.draws["query_weight"][0] - trained).abs().max()
    print(f"In {num_steps} steps the heads moved by up to {(trained - start).abs().max():.2f}.")
    print(f"Repulsion on the network and SVGD on its program differ by {apart:.0e}.\n")


def program(tokens, target=None, *, num_heads=NUM_HEADS):
    """Heads that pool the tokens' third feature; their mean, and noise, is observed."""
    with pyro.plate("head", num_heads):
        query = pyro.sample("query_weight", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    key, value = tokens[:, None, :, :2], tokens[:, None, :, 2:]
    pooled = ba.attention(query[:, None].to(tokens), key, value, scale=1.0)
    mean = pooled.mean((1, 2, 3))
    with pyro.plate("sentence", len(tokens)):
        pyro.sample("target", dist.Normal(mean, NOISE), obs=target)


def make_data(generator, num_sentences):
    """Sentences of six tokens, and what three heads say of them."""
    tokens = torch.randn(num_sentences, 6, 3, generator=generator)
    key, value = tokens[:, None, :, :2], tokens[:, None, :, 2:]
    mean = ba.attention(QUERIES[:, None], key, value, scale=1.0).mean((1, 2, 3))
    return tokens, mean + NOISE * torch.randn(num_sentences, generator=generator)


def infer(data, quick):
    """Posteriors of a network with one head and with three, and the heads of SVGD and SPOS."""
    few = 5 if quick else 1
    quiet = {"seed": 0, "progress": False}
    with warnings.catch_warnings():
        # Chains keep to an order of the heads, which tell nothing apart; so they disagree.
        warnings.simplefilter("ignore", ConvergenceWarning)
        one = NUTS(functools.partial(program, num_heads=1)).run(
            *data, warmup_steps=200 // few, num_samples=300 // few, num_chains=2, **quiet
        )
        joint = NUTS(program).run(
            *data, warmup_steps=200 // few, num_samples=300 // few, num_chains=2, **quiet
        )
        svgd = SVGD(program, particle_plate="head").run(
            *data, num_steps=1000 // few, num_runs=20, **quiet
        )
        spos = SPOS(program, particle_plate="head", step_size=0.02, metric="none").run(
            *data, warmup_steps=1000 // few, num_samples=100, num_runs=10, **quiet
        )
    return {"NUTS, one head": one, "NUTS, joint": joint, "SVGD": svgd, "SPOS": spos}


def law_of_a_head(posterior):
    """Any head of any draw as a draw of one head: what does not hang on the order of heads."""
    rows = posterior.network_samples()["query_weight"].flatten(0, 1)
    return Posterior({"query_weight": rows[None]}, method=posterior.method, draws_are="particles")


def report(posteriors, held_out):
    """Compare the laws of a head, and how well each predicts."""
    laws = {name: law_of_a_head(posterior) for name, posterior in posteriors.items()}
    reference = laws["NUTS, joint"].replace(draws_are="markov")
    others = {"one head": "NUTS, one head", "svgd": "SVGD", "spos": "SPOS"}
    found = compare(reference, num_null=50, **{k: laws[v] for k, v in others.items()})
    print("Any head of a network, beside any head of the joint posterior by NUTS")
    table = found.sites.droplevel("site")[["mean_error", "sd_ratio_low", "sd_ratio_high"]]
    print("(error of the mean in standard deviations; ratio of these, least and largest feature)")
    print(table.round(3).to_string())
    print("\nSpread of heads that look for the same thing (nearest to the same query of the truth)")
    for name, law in laws.items():
        print(f"  {name:15s} {float(spread_within(law)):.3f}")
    print("\nHeld-out log score, nats a sentence: of the mean over networks (restarts of SVGD),")
    print("of one network alone, and of the mean over heads, each taken for a network of its own")
    tokens, target = held_out
    for name, posterior in posteriors.items():
        together, alone, by_heads = log_scores(posterior, tokens, target)
        print(f"  {name:15s} {together:6.3f}   {alone:6.3f}   {by_heads:8.3f}")
    print(f"  {'the truth':15s} {float(truth(tokens, target)):6.3f}")
    return laws


def spread_within(law):
    """Standard deviation of heads about the mean of those that are nearest to the same query."""
    rows = law.draws["query_weight"][0]
    nearest = torch.cdist(rows, QUERIES).argmin(1)
    apart = [rows[nearest == index] for index in nearest.unique()]
    return torch.cat([part - part.mean(0) for part in apart]).square().mean().sqrt()


def log_scores(posterior, tokens, target):
    """Of the networks' mean density, their mean log density, and the mean density of heads."""
    networks = posterior.network_samples()["query_weight"]
    logs = log_densities(networks, tokens, target)
    by_heads = log_densities(networks.flatten(0, 1)[:, None], tokens, target)
    return float(mixture(logs)), float(logs.mean()), float(mixture(by_heads))


def mixture(logs):
    """Mean over sentences of the log of the mean density: "draw sentence" to a number."""
    return (torch.logsumexp(logs, 0) - math.log(len(logs))).mean()


def truth(tokens, target):
    """Log score of the heads that made the data."""
    return log_densities(QUERIES[None], tokens, target).mean()


def log_densities(queries, tokens, target):
    """Of each sentence under each draw of the heads: "draw sentence"."""
    query = queries[:, None, :, None]
    key, value = tokens[None, :, None, :, :2], tokens[None, :, None, :, 2:]
    mean = ba.attention(query, key, value, scale=1.0).mean((2, 3, 4))
    return dist.Normal(mean, NOISE).log_prob(target)


def draw(laws):
    """Heads of each kind in the plane of what they look for."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.9), sharex=True, sharey=True)
    figure.set_layout_engine("constrained")
    for ax, (name, law) in zip(axes, laws.items(), strict=True):
        rows = law.draws["query_weight"][0]
        step = -(-len(rows) // 1500)
        ax.scatter(*rows[::step].T, s=6, alpha=0.25, linewidths=0)
        ax.scatter(*QUERIES.T, marker="+", s=90, color="k")
        ax.set(title=name, xlabel="query, feature 1", aspect="equal")
    axes[0].set_ylabel("query, feature 2")
    figure.suptitle("Where any one head is (crosses: the heads that made the data)")
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
    torch.manual_seed(0)
    if options.quick:
        print("A fifth of the steps, with which SVGD has not arrived.\n")
    start, generator = time.perf_counter(), torch.Generator().manual_seed(0)
    show_one_path(generator)
    data, held_out = make_data(generator, 60), make_data(generator, 200)
    posteriors = infer(data, options.quick)
    laws = report(posteriors, held_out)
    path = options.out / "heads_as_particles.png"
    draw(laws).savefig(path, dpi=150)
    print(f"\n{path} is written ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
