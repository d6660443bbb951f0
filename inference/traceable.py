"""Distributions by formulas that suit a trace.

Some of torch's and Pyro's write in place or select by a mask, neither of which can be traced where
it depends on latent values; that of the Bernoulli distribution is traced as twenty passes over the
data where five do.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.distributions import OrderedLogistic
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Multinomial
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

__all__ = ["traceable_distributions"]


@contextlib.contextmanager
def traceable_distributions() -> Iterator[None]:
    """Let all distributions compute by formulas that a trace can follow, and check no value.

    What stood outside of the program when it was expanded has been told to check by torch, which
    keeps the switch of that moment with the distribution, out of the reach of Pyro's.
    """
    with (
        _replaced(Distribution, "_validate_sample", lambda self, value: None),
        _replaced(Distribution, "__init__", _unchecked(Distribution.__init__)),
        _replaced(Bernoulli, "log_prob", _bernoulli_log_prob),
        _replaced(Multinomial, "log_prob", _multinomial_log_prob),
        _replaced(OrderedLogistic, "__init__", _ordered_logistic),
    ):
        yield


def _unchecked(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def unchecked(self: Distribution, *args: Any, **kwargs: Any) -> None:
        # The switch is the last of three arguments.
        init(self, *args[:2], **kwargs | {"validate_args": False})

    return unchecked


def _bernoulli_log_prob(self: Bernoulli, value: Tensor) -> Tensor:
    logits, value = broadcast_all(self.logits, value)
    return logsigmoid(logits) - (1 - value) * logits


def _multinomial_log_prob(self: Multinomial, value: Tensor) -> Tensor:
    logits, value = broadcast_all(self.logits, value)
    # What did not happen may be impossible.
    logits = logits.masked_fill((value == 0) & (logits == -torch.inf), 0.0)
    count = torch.lgamma(value.sum(-1) + 1) - torch.lgamma(value + 1).sum(-1)
    return count + (logits * value).sum(-1)


@functools.wraps(OrderedLogistic.__init__)
def _ordered_logistic(
    self: Any, predictor: Tensor, cutpoints: Tensor, validate_args: bool | None = None
) -> None:
    below = torch.sigmoid(cutpoints - predictor.unsqueeze(-1))
    self.predictor = predictor.expand(below.shape[:-1])
    self.cutpoints = cutpoints.expand(below.shape)
    probs = torch.cat([below[..., :1], below.diff(dim=-1), 1 - below[..., -1:]], -1)
    super(OrderedLogistic, self).__init__(probs, validate_args=validate_args)


@contextlib.contextmanager
def _replaced(owner: type, name: str, function: Callable) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)
