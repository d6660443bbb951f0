"""Tests of bayesattn.calibration."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesattn import calibration

SEEDS = st.integers(0, 2**16)

# Four predictions over two classes: confidences .95, .85, .8, .6; right, right, wrong, wrong.
PROBABILITIES = torch.tensor([[0.95, 0.05], [0.15, 0.85], [0.8, 0.2], [0.4, 0.6]]).double()
LABELS = torch.tensor([0, 1, 1, 0])

SCORES = [
    calibration.accuracy,
    calibration.brier_score,
    calibration.expected_calibration_error,
    calibration.log_score,
    calibration.maximum_calibration_error,
]
ALL = [
    *SCORES,
    calibration.reliability_bins,
    calibration.selective_risk,
    lambda probabilities, labels: calibration.pavpu(probabilities, labels, threshold=0.5),
]


def close(ours, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ours.double(), expected, equal_nan=True)


def predictions(seed, *shape, concentration=1.0):
    """Random probabilities, and labels drawn from them: perfectly calibrated."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=generator) / concentration
    probabilities = logits.softmax(-1)
    labels = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
    return probabilities, labels.reshape(shape[:-1])


def test_bins_by_hand():
    """Quarters: .6 falls in the third, .8, .85 and .95 in the last."""
    count, confidence, accuracy = calibration.reliability_bins(PROBABILITIES, LABELS, num_bins=4)
    assert count.tolist() == [0, 0, 1, 3]
    close(confidence, [math.nan, math.nan, 0.6, 2.6 / 3])
    close(accuracy, [math.nan, math.nan, 0.0, 2 / 3])


def test_bins_are_closed_on_the_right():
    """Confidences of .5 and 1 of two bins: one each."""
    probabilities = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    bins = calibration.reliability_bins(probabilities, torch.tensor([0, 0]), num_bins=2)
    assert bins.count.tolist() == [1, 1]


def test_calibration_errors_by_hand():
    errors = [abs(0 - 0.6), abs(2 / 3 - 2.6 / 3)]
    expected = calibration.expected_calibration_error(PROBABILITIES, LABELS, num_bins=4)
    close(expected, (1 * errors[0] + 3 * errors[1]) / 4)
    largest = calibration.maximum_calibration_error(PROBABILITIES, LABELS, num_bins=4)
    close(largest, errors[0])


def test_scores_by_hand():
    close(calibration.accuracy(PROBABILITIES, LABELS), 0.5)
    log_score = sum(map(math.log, (0.95, 0.85, 0.2, 0.4))) / 4
    close(calibration.log_score(PROBABILITIES, LABELS), log_score)
    brier = (2 * 0.05**2 + 2 * 0.15**2 + 2 * 0.8**2 + 2 * 0.6**2) / 4
    close(calibration.brier_score(PROBABILITIES, LABELS), brier)


def test_what_was_ruled_out_costs_everything():
    probabilities = torch.tensor([[1.0, 0.0]])
    close(calibration.log_score(probabilities, torch.tensor([1])), -math.inf)
    close(calibration.brier_score(probabilities, torch.tensor([1])), 2.0)
    close(calibration.log_score(probabilities, torch.tensor([0])), 0.0)


def test_pavpu_by_hand():
    """Uncertain above .3: the second and the fourth; so right and certain, wrong and uncertain."""
    uncertainty = torch.tensor([0.1, 0.4, 0.3, 0.9])
    ours = calibration.pavpu(PROBABILITIES, LABELS, uncertainty, threshold=0.3)
    close(ours, 2 / 4)
    # Entropies .20, .42, .50 and .67 nats: the first two predictions, right ones, are certain.
    close(calibration.pavpu(PROBABILITIES, LABELS, threshold=0.45), 1.0)


