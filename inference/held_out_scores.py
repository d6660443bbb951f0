"""How well a posterior predicts data that it has not seen."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Independent

from bayesattn import calibration
from bayesattn.inference import prediction
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.replay import Replay

__all__ = [
    "HeldOut",
    "held_out_predictions",
    "predict_held_out",
    "predictive_density",
    "standard_error",
]


class HeldOut(NamedTuple):
    """What one posterior predicts of one observed site.

    Attributes:
        density: Log predictive density of each observation, in nats, masked ones left out.
        probabilities: Predictive probability of each class, None where there are no classes.
        labels: What came true, None likewise.
    """

    density: Float[Tensor, " observation"]
    probabilities: Float[Tensor, "observation _class"] | None
    labels: Shaped[Tensor, " observation"] | None

    def figures(self) -> dict[str, float]:
        """Mean log score, accuracy (each with its standard error) and calibration error."""
        density = self.density
        figures = {"log_score": float(density.mean()), "log_score_se": standard_error(density)}
        if self.probabilities is None or self.labels is None:
            return figures
        right = (self.probabilities.argmax(-1) == self.labels).double()
        error = calibration.expected_calibration_error(self.probabilities, self.labels)
        return figures | {
            "accuracy": float(right.mean()),
            "accuracy_se": standard_error(right),
            "calibration_error": float(error),
        }


def predict_held_out(
    posterior: Posterior,
    args: tuple,
    kwargs: Mapping[str, Any],
    chunk_size: int | None = None,
) -> dict[str, HeldOut]:
    """Predict the observed sites at other arguments of the program.

    Args:
        posterior: With a model.
        args: Of the program, observations included.
        kwargs: Likewise, by name.
        chunk_size: Most draws evaluated at once.

    Raises:
        ValueError: If the program does not run there, or nothing is observed.
    """
    replay = posterior.replay(args, kwargs, seed=0, chunk_size=chunk_size)
    likelihood = posterior.by_chain(prediction.log_likelihood(replay))
    classes = _class_probabilities(replay)
    result = {}
    for name, values in likelihood.items():
        values = values.detach().double().cpu().flatten(2)
        counts = (values != 0).any(0).any(0)
        density = predictive_density(values[..., counts])
        labels = torch.as_tensor(replay.sites[name].value).detach().cpu()
        result[name] = HeldOut(density, *_labeled(classes.get(name), labels, counts))
    return result


def held_out_predictions(
    posteriors: Mapping[str, Posterior],
    args: tuple,
    kwargs: Mapping[str, Any],
    notes: list[str],
    chunk_size: int | None = None,
) -> dict[str, dict[str, HeldOut]]:
    """Predict by each posterior that can: site to posterior to its predictions.

    Args:
        posteriors: By name.
        args: As of :func:`predict_held_out`.
        kwargs: Likewise.
        notes: Who cannot, and why, is added here.
        chunk_size: Most draws evaluated at once.

    Raises:
        ValueError: If none can.
    """
    found: dict[str, dict[str, HeldOut]] = {}
    refusals = {}
    for name, posterior in posteriors.items():
        try:
            scores = predict_held_out(posterior, args, kwargs, chunk_size)
        except ValueError as error:
            refusals[name] = error
            continue
        for site, score in scores.items():
            found.setdefault(site, {})[name] = score
    if not found:
        name, error = next(iter(refusals.items()))
        raise ValueError(
            f"held_out must be arguments of the program with observations: {name}: {error}"
        )
    notes += [f"{name}: no held-out scores: {error}" for name, error in refusals.items()]
    return found


def predictive_density(
    log_likelihood: Float[Tensor, "chain draw observation"],
) -> Float[Tensor, " observation"]:
    """Log of the likelihood's mean over draws, in nats, for each observation."""
    rows = log_likelihood.flatten(0, 1)
    return rows.logsumexp(0) - math.log(len(rows))


def standard_error(values: Float[Tensor, " observation"]) -> float:
    """Standard error of a mean; NaN for one value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _labeled(
    probabilities: Tensor | None, labels: Tensor, counts: Bool[Tensor, " observation"]
) -> tuple[Tensor | None, Tensor | None]:
    """Predictions and labels of the observations that count, or None twice."""
    if probabilities is None or probabilities.shape[:-1] != labels.shape:
        return None, None
    if labels.numel() != len(counts):
        # Events of several labels, which are masked together.
        counts = counts.repeat_interleave(labels.numel() // len(counts))
    flat = probabilities.flatten(0, -2) if labels.ndim else probabilities[None]
    return flat[counts], labels.reshape(-1)[counts].long()


def _class_probabilities(replay: Replay) -> dict[str, Tensor]:
    """Predictive probabilities at the observed sites that are categorical or of two values."""
    if replay.names("free"):
        return {}
    observed = replay.names("observed")

    def probabilities(trace: poutine.Trace) -> dict[str, Tensor]:
        found = {name: _probabilities(trace.nodes[name]["fn"]) for name in observed}
        return {name: value for name, value in found.items() if value is not None}

    means = replay.map(probabilities)
    return {name: value.detach().double().cpu().mean(0) for name, value in means.items()}


def _probabilities(distribution: Any) -> Tensor | None:
    while isinstance(distribution, Independent) or hasattr(distribution, "_mask"):
        distribution = distribution.base_dist
    if isinstance(distribution, Categorical):
        return distribution.probs
    if isinstance(distribution, Bernoulli):
        return torch.stack([1 - distribution.probs, distribution.probs], -1)
    return None
