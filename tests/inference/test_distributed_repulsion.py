"""Repulsion in two processes that train one network."""

import pytest
import torch

from bayesattn.inference import Repulsion, SteinDiffusion, SteinForce
from bayesattn.networks import head_partitions
from tests.heads import Classifier
from tests.two_processes import batch, trained_in_two_processes

METHODS = {
    "force": SteinForce(),
    "diffusion": SteinDiffusion(1),
}


def trained(model, tokens, method, rank=0):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    # No seed: it is drawn by one process and told to the others.
    prior = torch.distributions.Normal(0.0, 1.0)
    repulsion = Repulsion(model, optimizer, method=method, num_data=50, decoupled=True, prior=prior)
    for _ in range(4):
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        repulsion.step()
        optimizer.step()
    return [part.particles().clone() for part in head_partitions(model)]


@pytest.mark.slow
@pytest.mark.usefixtures("seeded_layers")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_processes_agree_and_do_what_one_does(method, tmp_path):
    """Mutants: a generator of each process's own, gradients before they are all-reduced."""
    model = Classifier()
    first, second = trained_in_two_processes(trained, model, method, tmp_path)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    if isinstance(method, SteinForce):
        for one, other in zip(first, trained(model, batch(), method), strict=True):
            torch.testing.assert_close(one, other)
