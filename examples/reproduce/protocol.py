"""The protocol of all evidence: rivals on equal terms, on real data, over several seeds.

A study is declared as data: its tasks, its rivals (each a name and a function that builds a model),
its metrics, and how one model is trained and measured. The protocol sees to the rest:

* every rival gets the same budget, and its number of parameters is held against the baseline's;
* for one seed, all rivals have the same splits, the same order of batches and, wherever names and
  shapes of parameters agree, the same initial weights, so that differences are paired;
* means and paired differences over seeds have standard errors;
* each finished run is kept in a file of its own, from which an interrupted study goes on;
* ``--quick`` is a smoke run of seconds.

A study must leave choices to the validation part alone: ``measure`` gets all parts, and ``train``
of ``training.py`` only the two that it may look at.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = [
    "Build",
    "Outcome",
    "Study",
    "Task",
    "check_parameters",
    "count_parameters",
    "equal_start",
]

Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Task:
    """Data, and what every rival is given to learn them.

    Attributes:
        load: ``load(folder, seed)`` gives the splits of one seed, or None where the folder, which
            may be None, does not hold them. They have a method ``sizes()``.
        budget: A dataclass that ``measure`` understands.
        quick: The same for a smoke run.
    """

    load: Callable[[Path | None, int], Any]
    budget: Any
    quick: Any


@dataclass(frozen=True)
class Outcome:
    """What one run gives, all of it fit for JSON.

    Attributes:
        metrics: The study's metrics, on the test part; None where a model has no such figure.
        choices: What the validation part decided.
        details: Whatever else the study draws or tells.
    """

    metrics: Mapping[str, float | None]
    choices: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """What is compared, on what, and how. Functions stand at the top level of their modules.

    Attributes:
        name: Of the study.
        tasks: Name and task.
        rivals: Name and ``build(splits) -> module``; the first is the baseline.
        metrics: Name of each metric, and "higher" or "lower", which is better, or "neither".
        measure: ``measure(build, splits, budget, seed) -> Outcome``; each ``build()`` gives the
            untrained model anew.
        methods: Where rivals differ in their training too, what ``measure`` gets as ``method`` for
            each of them; else empty.
        draw: ``draw(results, folder)`` writes what further figures there are.
        parameter_tolerance: By what part of the baseline's number of parameters a rival may differ.
    """

    name: str
    tasks: Mapping[str, Task]
    rivals: Mapping[str, Callable[[Any], nn.Module]]
    metrics: Mapping[str, str]
    measure: Callable[..., Outcome]
    methods: Mapping[str, Any] = field(default_factory=dict)
    draw: Callable[[list[dict[str, Any]], Path], None] | None = None
    parameter_tolerance: float = 0.01

    def __post_init__(self) -> None:
        for kind in ("tasks", "rivals", "metrics"):
            if not getattr(self, kind):
                raise ValueError(f"{kind}: expected at least one, got none")
        for name in (*self.tasks, *self.rivals):
            if not re.fullmatch(r"[a-z0-9_]+", name):
                raise ValueError(
                    f"tasks and rivals: expected names of a-z, 0-9 and _ (they name files), "
                    f"got {name!r}"
                )
        for name, better in self.metrics.items():
            if better not in ("higher", "lower", "neither"):
                raise ValueError(
                    f'metrics: expected "higher", "lower" or "neither", got {name}: {better!r}'
                )
        if self.methods and self.methods.keys() != self.rivals.keys():
            raise ValueError(
                f"methods: expected one for each of {', '.join(self.rivals)}, "
                f"got {', '.join(self.methods)}"
            )

    @property
    def baseline(self) -> str:
        """Name of the rival that the others are held against."""
        return next(iter(self.rivals))

    def measured(self, rival: str, build: Build, splits: Any, budget: Any, seed: int) -> Outcome:
        """Train and measure a rival by its method, if rivals have such."""
        chosen = {"method": self.methods[rival]} if self.methods else {}
        return self.measure(build, splits, budget, seed, **chosen)


def equal_start(study: Study, rival: str, splits: Any, seed: int) -> Build:
    """Give a function that builds a rival with the baseline's initial weights of this seed.

    Parameters that the baseline does not have, by name and shape, are drawn under the same seed.
    Torch's random state is left as it was.
    """

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            baseline = study.rivals[study.baseline](splits).state_dict()
            torch.manual_seed(seed)
            model = study.rivals[rival](splits)
        state = model.state_dict()
        shared = {
            name: value
            for name, value in baseline.items()
            if name in state and state[name].shape == value.shape
        }
        model.load_state_dict(state | shared)
        return model

    return build


def count_parameters(module: nn.Module) -> int:
    """Count the numbers that training may change."""
    return sum(value.numel() for value in module.parameters() if value.requires_grad)


def check_parameters(study: Study, splits: Any) -> dict[str, int]:
    """Count each rival's parameters and hold them against the baseline's.

    Raises:
        ValueError: If a rival differs by more than the study's tolerance.
    """
    with torch.random.fork_rng(devices=[]):
        counts = {name: count_parameters(build(splits)) for name, build in study.rivals.items()}
    allowed = study.parameter_tolerance * counts[study.baseline]
    for name, count in counts.items():
        if abs(count - counts[study.baseline]) > allowed:
            raise ValueError(
                f"rival {name}: expected {counts[study.baseline]} parameters within "
                f"{study.parameter_tolerance:.1%}, as many as {study.baseline}, got {count}"
            )
    return counts
