"""Kernels start as the dot product does; what they learn does not decay; divergences count."""

import pytest
import torch
from torch import nn

from bayesattn.implicit_densities import density_terms
from bayesattn.logits import DotProduct, ImplicitSpectralLogits
from bayesattn.multihead import MultiheadAttention
from examples.reproduce.kernel_rivals import LOGITS, LogitsRun, drawn, norms

pytestmark = pytest.mark.usefixtures("seeded_layers")

HEADS, DIM = 3, 5


def layer(name):
    choice = LOGITS[name]
    logits = None if choice is None else choice(HEADS, DIM)
    return MultiheadAttention(HEADS * DIM, HEADS, batch_first=True, logits=logits)


@pytest.fixture
def tokens(generator):
    return torch.randn(2, 7, HEADS * DIM, generator=generator)


@pytest.mark.parametrize("name", LOGITS)
def test_all_start_as_the_dot_product(name, tokens):
    """But for the floor of a squared kernel, and the copula's first correlations."""
    start, model = layer("dot"), layer(name)
    model.load_state_dict(model.state_dict() | start.state_dict())
    expected, found = (each.eval()(tokens, tokens, tokens)[0] for each in (start, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 if "copula" in name else 1e-6)


def test_heads_are_coupled_under_the_copula_alone():
    """Mutant: the two implicit rivals are one."""
    couples = {name: layer(name).logits for name in ("implicit", "implicit_copula")}
    assert all(isinstance(part, ImplicitSpectralLogits) for part in couples.values())
    laws = [part.law.couples_heads for part in couples.values()]
    assert laws == [False, True]


@pytest.mark.parametrize("groups", [1, 2])
def test_parameters_of_logits_do_not_decay(groups):
    """Mutants: they stay where they were; they are stepped twice, or not at all."""
    model = nn.Sequential(nn.Linear(2, 2), layer("spectral"))
    others = [{"params": list(model.parameters()), "weight_decay": 0.5}]
    others += [{"params": [nn.Parameter(torch.ones(1))], "weight_decay": 0.0}] * (groups - 1)
    optimizer = torch.optim.SGD(others, lr=0.1)
    LogitsRun().attach(model, optimizer, 4)
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    before = [value.detach().clone() for value in model.parameters()]
    optimizer.step()
    kept = {
        name
        for (name, value), old in zip(model.named_parameters(), before, strict=True)
        if torch.equal(value, old) and old.any()
    }
    own = {f"1.logits.{name}" for name, _ in model[1].logits.named_parameters()}
    assert kept == own
    assert len(optimizer.param_groups) == 2
    stepped = sum(len(group["params"]) for group in optimizer.param_groups)
    assert stepped == len(list(model.parameters())) + groups - 1


def test_divergences_rise_to_the_evidence_bound(tokens):
    """Mutants: a weight that does not rise, or goes past one; a sum over terms."""
    model = layer("implicit_copula")
    run = LogitsRun(terms_per_sequence=20)
    before_step = run.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), 8)

    def task():
        return 0 * model(tokens, tokens, tokens)[0].sum() + 3.0

    with density_terms(model) as terms:
        task()
    added = []
    for _ in range(7):
        added.append((run.loss(task) - 3.0).item() * 20 / terms.total().item())
        before_step()
    assert added == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1])
    plain = layer("spectral")
    run.attach(plain, torch.optim.SGD(plain.parameters(), lr=0.1), 8)
    assert run.loss(lambda: torch.tensor(3.0)).item() == 3.0


def test_what_draws_is_drawn_from(tokens):
    for name, number in (("dot", 1), ("spectral", 1), ("implicit", 4)):
        model = layer(name).eval()
        found = drawn(model, lambda model=model: model(tokens, tokens, tokens)[0], 4)
        assert found.shape == (number, *tokens.shape)
    assert not torch.equal(found[0], found[1])
    again = drawn(model, lambda: model(tokens, tokens, tokens)[0], 4)
    assert torch.equal(found, again)
    other = drawn(model, lambda: model(tokens, tokens, tokens)[0], 4, seed=1)
    assert not torch.equal(found, other)


def test_norms_are_those_that_heads_learn():
    assert norms(nn.Sequential(layer("rbf_p"), layer("rbf_p"))) == [[2.0] * HEADS] * 2
    assert norms(nn.Sequential(layer("dot"), layer("spectral"))) == []
    assert layer("dot").logits is None or isinstance(layer("dot").logits, DotProduct)
