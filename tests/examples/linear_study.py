"""A study that takes no time: lines through points, by a linear map with or without extras."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from examples.reproduce.protocol import Outcome, Study, Task

SLOPE = 3.0


class Points(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor

    def sizes(self):
        return {"train": len(self.x)}


@dataclass(frozen=True)
class Steps:
    num_steps: int
    rates: tuple[float, ...] = (0.1,)


class Line(nn.Module):
    """A slope of random start, and a number that the baseline does not have."""

    def __init__(self, *, has_offset=False, width=1):
        super().__init__()
        self.offset = nn.Parameter(torch.randn(1, dtype=torch.float64)) if has_offset else None
        self.slope = nn.Linear(width, 1, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.slope(x) + (0.0 if self.offset is None else self.offset)


def load(folder: Path | None, seed: int):
    if folder is not None and folder.name == "empty":
        return None
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(13, 1, generator=generator, dtype=torch.float64)
    return Points(x, SLOPE * x)


def plain(splits):
    return Line()


def offset(splits):
    return Line(has_offset=True)


def measure(build, splits, budget, seed):
    model = build()
    start = model.slope.weight.item()
    for _ in range(budget.num_steps):
        loss = (model(splits.x) - splits.y).square().mean()
        for value, slope in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            value.data -= budget.rates[0] * slope
    # Draws like those of dropout, from the global state that the protocol has to shield.
    noise = float(torch.rand(()))
    error = (model(splits.x) - splits.y).square().mean().item()
    return Outcome({"error": error}, {"start": start}, {"noise": noise})


def draw(records, folder):
    (folder / "drawn.txt").write_text(str(len(records)))


STUDY = Study(
    name="lines",
    tasks={
        "short": Task(load, Steps(11), Steps(1)),
        "long": Task(load, Steps(23), Steps(2)),
    },
    rivals={"plain": plain, "offset": offset},
    metrics={"error": "lower"},
    measure=measure,
    draw=draw,
    parameter_tolerance=1.0,
)
