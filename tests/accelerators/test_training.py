"""Training on an accelerator: repulsion, alignment, and projections that heads share."""

import copy

import pytest
import torch
from torch import nn

from bayesattn.conversion import convert
from bayesattn.divergences import (
    MMD,
    Adversarial,
    BuresWasserstein,
    ConditionalTransport,
    Energy,
    EntropicTransport,
    SinkhornDivergence,
    SlicedWasserstein,
    permutation_test,
)
from bayesattn.factorization import factorize
from bayesattn.head_diagnostics import circuit_similarity, head_statistics, weight_similarity
from bayesattn.head_penalties import HeadPenalty, orthogonality_penalty
from bayesattn.inference import (
    Alignment,
    CircuitForce,
    Repulsion,
    SteinDiffusion,
    SteinForce,
    WassersteinForce,
)
from bayesattn.networks import head_partitions
from bayesattn.projection_conversion import CollaborativeFit, Separate
from bayesattn.width_choice import width_for_error
from tests.heads import Classifier
from tests.models.component_cases import shared_heads

pytestmark = [
    pytest.mark.usefixtures("seeded_layers"),
    pytest.mark.filterwarnings("ignore:SteinDiffusion with a flat prior"),
]

EMBED, HEADS, BATCH, TOKENS = 12, 3, 5, 7
METHODS = {
    "stein": SteinForce(),
    "wasserstein": WassersteinForce(),
    "circuits": CircuitForce(),
    "spos": SteinDiffusion(warmup_steps=2),
}
DIVERGENCES = {
    "MMD": MMD(),
    "energy": Energy(),
    "sliced": SlicedWasserstein(seed=3),
    "moments": BuresWasserstein(),
    "transport": ConditionalTransport(),
    "debiased": ConditionalTransport(debiased=True),
    "learned": ConditionalTransport.learned,
    "adversary": Adversarial,
    "entropic": EntropicTransport(),
    "sinkhorn": SinkhornDivergence(),
}


@pytest.fixture
def models(device):
    """A network, and its copy on the device."""
    model = Classifier(EMBED, HEADS)
    return model, copy.deepcopy(model).to(device)


@pytest.fixture
def batch(generator):
    return torch.randn(BATCH, TOKENS, EMBED, generator=generator), torch.tensor([0, 1, 2, 0, 1])


def steps(model, batch, method, count=4):
    """Training steps under repulsion, and what is left."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    heads = None
    if isinstance(method, CircuitForce):
        heads = head_partitions(model, ("query", "key"), joint=True)
    repulsion = Repulsion(model, optimizer, method=method, heads=heads, num_data=50, seed=1)
    tokens, labels = batch
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), labels).backward()
        repulsion.step()
        optimizer.step()
    return repulsion


@pytest.mark.parametrize("name", [name for name in METHODS if name != "spos"])
def test_repelled_heads_are_those_of_the_cpu(name, models, batch, device):
    here, there = models
    for model, where in ((here, "cpu"), (there, device)):
        steps(model, [part.to(where) for part in batch], METHODS[name])
    for one, other in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-7, atol=1e-9)


def test_noise_repeats(models, batch, device):
    """It is drawn where heads are, so that a seed gives other numbers on another kind of device."""
    there, twin = models[1], copy.deepcopy(models[1])
    for model in (there, twin):
        steps(model, [part.to(device) for part in batch], METHODS["spos"])
    for one, other in zip(there.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", METHODS)
def test_repulsion_does_not_wait_for_the_device(name, models, batch, device, no_waiting):
    model = models[1].float()
    tokens, labels = batch[0].float().to(device), batch[1].to(device)
    repulsion = steps(model, (tokens, labels), METHODS[name], 3)
    with no_waiting():
        nn.functional.cross_entropy(model(tokens), labels).backward()
        repulsion.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_terms_of_alignment_are_those_of_the_cpu(name, models, batch, device):
    found = []
    for model, where in zip(models, ("cpu", device), strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            alignment = Alignment(model, DIVERGENCES[name], 0.3)
            with alignment.observe():
                model(batch[0].to(where))
            term = alignment.loss()
        term.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([term, *gradients, *alignment.head_divergences.values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other.cpu(), one, rtol=1e-6, atol=1e-8)


# PyTorch waits for the success of a decomposition, which moments need.
@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "moments"])
def test_alignment_does_not_wait_for_the_device(name, models, batch, device, no_waiting):
    model, tokens = models[1].float(), batch[0].float().to(device)
    alignment = Alignment(model, DIVERGENCES[name], 0.3)
    for is_checked in (False, True):
        with no_waiting() if is_checked else torch.enable_grad():
            with alignment.observe():
                loss = model(tokens).square().mean()
            (loss + alignment.loss()).backward()


def test_a_permutation_test_is_that_of_the_cpu(generator, device):
    clouds = [torch.randn(size, 3, generator=generator) for size in (11, 13)]
    settings = {"statistic": Energy(), "num_permutations": 50, "seed": 0}
    here = permutation_test(*clouds, **settings)
    there = permutation_test(*(cloud.to(device) for cloud in clouds), **settings)
    torch.testing.assert_close(there.p_value.cpu(), here.p_value)


def test_diagnostics_and_penalties_are_those_of_the_cpu(models, batch, device):
    here, there = models
    for measure in (weight_similarity, circuit_similarity):
        expected, found = measure(here), measure(there)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name].cpu(), value)
    seen = []
    for model, where in ((here, "cpu"), (there, device)):
        penalty = HeadPenalty(model, orthogonality_penalty)
        with penalty.observe(), head_statistics(model) as statistics:
            model(batch[0].to(where))
        seen.append([penalty.loss(), *(row for layer in statistics.values() for row in layer[:3])])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(other.cpu(), one)


@pytest.mark.parametrize("start", ["heads", "algebraic", "random", "best"])
def test_shared_projections_are_as_near_as_on_the_cpu(start, generator, device):
    sides = [
        torch.stack(layers)
        for layers in zip(
            *(
                shared_heads(generator, heads=4, dim=5, query=23, key=19, components=9, noise=noise)
                for noise in (0.0, 0.1)
            ),
            strict=True,
        )
    ]
    settings = {"start": start, "num_iterations": 30, "tolerance": 0}
    here = factorize(*sides, 9, **settings)
    there = factorize(*(side.to(device) for side in sides), 9, **settings)
    torch.testing.assert_close(
        there.relative_error.cpu(), here.relative_error, rtol=1e-3, atol=1e-9
    )
    assert there.mixing.device.type == torch.device(device).type
    found = width_for_error(sides[0][0].to(device), sides[1][0].to(device), 1e-6)
    assert found.query_weight.shape[0] == 9


def test_conversions_are_exact_and_go_back(models, batch, device):
    """PyTorch's layers; weighed by the tokens that they see."""
    here, there = models
    tokens = batch[0].to(device)
    expected = here(batch[0])
    fit = CollaborativeFit(EMBED, num_iterations=3)
    shared, report = convert(there, projections=fit, copy=True)
    torch.testing.assert_close(shared(tokens).cpu(), expected, rtol=1e-7, atol=1e-7)
    assert all(p.device.type == torch.device(device).type for p in shared.parameters())
    assert len(report) == 2
    back, _ = convert(shared, projections=Separate(), copy=True)
    torch.testing.assert_close(back(tokens).cpu(), expected, rtol=1e-7, atol=1e-7)
