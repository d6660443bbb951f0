"""The same training in two processes that share their gradients, each on half of a batch."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["batch", "trained_in_two_processes"]

# From a network, its part of the batch, what is compared and the process's number to what it got.
Train = Callable[[nn.Module, Tensor, Any, int], list[Tensor]]


def batch() -> Tensor:
    """The batch of which each process has a half."""
    return torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(0))


def trained_in_two_processes(
    train: Train, model: nn.Module, choice: Any, folder: Path
) -> tuple[list[Tensor], list[Tensor]]:
    """Train copies of a network, and give what each process got."""
    multiprocessing.spawn(_work, (folder, train, model, choice), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    return first, second


def _work(rank: int, folder: Path, train: Train, model: nn.Module, choice: Any) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    # Copied, since what is sent to a process lies in memory that all of them share.
    network = DistributedDataParallel(copy.deepcopy(model))
    torch.save(train(network, batch().chunk(2)[rank], choice, rank), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