def test_selective_risk_by_hand():
    coverage, risk, area = calibration.selective_risk(PROBABILITIES, LABELS)
    close(coverage, [0.25, 0.5, 0.75, 1.0])
    close(risk, [0, 0, 1 / 3, 1 / 2])
    close(area, (1 / 3 + 1 / 2) / 4)
    worst_first = calibration.selective_risk(PROBABILITIES, LABELS, torch.tensor([4.0, 3, 2, 1]))
    close(worst_first.risk, [1, 1, 2 / 3, 1 / 2])


def test_risk_among_equals_is_that_of_chance():
    coverage, risk, _ = calibration.selective_risk(
        PROBABILITIES, LABELS, torch.tensor([2.0, 2.0, 1.0, 2.0])
    )
    close(coverage, [0.25, 0.5, 0.75, 1.0])
    close(risk, [1, (1 + 1 / 3) / 2, (1 + 2 / 3) / 3, 1 / 2])


def test_entropies_by_hand():
    probabilities = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])
    close(calibration.predictive_entropy(probabilities), [[0, math.log(2)], [0, math.log(2)]])
    # The draws disagree wholly on the first label, and agree that the second is open.
    close(calibration.mutual_information(probabilities), [math.log(2), 0])


def test_calibrated_predictions_pass_within_chance():
    """The error is what the binomial law of the labels alone makes of it; five sd: 1 in 10^6."""
    probabilities, labels = predictions(1, 20_000, 5)
    bins = calibration.reliability_bins(probabilities, labels, num_bins=10)
    confidence = probabilities.amax(-1)
    for b in range(10):
        inside = (confidence > b / 10) & (confidence <= (b + 1) / 10)
        assert bins.count[b] == inside.sum()
        if inside.any():
            sd = (confidence * (1 - confidence))[inside].sum().sqrt() / inside.sum()
            assert (bins.accuracy[b] - bins.confidence[b]).abs() <= 5 * sd
    error = calibration.expected_calibration_error(probabilities, labels, num_bins=10)
    assert error <= 0.5 * (10 / 20_000) ** 0.5
    sharpened = probabilities.square() / probabilities.square().sum(-1, keepdim=True)
    assert calibration.expected_calibration_error(sharpened, labels, num_bins=10) > 10 * error


def test_scores_of_calibrated_predictions_meet_their_expectation():
    """E log p = -entropy and E Brier = 1 - sum p^2, five Monte-Carlo errors."""
    probabilities, labels = predictions(2, 20_000, 5)
    gathered = probabilities.gather(-1, labels[:, None]).log()
    entropy = calibration.predictive_entropy(probabilities).mean()
    error = gathered.std() / 20_000**0.5
    assert (calibration.log_score(probabilities, labels) + entropy).abs() < 5 * error
    expected = 1 - probabilities.square().sum(-1).mean()
    assert (calibration.brier_score(probabilities, labels) - expected).abs() < 5 / 20_000**0.5
    expected = probabilities.amax(-1).mean()
    assert (calibration.accuracy(probabilities, labels) - expected).abs() < 2.5 / 20_000**0.5


@given(seed=SEEDS, num_classes=st.integers(2, 4))
def test_the_truth_scores_best(seed, num_classes):
    """Both scores are proper: any other prediction is worse under the labels' own law."""
    truth, other = predictions(seed, 2, num_classes)[0]
    labels = torch.arange(num_classes)

    def expectation(score, prediction):
        rows = prediction.expand(num_classes, num_classes)
        each = [score(row[None], label[None]) for row, label in zip(rows, labels, strict=True)]
        return (truth * torch.stack(each)).sum()

    for score, sign in ((calibration.log_score, 1), (calibration.brier_score, -1)):
        assert sign * expectation(score, truth) >= sign * expectation(score, other)


