"""Alignment in two processes that train one network: what learns beside it stays one too."""

import pytest
import torch

from bayesattn.divergences import Adversarial, Energy
from bayesattn.inference import Alignment
from tests.heads import Classifier
from tests.two_processes import batch, trained_in_two_processes

DIVERGENCES = {"fixed": Energy(), "learned": Adversarial}


def trained(model, tokens, divergence, rank=0):
    """Parameters of a network, and of what learns beside it, after some steps."""
    # The second process draws other initial values, and is given the first one's.
    alignment = Alignment(model, divergence, 0.5, seed=rank)
    groups = [{"params": model.parameters()}, *alignment.parameter_groups(lr=0.02)]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        with alignment.observe():
            loss = model(tokens).square().mean()
        (loss + alignment.loss()).backward()
        alignment.sync_gradients()
        optimizer.step()
        alignment.step()
    parameters = [*model.parameters(), *alignment.parameters()]
    return [parameter.detach().clone() for parameter in parameters]


@pytest.mark.slow
@pytest.mark.usefixtures("seeded_layers")
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_processes_agree_and_do_what_one_does(divergence, tmp_path):
    """Mutants: gradients of adversaries are not averaged, or their initial values not shared."""
    model = Classifier()
    first, second = trained_in_two_processes(trained, model, divergence, tmp_path)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(first, trained(model, batch(), divergence), strict=True):
        torch.testing.assert_close(one, other)
