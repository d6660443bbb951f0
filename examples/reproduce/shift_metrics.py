"""What predictions are worth on text like that which was learned from, and on other text."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bayesattn import calibration
from examples.reproduce.text_shift import ShiftedText
from examples.reproduce.training import Budget, classification_metrics, predict

__all__ = ["SHIFT_METRICS", "detection_rate", "prediction_metrics", "shift_metrics"]

SHIFT_METRICS = {
    "accuracy": "higher",
    "log score": "higher",
    "ECE": "lower",
    "risk area": "lower",
    "noisy accuracy": "higher",
    "noisy ECE": "lower",
    "out-of-scope AUROC": "higher",
}


def shift_metrics(model: nn.Module, text: ShiftedText, budget: Budget) -> dict[str, float | None]:
    """Measure a trained classifier, in and out of its domain.

    "risk area" is the mean error rate over all parts of the sentences that might be kept, the most
    confident first; "out-of-scope AUROC" how often a sentence of no class is predicted with less
    confidence than one of the test part, None where there are no such sentences.
    """
    metrics: dict[str, float | None] = dict.fromkeys(SHIFT_METRICS)
    confidence = {}
    for prefix, part in (("", text.splits.test), ("noisy ", text.noisy)):
        sentences = budget.cut(part)
        probabilities = predict(model, sentences)
        found = prediction_metrics(probabilities, sentences.label)
        metrics |= {f"{prefix}{name}": value for name, value in found.items()}
        confidence[prefix] = probabilities.amax(-1)
    if text.out_of_scope is not None:
        foreign = predict(model, budget.cut(text.out_of_scope)).amax(-1)
        metrics["out-of-scope AUROC"] = detection_rate(-foreign, -confidence[""])
    return {name: metrics[name] for name in SHIFT_METRICS}


def prediction_metrics(
    probabilities: Float[Tensor, "sentence class"], label: Int[Tensor, " sentence"]
) -> dict[str, float]:
    """Give accuracy, log score, expected calibration error and the area of the selective risk."""
    area = calibration.selective_risk(probabilities, label).area
    return classification_metrics(probabilities, label) | {"risk area": float(area)}


def detection_rate(
    positive: Float[Tensor, " _positive"], negative: Float[Tensor, " _negative"]
) -> float:
    """Area under the ROC curve: how often a positive is above a negative, half of the ties counted.

    Args:
        positive: Score of each sentence that is to be detected.
        negative: Of each other one.
    """
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive)
    not_above = torch.searchsorted(ordered, positive, right=True)
    return float((below + not_above).double().mean() / (2 * len(ordered)))
