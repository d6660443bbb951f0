"""Do kernels that learn their spectrum, or draw it, help attention to regress?

Song et al. (2021), arXiv:2006.06147, take the dot product apart into an RBF similarity and
magnitudes, and let heads learn a power norm and the spectral density of the similarity, which a
network draws for each set of points, with heads that depend on each other. Here one layer of eight
heads predicts points from others (``attention_regression.py``), under the kernels of
``kernel_rivals.py``; exact Gaussian processes stand beside it where GPyTorch is installed::

    python -m examples.reproduce.implicit_kernel --data DIR

``regression_tasks.py`` says what may lie in DIR. Errors and log scores are in units of the training
targets' standard deviation, so that one is the error of guessing the mean. "attended" is the number
of training points that a head looks at in effect, the exponential of the entropy of its weights.
"step time" is that of a training step over that of one with the dot product.

Networks differ in their number of parameters by those of their logits, up to .44 of the baseline's;
a Gaussian process has a few dozen in all, and looks at all training points in each of its steps.
``implicit_kernel_classification.py`` has text and graphs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.reproduce.attention_regression import AttentionRegression
from examples.reproduce.command_line import command
from examples.reproduce.gaussian_process import (
    KERNELS,
    Evidence,
    gaussian_process,
    is_installed,
)
from examples.reproduce.implicit_kernel_figures import forecast_figure, relative_figure
from examples.reproduce.kernel_rivals import LOGITS, LogitsRun, drawn, norms
from examples.reproduce.protocol import Build, Outcome, Study, Task, equal_start
from examples.reproduce.regression_tasks import TABLES, Points, RegressionSplits, read_regression
from examples.reproduce.regression_training import (
    Method,
    RandomTargets,
    RegressionBudget,
    forecast,
    train_regression,
)
from examples.reproduce.step_time import relative_time

__all__ = ["STUDY", "build_network", "measure"]

# Turns in which steps are timed.
_TURNS = 5
# Of the frequencies, in which predictions of the test part are averaged.
_TEST_DRAWS = 16


def build_network(splits: RegressionSplits, *, rival: str) -> nn.Module:
    """Build an untrained network with one of ``LOGITS``."""
    return AttentionRegression(splits.train.x.shape[1], logits=LOGITS[rival])


def measure(
    build: Build, splits: RegressionSplits, budget: RegressionBudget, seed: int, *, method: Method
) -> Outcome:
    """Train, choose by the validation part, and look at predictions of the test part."""
    trained = train_regression(build, splits, budget, seed, method)
    found = forecast(trained.model, splits.test, splits.train, _TEST_DRAWS)
    metrics: dict[str, float | None] = {
        "RMSE": found.error(splits.test.y),
        "log score": found.log_score(splits.test.y),
        "attended": _attended(trained.model, splits),
        "step time": _step_time(build, splits, budget, seed),
    }
    details: dict[str, Any] = {
        "scale": splits.scale,
        "curves": trained.curves,
        "norms": norms(trained.model),
    }
    if splits.train.x.shape[1] == 1:
        details["forecast"] = _along(trained.model, splits)
    return Outcome(metrics, trained.choices, details)


def draw(records: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Draw errors relative to the baseline's, and what is forecast of series."""
    relative_figure(records, STUDY.baseline).savefig(folder / "relative.png", dpi=150)
    series = [record for record in records if "forecast" in record["details"]]
    if series:
        forecast_figure(series).savefig(folder / "series.png", dpi=150)


@torch.no_grad()
def _attended(model: nn.Module, splits: RegressionSplits) -> float | None:
    """The number of points that heads attend to in effect; None of a process."""
    if not isinstance(model, AttentionRegression):
        return None
    weights = drawn(model, partial(model.weights, splits.test, splits.train), _TEST_DRAWS)
    return float(torch.special.entr(weights).sum(-1).exp().mean())


def _step_time(
    build: Build, splits: RegressionSplits, budget: RegressionBudget, seed: int
) -> float | None:
    """The time of a training step over that with the dot product; None of a process."""
    models = [build(), equal_start(STUDY, STUDY.baseline, splits, seed)()]
    if not isinstance(models[0], AttentionRegression):
        return None
    own, plain = (_step(model, splits.train, budget) for model in models)
    return relative_time(own, plain, _TURNS)


def _step(model: nn.Module, training: Points, budget: RegressionBudget) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    run, order = LogitsRun(len(training.y)), torch.Generator().manual_seed(0)
    run.attach(model, optimizer, 1)

    def step() -> None:
        optimizer.zero_grad()
        run.loss(partial(RandomTargets().loss, model, training, budget, order)).backward()
        optimizer.step()

    return step


def _along(model: nn.Module, splits: RegressionSplits) -> dict[str, list[float]]:
    """What is forecast of the test points of a series, in the order of time."""
    test = splits.test.choose(splits.test.x[:, 0].argsort())
    found = forecast(model, test, splits.train, _TEST_DRAWS)
    return {
        "time": test.x[:, 0].tolist(),
        "y": test.y.tolist(),
        "mean": found.mean.mean(0).tolist(),
        "deviation": found.deviation.mean(0).tolist(),
    }


def _task(name: str) -> Task:
    quick = RegressionBudget(
        6, learning_rates=(3e-3,), process_steps=3, batch_size=16, num_known=48, num_looks=2
    )
    return Task(partial(read_regression, name), RegressionBudget(600), quick)


_NETWORKS = {name: partial(build_network, rival=name) for name in LOGITS}
_PROCESSES = {
    f"gp_{kernel}": partial(gaussian_process, kernel=kernel)
    for kernel in (KERNELS if is_installed() else ())
}

STUDY = Study(
    name="implicit_kernel",
    tasks={name: _task(name) for name in TABLES},
    rivals={**_NETWORKS, **_PROCESSES},
    metrics={
        "RMSE": "lower",
        "log score": "higher",
        "attended": "neither",
        "step time": "lower",
    },
    measure=measure,
    methods={
        **dict.fromkeys(_NETWORKS, RandomTargets()),
        **dict.fromkeys(_PROCESSES, Evidence()),
    },
    draw=draw,
    parameter_tolerance=1.0,
)

if __name__ == "__main__":
    command(STUDY)()
