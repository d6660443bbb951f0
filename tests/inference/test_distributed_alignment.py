"""Alignment in two processes that train one network: what learns beside it stays one too."""

import copy

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from bayesattn.divergences import Adversarial, Energy
from bayesattn.inference import Alignment
from tests.heads import Classifier

DIVERGENCES = {"fixed": Energy(), "learned": Adversarial}


def trained(model, tokens, divergence, seed=0):
    """Parameters of a network, and of what learns beside it, after some steps."""
    alignment = Alignment(model, divergence, 0.5, seed=seed)
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


def batch():
    return torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(0))


def work(rank, folder, model, divergence):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    # Copied, since what is sent to a process lies in memory that all of them share.
    network = DistributedDataParallel(copy.deepcopy(model))
    # The second process draws other initial values, and is given the first one's.
    rows = trained(network, batch().chunk(2)[rank], divergence, seed=rank)
    torch.save(rows, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_processes_agree_and_do_what_one_does(divergence, tmp_path):
    """Mutants: gradients of adversaries are not averaged, or their initial values not shared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier()
    assert isinstance(model, nn.Module)
    multiprocessing.spawn(work, (tmp_path, model, divergence), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(first, trained(model, batch(), divergence), strict=True):
        torch.testing.assert_close(one, other)
