"""Markov chains side by side, each in a process forked from this one.

A fork has the recorded graphs already, so that nothing is sent to it. It runs on one thread, hands
its figures and in the end its draws back through a pipe, and stops when this process asks it to.
"""

import contextlib
import multiprocessing
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from bayesattn.inference.markov_chain import ChainDraws, Tick
from bayesattn.inference.running import Progress

__all__ = ["can_fork", "in_processes"]

Sample = Callable[[int, Tick, Callable[[], bool]], ChainDraws]

# Seconds between looks for a Ctrl-C; draws between messages.
_PATIENCE = 0.1
_DRAWS_A_MESSAGE = 10


def can_fork(device: torch.device) -> str:
    """Why chains on this device cannot run in forked processes; empty if they can."""
    if sys.platform != "linux":
        return f"processes are forked on Linux only, not on {sys.platform}"
    if device.type != "cpu":
        return f"a forked process cannot use the device {device}"
    if torch.cuda.is_available():
        return "autograd has threads for CUDA devices, and cannot be forked with them"
    return ""


def in_processes(
    sample: Sample, num_chains: int, bar: Progress, stop: Callable[[], bool]
) -> list[ChainDraws]:
    """Run every chain in a process of its own.

    Args:
        sample: Runs the chain of a number; takes functions to tell figures, and to ask whether
            to stop.
        num_chains: How many.
        bar: Advanced with every draw of every chain.
        stop: Once it says so, all chains stop with what they have.

    Raises:
        RuntimeError: If a chain fails; with its traceback.
    """
    context = multiprocessing.get_context("fork")
    halt = context.Event()
    processes: list[Any] = []
    links: dict[Connection, int] = {}
    chains: dict[int, ChainDraws] = {}
    try:
        for chain in range(num_chains):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (theirs, [*links, ours], sample, chain, halt)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            _start(process)
            processes.append(process)
            theirs.close()
            links[ours] = chain
        while links:
            if stop():
                halt.set()
            for link in wait(list(links), timeout=_PATIENCE):
                assert isinstance(link, Connection)
                kind, content = _received(link, links[link])
                if kind == "figures":
                    for figures in content:
                        bar.show(figures)
                else:
                    chains[links.pop(link)] = content
                    link.close()
    finally:
        for process in processes:
            if links:
                process.kill()
            process.join()
            process.close()
        for link in links:
            link.close()
    return [chains[chain] for chain in range(num_chains)]


def _start(process: Any) -> None:
    threads = torch.get_num_threads()
    # A forked process must not enter a thread pool that it does not have.
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork")
            process.start()
    finally:
        torch.set_num_threads(threads)


def _received(link: Connection, chain: int) -> tuple[str, Any]:
    try:
        kind, content = link.recv()
    except EOFError:
        raise RuntimeError(f"the process of chain {chain} ended without a result") from None
    if kind == "error":
        raise RuntimeError(f"chain {chain} failed in its process:\n{content}")
    return kind, content


def _serve(
    link: Connection, others: list[Connection], sample: Sample, chain: int, halt: Any
) -> None:
    """Run in the forked process."""
    # Ctrl-C reaches all processes of a terminal; the first one says what is to be done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for other in others:
        other.close()
    pending: list[Mapping[str, float]] = []

    def tick(figures: Mapping[str, float]) -> None:
        pending.append(figures)
        if len(pending) >= _DRAWS_A_MESSAGE:
            link.send(("figures", pending[:]))
            pending.clear()

    try:
        draws = sample(chain, tick, halt.is_set)
        link.send(("figures", pending))
        link.send(("draws", draws))
    except BaseException:
        # Nobody listens where the first process is gone.
        with contextlib.suppress(OSError):
            link.send(("error", traceback.format_exc()))
    finally:
        link.close()
