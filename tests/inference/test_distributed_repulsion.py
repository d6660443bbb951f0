"""Repulsion in two processes that train one network."""

import copy

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from bayesattn.inference import Repulsion, SteinDiffusion, SteinForce
from bayesattn.networks import head_partitions
from tests.heads import Classifier

METHODS = {
    "force": SteinForce(),
    "diffusion": SteinDiffusion(1),
}


def trained(model, tokens, method):
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


def batch():
    return torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(0))


def work(rank, folder, model, method):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    # Copied, since what is sent to a process lies in memory that all of them share.
    rows = trained(DistributedDataParallel(copy.deepcopy(model)), batch().chunk(2)[rank], method)
    torch.save(rows, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_processes_agree_and_do_what_one_does(method, tmp_path):
    """Mutants: a generator of each process's own, gradients before they are all-reduced."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier()
    assert isinstance(model, nn.Module)
    multiprocessing.spawn(work, (tmp_path, model, method), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    if isinstance(method, SteinForce):
        for one, other in zip(first, trained(model, batch(), method), strict=True):
            torch.testing.assert_close(one, other)
