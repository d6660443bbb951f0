"""Ratios of times, taken side by side: contestants take turns, so that a machine's moods hit all.

On a quiet machine the wall clock counts. Where others compute too, it counts their turns on the
processor; the processor time of the process does not, and is the same for one busy thread.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

__all__ = [
    "Advance",
    "Clock",
    "Times",
    "alternating",
    "name_of",
    "repeated",
    "seconds_of",
    "table",
    "wait_for",
]

Advance = Callable[[int], None]
Clock = Callable[[], float]


class Times(NamedTuple):
    """Milliseconds a step of one contestant, one figure a round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Over rounds."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> str:
        """Fastest and slowest round."""
        return f"{_short(min(self.rounds))}–{_short(max(self.rounds))}"

    def __str__(self) -> str:
        return f"{_short(self.median)} ({self.spread})"


def alternating(
    contestants: Mapping[str, Advance],
    *,
    rounds: int,
    seconds: float,
    clock: Clock = time.perf_counter,
) -> dict[str, Times]:
    """Let contestants take turns.

    Args:
        contestants: Name to a function that does so many steps, and waits for their results.
        rounds: Turns of each.
        seconds: Of a turn, about.
        clock: In seconds.
    """
    counts = {name: _steps_in(advance, seconds) for name, advance in contestants.items()}
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, advance in contestants.items():
            # Caches, clocks and allocators are another's when a turn begins.
            advance(max(1, counts[name] // 10))
            spent = seconds_of(advance, counts[name], clock=clock)
            found[name].append(1e3 * spent / counts[name])
    return {name: Times(tuple(times)) for name, times in found.items()}


def repeated(once: Callable[[], object], device: str = "cpu") -> Advance:
    """Steps that are calls of a function; the last waits for the device."""

    def advance(count: int) -> None:
        for _ in range(count):
            once()
        wait_for(device)

    return advance


def seconds_of(function: Callable, *args: object, clock: Clock = time.perf_counter) -> float:
    """Time of one call."""
    start = clock()
    function(*args)
    return clock() - start


def wait_for(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def name_of(device: str) -> str:
    """What a device is: CPU, or the GPU's name."""
    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Lay out columns of text."""
    if markdown:
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _steps_in(advance: Advance, seconds: float) -> int:
    advance(2)
    one = max(seconds_of(advance, 2) / 2, 1e-6)
    count = max(1, min(20, int(seconds / one)))
    one = seconds_of(advance, count) / count
    return max(1, int(seconds / one))


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"