@given(seed=SEEDS, size=st.integers(1, 12), num_classes=st.integers(1, 4))
def test_order_and_batch_axes_do_not_matter_and_bounds_hold(seed, size, num_classes):
    probabilities, labels = predictions(seed, 2, size, num_classes)
    flat, flat_labels = probabilities.flatten(0, 1), labels.flatten()
    order = torch.randperm(2 * size, generator=torch.Generator().manual_seed(seed))
    for function in ALL:
        ours = function(probabilities, labels)
        for moved in (function(flat, flat_labels), function(flat[order], flat_labels[order])):
            torch.testing.assert_close(moved, ours, equal_nan=True)
    results = [score(probabilities, labels) for score in SCORES]
    accuracy, brier, expected, log_score, largest = results
    assert 0 <= accuracy <= 1
    assert 0 <= brier <= 2
    assert log_score <= 0
    assert 0 <= expected <= largest <= 1
    right = (probabilities.argmax(-1) == labels).double().mean()
    close(accuracy, right)
    risk = calibration.selective_risk(probabilities, labels)
    close(risk.risk[-1], 1 - right)
    assert 0 <= risk.area <= 1


@given(seed=SEEDS, num_draws=st.integers(1, 5), num_classes=st.integers(1, 4))
def test_information_is_between_zero_and_the_entropy_of_the_mean(seed, num_draws, num_classes):
    probabilities, _ = predictions(seed, num_draws, 3, num_classes, concentration=0.2)
    information = calibration.mutual_information(probabilities)
    total = calibration.predictive_entropy(probabilities.mean(0))
    assert information.shape == (3,)
    assert information.min() >= 0
    assert (information <= total + 1e-12).all()
    assert (total <= math.log(num_classes) + 1e-12).all()
    agreeing = calibration.mutual_information(probabilities[:1].expand(7, 3, num_classes).float())
    torch.testing.assert_close(agreeing, torch.zeros_like(agreeing), rtol=0, atol=1e-6)
    assert agreeing.min() >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_widened(dtype):
    probabilities, labels = predictions(3, 300, 5)
    low = probabilities.to(dtype)
    for score in SCORES:
        assert score(low, labels.to(torch.int32)).dtype == torch.float32
    for score in (calibration.log_score, calibration.brier_score):
        tolerance = torch.finfo(dtype).eps
        ours, expected = score(low, labels).double(), score(probabilities, labels)
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (torch.ones(0, 2), torch.ones(0).long(), r"expected some, got shape \(0, 2\)"),
        (torch.tensor([[math.nan, 1.0]]), torch.tensor([0]), "got NaN in 1 predictions"),
        (torch.tensor([[-0.5, 1.5]]), torch.tensor([0]), r"none below zero, got -0\.5"),
        (torch.tensor([[0.5, 0.4]]), torch.tensor([0]), r"sum to one, got a sum of 0\.9"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([2]), "labels: expected 0 to 1, got 2 to 2"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([-1]), "labels: expected 0 to 1, got -1 to -1"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0.0]), "whole numbers, got torch.float"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([True]), "whole numbers, got torch.bool"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0, 1]), r"prediction, \(1,\), got \(2,\)"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([[0]]), r"prediction, \(1,\), got \(1, 1\)"),
    ],
)
def test_refuses(function, probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        function(probabilities, labels)


@pytest.mark.parametrize(
    "function", [calibration.predictive_entropy, calibration.mutual_information]
)
def test_entropies_refuse_what_is_no_probability(function):
    for probabilities in (
        torch.ones(3, 0, 2),
        torch.ones(3, 1, 2),
        torch.full((3, 1, 2), math.nan),
    ):
        with pytest.raises(ValueError, match="probabilities: expected"):
            function(probabilities)


def test_refuses_bins_and_uncertainties():
    with pytest.raises(ValueError, match="num_bins: expected at least one, got 0"):
        calibration.reliability_bins(PROBABILITIES, LABELS, num_bins=0)
    for uncertainty, message in (
        (torch.ones(3), r"of 4 predictions, got shape \(3,\)"),
        (torch.full((4,), math.nan), "uncertainty: .* got NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            calibration.selective_risk(PROBABILITIES, LABELS, uncertainty)
        with pytest.raises(ValueError, match=message):
            calibration.pavpu(PROBABILITIES, LABELS, uncertainty, threshold=1)
