"""One Markov chain of Pyro's no-U-turn sampler, with what each draw took.

The names of the statistics are those of ArviZ's schema. The energy of a draw is that of the point
that was accepted, momentum included, so that it is never below the potential there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.infer
import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.inference.checkpoints import CheckpointFile, load_random_state, random_state
from bayesattn.inference.nuts_state import load_sampler_state, sampler_state

__all__ = ["STATISTICS", "ChainDraws", "WatchedNUTS", "equally_long", "sample_chain"]

STATISTICS = ("lp", "acceptance_rate", "step_size", "tree_depth", "n_steps", "diverging", "energy")

Tick = Callable[[Mapping[str, float]], None]


class ChainDraws(NamedTuple):
    """What one chain kept.

    Attributes:
        working: Draws in working coordinates.
        statistics: One column for each of :data:`STATISTICS`.
        num_steps: Leapfrog steps in all, warmup included: one gradient each.
    """

    working: Float[np.ndarray, "draw dim"]
    statistics: Float[np.ndarray, "draw statistic"]
    num_steps: int


class WatchedNUTS(pyro.infer.NUTS):
    """Pyro's sampler, counting what each draw took.

    Attributes:
        num_leapfrogs: Leapfrog steps of all draws so far.
    """

    num_leapfrogs = 0

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make the next draw."""
        self._leaves: list[Any] = []
        self._start_energy: Tensor | None = None
        draw = super().sample(params)
        self.num_leapfrogs += len(self._leaves)
        return draw

    @property
    def acceptance_rate(self) -> float:
        """Mean acceptance probability over the last draw's trajectory."""
        total = sum(float(leaf.sum_accept_probs) for leaf in self._leaves)
        return total / max(len(self._leaves), 1)

    def statistics(self) -> list[float]:
        """Statistics of the last draw, in the order of :data:`STATISTICS`."""
        num_steps = len(self._leaves)
        return [
            -float(self._potential()),
            self.acceptance_rate,
            float(self.step_size),
            float(math.ceil(math.log2(num_steps + 1))),
            float(num_steps),
            float(any(bool(leaf.diverging) for leaf in self._leaves)),
            self._energy(),
        ]

    def _energy(self) -> float:
        """Total energy of the accepted point: a leaf of the tree, or where the draw began."""
        assert self._start_energy is not None
        accepted = self._potential()
        for leaf in self._leaves:
            if leaf.z_proposal_pe is accepted:
                # A leaf's weight is how much energy it has lost.
                return float(self._start_energy - leaf.weight)
        return float(self._start_energy)

    def _potential(self) -> Tensor:
        assert self._potential_energy_last is not None
        return self._potential_energy_last

    def _build_basetree(
        self, z: Any, r: Any, z_grads: Any, log_slice: Any, direction: Any, energy_current: Any
    ) -> Any:
        leaf = super()._build_basetree(z, r, z_grads, log_slice, direction, energy_current)
        self._start_energy = energy_current
        self._leaves.append(leaf)
        return leaf


def sample_chain(
    sampler: WatchedNUTS,
    start: Float[Tensor, " dim"],
    warmup_steps: int,
    num_samples: int,
    tick: Tick,
    stop: Callable[[], bool],
    file: CheckpointFile | None = None,
) -> ChainDraws:
    """Run a sampler whose position has one site, ``"working"``.

    Args:
        sampler: Not yet set up.
        start: First position.
        warmup_steps: Draws thrown away while the sampler adapts.
        num_samples: Draws kept.
        tick: Told the figures of each draw.
        stop: Once it says so, the draws so far are all.
        file: Where the chain is saved, and goes on from where it is there already.
    """
    chain = _Chain(sampler, start)
    # Pyro would read every tensor to validate its own random choices.
    with pyro.validation_enabled(False), torch.enable_grad():
        sampler.initial_params = chain.position
        sampler.setup(warmup_steps)
        chain.go_on(file)
        for iteration in range(chain.done, warmup_steps + num_samples):
            if stop():
                break
            chain.advance(is_kept=iteration >= warmup_steps)
            tick({"step size": float(sampler.step_size), "acceptance": sampler.acceptance_rate})
            if file is not None and file.is_due(chain.done):
                file.save(chain.state_dict())
        if file is not None:
            file.save(chain.state_dict())
    return chain.draws()


class _Chain:
    """A sampler's position, and what was kept of it."""

    def __init__(self, sampler: WatchedNUTS, start: Float[Tensor, " dim"]):
        self.sampler, self.start = sampler, start
        self.position = {"working": start.clone()}
        self.done = 0
        self.working: list[np.ndarray] = []
        self.statistics: list[Sequence[float]] = []

    def advance(self, *, is_kept: bool) -> None:
        self.position = self.sampler.sample(self.position)
        self.done += 1
        if is_kept:
            self.working.append(self.position["working"].detach().cpu().numpy().copy())
            self.statistics.append(self.sampler.statistics())

    def draws(self) -> ChainDraws:
        count, dim = len(self.working), self.start.shape[-1]
        return ChainDraws(
            np.array(self.working, dtype=np.float64).reshape(count, dim),
            np.array(self.statistics, dtype=np.float64).reshape(count, len(STATISTICS)),
            self.sampler.num_leapfrogs,
        )

    def state_dict(self) -> dict[str, Any]:
        draws = self.draws()
        return {
            "done": self.done,
            "position": self.position,
            "sampler": sampler_state(self.sampler),
            "kept": [torch.from_numpy(draws.working), torch.from_numpy(draws.statistics)],
            "num_steps": draws.num_steps,
            "random": random_state({}, self.start.device),
        }

    def go_on(self, file: CheckpointFile | None) -> None:
        """Go to where the checkpoint is, if there is one."""
        state = None if file is None else file.load()
        if state is None:
            return
        self.done, self.sampler.num_leapfrogs = state["done"], state["num_steps"]
        self.position = {"working": state["position"]["working"].to(self.start.device)}
        working, statistics = (part.numpy() for part in state["kept"])
        self.working, self.statistics = list(working), list(statistics)
        load_sampler_state(self.sampler, state["sampler"])
        load_random_state(state["random"], {}, self.start.device)


def equally_long(chains: Sequence[ChainDraws]) -> list[ChainDraws]:
    """Of chains of unequal length, those and that length that keep the most draws in all."""
    lengths = sorted({len(chain.working) for chain in chains})
    if not lengths:
        return []

    def kept(length: int) -> int:
        return length * sum(len(chain.working) >= length for chain in chains)

    length = max(lengths, key=kept)
    whole = [chain for chain in chains if len(chain.working) >= length > 0]
    return [
        chain._replace(working=chain.working[:length], statistics=chain.statistics[:length])
        for chain in whole
    ]
