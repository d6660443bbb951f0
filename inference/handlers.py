"""Handlers under which a program runs at given values: what is given, drawn, and in full plates."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger, _Subsample
from torch import Tensor

__all__ = [
    "FreshDraws",
    "GivenValues",
    "SamplingError",
    "ShapeMismatchError",
    "first_line",
    "full_plates",
]

Values = Mapping[str, Tensor]


class ShapeMismatchError(ValueError):
    """A site has another shape in the program than its given value."""


class GivenValues(Messenger):
    """Gives sites and parameters their values, and frees observed sites that are drawn anew.

    Args:
        values: Site to value.
        resample: Observed sites that are drawn anew.
        parameters: Parameter to value; the same by default.
        num_plate_axes: How many axes plates take at most, where known: axes left of them are of
            discrete sites that are enumerated, on which a site of one value may hang.
    """

    def __init__(
        self,
        values: Values,
        resample: Collection[str] = (),
        parameters: Values | None = None,
        num_plate_axes: int | None = None,
    ):
        super().__init__()
        self._values, self._resample, self._num_plate_axes = values, resample, num_plate_axes
        self._parameters = values if parameters is None else parameters

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self._resample:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
        if isinstance(msg["fn"], _Subsample):
            return
        batch = msg["fn"].batch_shape
        if self._num_plate_axes is not None:
            batch = batch[max(0, len(batch) - self._num_plate_axes) :]
        expected = batch + msg["fn"].event_shape
        if msg["is_observed"]:
            _check_observed(name, msg["value"], expected)
        if name not in self._values or msg["is_observed"]:
            return
        value = self._values[name]
        if value.shape != expected:
            raise ShapeMismatchError(
                f"latent site {name!r} has shape {tuple(value.shape)} in the draws, but "
                f"{tuple(expected)} in the model at these arguments"
            )
        msg["value"], msg["done"] = value, True

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self._parameters:
            msg["value"], msg["done"] = self._parameters[msg["name"]], True


def _check_observed(name: str, value: Any, expected: torch.Size) -> None:
    """Refuse data that no distribution of that shape has; nothing else would notice."""
    try:
        torch.broadcast_shapes(getattr(value, "shape", ()), expected)
    except RuntimeError:
        raise ShapeMismatchError(
            f"observed site {name!r} has shape {tuple(value.shape)} in the data, but "
            f"{tuple(expected)} in the model"
        ) from None


class SamplingError(RuntimeError):
    """A distribution has no rule for being sampled under vmap, which is not the program's fault."""


class FreshDraws(Messenger):
    """Draws what is left to draw without gradients, which more distributions can do under vmap."""

    def _pyro_sample(self, msg: Any) -> None:
        is_settled = msg["done"] or msg["is_observed"] or msg["value"] is not None
        if is_settled or isinstance(msg["fn"], _Subsample):
            return
        try:
            msg["value"] = msg["fn"].sample()
        except RuntimeError as error:
            raise SamplingError(first_line(error)) from error
        msg["done"] = True


@contextlib.contextmanager
def full_plates() -> Iterator[None]:
    """Let every plate that would draw a subsample take all its indices, in order."""
    # A plate compares its indices with its own argument, so handlers alone cannot do this.
    original = SubsampleMessenger._subsample

    def full(name: str, size: Any = None, subsample_size: Any = None, *rest: Any, **named: Any):
        indices = rest[0] if rest else named.get("subsample")
        return original(name, size, None if indices is None else subsample_size, *rest, **named)

    SubsampleMessenger._subsample = staticmethod(full)
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(original)


def first_line(error: Exception) -> str:
    """What an error says, less the values that torch and the shapes that Pyro append."""
    return str(error).strip().split("\n")[0].removesuffix(":")
