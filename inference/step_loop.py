"""A loop of steps that shows progress, watches for non-finite values, and can be stopped.

The device is looked at every some steps only. At each look one good snapshot is kept: a state whose
log density and score were finite.
"""

import contextlib
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from bayesattn.argument_checks import check_count
from bayesattn.inference.checkpoints import (
    Checkpoint,
    CheckpointFile,
    load_random_state,
    random_state,
    run_identity,
)
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.running import (
    NonFiniteError,
    NonFiniteWatch,
    Progress,
    Watched,
    resolve_seed,
    seeded,
)

__all__ = ["StepLoop", "Steps", "interruptible"]


@runtime_checkable
class Steps(Protocol):
    """What a loop needs of a run.

    Attributes:
        dim: Width of the scores.
        device: Where they live.
    """

    dim: int
    device: torch.device

    def advance(self, step: int) -> Any:
        """Do one step, and return its info, a NamedTuple.

        Its field ``watched``, of the state before the step, is looked at for non-finite values; the
        others, one number a run, become curves.
        """
        ...

    def evaluate(self) -> Watched:
        """What is to be watched of the present state, without a step."""
        ...

    def snapshot(self) -> Any:
        """Copy the present state."""
        ...

    def figures(self, info: Any) -> Mapping[str, float]:
        """What the bar shows of an info."""
        ...

    def finish(self, snapshot: Any, curves: dict[str, Tensor], attrs: dict[str, Any]) -> Posterior:
        """Make a posterior of a snapshot."""
        ...

    def names(self, entries: Bool[Tensor, " dim"]) -> list[str]:
        """Say which sites some entries of the scores belong to."""
        ...

    def is_settled(self) -> bool:
        """Whether more steps are not needed; asked at each look."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: mappings, sequences, tensors, plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where a state was taken."""
        ...


