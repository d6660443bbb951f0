r"""What programs on sentences share: their data in minibatches, normal priors, and the readout.

.. math:: o_n = \sum_h F_{nh} R_h + b, \qquad y_n \sim p(\,\cdot \mid o_n), \qquad
          R, b \sim \mathcal N(0, \sigma^2)

Every head finds features F in a sentence; the readout adds them up to outputs, which a likelihood
turns into a distribution of the sentence's observation. The readout stands outside of the plate of
the heads, so that it is no part of a head where heads are particles.
"""

from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Shaped
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from bayesattn.models.checks import check_sentences
from bayesattn.models.likelihoods import Likelihood

__all__ = ["Batch", "minibatch", "normal_prior", "observe", "shared_dims"]


class Batch(NamedTuple):
    """Sentences of one evaluation.

    Attributes:
        plate: To stand around what every sentence has.
        tokens: Token vectors.
        mask: True where there is a token, not padding; None without padding.
        target: Observations, or None.
    """

    plate: pyro.plate
    tokens: Float[Tensor, "sentence token dim"]
    mask: Bool[Tensor, "sentence token"] | None
    target: Shaped[Tensor, " sentence"] | None


def minibatch(
    tokens: Tensor,
    mask: Tensor | None,
    target: Tensor | None,
    batch_size: int | None,
    *,
    axis: str = "sentence",
    prefix: str = "",
) -> Batch:
    """Check the data, and draw sentences for one evaluation.

    Args:
        tokens: Token vectors, (sentence, token, dim), finite at padding too.
        mask: True where there is a token, not padding, (sentence, token).
        target: One observation a sentence.
        batch_size: How many sentences to draw; all if None, or if there are no more.
        axis: Name of the plate.
        prefix: Of the arguments' names in messages.

    Raises:
        ValueError: If shapes or types do not fit.
    """
    check_sentences(tokens, mask, target, prefix=prefix)
    size = None if batch_size is None else min(batch_size, len(tokens))
    plate = pyro.plate(axis, len(tokens), subsample_size=size)
    with plate:
        tokens = pyro.subsample(tokens, event_dim=2)
        mask = None if mask is None else pyro.subsample(mask, event_dim=1)
        target = None if target is None else pyro.subsample(target, event_dim=0)
    return Batch(plate, tokens, mask, target)


def normal_prior(like: Tensor, *shape: int, scale: float) -> TorchDistributionMixin:
    """Independent normal entries around zero, of a tensor's dtype and device, as one event."""
    return dist.Normal(like.new_zeros(shape), scale).to_event(len(shape))


def observe(
    batch: Batch,
    features: Float[Tensor, "sentence head feature"],
    likelihood: Likelihood,
    readout_scale: float,
) -> None:
    """Read outputs off the heads' features, and observe each sentence's target.

    Sites: ``readout_weight`` and ``readout_bias``, the likelihood's own, and ``target``;
    deterministic: ``expected_target``.

    Args:
        batch: The sentences.
        features: What each head found in each of them.
        likelihood: Of the observations given outputs.
        readout_scale: Prior standard deviation of the readout's entries and bias.

    Raises:
        ValueError: If the target is of a type that the likelihood does not observe.
    """
    _check_target(batch.target, likelihood)
    shape = (*features.shape[1:], likelihood.num_outputs)
    weight = pyro.sample("readout_weight", normal_prior(batch.tokens, *shape, scale=readout_scale))
    prior = normal_prior(batch.tokens, likelihood.num_outputs, scale=readout_scale)
    bias = pyro.sample("readout_bias", prior)
    distribution, expected = likelihood(torch.einsum("shf,hfo->so", features, weight) + bias)
    with batch.plate:
        pyro.deterministic("expected_target", expected, event_dim=expected.ndim - 1)
        pyro.sample("target", distribution, obs=batch.target)


def shared_dims(likelihood: Likelihood, feature: str) -> dict[str, list[str]]:
    """Name the axes of the data and of the sites of :func:`observe`, for ArviZ.

    Args:
        likelihood: Of the observations.
        feature: Name of the axis of each head's features.
    """
    return {
        "tokens": ["sentence", "token", "feature"],
        "mask": ["sentence", "token"],
        "readout_weight": ["head", feature, likelihood.output_axis],
        "readout_bias": [likelihood.output_axis],
        **likelihood.dims,
    }


def _check_target(target: Tensor | None, likelihood: Likelihood) -> None:
    if target is not None and target.is_floating_point() != likelihood.observes_floats:
        expected = "floating point" if likelihood.observes_floats else "whole"
        raise ValueError(
            f"target must hold {expected} numbers for {likelihood}, got {target.dtype}"
        )
