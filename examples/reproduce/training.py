r"""Training of a text classifier under a budget, with every choice left to the validation part.

Each learning rate of the budget is tried from the same start on the same batches, for the same
number of steps, with a linear warm-up and a linear decay; the learning rate and the epoch with the
best log score on the validation sentences win. The test part is never seen here.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bayesattn import calibration
from examples.reproduce.protocol import Build
from examples.reproduce.text_tasks import Sentences

__all__ = [
    "Attach",
    "Budget",
    "Loss",
    "Trained",
    "classification_metrics",
    "cross_entropy",
    "decay_groups",
    "predict",
    "shuffled_batches",
    "train",
]

Loss = Callable[[nn.Module, Sentences], Tensor]
# From a model, its optimizer and the number of steps to what is called before each of them.
Attach = Callable[[nn.Module, torch.optim.Optimizer, int], Callable[[], None]]


@dataclass(frozen=True)
class Budget:
    """What every rival is given.

    Attributes:
        num_epochs: Passes over the training sentences, for each learning rate.
        learning_rates: Peaks of the schedules that are tried.
        batch_size: Sentences in a step.
        weight_decay: AdamW's, on matrices only.
        warmup: Part of the steps in which the learning rate rises.
        max_sentences: Only the first so many of each part are used; None uses all.
    """

    num_epochs: int
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    batch_size: int = 32
    weight_decay: float = 0.01
    warmup: float = 0.1
    max_sentences: int | None = None

    def cut(self, sentences: Sentences) -> Sentences:
        """Take as many sentences as the budget allows."""
        return sentences.choose(slice(self.max_sentences))


class Trained(NamedTuple):
    """The chosen model.

    Attributes:
        model: In evaluation mode, as it was after the chosen epoch.
        choices: The learning rate, the epoch (from one) and their log score on validation.
        curves: For each learning rate, the log score after each epoch.
        states: The model's after each epoch, with the chosen learning rate.
    """

    model: nn.Module
    choices: dict[str, float]
    curves: dict[str, list[float]]
    states: list[dict[str, Tensor]]


def train(
    build: Build,
    training: Sentences,
    validation: Sentences,
    budget: Budget,
    seed: int,
    *,
    loss: Loss | None = None,
    attach: Attach | None = None,
    first_epoch: int = 1,
) -> Trained:
    """Train from the start with each learning rate, and choose by the validation sentences.

    Args:
        build: Gives the untrained model, which takes tokens and mask and gives logits of classes.
        training: What is learned from.
        validation: What decides.
        budget: How much is done.
        seed: Of the order of the batches and of dropout, so the same for all rivals.
        loss: ``loss(model, batch)``; the cross-entropy if None.
        attach: ``attach(model, optimizer, num_steps)`` is called for each learning rate, and gives
            what is called before each step, when gradients are there and not yet clipped.
        first_epoch: The earliest that may be chosen, from one.

    Raises:
        ValueError: If no epoch may be chosen, or no learning rate leads to a finite log score.
    """
    curves: dict[str, list[float]] = {}
    states: list[dict[str, Tensor]] = []
    best: tuple[float, float, int] | None = None
    loss = loss or cross_entropy
    model = build()
    with torch.random.fork_rng(devices=[]):
        for rate in budget.learning_rates:
            model = build()
            curve = curves[str(rate)] = []
            kept: list[dict[str, Tensor]] = []
            for epoch in _epochs(model, training, budget, rate, seed, loss, attach):
                probabilities = predict(model, validation)
                curve.append(float(calibration.log_score(probabilities, validation.label)))
                kept.append(copy.deepcopy(model.state_dict()))
                if epoch >= first_epoch and (best is None or curve[-1] > best[0]):
                    best, states = (curve[-1], rate, epoch), kept
    if best is None:
        raise ValueError(f"budget: expected {first_epoch} epochs at least, got {budget}")
    score, learning_rate, epoch = best
    model.load_state_dict(states[epoch - 1])
    choices = {"learning_rate": learning_rate, "epoch": epoch, "validation_log_score": score}
    return Trained(model.eval(), choices, curves, states)


def cross_entropy(model: nn.Module, batch: Sentences) -> Float[Tensor, ""]:
    """Mean negative log probability of the labels."""
    return F.cross_entropy(model(batch.tokens, batch.mask), batch.label)


@torch.no_grad()
def predict(
    model: nn.Module, sentences: Sentences, batch_size: int = 256
) -> Float[Tensor, "sentence class"]:
    """Give each sentence's probabilities of the classes, in evaluation mode."""
    model.eval()
    order = sentences.mask.sum(-1).argsort()
    batches = (sentences.choose(rows) for rows in order.split(batch_size))
    sorted_rows = torch.cat([model(batch.tokens, batch.mask).softmax(-1) for batch in batches])
    return sorted_rows[order.argsort()]


def classification_metrics(
    probabilities: Float[Tensor, "sentence class"], label: Int[Tensor, " sentence"]
) -> dict[str, float]:
    """Give accuracy, log score and expected calibration error."""
    return {
        "accuracy": float(calibration.accuracy(probabilities, label)),
        "log score": float(calibration.log_score(probabilities, label)),
        "ECE": float(calibration.expected_calibration_error(probabilities, label)),
    }


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices; leave biases, scales and a normalization's own parameters alone."""
    matrices = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _epochs(
    model: nn.Module,
    training: Sentences,
    budget: Budget,
    learning_rate: float,
    seed: int,
    loss: Loss,
    attach: Attach | None,
) -> Iterator[int]:
    """Train, and give the number of each epoch after it."""
    steps = budget.num_epochs * -(-len(training.label) // budget.batch_size)
    optimizer = torch.optim.AdamW(
        decay_groups(model, budget.weight_decay), lr=learning_rate, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _shape(steps, budget.warmup))
    before_step = None if attach is None else attach(model, optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    for epoch in range(1, budget.num_epochs + 1):
        model.train()
        for rows in shuffled_batches(training.mask.sum(-1), budget.batch_size, order):
            optimizer.zero_grad()
            loss(model, training.choose(rows)).backward()
            if before_step is not None:
                before_step()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        yield epoch


def shuffled_batches(
    lengths: Int[Tensor, " sentence"], batch_size: int, generator: torch.Generator
) -> list[Int[Tensor, " chosen"]]:
    """Put the sentences into batches at random, but with others of similar length.

    Each pool of 16 batches is chosen at random and sorted by length, which halves the padding;
    then the batches themselves are shuffled.
    """
    order = torch.randperm(len(lengths), generator=generator)
    pools = [rows[lengths[rows].argsort(stable=True)] for rows in order.split(16 * batch_size)]
    batches = torch.cat(pools).split(batch_size)
    shuffled = torch.randperm(len(batches), generator=generator)
    return [batches[place] for place in shuffled.tolist()]


def _shape(steps: int, warmup: float) -> Callable[[int], float]:
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        return min((step + 1) / rising, max(0.0, (steps - step) / max(1, steps - rising)))

    return factor