class StepLoop:
    """Runs steps with a bar, a watch, snapshots, checkpoints and a clean stop.

    Args:
        label: The routine's name.
        num_steps: How many steps.
        seed: Of the run; fresh if None.
        progress: Whether to show a bar.
        check_every: Steps between looks at the device.

    Attributes:
        seed: As resolved.
        generator: On the CPU, seeded.
        checkpoint: Where the run is saved, and goes on from; None at first.

    Raises:
        ValueError: If a number of steps is below one.
    """

    def __init__(
        self, label: str, num_steps: int, seed: int | None, progress: bool, check_every: int = 50
    ):
        self.num_steps = check_count("num_steps", num_steps)
        self.check_every = check_count("check_every", check_every)
        self.label, self.show = label, progress
        self.checkpoint: CheckpointFile | None = None
        self.seed = resolve_seed(seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self._generators = {"loop": self.generator}
        # Another seed, lest the two streams be the same numbers.
        self._global_seed = int(torch.randint(2**31, (), generator=self.generator))

    def save_to(self, checkpoint: Checkpoint | None, density: LogDensity, **settings: Any) -> None:
        """Save the run to a checkpoint, and go on from it where it is there already.

        Args:
            checkpoint: None for none.
            density: Of the program.
            **settings: What else a run is.

        Raises:
            OSError: If nothing can be written there.
        """
        self._generators["density"] = density.noise_generator
        if checkpoint is not None:
            about = {"seed": self.seed, "num_steps": self.num_steps} | settings
            self.checkpoint = CheckpointFile(checkpoint, run_identity(density, self.label, **about))

    def random_state(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Fork and seed global random state for what draws from it."""
        return seeded(self._global_seed, device)

    def run(self, steps: Steps) -> Posterior:
        """Do all steps, and finish.

        Raises:
            NonFiniteError: With the posterior of the last good snapshot.
        """
        record = _Record(self, steps)
        self._go_on(record)
        with Progress(self.num_steps, self.label, self.show, record.done) as bar:
            with interruptible() as stop:
                self._steps(record, bar, stop)
            random = random_state(self._generators, steps.device)
            record.look_at_the_end()
            self._save(record, random)
        attrs: dict[str, Any] = {"is_settled": 1} if record.is_settled else {}
        if record.done < self.num_steps and not record.is_settled:
            attrs["interrupted"] = 1
            kept = "" if self.checkpoint is None else f", and is kept in {self.checkpoint.path}"
            warnings.warn(
                f"{self.label} was interrupted after {record.done} of {self.num_steps} steps; what "
                f"it had is returned{kept}",
                RuntimeWarning,
                stacklevel=3,
            )
        return record.finished(steps.snapshot(), record.done, **attrs)

    def _steps(self, record: "_Record", bar: Progress, stop: threading.Event) -> None:
        steps = record.steps
        for step in range(record.done, self.num_steps):
            if stop.is_set() or record.is_settled:
                break
            is_look = (step + 1) % self.check_every == 0 or step + 1 == self.num_steps
            before = steps.snapshot() if is_look or step == 0 else None
            info = steps.advance(step)
            record.note(step, info)
            bar.advance((lambda info=info: steps.figures(info)) if is_look else None)
            if is_look or step == 0:
                record.keep_if_good(step, before)
            if is_look:
                record.is_settled = steps.is_settled()
            if self.checkpoint is not None and self.checkpoint.is_due(step + 1):
                record.refuse_if_bad()
                self._save(record, random_state(self._generators, steps.device))

    def _save(self, record: "_Record", random: dict[str, Any]) -> None:
        if self.checkpoint is not None:
            about = {"record": record.state_dict(), "steps": record.steps.state_dict()}
            self.checkpoint.save(about | {"random": random})

    def _go_on(self, record: "_Record") -> None:
        """Go to where the checkpoint is, if there is one."""
        state = None if self.checkpoint is None else self.checkpoint.load()
        if state is None:
            return
        record.steps.load_state_dict(state["steps"])
        record.load_state_dict(state["record"])
        load_random_state(state["random"], self._generators, record.steps.device)


class _Record:
    """Curves, the watch and the last good snapshot of one run."""

    def __init__(self, loop: StepLoop, steps: Steps):
        self.loop, self.steps = loop, steps
        self.watch = NonFiniteWatch(steps.dim, steps.device)
        self.curves: dict[str, list[Tensor]] = {}
        self.done, self.good_step, self.is_settled = 0, 0, False
        self.good = steps.snapshot()
        self.start = time.perf_counter()

    def note(self, step: int, info: Any) -> None:
        """Watch an info and keep its curves."""
        self.watch.observe(step, info.watched)
        for name, value in zip(info._fields, info, strict=True):
            if name != "watched":
                self.curves.setdefault(name, []).append(value)
        self.done = step + 1

    def keep_if_good(self, step: int, before: Any) -> None:
        """Keep the state that this step began from, or raise."""
        self.refuse_if_bad()
        self.good, self.good_step = before, step

    def refuse_if_bad(self) -> None:
        """Raise if a step so far met what is not finite."""
        bad = self.watch.poll()
        if bad is not None:
            self._refuse(bad)

    def look_at_the_end(self) -> None:
        """Raise where the last step led to what no step has evaluated."""
        self.watch.observe(self.done, self.steps.evaluate())
        self.refuse_if_bad()

    def state_dict(self) -> dict[str, Any]:
        """Steps done, seconds that they took, and their curves."""
        curves = {name: torch.stack(rows, -1) for name, rows in self.curves.items()}
        seconds = time.perf_counter() - self.start
        about = {"done": self.done, "is_settled": self.is_settled, "seconds": seconds}
        return about | {"curves": curves}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where a state was taken; the routine's own state is there already."""
        device = self.steps.device
        self.is_settled = state["is_settled"]
        self.done, self.start = state["done"], time.perf_counter() - state["seconds"]
        curves = state["curves"].items()
        self.curves = {name: list(rows.to(device).unbind(-1)) for name, rows in curves}
        self.good, self.good_step = self.steps.snapshot(), self.done

    def finished(self, snapshot: Any, num_steps: int, **attrs: Any) -> Posterior:
        """Posterior of a snapshot, with the curves up to it."""
        curves = {
            name: torch.stack(rows[:num_steps], -1)
            for name, rows in self.curves.items()
            if num_steps
        }
        seconds = time.perf_counter() - self.start
        about = {"seed": self.loop.seed, "num_steps": num_steps, "seconds": seconds}
        return self.steps.finish(snapshot, curves, about | attrs)

    def _refuse(self, bad: int) -> None:
        sites = self.steps.names(self.watch.bad_entries())
        where = f", first in {', '.join(sites)}" if sites else ""
        raise NonFiniteError(
            f"{self.loop.label}: the log density or its score is not finite at step {bad}{where}; "
            f"what there was at step {self.good_step} is kept in this error's .posterior. A "
            "smaller learning rate or step size, other starts (init=) or coordinates='laplace' "
            "may help",
            step=bad,
            sites=sites,
            posterior=self.finished(self.good, self.good_step),
        )


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag that is read between steps; a second one interrupts."""
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    # Handlers can be set in the main thread only, and put back only if Python set them.
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield stop
        return

    def note(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
