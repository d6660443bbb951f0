"""Classification of sentences, as the study of alignment sees it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.reproduce.alignment_measures import attention_difference, head_figures
from examples.reproduce.alignment_methods import AlignmentRun
from examples.reproduce.protocol import Build
from examples.reproduce.sentence_encoder import read_pieces, sentence_classifier
from examples.reproduce.shift_metrics import shift_metrics
from examples.reproduce.text_classifier import small_transformer
from examples.reproduce.text_shift import PartSizes, ShiftedText, read_shifted
from examples.reproduce.text_tasks import Sentences
from examples.reproduce.training import Budget, Trained, cross_entropy, train

__all__ = ["TextProblem", "load_pretrained", "load_untrained"]

_NUM_HEADS = 4
# Test sentences whose attention is looked at.
_LOOKED_AT = 64


# Equal if the same, so that it may be a key of what has been computed for it.
@dataclass(frozen=True, eq=False)
class TextProblem:
    """What is to be learned, and by what.

    Attributes:
        text: The data.
        network: Gives the model that training begins with.
    """

    text: ShiftedText
    network: Callable[[ShiftedText], nn.Module]

    def sizes(self) -> dict[str, int]:
        """How many sentences each part has, and how many classes there are."""
        return self.text.sizes()

    def build(self) -> nn.Module:
        """Build the model that training begins with."""
        return self.network(self.text)

    def train(self, build: Build, budget: Budget, seed: int, run: AlignmentRun) -> Trained:
        """Train from the start, and choose the epoch by the validation sentences."""

        def loss(model: nn.Module, batch: Sentences) -> Tensor:
            return run.loss(partial(cross_entropy, model, batch))

        training, validation = map(budget.cut, self.text.splits[:2])
        trained = train(build, training, validation, budget, seed, loss=loss, attach=run.attach)
        # Some of these are large.
        return trained._replace(states=[])

    def evaluate(self, model: nn.Module, budget: Budget) -> dict[str, float | None]:
        """Measure predictions on the test sentences, on noisy ones and on those of no class."""
        return shift_metrics(model, self.text, budget)

    def figures(self, model: nn.Module) -> dict[str, list[list[float]]]:
        """Give how far queries and keys are apart in some test sentences, and the entropy."""
        return head_figures(model, self._look)

    def difference(self, model: nn.Module, other: nn.Module) -> list[list[float]]:
        """Give the part of the attention that goes elsewhere in some test sentences."""
        return attention_difference(model, other, self._look)

    def step(self, build: Build, budget: Budget, run: AlignmentRun) -> Callable[[], None]:
        """Give what does a training step on the same sentences whenever it is called."""
        model, batch = build().train(), self.text.splits.train.choose(slice(budget.batch_size))
        optimizer = torch.optim.AdamW(model.parameters(), lr=budget.learning_rates[0], fused=True)
        before_step = run.attach(model, optimizer, 1)

        def step() -> None:
            optimizer.zero_grad()
            run.loss(partial(cross_entropy, model, batch)).backward()
            before_step()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return step

    def _look(self, model: nn.Module) -> None:
        sentences = self.text.splits.test.choose(slice(_LOOKED_AT))
        model(sentences.tokens, sentences.mask)


def load_untrained(
    name: str, sizes: PartSizes, folder: Path | None, seed: int
) -> TextProblem | None:
    """Read a data set for a Transformer that learns from scratch; None where it is not there."""
    text = read_shifted(name, sizes, folder, seed)
    return text and TextProblem(text, _small_transformer)


def load_pretrained(
    name: str, sizes: PartSizes, folder: Path | None, seed: int
) -> TextProblem | None:
    """Read a data set for the pre-trained encoder; None where one of the two is not there."""
    text = read_pieces(name, sizes, folder, seed)
    return text and TextProblem(text, sentence_classifier)


def _small_transformer(text: ShiftedText) -> nn.Module:
    return small_transformer(text.splits, _NUM_HEADS)
