"""Heads of a Pyro program and those of a network in training: one path, step for step."""

import functools

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from bayesattn import StructuredSelfAttention
from bayesattn.inference import SVGD, WGD, Repulsion, SteinDiffusion, SteinForce, WassersteinForce
from bayesattn.inference.coordinates import identity
from bayesattn.inference.diffusion_state import DiffusionState
from bayesattn.inference.langevin import SPOSState, diffused
from bayesattn.inference.particle_views import WholeParticles
from bayesattn.inference.schedules import constant
from bayesattn.kernels import IMQ, RBF, PerSite
from bayesattn.models import AttentionPooling, Categorical, MultiHeadSelfAttention
from bayesattn.networks import head_partitions

SENTENCES, TOKENS, EMBED, HIDDEN, HEADS, CLASSES = 11, 5, 6, 7, 3, 4
RATE, NUM_STEPS = 0.003, 6


class Pooling(nn.Module):
    """The program's own network: pooled tokens, and a readout that adds up the heads."""

    def __init__(self):
        super().__init__()
        self.pooling = StructuredSelfAttention(EMBED, HIDDEN, HEADS)
        self.readout = nn.Linear(HEADS * EMBED, CLASSES)

    def forward(self, tokens):
        return self.readout(self.pooling(tokens)[0].flatten(1))

    def outside(self):
        """Values beside the heads, with their prior's standard deviations."""
        yield self.pooling.key_weight, EMBED**-0.5
        yield self.readout.weight, 0.3
        yield self.readout.bias, 0.3

    def sites(self):
        weight = self.readout.weight.view(CLASSES, HEADS, EMBED).movedim(0, -1)
        return {
            "query_weight": self.pooling.query_weight,
            "hidden_weight": self.pooling.key_weight,
            "readout_weight": weight,
            "readout_bias": self.readout.bias,
        }


class SelfAttention(nn.Module):
    """Self-attention without an output projection of its own, the mean over tokens, a readout."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(EMBED, HEADS, bias=False, batch_first=True)
        self.attention.out_proj.weight.requires_grad_(False).copy_(torch.eye(EMBED))
        self.readout = nn.Linear(EMBED, CLASSES)

    def forward(self, tokens):
        return self.readout(self.attention(tokens, tokens, tokens)[0].mean(1))

    def outside(self):
        yield self.readout.weight, 0.3
        yield self.readout.bias, 0.3

    def sites(self):
        width = EMBED // HEADS
        parts = self.attention.in_proj_weight.view(3, HEADS, width, EMBED).mT
        weight = self.readout.weight.view(CLASSES, HEADS, width).movedim(0, -1)
        names = ("query_weight", "key_weight", "value_weight")
        return {
            **dict(zip(names, parts, strict=True)),
            "readout_weight": weight,
            "readout_bias": self.readout.bias,
        }


CASES = {
    "pooling": (Pooling, AttentionPooling(HEADS, Categorical(CLASSES), HIDDEN), 1.0),
    "self-attention": (
        SelfAttention,
        MultiHeadSelfAttention(HEADS, EMBED // HEADS, Categorical(CLASSES)),
        EMBED**-0.5,
    ),
}


@pytest.fixture
def data(generator):
    tokens = torch.randn(SENTENCES, TOKENS, EMBED, generator=generator)
    return tokens, torch.randint(CLASSES, (SENTENCES,), generator=generator)


def trained(network, method, heads_scale, data, *, joint=True):
    """Sites of a network after some steps of gradient descent with Repulsion."""
    tokens, intents = data
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE * SENTENCES)
    heads = head_partitions(network, joint=joint)
    repulsion = Repulsion(
        network,
        optimizer,
        method=method,
        heads=heads,
        num_data=SENTENCES,
        prior=Normal(0.0, heads_scale),
    )
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(tokens), intents)
        for value, scale in network.outside():
            loss = loss - Normal(0.0, scale).log_prob(value).sum() / SENTENCES
        loss.backward()
        repulsion.step()
        optimizer.step()
    return network.sites()


def inferred(routine, program, sites, data, **settings):
    """Sites of a program after as many steps of a routine, from the same start."""
    tokens, intents = data
    routine = routine(
        program,
        particle_plate="head",
        optimizer=functools.partial(torch.optim.SGD, lr=RATE),
        schedule=constant,
        metric="none",
        **settings,
    )
    start = {name: value.detach().clone()[None] for name, value in sites.items()}
    posterior = routine.run(
        tokens, None, intents, num_steps=NUM_STEPS, init=start, seed=0, progress=False
    )
    found = posterior.network_samples()
    return {name: found[name].reshape(value.shape) for name, value in sites.items()}


@pytest.mark.filterwarnings("ignore::bayesattn.inference.ConvergenceWarning")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("method", "routine", "kernel"),
    [
        (SteinForce(), SVGD, RBF("paper")),
        (SteinForce(IMQ()), SVGD, IMQ()),
        (WassersteinForce(), WGD, RBF()),
    ],
)
def test_a_network_in_training_is_its_program_s_particles(case, method, routine, kernel, data):
    """Mutants: N left out anywhere, heads mixed up, the prior forgotten, α for 1 / N."""
    make, program, scale = CASES[case]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make()
    start = {name: value.detach().clone() for name, value in network.sites().items()}
    ours = inferred(routine, program, network.sites(), data, kernel=kernel)
    for name, value in trained(network, method, scale, data).items():
        assert (value - start[name]).abs().max() > 1e-3
        torch.testing.assert_close(ours[name], value.detach())


@pytest.mark.filterwarnings("ignore::bayesattn.inference.ConvergenceWarning")
def test_queries_keys_and_values_apart_are_a_kernel_for_each_site(data):
    make, program, scale = CASES["self-attention"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make()
    ours = inferred(SVGD, program, network.sites(), data, kernel=PerSite(RBF("paper")))
    for name, value in trained(network, SteinForce(), scale, data, joint=False).items():
        torch.testing.assert_close(ours[name], value.detach())


def test_a_step_of_a_diffusion_is_spos_s(generator):
    """At temperature one; the same noise."""
    heads, normal = torch.randn(2, 2, 4, 3, generator=generator)
    precision = torch.tensor([1.0, 2.0, 5.0])

    def value_and_score(rows):
        return -(rows.square() * precision).sum(-1) / 2, -rows * precision

    for noise in ("exact", "paper"):
        kernel = RBF(torch.tensor([1.5, 1.5]))
        frame = identity(torch.zeros(2, 3))
        state = SPOSState(heads, torch.zeros(2, 0), frame, kernel, torch.zeros(2, 0))
        settings = {"noise": noise, "langevin": 0.5, "step_size": 0.1}
        expected = diffused(
            value_and_score, state, normal, torch.zeros(2, 0), view=WholeParticles(2), **settings
        )[0]
        method = SteinDiffusion(0, RBF(1.5), 0.5, noise=noise, preconditioner="none")
        drive = value_and_score(heads)[1]
        motion = DiffusionState(method).moved(("a", "b"), heads, drive, normal, 1.0)
        torch.testing.assert_close(motion.move(0.1), expected)
