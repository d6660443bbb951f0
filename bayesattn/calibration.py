r"""How far predicted probabilities can be trusted: calibration, proper scores and uncertainty.

.. math:: \mathrm{ECE} = \sum_b \frac{n_b}{n} \,
    \lvert \mathrm{accuracy}_b - \mathrm{confidence}_b \rvert

Probabilities are "*batch class" and labels "*batch", whole numbers from zero; all predictions, in
whichever batch axes, count alike. Entropies and log scores are in nats.

Source:
    Guo et al. (2017), On calibration of modern neural networks, arXiv:1706.04599, eqs. 2, 3 and 5.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

__all__ = [
    "ReliabilityBins",
    "SelectiveRisk",
    "accuracy",
    "brier_score",
    "expected_calibration_error",
    "log_score",
    "maximum_calibration_error",
    "mutual_information",
    "pavpu",
    "predictive_entropy",
    "reliability_bins",
    "selective_risk",
]

Number = float | int


class ReliabilityBins(NamedTuple):
    """A reliability diagram: bins of equal width over the confidence, closed on the right.

    Attributes:
        count: Predictions in each bin.
        confidence: Their mean highest probability, NaN in an empty bin.
        accuracy: The fraction of them that is right, NaN in an empty bin.
    """

    count: Int[Tensor, " bin"]
    confidence: Float[Tensor, " bin"]
    accuracy: Float[Tensor, " bin"]


class SelectiveRisk(NamedTuple):
    """The error rate among the predictions kept when the most uncertain are refused.

    Attributes:
        coverage: Fraction of predictions that is kept, from one prediction to all.
        risk: Fraction of the kept ones that is wrong.
        area: Mean of the risk over all coverages, the area under the curve (AURC).
    """

    coverage: Float[Tensor, " prediction"]
    risk: Float[Tensor, " prediction"]
    area: Float[Tensor, ""]


def reliability_bins(
    probabilities: Float[Tensor, "*_batch _class"],
    labels: Shaped[Tensor, "*_batch"],
    *,
    num_bins: int = 15,
) -> ReliabilityBins:
    """Group predictions by confidence, to be held against the accuracy of each group.

    Raises:
        ValueError: If the inputs are no probabilities and labels, or there is no bin.
    """
    probabilities, labels = _checked(probabilities, labels)
    if num_bins < 1:
        raise ValueError(f"num_bins: expected at least one, got {num_bins}")
    confidence, choice = probabilities.max(-1)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=confidence.dtype, device=confidence.device)
    place = torch.bucketize(confidence, edges[1:-1])
    count = torch.bincount(place, minlength=num_bins)
    right = (choice == labels).to(confidence.dtype)
    empty = confidence.new_zeros(num_bins)
    means = (empty.index_add(0, place, values) / count for values in (confidence, right))
    return ReliabilityBins(count, *means)


def expected_calibration_error(
    probabilities: Float[Tensor, "*_batch _class"],
    labels: Shaped[Tensor, "*_batch"],
    *,
    num_bins: int = 15,
) -> Float[Tensor, ""]:
    r"""Mean distance between accuracy and confidence over predictions, bin by bin.

    Even for perfectly calibrated predictions it is not zero: by chance alone, a bin of n is off by
    some :math:`0.4 / \sqrt n`.

    Raises:
        ValueError: If the inputs are no probabilities and labels, or there is no bin.
    """
    count, confidence, right = reliability_bins(probabilities, labels, num_bins=num_bins)
    return (count * (right - confidence).abs()).nansum() / count.sum()


def maximum_calibration_error(
    probabilities: Float[Tensor, "*_batch _class"],
    labels: Shaped[Tensor, "*_batch"],
    *,
    num_bins: int = 15,
) -> Float[Tensor, ""]:
    """Largest distance between accuracy and confidence of any bin that is not empty.

    Raises:
        ValueError: If the inputs are no probabilities and labels, or there is no bin.
    """
    count, confidence, right = reliability_bins(probabilities, labels, num_bins=num_bins)
    return (right - confidence).abs()[count > 0].max()


def log_score(
    probabilities: Float[Tensor, "*_batch _class"], labels: Shaped[Tensor, "*_batch"]
) -> Float[Tensor, ""]:
    """Mean log probability of the labels: zero at best, minus infinity if one was ruled out.

    Raises:
        ValueError: If the inputs are no probabilities and labels.
    """
    probabilities, labels = _checked(probabilities, labels)
    return probabilities.gather(-1, labels[:, None]).log().mean()


def brier_score(
    probabilities: Float[Tensor, "*_batch _class"], labels: Shaped[Tensor, "*_batch"]
) -> Float[Tensor, ""]:
    """Mean squared distance of the probabilities from the truth: zero at best, two at worst.

    Raises:
        ValueError: If the inputs are no probabilities and labels.

    Source:
        Brier (1950), Verification of forecasts expressed in terms of probability, summed over
        classes as there (some halve it for two classes).
    """
    probabilities, labels = _checked(probabilities, labels)
    truth = torch.zeros_like(probabilities).scatter(-1, labels[:, None], 1.0)
    return (probabilities - truth).square().sum(-1).mean()


def accuracy(
    probabilities: Float[Tensor, "*_batch _class"], labels: Shaped[Tensor, "*_batch"]
) -> Float[Tensor, ""]:
    """Fraction of labels that have the highest probability, the first of equal ones.

    Raises:
        ValueError: If the inputs are no probabilities and labels.
    """
    probabilities, labels = _checked(probabilities, labels)
    return (probabilities.argmax(-1) == labels).to(probabilities.dtype).mean()


def pavpu(
    probabilities: Float[Tensor, "*_batch _class"],
    labels: Shaped[Tensor, "*_batch"],
    uncertainty: Float[Tensor, "*_batch"] | None = None,
    *,
    threshold: Number,
) -> Float[Tensor, ""]:
    r"""Patch accuracy versus patch uncertainty: how often right and certain go together.

    .. math:: \frac{n_{\text{right, certain}} + n_{\text{wrong, uncertain}}}{n}

    Args:
        probabilities: Predictions.
        labels: What came true.
        uncertainty: Of each prediction; its entropy if None.
        threshold: A prediction is uncertain above it.

    Raises:
        ValueError: If the inputs are no probabilities and labels, or the uncertainties do not fit.

    Source:
        Mukhoti and Gal (2018), Evaluating Bayesian deep learning methods for semantic
        segmentation, arXiv:1811.12709; every prediction is a patch of its own here.
    """
    entropy = predictive_entropy(probabilities) if uncertainty is None else uncertainty
    probabilities, labels = _checked(probabilities, labels)
    certain = _flat_uncertainty(entropy, labels) <= threshold
    right = probabilities.argmax(-1) == labels
    return (right == certain).to(probabilities.dtype).mean()


def selective_risk(
    probabilities: Float[Tensor, "*_batch _class"],
    labels: Shaped[Tensor, "*_batch"],
    uncertainty: Float[Tensor, "*_batch"] | None = None,
) -> SelectiveRisk:
    """Risk against coverage, when predictions are refused from the most uncertain on.

    Among equally uncertain predictions the risk is that of keeping some at random.

    Args:
        probabilities: Predictions.
        labels: What came true.
        uncertainty: Of each prediction; one less its highest probability if None.

    Raises:
        ValueError: If the inputs are no probabilities and labels, or the uncertainties do not fit.

    Source:
        Geifman et al. (2019), Bias-reduced uncertainty estimation for deep neural classifiers,
        arXiv:1805.08206.
    """
    probabilities, labels = _checked(probabilities, labels)
    if uncertainty is None:
        uncertainty = 1 - probabilities.amax(-1)
    ordered, order = _flat_uncertainty(uncertainty, labels).sort()
    wrong = (probabilities.argmax(-1) != labels).to(probabilities.dtype)[order]
    _, group, size = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    expected = wrong.new_zeros(len(size)).index_add(0, group, wrong) / size
    kept = torch.arange(1, len(wrong) + 1, device=wrong.device)
    risk = expected[group].cumsum(0) / kept
    return SelectiveRisk(kept.to(wrong.dtype) / len(wrong), risk, risk.mean())


def predictive_entropy(
    probabilities: Float[Tensor, "*batch _class"],
) -> Float[Tensor, "*batch"]:
    """Entropy of each prediction, in nats: zero when certain, log of the classes when ignorant.

    Raises:
        ValueError: If the rows are no probabilities.
    """
    return torch.special.entr(_checked_probabilities(probabilities)).sum(-1)


def mutual_information(
    probabilities: Float[Tensor, "draw *batch _class"],
) -> Float[Tensor, "*batch"]:
    """Information about a label's draw: entropy of the mean less the mean of the entropies.

    It is the part of the uncertainty that more data would remove: how much the draws disagree.

    Args:
        probabilities: Predictions of each draw from a posterior.

    Raises:
        ValueError: If the rows are no probabilities.

    Source:
        Houlsby et al. (2011), Bayesian active learning for classification and preference
        learning, arXiv:1112.5745, eq. 2.
    """
    each = predictive_entropy(probabilities).mean(0)
    mixture = _checked_probabilities(probabilities).mean(0)
    return (torch.special.entr(mixture).sum(-1) - each).clamp_min(0.0)


def _checked(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = _checked_probabilities(probabilities)
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels: expected whole numbers, got {labels.dtype}")
    if labels.shape != probabilities.shape[:-1]:
        expected = tuple(probabilities.shape[:-1])
        raise ValueError(
            f"labels: expected one for each prediction, {expected}, got {tuple(labels.shape)}"
        )
    num_classes, labels = probabilities.shape[-1], labels.flatten().long()
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels: expected 0 to {num_classes - 1}, "
            f"got {labels.min().item()} to {labels.max().item()}"
        )
    return probabilities.reshape(-1, num_classes), labels


def _checked_probabilities(probabilities: Tensor) -> Tensor:
    if probabilities.numel() == 0:
        raise ValueError(f"probabilities: expected some, got shape {tuple(probabilities.shape)}")
    if probabilities.isnan().any():
        count = int(probabilities.isnan().any(-1).sum())
        raise ValueError(f"probabilities: expected numbers, got NaN in {count} predictions")
    if probabilities.min() < 0:
        raise ValueError(f"probabilities: expected none below zero, got {probabilities.min():.4g}")
    # Predictions may come in a narrower type than they are given in.
    tolerance = max(1e-4, torch.finfo(probabilities.dtype).eps ** 0.5)
    probabilities = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    total = probabilities.sum(-1)
    if (total - 1).abs().max() > tolerance:
        worst = total.flatten()[(total - 1).abs().argmax()]
        raise ValueError(f"probabilities: expected rows that sum to one, got a sum of {worst:.4g}")
    return probabilities


def _flat_uncertainty(uncertainty: Tensor, labels: Tensor) -> Tensor:
    if uncertainty.numel() != labels.numel():
        raise ValueError(
            f"uncertainty: expected one for each of {labels.numel()} predictions, "
            f"got shape {tuple(uncertainty.shape)}"
        )
    if uncertainty.isnan().any():
        raise ValueError("uncertainty: expected numbers, got NaN")
    return uncertainty.flatten()
